# SPDX-License-Identifier: Apache-2.0
"""Positions of single frames -> one that does not jump: the median over the last few, none of them old."""

from collections import deque

import numpy as np


class Steady:
    """The median over time, per axis, of positions in a frame that does not move (the robot's base).

    A median, because a mask that once takes the wrong object for the right one must not pull the goal half-way there.
    Stamps in ns. A stamp that goes back (a bag that loops) begins anew.
    """

    def __init__(self, frames: int = 5, seconds: float = 2.0):
        """:param frames: to take the median of. :param seconds: older positions are forgotten."""
        self.frames, self.seconds = frames, seconds
        self._seen: deque[tuple[int, np.ndarray]] = deque()

    def add(self, stamp: int, position: np.ndarray) -> np.ndarray:
        """Take the position float64 `[3]` seen at `stamp` and return the median, float64 `[3]`."""
        if self._seen and stamp < self._seen[-1][0]:
            self._seen.clear()
        self._seen.append((stamp, position))
        while len(self._seen) > max(1, self.frames) or stamp - self._seen[0][0] > self.seconds * 1e9:
            self._seen.popleft()
        return np.median([p for _, p in self._seen], axis=0)

    def last(self, stamp: int) -> np.ndarray | None:
        """Return the last position `[3]`, if it is not too old at `stamp`."""
        if not self._seen or not 0 <= stamp - self._seen[-1][0] <= self.seconds * 1e9:
            return None
        return self._seen[-1][1]

    def clear(self) -> None:
        """Forget everything: another object is sought."""
        self._seen.clear()
