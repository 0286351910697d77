# SPDX-License-Identifier: Apache-2.0
"""What a policy asks of the joints."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Command:
    """The next step of a robot's n joints, in the order of `Robot.joint_names`.

    - `positions`: to be at after one control period, float64 `[n]`, rad or m
    - `velocities`: on the way there, float64 `[n]`, rad/s or m/s
    - `joint_positions`: where the self-model believes each joint's frame is, in the root's frame, float64 `[n, 3]`, m; or None
    """

    positions: np.ndarray
    velocities: np.ndarray
    joint_positions: np.ndarray | None = None


class Policy(Protocol):
    """A policy of one robot, called once a control period."""

    def reset(self, positions: np.ndarray) -> None:
        """Start anew from the measured positions `[n]`."""

    def act(self, positions: np.ndarray, goal: np.ndarray | None) -> Command:
        """Return the next step from the measured positions `[n]` towards a goal `[3]` in the root's frame, m."""
