# SPDX-License-Identifier: Apache-2.0
"""How a goal is come to: from above, as a hand does that must not push away what it reaches for. Stateless."""

from dataclasses import dataclass

import numpy as np

SLOPE = 2.0  # m of height for each m beside the goal


@dataclass(frozen=True)
class Approach:
    """A funnel over each goal, whose axis is the z axis of the root's frame: the root stands upright.

    A tip that is farther than `radius` (m) beside the goal is sent to a point above it: SLOPE times that distance, at most
    `height` (m). So it comes down on the goal at the end, whichever way it started. A height of 0 lets it go straight.
    """

    height: float = 0.0
    radius: float = 0.04

    def goal(self, goal: np.ndarray, tip: np.ndarray) -> np.ndarray:
        """Return where to go now, `[3]`, m, in the root's frame. :param goal: `[3]`. :param tip: where the tip is, `[3]`."""
        beside = float(np.hypot(goal[0] - tip[0], goal[1] - tip[1]))
        lift = min(max(SLOPE * (beside - self.radius), 0.0), self.height)
        return np.array([goal[0], goal[1], goal[2] + lift])
