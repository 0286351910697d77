# SPDX-License-Identifier: Apache-2.0
"""Which of several back ends is the fastest with a model on this machine: measured once, kept as JSON in the cache.

Only time is compared. Each back end is measured in the precision that it would run the model in, so `auto` for both back end
and precision may take bf16 over fp32; a precision that is named is kept by whichever back end is taken. Who needs the same
back end on every machine (replay in a CI, say) names it.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import numpy as np

from deeprob_perception.engines import store
from deeprob_perception.engines.engine import Engine
from deeprob_perception.engines.host import cores, processor_name
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError, ModelError

WARM_UP = 2
RUNS = 7
SECONDS = 2.0  # for one back end, at most; a frame that takes longer is waited for
log = logging.getLogger(__name__)


def fastest(
    model: ModelFile, loaders: Mapping[str, Callable[[], Engine]], precision: str, cache_dir: Path | None, threads: int
) -> tuple[Engine, str]:
    """Return the fastest engine, and why it is.

    :param loaders: for each back end's name what loads the model by it; the first is the likeliest. One that refuses the
        model or the precision is left out.
    :raises ModelError, EngineError: the first back end's refusal, when all refuse.
    """
    folder = store.folder(cache_dir, "choice")
    path = folder and folder / f"{_key(model, list(loaders), precision, threads)}.json"
    kept = _read(path, set(loaders))
    if kept:
        name = min(kept, key=kept.__getitem__)
        try:
            return loaders[name](), f"{_figures(kept)} when they were measured ({path})"
        except (EngineError, ModelError) as error:
            log.warning("%s was the fastest, but fails now (%s); measuring again", name, error)
    engines: dict[str, Engine] = {}
    refused: dict[str, EngineError | ModelError] = {}
    for name, load in loaders.items():
        try:
            engines[name] = load()
        except (EngineError, ModelError) as error:
            refused[name] = error
    if not engines:
        raise next(iter(refused.values()))
    if len(engines) == 1:
        name, engine = next(iter(engines.items()))
        return engine, "; ".join(f"{other} refuses: {error}" for other, error in refused.items())
    times = {name: measure(engine) for name, engine in engines.items()}
    if not refused and path is not None:
        facts = {
            "model": model.path.name,
            "processor": processor_name(),
            "precision": {name: engine.precision for name, engine in engines.items()},
            "threads": threads,
            "milliseconds": times,
        }
        store.write(path, (json.dumps(facts, indent=1) + "\n").encode())
    name = min(times, key=times.__getitem__)
    return engines[name], f"{_figures(times)}, measured now"


def measure(engine: Engine) -> float:
    """Return the median time of one frame's labels, ms."""
    random = np.random.default_rng(0)
    images = {
        s.name: random.integers(0, 256, s.shape, dtype=np.uint8) if s.dtype == np.uint8 else np.zeros(s.shape, s.dtype)
        for s in engine.inputs
    }
    wanted = (engine.outputs[0].name,)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    for i in range(WARM_UP + RUNS):
        start = time.perf_counter()
        engine(outputs=wanted, **images)
        if i >= WARM_UP:
            times.append((time.perf_counter() - start) * 1e3)
        if times and time.perf_counter() > end:
            break
    return median(times)


def _key(model: ModelFile, names: list[str], precision: str, threads: int) -> str:
    """Name the measurement by all that it depends on."""
    facts = {"processor": processor_name(), "cores": cores(), "threads": threads, "precision": precision}
    return store.key(model.path.stem, model=model.sha256, versions={name: _version(name) for name in names}, **facts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # built from source, or renamed
        return ""


def _read(path: Path | None, names: set[str]) -> dict[str, float] | None:
    """Return the kept median of each back end, ms; None when there is none or the file is damaged."""
    if path is None or not path.is_file():
        return None
    try:
        times = json.loads(path.read_text())["milliseconds"]
        if set(times) == names and all(isinstance(t, float) and t > 0 for t in times.values()):
            found: dict[str, float] = times
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    log.warning("%s: not a measurement of back ends; measuring again", path)
    return None


def _figures(times: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {time:.1f} ms a frame" for name, time in sorted(times.items(), key=lambda item: item[1]))
