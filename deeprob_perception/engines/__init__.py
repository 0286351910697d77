# SPDX-License-Identifier: Apache-2.0
"""A model file -> something callable. One interface (`engine.Engine`), one file a back end, chosen here by name.

A back end's file has `unavailable() -> str | None` (why it cannot be used on this machine, in one line) and
`load(model, precision, cache_dir, threads) -> Engine`; it imports its library inside those two. One that has to build for
minutes before it can load has `ready(model, precision, cache_dir) -> bool` as well.
"""

import logging
import platform
from importlib import import_module
from pathlib import Path
from types import ModuleType

from deeprob_perception.engines import model_file
from deeprob_perception.engines.engine import Engine
from deeprob_perception.engines.model_file import ModelFile, TensorSpec
from deeprob_perception.errors import EngineError

__all__ = ["BACKENDS", "PRECISIONS", "Engine", "ModelFile", "TensorSpec", "choose", "load", "ready", "unavailable"]

BACKENDS = ("tensorrt", "openvino", "onnxruntime")  # each is a module of this package
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")
log = logging.getLogger(__name__)


def load(
    path: str | Path,
    backend: str = "auto",
    precision: str = "auto",
    cache_dir: str | Path | None = None,
    threads: int = 0,
) -> Engine:
    """Load a model that `deeprob export` wrote.

    :param backend: a name in `BACKENDS`, or `auto`: TensorRT on an NVIDIA GPU, OpenVINO on x86, ONNX Runtime elsewhere.
    :param precision: `fp32`, `bf16`, `fp16`, `int8`, or `auto`: fp16 by TensorRT; bf16 where the CPU computes it natively
        and the back end can; else fp32. What really runs is `engine.precision`; it differs from what was asked only with a
        warning in the log.
    :param cache_dir: where compiled models are kept for a quicker start; None for the user's cache folder.
    :param threads: for one inference; 0 leaves it to the back end (all cores).
    :raises ModelError: when the file is missing, damaged or not ours.
    :raises EngineError: when the back end is unknown, not installed, or refuses the model or the precision.
    """
    if precision not in PRECISIONS:
        raise EngineError(f"unknown precision {precision!r}; there are: {', '.join(PRECISIONS)}")
    if threads < 0:
        raise EngineError(f"threads is {threads}; give a number of threads, or 0 for all cores")
    model = model_file.read(path)
    name, why = _usable(backend)
    engine = _module(name).load(model, precision, None if cache_dir is None else Path(cache_dir), threads)
    log.info("%s: %s %s on %s (%s)", model.path.name, engine.backend, engine.precision, engine.device, why)
    return engine


def ready(path: str | Path, backend: str = "auto", precision: str = "auto", cache_dir: str | Path | None = None) -> bool:
    """Tell whether `load` with the same arguments would start at once, or else build for minutes first.

    :raises ModelError, EngineError: as `load`, for what can be told before building.
    """
    name, _ = _usable(backend)
    module = _module(name)
    if not hasattr(module, "ready"):
        return True
    found: bool = module.ready(model_file.read(path), precision, None if cache_dir is None else Path(cache_dir))
    return found


def choose() -> tuple[str, str]:
    """Return the back end that `auto` takes on this machine, and why."""
    if unavailable("tensorrt") is None:
        return "tensorrt", "auto: there is an NVIDIA GPU, and TensorRT for it"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    order = ("openvino", "onnxruntime") if x86 else ("onnxruntime", "openvino")
    first = unavailable(order[0])
    if first is None:
        return order[0], f"auto: {order[0]} comes first on {platform.machine()}"
    if unavailable(order[1]) is None:
        return order[1], f"auto: {order[0]} cannot be used: {first}"
    raise EngineError("no back end can run models here; `pip install onnxruntime` gives one")


def unavailable(backend: str) -> str | None:
    """Return why a back end cannot be used on this machine, in one line; None when it can."""
    return _module(backend).unavailable()


def _usable(backend: str) -> tuple[str, str]:
    """Return the name of the back end to use and why; raise EngineError when it cannot be used."""
    if backend != "auto" and backend not in BACKENDS:
        raise EngineError(f"unknown back end {backend!r}; there are: auto, {', '.join(BACKENDS)}")
    name, why = choose() if backend == "auto" else (backend, "asked for")
    reason = unavailable(name)
    if reason:
        raise EngineError(f"the back end {name} cannot be used: {reason}")
    return name, why


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
