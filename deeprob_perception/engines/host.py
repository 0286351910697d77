# SPDX-License-Identifier: Apache-2.0
"""The machine that an engine runs on."""

import os
import platform
from functools import cache
from pathlib import Path


@cache
def processor_name() -> str:
    """Return the CPU's name as the kernel reports it, or else the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_nvidia_gpu() -> bool:
    """Tell whether NVIDIA's driver runs here (desktop or Jetson), without loading any library of it."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu"))
