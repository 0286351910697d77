# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on: the machine and the versions that go with every number."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deeprob_perception.engines.host import cores, processor_name

PACKAGES = ("deeprob_perception", "rclpy", "openvino", "onnxruntime", "numpy", "opencv-python-headless", "rosbags")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def facts() -> dict[str, str]:
    """Return processor, cores that this process may use, memory and operating system, for people to read."""
    return {"processor": processor_name(), "cores": str(cores()), **_memory(), "system": _system()}


def _memory() -> dict[str, str]:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return {}
    return {"memory": f"{pages / 2**30:.0f} GiB"}


def _system() -> str:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return platform.system()
    named = dict(line.partition("=")[::2] for line in lines)
    return f"{named.get('PRETTY_NAME', platform.system()).strip(chr(34))}, {platform.machine()}"
