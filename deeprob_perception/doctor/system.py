# SPDX-License-Identifier: Apache-2.0
"""Python, processor, GPU, driver, CUDA, Jetson, shared memory."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from deeprob_perception import machine
from deeprob_perception.doctor.check import FAIL, OFF, OK, WARN, Check

# Names of /proc/cpuinfo -> what the CPU computes natively.
NATIVE = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    "int8": {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"},
}
ROOM_FOR_LARGE = 256 << 20  # as nodes.dds has it; a test compares


def python() -> Check:
    version, text = sys.version_info[:2], f"{platform.python_version()} ({sys.executable})"
    if version < (3, 10):
        return Check("Python", FAIL, text, "install Python 3.10 or newer")
    if version > (3, 13):
        return Check("Python", WARN, text, "ROS 2 has wheels for 3.10 to 3.13: take one of these for nodes")
    return Check("Python", OK, text)


def packages() -> Check:
    found = machine.versions()
    found.pop("python")
    return Check("versions", OK, ", ".join(f"{name} {version}" for name, version in found.items()))


def precisions(cpuinfo: Path = Path("/proc/cpuinfo")) -> Check:
    flags = set(re.findall(r"\w+", cpuinfo.read_text())) if cpuinfo.is_file() else set()
    native = ["fp32", *(name for name, names in NATIVE.items() if names & flags)]
    return Check("processor", OK, f"{machine.facts()['processor']}, {machine.cores()} cores; natively {', '.join(native)}")


def gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        if Path("/dev/nvidia0").exists():
            return Check("GPU", WARN, "an NVIDIA device, but no nvidia-smi",
                         "give the container the driver's tools (NVIDIA_DRIVER_CAPABILITIES=compute,utility)")
        return Check("GPU", OFF, "no NVIDIA GPU; models run on the CPU")
    done = subprocess.run([tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
                          capture_output=True, text=True, timeout=20)
    text = (done.stdout.strip() or done.stderr.strip()).replace("\n", "; ")
    if done.returncode or not done.stdout.strip():
        return Check("GPU", WARN, f"nvidia-smi fails: {text}", "reinstall the driver or reboot")
    return Check("GPU", OK, text)


def cuda() -> Check:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check("CUDA", OFF, "no CUDA driver library")
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return Check("CUDA", OK, f"the driver supports CUDA {version.value // 1000}.{version.value % 1000 // 10}")


def jetson(release: Path = Path("/etc/nv_tegra_release")) -> Check:
    if not release.is_file():
        return Check("Jetson", OFF, "not a Jetson")
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release.read_text())
    if not found:
        return Check("Jetson", WARN, f"{release} names no release", "reinstall the board's nvidia-l4t-core package")
    pack = {"36": "JetPack 6", "38": "JetPack 7"}.get(found[1])
    text = f"L4T {found[1]}.{found[2]}" + (f" ({pack})" if pack else "")
    if pack is None:
        return Check("Jetson", WARN, text, "this package is made for JetPack 6 and 7")
    return Check("Jetson", OK, text)


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Check("shared memory", WARN, f"{folder}: {error.strerror}", "mount a tmpfs there, or DDS loses large images")
    text = f"{folder}: {usage.free >> 20} of {usage.total >> 20} MB free"
    if usage.free < ROOM_FOR_LARGE:
        return Check("shared memory", WARN, text, "docker run --shm-size=256m, or remove what dead processes left (fastrtps_*)")
    return Check("shared memory", OK, text)


def rendering() -> Check:
    """Try MuJoCo's off-screen rendering in a process of its own: without EGL it may end more than an import."""
    if importlib.util.find_spec("mujoco") is None:
        return Check("rendering", OFF, "MuJoCo is not installed; only `deeprob sim` needs it")
    script = "from deeprob_perception import sim; import mujoco; mujoco.GLContext(16, 16).make_current()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return Check("rendering", WARN, f"MuJoCo cannot draw: {reason}",
                     "apt install libegl1 libgl1-mesa-dri, for `deeprob sim`")
    return Check("rendering", OK, f"MuJoCo draws off screen ({os.environ.get('MUJOCO_GL', 'egl')})")
