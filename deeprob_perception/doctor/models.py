# SPDX-License-Identifier: Apache-2.0
"""Back ends, TensorRT's flavours, models and their checksums, the cache folder."""

import os
import shutil
from pathlib import Path

from deeprob_perception import engines, zoo
from deeprob_perception.doctor.check import FAIL, OFF, OK, WARN, Check
from deeprob_perception.engines import tensorrt_library
from deeprob_perception.share import PACKAGE

LITTLE = 1 << 30  # bytes: fetched models and compiled engines take some hundred MB


def backends() -> Check:
    reasons = {name: engines.unavailable(name) for name in engines.BACKENDS}
    usable = [name for name, reason in reasons.items() if reason is None]
    text = "; ".join([f"usable: {', '.join(usable) or 'none'}", *(f"{n}: {r}" for n, r in reasons.items() if r)])
    if not usable:
        return Check("back ends", FAIL, text, "pip install onnxruntime")
    return Check("back ends", OK, text)


def tensorrt() -> Check:
    found, _ = tensorrt_library.libraries()
    if found:
        return Check("TensorRT", OK, ", ".join(library.title for library in found))
    if shutil.which("nvidia-smi") or Path("/etc/nv_tegra_release").is_file():
        return Check("TensorRT", WARN, "a GPU, but no TensorRT", "docs/tensorrt.md says which one fits this machine")
    return Check("TensorRT", OFF, "not installed")


def models() -> Check:
    entries = zoo.catalogue()
    broken = [entry for _, entry in sorted(entries.items()) if not entry.intact()]
    if broken:
        level = FAIL if any(entry.shipped for entry in broken) else WARN
        return Check("models", level, "missing or changed: " + ", ".join(str(entry.path) for entry in broken),
                     "install the package again, or fetch the model again (deeprob models fetch NAME)")
    if not entries:
        return Check("models", FAIL, f"none in {zoo.shipped_dir()}", "install the package again")
    return Check("models", OK, f"{', '.join(sorted(entries))}: checksums right")


def cache(folder: Path | None = None) -> Check:
    import platformdirs

    folder = folder or platformdirs.user_cache_path(PACKAGE)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check("cache", WARN, f"{folder} cannot be written: every start compiles anew",
                     f"give yourself {there}, or set XDG_CACHE_HOME to a folder of yours")
    foreign = next((p for p in folder.rglob("*") if p.is_dir() and not os.access(p, os.W_OK)), None)
    if foreign:
        return Check("cache", WARN, f"{foreign} cannot be written", f"sudo chown -R $USER {folder}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free
    text = f"{folder}: {size / 1e6:.0f} MB, {free / 1e9:.1f} GB free"
    if free < LITTLE:
        return Check("cache", WARN, text, "make room, or set XDG_CACHE_HOME to a larger disk")
    return Check("cache", OK, text)
