# SPDX-License-Identifier: Apache-2.0
"""Masks and depth images of one camera, joined by their stamps; what has no partner is let go. Stamps in ns."""

from collections import OrderedDict
from typing import Generic, TypeVar

M = TypeVar("M")
D = TypeVar("D")


class Pairs(Generic[M, D]):
    """Joins each mask with the depth image nearest in time, at most `slop` away.

    A mask takes a network's time and comes after its depth image, so some of those are kept; where depth is the slower one, the
    newest mask waits for it. Only the newest mask counts: a robot wants to know where things are now.

    unmatched: masks that were overtaken by another one before a depth image came for them. Stamps that go back (a bag that
    loops, a simulation that starts anew) clear everything.
    """

    def __init__(self, slop: int, kept: int = 15):
        """:param kept: depth images to keep; at 15 Hz, a second's."""
        self.slop, self.unmatched = slop, 0
        self._kept = kept
        self._depth: OrderedDict[int, D] = OrderedDict()
        self._waiting: tuple[int, M] | None = None
        self._newest = 0  # of the masks

    def mask(self, stamp: int, mask: M) -> tuple[int, M, D] | None:
        """Take a mask; return stamp, mask and depth where there is one for it."""
        if stamp < self._newest:
            self.clear()
        self._newest = stamp
        if self._waiting is not None:
            self.unmatched += 1
        self._waiting = (stamp, mask)
        return self._join()

    def depth(self, stamp: int, depth: D) -> tuple[int, M, D] | None:
        """Take a depth image; return stamp, mask and depth where a mask has waited for it."""
        if self._depth and stamp < next(reversed(self._depth)) - 10**9:  # not merely out of order
            self._depth.clear()
        self._depth[stamp] = depth
        while len(self._depth) > self._kept:
            self._depth.popitem(last=False)
        return self._join()

    def clear(self) -> None:
        """Forget everything that waits."""
        self._depth.clear()
        self._waiting = None

    def _join(self) -> tuple[int, M, D] | None:
        if self._waiting is None or not self._depth:
            return None
        stamp, mask = self._waiting
        nearest = min(self._depth, key=lambda other: abs(other - stamp))
        if abs(nearest - stamp) > self.slop:
            return None
        self._waiting = None
        return stamp, mask, self._depth[nearest]
