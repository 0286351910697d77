# SPDX-License-Identifier: Apache-2.0
"""Goals that no pose of a robot can reach: those beyond its stretched chain."""

import numpy as np

from deeprob_perception.robots import Robot
from deeprob_perception.robots.batch import of_robot


class Workspace:
    """A ball around the first joint towards the tip: what lies outside is out of reach for certain.

    :raises RobotError: when no joint moves the tip.
    """

    def __init__(self, robot: Robot, tip: str):
        batch = of_robot(robot, tip)
        on = batch.carries[0]
        first = int(np.flatnonzero(on & (batch.parent[0] < 0))[0])
        lengths = np.linalg.norm(batch.origins[0, :, :3, 3], axis=-1)
        lengths[first] = 0  # the distance is counted from there
        ends = np.maximum(np.abs(batch.lower[0]), np.abs(batch.upper[0]))
        slides = np.where(batch.prismatic[0], ends, 0)
        self.centre = batch.origins[0, first, :3, 3].astype(np.float64)  # m, in the root's frame
        self.radius = float((lengths + slides)[on].sum() + np.linalg.norm(batch.tip[0]))

    def refusal(self, goal: np.ndarray) -> tuple[str, str] | None:
        """Return why a goal `[3]` (m, root's frame) cannot be reached, as (name, reason), or None."""
        distance = float(np.linalg.norm(goal - self.centre))
        if distance <= self.radius:
            return None
        return "goal_unreachable", (f"the goal is {distance:.3f} m from the first joint; the stretched chain measures "
                                    f"{self.radius:.3f} m")
