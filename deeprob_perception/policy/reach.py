# SPDX-License-Identifier: Apache-2.0
"""Reach for a point with any robot: the policy of `training/reach.py`, on an exported model."""

import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import ModelError
from deeprob_perception.policy import expert
from deeprob_perception.policy.command import Command
from deeprob_perception.policy.graph_inputs import graph_inputs, slots
from deeprob_perception.policy.tokens import LAYOUT, SCALE, TOKEN, fixed, tokens
from deeprob_perception.robots import Robot
from deeprob_perception.robots.batch import of_robot


class ReachPolicy:
    """Moves a robot's tip to a goal. Keeps no state: each step follows from the measured positions and the goal alone.

    :param tip: the link that shall be at the goal. :param rate: of control, Hz.
    :raises RobotError: for a robot that the model cannot express. :raises ModelError: for another layout of tokens.
    """

    def __init__(self, engine: Engine, robot: Robot, tip: str, rate: float = 20.0):
        layout = engine.metadata.get("layout")
        size = next(spec.shape[2] for spec in engine.inputs if spec.name == "tokens")
        if layout != LAYOUT or size != TOKEN:
            raise ModelError(f"{engine.path} takes tokens of the layout {layout} ({size} numbers), this version makes {LAYOUT} "
                             f"({TOKEN}); export it again")
        self._engine = engine
        self._count = len(robot.joint_names)
        self._graph = graph_inputs(engine, robot.graph(), robot.name)
        self._batch = of_robot(robot, tip, slots(engine))
        self._constant = fixed(self._batch)
        self._period = 1 / rate
        self._reach = float(self._batch.reach[0])
        self._positions = np.zeros((1, 1, slots(engine)), np.float32)

    def reset(self, positions: np.ndarray) -> None:
        """Start anew: nothing is kept, so there is nothing to do."""

    def act(self, positions: np.ndarray, goal: np.ndarray | None) -> Command:
        """Return the next step from the measured positions `[n]` towards a goal `[3]` in the root's frame, m."""
        assert goal is not None
        self._positions[0, 0, : self._count] = positions
        goals = np.asarray(goal, np.float32)[None, None]
        told, state = tokens(self._batch, self._constant, self._positions, goals)
        found = self._engine(outputs=None, tokens=told[0], **self._graph)
        action = found["action"].reshape(1, 1, -1) * np.float32(SCALE)
        action = np.where(self._batch.padding[:, None], 0, action)
        after = expert.step(self._batch, action, state.offset, self._positions, self._period)[0, 0, : self._count]
        positions = np.asarray(positions, np.float64)
        places = found.get("forward_kinematics")
        seen = None if places is None else places[0, : self._count].astype(np.float64) * self._reach
        return Command(after.astype(np.float64), (after - positions) / self._period, seen)

    def unreachable(self, goal: np.ndarray) -> str:
        """Return why a goal `[3]` is certainly out of reach, or "": it lies beyond the stretched chain."""
        batch, on = self._batch, self._batch.carries[0]
        first = int(np.flatnonzero(on & (batch.parent[0] < 0))[0])
        ends = np.maximum(np.abs(batch.lower[0]), np.abs(batch.upper[0]))
        slide = np.where(batch.prismatic[0], ends, 0)
        lengths = np.linalg.norm(batch.origins[0, :, :3, 3], axis=-1)
        lengths[first] = 0  # the goal's distance is counted from there
        farthest = float((lengths + slide)[on].sum() + np.linalg.norm(batch.tip[0]))
        distance = float(np.linalg.norm(goal - batch.origins[0, first, :3, 3]))
        if distance <= farthest:
            return ""
        return f"the goal is {distance:.3f} m from the first joint; the stretched chain measures {farthest:.3f} m"
