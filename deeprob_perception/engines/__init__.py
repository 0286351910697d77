# SPDX-License-Identifier: Apache-2.0
"""A model file -> something callable. One interface (`engine.Engine`), one file a back end, chosen here by name.

A back end's file has `unavailable() -> str | None` (why it cannot be used on this machine, in one line) and
`load(model, precision, cache_dir, threads) -> Engine`; it imports its library inside those two. One that has to build an
engine for minutes before it can load it also has `ready(model, precision, cache_dir) -> bool`.
"""

import logging
import platform
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from deeprob_perception.engines import choice, model_file
from deeprob_perception.engines.engine import Engine
from deeprob_perception.engines.host import has_nvidia_gpu
from deeprob_perception.engines.model_file import ModelFile, TensorSpec
from deeprob_perception.errors import EngineError

__all__ = ["BACKENDS", "PRECISIONS", "Engine", "ModelFile", "TensorSpec", "choose", "load", "ready", "stand_in", "unavailable"]

BACKENDS = ("tensorrt", "openvino", "onnxruntime", "torch")  # each is a module of this package
CPU_BACKENDS = ("openvino", "onnxruntime")  # that `auto` measures, the likeliest to be fast on x86 first
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

    :param backend: a name in `BACKENDS`, or `auto`: TensorRT on an NVIDIA GPU, else torch there; on a CPU the fastest by a
        short measurement, which is kept (see `choose` and `choice`).
    :param precision: `fp32`, `bf16`, `fp16`, `int8` (on a CPU of a quantised file), or `auto`: int8 of a quantised file; else
        fp16 by TensorRT, bf16 where the processor computes it natively and the back end can; else fp32. What really runs is
        `engine.precision`; it differs from what was asked only with a warning in the log.
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
    folder = None if cache_dir is None else Path(cache_dir)
    names, why = choose() if backend == "auto" else ([backend], "asked for")
    try:
        engine, measured = _load(names, model, precision, folder, threads)
    except EngineError as error:
        # A GPU that has no memory left, say, or an operator that TensorRT lacks: `auto` asked for what works.
        others = [name for name in cpu_backends() if name not in names] if backend == "auto" else []
        if not others:
            raise
        log.warning("%s: %s; going on with %s", model.path.name, error, " or ".join(others))
        why = f"auto: {', '.join(names)} failed"
        engine, measured = _load(others, model, precision, folder, threads)
    why = f"{why}: {measured}" if measured else why
    log.info("%s: %s %s on %s (%s)", model.path.name, engine.backend, engine.precision, engine.device, why)
    return engine


def choose() -> tuple[list[str], str]:
    """Return the back ends that `auto` chooses from on this machine, the likeliest first, and why these.

    On an NVIDIA GPU TensorRT, and torch only where it is the one way there, since importing it takes seconds; else every CPU
    back end that can be used.

    :raises EngineError: when there is none.
    """
    if unavailable("tensorrt") is None:
        return ["tensorrt"], "auto: there is an NVIDIA GPU, and TensorRT for it"
    if has_nvidia_gpu() and import_module(f"{__name__}.torch").drives_gpu():
        return ["torch"], "auto: an NVIDIA GPU, and torch is what can use it"
    usable = cpu_backends()
    if not usable:
        raise EngineError("no back end can run models here; `pip install onnxruntime` gives one")
    missing = [f"{name} cannot be used: {unavailable(name)}" for name in CPU_BACKENDS if name not in usable]
    return usable, "; ".join(["auto", *missing])


def cpu_backends() -> list[str]:
    """Return the CPU back ends that can be used, the likeliest to be fast first."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [name for name in (CPU_BACKENDS if x86 else CPU_BACKENDS[::-1]) if unavailable(name) is None]


def ready(path: str | Path, backend: str = "auto", precision: str = "auto", cache_dir: str | Path | None = None) -> bool:
    """Tell whether a back end can load the model at once, or would have to build an engine first.

    :raises ModelError: when the file is missing, damaged or not ours.
    :raises EngineError: when `auto` finds no back end.
    """
    model = model_file.read(path)
    names = choose()[0] if backend == "auto" else [backend]
    if len(names) > 1 or not hasattr(_module(names[0]), "ready") or unavailable(names[0]):
        return True  # at once, or never: `load` says why
    return bool(_module(names[0]).ready(model, precision, None if cache_dir is None else Path(cache_dir)))


def stand_in(path: str | Path, backend: str, cache_dir: str | Path | None = None) -> str | None:
    """Return the next best back end that can load the model at once while `backend` builds; None when there is none."""
    for name in BACKENDS:
        if name != backend and unavailable(name) is None and ready(path, name, "auto", cache_dir):
            return name
    return None


def unavailable(backend: str) -> str | None:
    """Return why a back end cannot be used on this machine, in one line; None when it can."""
    return _module(backend).unavailable()


def _load(
    names: list[str], model: ModelFile, precision: str, cache_dir: Path | None, threads: int
) -> tuple[Engine, str]:
    """Load by the one back end named, or by the fastest of several; return what was measured, too."""
    for name in names:
        reason = unavailable(name)
        if reason:
            raise EngineError(f"the back end {name} cannot be used: {reason}")
    if len(names) == 1:
        return _module(names[0]).load(model, precision, cache_dir, threads), ""
    loaders = {name: partial(_module(name).load, model, precision, cache_dir, threads) for name in names}
    return choice.fastest(model, loaders, precision, cache_dir, threads)


def _module(backend: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}")
