# SPDX-License-Identifier: Apache-2.0
"""Latency statistics: plain classes with no thread and no clock of their own, so that they are tested without either."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import numpy as np


class Samples:
    """The last `window` durations in milliseconds, and how many there were in all."""

    def __init__(self, window: int = 100_000):
        self._values: deque[float] = deque(maxlen=window)
        self.count = 0

    def add(self, milliseconds: float) -> None:
        self._values.append(milliseconds)
        self.count += 1

    def values(self) -> np.ndarray:
        """Return the samples in the window, float64 `[n]`, oldest first."""
        return np.fromiter(self._values, np.float64, len(self._values))

    def summary(self) -> dict[str, float]:
        """Return `{"n", "p50", "p95", "p99", "max"}` in ms; only `{"n": 0}` without samples."""
        if not self._values:
            return {"n": 0}
        values = self.values()
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        return {"n": self.count, "p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(values.max())}

    def clear(self) -> None:
        self._values.clear()
        self.count = 0


class Stages:
    """Durations of named stages (`decode`, `infer`, ...), in the order in which they first ran."""

    def __init__(self, window: int = 100_000):
        self._window = window
        self._stages: dict[str, Samples] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the body with the monotonic clock; a body that raises is not counted."""
        start = perf_counter_ns()
        yield
        self.add(name, (perf_counter_ns() - start) / 1e6)

    def add(self, name: str, milliseconds: float) -> None:
        stage = self._stages.get(name)
        if stage is None:
            stage = self._stages[name] = Samples(self._window)
        stage.add(milliseconds)

    def __getitem__(self, name: str) -> Samples:
        return self._stages[name]

    def __contains__(self, name: str) -> bool:
        return name in self._stages

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: samples.summary() for name, samples in self._stages.items()}

    def clear(self) -> None:
        self._stages.clear()
