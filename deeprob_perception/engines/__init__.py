# SPDX-License-Identifier: Apache-2.0
"""A model file -> something callable. One interface (`engine.Engine`), one file a back end, chosen here by name.

A back end's file has `unavailable() -> str | None` (why it cannot be used on this machine, in one line) and
`load(model, precision, cache_dir, threads) -> Engine`; it imports its library inside those two. One that has to build an
engine for minutes before it can load it also has `ready(model, precision, cache_dir) -> bool`.
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

__all__ = ["BACKENDS", "PRECISIONS", "Engine", "ModelFile", "TensorSpec", "choose", "load", "ready", "stand_in", "unavailable"]

BACKENDS = ("openvino", "onnxruntime")  # each is a module of this package
PRECISIONS = ("auto", "fp32", "bf16")
log = logging.getLogger(__name__)


def load(
    path: str | Path,
    backend: str = "auto",
    precision: str = "auto",
    cache_dir: str | Path | None = None,
    threads: int = 0,
) -> Engine:
    """Load a model that `deeprob export` wrote.

    :param backend: a name in `BACKENDS`, or `auto`: OpenVINO on x86, ONNX Runtime elsewhere.
    :param precision: `fp32`, `bf16`, or `auto`: bf16 where the CPU computes it natively and the back end can, else fp32.
        What really runs is `engine.precision`; it differs from what was asked only with a warning in the log.
    :param cache_dir: where compiled models are kept for a quicker start; None for the user's cache folder.
    :param threads: for one inference; 0 leaves it to the back end (all cores).
    :raises ModelError: when the file is missing, damaged or not ours.
    :raises EngineError: when the back end is unknown, not installed, or refuses the model or the precision.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise EngineError(f"unknown back end {backend!r}; there are: auto, {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise EngineError(f"unknown precision {precision!r}; there are: {', '.join(PRECISIONS)}")
    if threads < 0:
        raise EngineError(f"threads is {threads}; give a number of threads, or 0 for all cores")
    model = model_file.read(path)
    name, why = choose() if backend == "auto" else (backend, "asked for")
    reason = unavailable(name)
    if reason:
        raise EngineError(f"the back end {name} cannot be used: {reason}")
    engine = _module(name).load(model, precision, None if cache_dir is None else Path(cache_dir), threads)
    log.info("%s: %s %s on %s (%s)", model.path.name, engine.backend, engine.precision, engine.device, why)
    return engine


def choose() -> tuple[str, str]:
    """Return the back end that `auto` takes on this machine, and why."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    order = ("openvino", "onnxruntime") if x86 else ("onnxruntime", "openvino")
    first = unavailable(order[0])
    if first is None:
        return order[0], f"auto: {order[0]} comes first on {platform.machine()}"
    if unavailable(order[1]) is None:
        return order[1], f"auto: {order[0]} cannot be used: {first}"
    raise EngineError("no back end can run models here; `pip install onnxruntime` gives one")


def ready(path: str | Path, backend: str, precision: str = "auto", cache_dir: str | Path | None = None) -> bool:
    """Tell whether a back end can load the model at once, or would have to build an engine first.

    :raises ModelError: when the file is missing, damaged or not ours.
    """
    model = model_file.read(path)
    if not hasattr(_module(backend), "ready") or unavailable(backend):
        return True  # at once, or never: `load` says why
    return bool(_module(backend).ready(model, precision, None if cache_dir is None else Path(cache_dir)))


def stand_in(path: str | Path, backend: str, cache_dir: str | Path | None = None) -> str | None:
    """Return the next best back end that can load the model at once while `backend` builds; None when there is none."""
    for name in BACKENDS:
        if name != backend and unavailable(name) is None and ready(path, name, "auto", cache_dir):
            return name
    return None


def unavailable(backend: str) -> str | None:
    """Return why a back end cannot be used on this machine, in one line; None when it can."""
    return _module(backend).unavailable()


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
