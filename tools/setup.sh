#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the Makefile cannot leave to pip: a Python that fits, and the system libraries for off-screen rendering.
#   setup.sh venv DIR ROS    make the virtual environment DIR (PYTHON names the interpreter, if it is set); ROS: wheels, or
#                            sourced, the shell's own, whose packages the environment sees then
#   setup.sh rendering DIR   see that MuJoCo can draw; installs Mesa's EGL as root, else says what to install
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

apt_install() {  # apt_install WHY PACKAGE...
    local why=$1
    shift
    if ! command -v apt-get >/dev/null; then
        say "missing: $* (Debian's names), for $why; please install what your system calls them"
        return 1
    elif [ "$(id -u)" != 0 ]; then
        say "missing: $*, for $why; please run: sudo apt-get install $*"
        return 1
    fi
    say "installing $* with apt-get, for $why"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
        </dev/null >/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.10}; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    say "needs CPython 3.10 to 3.13 (ROS 2 has wheels for these); found: $("${PYTHON:-python3}" --version 2>&1)"
    say "install one of them and name it: make PYTHON=python3.12 ..."
    return 1
}

make_venv() {  # make_venv DIR wheels|sourced
    local python version seen=()
    python=$(find_python)
    if [ "$2" = sourced ]; then
        if ! "$python" -c 'import rclpy'; then
            say "no ROS 2 in this shell: source its setup.bash, then run make again"
            say "(PyPI has a ROS 2 for x86-64 only, where make ROS=wheels takes it; this is $(uname -m))"
            return 1
        fi
        seen=(--system-site-packages)
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || apt_install "virtual environments of Python $version" "python$version-venv"
    "$python" -m venv "${seen[@]}" "$1"
}

draws() {
    MUJOCO_GL=egl "$1/bin/python" -c 'import mujoco; mujoco.GLContext(16, 16).make_current()' >/dev/null 2>&1
}

rendering() {
    draws "$1" && return
    apt_install "off-screen rendering with EGL (MuJoCo)" libegl1 libgl1-mesa-dri || true
    draws "$1" && return
    say "off-screen rendering does not work here: the closed loop and the tests that render are left out"
    return 1
}

case ${1:-} in
venv) make_venv "$2" "$3" ;;
rendering) rendering "$2" ;;
*)
    say "usage: setup.sh venv|rendering DIR"
    exit 2
    ;;
esac
