# SPDX-License-Identifier: Apache-2.0
"""ROS 2: which distribution and from where, the middleware and its image-size trap, discovery."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from deeprob_perception.doctor.check import FAIL, OFF, OK, WARN, Check
from deeprob_perception.errors import PerceptionError
from deeprob_perception.share import share_dir

PROFILES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")  # as nodes.dds has them; a test compares
RANGES = ("SUBNET", "LOCALHOST", "OFF", "SYSTEM_DEFAULT")
RMEM = 8 << 20  # bytes that hold several 640x480 colour images


def wheels() -> set[str]:
    """Return the ROS distributions of which wheels are installed."""
    names = (re.fullmatch(r"ros[-_]([a-z]+)[-_]rclpy", d.metadata["Name"] or "") for d in distributions())
    return {name[1] for name in names if name}


def places(environ: Mapping[str, str], installed: set[str]) -> list[tuple[str, str]]:
    """Return (distribution or "", place) of every ROS in sight."""
    found = [(name, "wheels from PyPI") for name in sorted(installed)]
    for entry in filter(None, environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
        system = re.fullmatch(r"/opt/ros/(\w+)/?", entry)
        found.append((system[1], entry) if system else ("", f"overlay {entry}"))
    if environ.get("ROS_DISTRO"):
        found.append((environ["ROS_DISTRO"], "ROS_DISTRO"))
    return found


def distribution(environ: Mapping[str, str] = os.environ, installed: set[str] | None = None) -> Check:
    found = places(environ, wheels() if installed is None else installed)
    names = {name for name, _ in found if name}
    text = ", ".join(f"{name} {place}".strip() for name, place in found)
    if not names:
        return Check("ROS 2", WARN, text or "none: replay, export and bench engine work, nodes do not",
                     "source /opt/ros/DISTRO/setup.bash, or pip install 'deeprob_perception[ros]'")
    if len(names) > 1:
        return Check("ROS 2", FAIL, f"mixed distributions: {text}",
                     "use one: a fresh virtual environment for the wheels, or a shell that sourced only one setup.bash")
    return Check("ROS 2", OK, text)


def require_ros(what: str) -> None:
    """:raises PerceptionError: without a ROS 2 that loads here, or with two, whose libraries do not load together."""
    if importlib.util.find_spec("rclpy") is None:
        raise PerceptionError(f"{what} needs ROS 2: source its setup.bash, or pip install 'deeprob_perception[ros]'")
    found = distribution()
    if found.level == FAIL:
        raise PerceptionError(f"{what} needs one ROS 2, and there are {found.text}: {found.advice}")
    try:
        import rclpy  # noqa: F401
    except ImportError as error:
        raise PerceptionError(f"{what} needs ROS 2, and {found.text} does not load: {error}") from error


def probe() -> tuple[str | None, str]:
    """Return the middleware's name by importing rclpy in a process of its own; None and why when that fails."""
    if importlib.util.find_spec("rclpy") is None:
        return None, "rclpy is not installed"
    done = subprocess.run([sys.executable, "-c", "import rclpy; print(rclpy.get_rmw_implementation_identifier())"],
                          capture_output=True, text=True, timeout=60)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return done.stdout.split()[-1], ""


def middleware(
    environ: Mapping[str, str] = os.environ, found: tuple[str | None, str] | None = None,
    rmem: Path = Path("/proc/sys/net/core/rmem_max"),
) -> Check:  # fmt: skip
    name, why = probe() if found is None else found
    if name is None:
        if why == "rclpy is not installed":
            return Check("middleware", OFF, why)
        return Check("middleware", FAIL, f"rclpy does not start: {why}",
                     "unset RMW_IMPLEMENTATION or install it; in doubt reinstall ROS 2 in one distribution")
    if "fastrtps" in name:
        return fast_dds(environ, name)
    size = int(rmem.read_text()) if rmem.is_file() else None
    if size is not None and size < RMEM:
        return Check("middleware", WARN, f"{name}; net.core.rmem_max is {size} bytes, too few for large images",
                     f"sudo sysctl -w net.core.rmem_max={RMEM}")
    return Check("middleware", OK, name)


def fast_dds(environ: Mapping[str, str], name: str) -> Check:
    chosen = next((environ[key] for key in PROFILES if environ.get(key)), None)
    ours = share_dir() / "config" / "fastdds_large_images.xml"
    if chosen is None:
        return Check("middleware", WARN, f"{name}; our nodes set a profile for large images, other processes do not",
                     f"export {PROFILES[0]}={ours} where the camera driver starts")
    if not Path(chosen).is_file():
        return Check("middleware", FAIL, f"{name}; the profile {chosen} does not exist", f"set {PROFILES[0]}={ours}")
    return Check("middleware", OK, f"{name}, profile {chosen}")


def discovery(environ: Mapping[str, str] = os.environ) -> Check:
    domain, reach = environ.get("ROS_DOMAIN_ID", "0"), environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    text = f"domain {domain}, range {reach}"
    if environ.get("ROS_LOCALHOST_ONLY", "0") == "1":  # Humble's way, which goes before the range in newer ones, too
        reach, text = "LOCALHOST", f"domain {domain}, loopback only (ROS_LOCALHOST_ONLY)"
    if not domain.isdecimal() or int(domain) > 232:
        return Check("discovery", FAIL, text, "set ROS_DOMAIN_ID to a number from 0 to 101")
    if reach not in RANGES:
        return Check("discovery", FAIL, text, f"set ROS_AUTOMATIC_DISCOVERY_RANGE to one of {', '.join(RANGES)}")
    if int(domain) > 101:
        return Check("discovery", WARN, text, "on Linux domains above 101 may meet ports in use: take 0 to 101")
    if reach == "OFF":
        return Check("discovery", WARN, text, "nodes find nobody so: unset ROS_AUTOMATIC_DISCOVERY_RANGE")
    return Check("discovery", OK, text)


def optional() -> Check:
    """Return what some commands use where it is there; a broken cv_bridge harms nobody, since images are converted without."""
    names = ("cv_bridge", "vision_msgs", "tf2_ros", "launch", "launch_ros", "mujoco", "torch", "transformers")
    found = {name: installed(name) for name in names}
    have, lack = [n for n in names if found[n]], [n for n in names if not found[n]]
    return Check("optional", OK if have else OFF, f"found: {', '.join(have) or 'none'}; absent: {', '.join(lack) or 'none'}")


def installed(name: str) -> bool:
    """Tell whether a module can be imported; a mere folder of that name (a checkout's `launch/`) is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
