# SPDX-License-Identifier: Apache-2.0
"""How a goal is come to: from above, as a hand does that must not push away what it reaches for."""

import math
from dataclasses import dataclass

import numpy as np

SLOPE = 2.0  # m of height for each m beside the goal
PATIENCE = 0.5  # seconds without coming nearer by PROGRESS, after which the funnel gets lower by half
PROGRESS = 0.003  # m
RETREAT = 2.0  # seconds
LOWEST = 0.01  # m: a funnel that is not higher is none
THERE = 0.03  # m: who is so near has not got stuck
ANOTHER = 0.05  # m: a goal that is so far from the last one is another


@dataclass(frozen=True)
class Approach:
    """A funnel over each goal, whose axis is the z axis of the root's frame: the root stands upright.

    A tip that is farther than `radius` (m) beside the goal is sent to a point above it: SLOPE times that distance, at most
    `height` (m). So it comes down on the goal at the end, whichever way it started. A height of 0 lets it go straight.
    """

    height: float = 0.0
    radius: float = 0.04

    def lift(self, beside: float) -> float:
        """Return how far above its goal a tip is sent that is `beside` m beside it, m."""
        return min(max(SLOPE * (beside - self.radius), 0.0), self.height)


class Funnel:
    """An approach under way.

    Where the arm cannot follow it, as the point above is out of reach, it gets lower and lower. An arm that has got stuck all
    the same, at its joints' limits, draws back once for each goal, for RETREAT seconds, and comes another way.
    """

    def __init__(self, approach: Approach, period: float):
        """:param period: of control, seconds."""
        self._approach = approach
        self._patience, self._retreat = max(1, round(PATIENCE / period)), round(RETREAT / period)
        self.reset()

    def reset(self) -> None:
        """Begin anew, at full height."""
        self._share, self._nearest, self._stalled = 1.0, math.inf, 0
        self._last: np.ndarray | None = None
        self._retreated = 0  # steps

    def goal(self, goal: np.ndarray, tip: np.ndarray) -> np.ndarray | None:
        """Return where to go in this step, `[3]`, m, in the root's frame, or None to draw back.

        :param goal: `[3]`. :param tip: where it is, `[3]`.
        """
        if self._last is None or math.dist(goal, self._last) > ANOTHER:
            self.reset()
        self._last = np.array(goal)
        if 0 < self._retreated < self._retreat:
            self._retreated += 1
            return None
        lift = self._share * self._approach.lift(math.hypot(goal[0] - tip[0], goal[1] - tip[1]))
        there = np.array([goal[0], goal[1], goal[2] + lift])
        distance = math.dist(there, tip)
        if distance < self._nearest - PROGRESS:
            self._nearest, self._stalled = distance, 0
        else:
            self._stalled += 1
        if self._stalled >= self._patience:
            self._nearest, self._stalled = math.inf, 0
            if lift > LOWEST:
                self._share *= 0.5
            elif not self._retreated and math.dist(goal, tip) > THERE:
                self._share, self._retreated = 1.0, 1
        return there
