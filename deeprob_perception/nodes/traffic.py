# SPDX-License-Identifier: Apache-2.0
"""What went through a node: rates, failures, stamps, latency. Plain counters without threads of their own; no ROS."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import perf_counter

from deeprob_perception.timing import Samples, Stages

# Percentiles are of the last so many frames (20 s at 30 Hz): what the node does now, not what it did at start-up.
WINDOW = 600
# A frame cannot be older than this nor come from the future by more than the clocks of two synchronised machines
# differ: beyond, the stamps are of another clock, and a latency computed from them means nothing.
COMPARABLE_AGE = (-0.05, 60.0)


@contextmanager
def measured(stages: dict[str, float], name: str) -> Iterator[None]:
    """Add the body's duration in ms to `stages[name]`, by the monotonic clock."""
    start = perf_counter()
    yield
    stages[name] = stages.get(name, 0.0) + (perf_counter() - start) * 1e3


class Rate:
    """Events a second over the last few readings of a counter."""

    def __init__(self, readings: int = 6):
        self._readings: deque[tuple[float, int]] = deque(maxlen=readings)

    def reading(self, now: float, count: int) -> float:
        """Note that the counter stands at `count` at time `now` (seconds) and return the rate in Hz (0.0 at first)."""
        self._readings.append((now, count))
        return self.value

    @property
    def value(self) -> float:
        """Return the rate of the last reading, in Hz."""
        if len(self._readings) < 2:
            return 0.0
        (start, first), (end, last) = self._readings[0], self._readings[-1]
        return max(0.0, (last - first) / (end - start)) if end > start else 0.0


@dataclass
class Failures:
    """Frames that gave no output, and why the last one did not."""

    count: int = 0
    in_a_row: int = 0
    reason: str = ""

    def add(self, reason: str) -> None:
        self.count += 1
        self.in_a_row += 1
        self.reason = reason

    def success(self) -> None:
        self.in_a_row = 0


@dataclass
class Stamps:
    """What the stamps of the frames look like against the node's clock.

    age: seconds from the last frame's stamp to the node's clock when the worker took it; None for a stamp of 0.
    zero: frames with a stamp of 0. backward: how often a frame was older than the one before (a bag that loops).
    incomparable: frames whose age lies outside COMPARABLE_AGE.
    """

    age: float | None = None
    zero: int = 0
    backward: int = 0
    incomparable: int = 0
    last_was_zero: bool = False
    _last: int = 0

    def add(self, stamp: int, now: int) -> None:
        """Note a frame with `stamp`, taken at `now` (both in ns of the same clock, as far as we know)."""
        self.last_was_zero = stamp == 0
        if self.last_was_zero:
            self.zero += 1
            self.age = None
            return
        self.backward += stamp < self._last
        self._last = stamp
        self.age = (now - stamp) / 1e9
        self.incomparable += not comparable(self.age)


def comparable(age: float) -> bool:
    """Return whether a stamp `age` seconds before now can be of the same clock as now."""
    return COMPARABLE_AGE[0] <= age <= COMPARABLE_AGE[1]


@dataclass
class Traffic:
    """All counters of one camera's way through the node. The worker writes, the diagnostics read.

    published: frames that gave output. unheard: frames not computed because nobody listened.
    latency: ms from stamp to the first publication. overhead: the same less the time in the engine.
    """

    published: int = 0
    unheard: int = 0
    failures: Failures = field(default_factory=Failures)
    stamps: Stamps = field(default_factory=Stamps)
    _latency: Samples = field(default_factory=lambda: Samples(WINDOW))
    _overhead: Samples = field(default_factory=lambda: Samples(WINDOW))
    _stages: Stages = field(default_factory=lambda: Stages(WINDOW))
    _lock: Lock = field(default_factory=Lock)

    def success(self, stamp: int, now: int, stages: dict[str, float]) -> None:
        """Note a frame with `stamp` published at `now` (ns); `stages` in ms, the engine's among them as `infer`."""
        self.failures.success()
        with self._lock:
            self.published += 1
            for name, milliseconds in stages.items():
                self._stages.add(name, milliseconds)
            if stamp and comparable((now - stamp) / 1e9):
                latency = (now - stamp) / 1e6
                self._latency.add(latency)
                self._overhead.add(latency - stages.get("infer", 0.0))

    def summary(self) -> dict[str, dict[str, float]]:
        """Return n, p50, p95, p99 and max in ms of `stamp_to_publish`, `overhead` and each stage that has samples."""
        with self._lock:
            both = {"stamp_to_publish": self._latency.summary(), "overhead": self._overhead.summary()}
            return {name: row for name, row in (both | self._stages.summary()).items() if row["n"]}
