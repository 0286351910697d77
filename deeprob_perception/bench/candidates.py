# SPDX-License-Identifier: Apache-2.0
"""The ways to run a model: every back end at every precision, and what users would run instead (`peers`)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from deeprob_perception import engines
from deeprob_perception.bench import peers, remote
from deeprob_perception.engines.host import processor_name
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError


@dataclass(frozen=True)
class Candidate:
    """One way to run a model, told in plain values: it is started in another process.

    `name` is a back end's or a peer's; `threads` 0 leaves their number to it; `cache` is its folder for compiled models.
    """

    model: Path
    model_name: str
    name: str
    precision: str
    threads: int = 0
    cache: str | None = None

    @property
    def is_peer(self) -> bool:
        return self.name in peers.PEERS

    def __str__(self) -> str:
        return f"{self.model_name}: {self.name} {self.precision}"


def of(models: Sequence[ModelFile], backends: Sequence[str], threads: int) -> tuple[list[Candidate], dict[str, str]]:
    """Return every back end and precision that is worth a trial for each model, and why the others are not.

    A model file of a precision of its own (metadata `precision`: a quantised one) is tried at that one only.
    """
    found, skipped = [], {}
    for backend in backends:
        reason = engines.unavailable(backend)
        if reason:
            skipped[backend] = reason
            continue
        for model in models:
            own = model.metadata.get("precision", "fp32")
            for precision in engines.PRECISIONS[1:] if own == "fp32" else (own,):
                found.append(Candidate(model.path, model.metadata["name"], backend, precision, threads))
    return found, skipped


class Runner:
    """A candidate that runs, from 8-bit picture to labels or features. Made in a process of its own.

    :param images: uint8 `[1, H, W, 3]` BGR each; the frames that turns and answers count through.
    :raises EngineError: when it cannot be loaded, or would compute in another precision than it is named for.
    """

    def __init__(self, candidate: Candidate, images: list[np.ndarray]):
        start = perf_counter_ns()
        self._images = images
        self.device = "cpu"
        if candidate.is_peer:
            if candidate.cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = candidate.cache
            self._run, self.device = peers.PEERS[candidate.name](candidate.model, candidate.threads)
        else:
            engine = engines.load(
                candidate.model, candidate.name, candidate.precision, candidate.cache, threads=candidate.threads
            )
            if engine.precision != candidate.precision:
                raise EngineError(f"it computes in {engine.precision} here")
            name = engine.outputs[0].name
            self._run = lambda image: engine(image=image, outputs=(name,))[name]
            self.device = "cpu" if is_cpu(engine.device) else "cuda"
        self.answer(0)
        self._first_frame_s = (perf_counter_ns() - start) / 1e9

    def facts(self) -> dict[str, Any]:
        """Return `first_frame_s`, from nothing imported or loaded to the first answer; `device`; and `remote.memory`."""
        return {"first_frame_s": self._first_frame_s, "device": self.device, **remote.memory()}

    def answer(self, number: int) -> np.ndarray:
        """Return the labels of a frame, uint8 `[1, H, W]`, or its features, float32 `[1, h, w, C]`."""
        return self._run(self._images[number % len(self._images)])

    def turn(self, number: int, frames: int) -> list[float]:
        """Return the milliseconds of `frames` frames in a row, after one that is not counted.

        That one wakes sleeping threads, refills caches, and outlasts the spinning workers of whoever ran before.
        """
        self.answer(number)
        found = []
        for i in range(frames):
            start = perf_counter_ns()
            self.answer(number + 1 + i)
            found.append((perf_counter_ns() - start) / 1e6)
        return found


def is_cpu(device: str) -> bool:
    """Tell whether an engine's device (a name for people) is the processor rather than a GPU."""
    name = device.strip()
    return name.lower() == "cpu" or processor_name().strip() in name or name in processor_name()
