# SPDX-License-Identifier: Apache-2.0
"""The reaching policy: a robot's state and a goal -> the next positions of its joints, by one network for all robots."""

from dataclasses import replace

import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import ModelError, RobotError
from deeprob_perception.policy import expert
from deeprob_perception.policy.approach import Approach, Funnel
from deeprob_perception.policy.command import Command
from deeprob_perception.policy.tokens import LAYOUT, SCALE, TOKEN, fixed, tokens
from deeprob_perception.robots.batch import of_robot
from deeprob_perception.robots.robot import Robot

SLOWEST = 1.0  # rad/s or reach/s: the speed of a joint whose description names none


class ReachPolicy:
    """Moves a robot's tip to goals.

    What it asks for is within the position limits of the robot's description and, in one control period, within its velocity
    limits. It has no state but that of an approach.
    """

    def __init__(self, engine: Engine, robot: Robot, tip: str, rate: float = 20.0, approach: Approach | None = None):
        """:param tip: the link that shall reach the goal. :param rate: of control, Hz. :param approach: None: straight.

        :raises ModelError: for a model of another task or token layout. :raises RobotError: for a robot that it cannot move.
        """
        if engine.metadata.get("task") != "reach":
            raise ModelError(f"{engine.path} is for the task {engine.metadata.get('task')!r}, not for reaching")
        if engine.metadata["layout"] != LAYOUT:
            raise ModelError(f"{engine.path} takes tokens {engine.metadata['layout']!r}; this version makes {LAYOUT!r}")
        if not rate > 0:
            raise RobotError(f"a control rate of {rate:g} Hz makes no sense; give one above 0")
        self.engine, self.robot, self.tip = engine, robot, tip
        self._period = 1 / rate
        self._funnel = Funnel(approach, self._period) if approach is not None and approach.height > 0 else None
        slots = next(spec for spec in engine.inputs if spec.name == "tokens").shape[1]
        padded = of_robot(robot, tip, slots)
        batch = of_robot(robot, tip)  # what is computed here need not be padded, and takes half the time for that
        still = ~np.isfinite(batch.velocity) | (batch.velocity <= 0)
        speed = np.where(batch.prismatic, batch.reach[:, None], 1.0) * SLOWEST
        self._batch = replace(batch, velocity=np.where(still, speed, batch.velocity).astype(np.float32))
        self._constant = fixed(self._batch)
        graph = padded.graphs()
        told = {"distance": graph.distance, "parent": graph.parent, "child": graph.child, "padding": padded.padding}
        taken = {spec.name for spec in engine.inputs}
        self._inputs = {name: array for name, array in told.items() if name in taken}
        self._count = len(robot.joint_names)
        bounded = np.isfinite(robot.lower) & np.isfinite(robot.upper)
        lower, upper = (np.where(bounded, limit, 0.0) for limit in (robot.lower, robot.upper))
        self._middle = (lower + upper) / 2  # where a retreat goes
        self._tokens = np.zeros((1, slots, TOKEN), np.float32)  # those of padding stay zero
        self._wanted = tuple(spec.name for spec in engine.outputs)

    def reset(self, positions: np.ndarray) -> None:
        """Begin the approach anew; without one, the next step depends on nothing but the state."""
        if self._funnel is not None:
            self._funnel.reset()

    def act(self, positions: np.ndarray, goal: np.ndarray | None) -> Command:
        """Return the next step.

        :param positions: measured, float64 `[n]`, rad or m. :param goal: of the tip in the root's frame, `[3]`, m; None: stay.
        """
        positions = np.asarray(positions, np.float64)
        state = positions.astype(np.float32).reshape(1, 1, -1)
        back = False
        if goal is not None and self._funnel is not None:
            there = self._funnel.goal(goal, self.robot.forward_kinematics(positions, [self.tip])[0, :3, 3])
            goal, back = (goal, True) if there is None else (there, False)
        there = np.zeros((1, 1, 3), np.float32) if goal is None else np.asarray(goal, np.float32).reshape(1, 1, 3)
        told, seen = tokens(self._batch, self._constant, state, there)
        self._tokens[0, : self._count] = told[0, 0]
        found = self.engine(tokens=self._tokens, outputs=self._wanted, **self._inputs)
        believed = None
        if "forward_kinematics" in found:
            believed = found["forward_kinematics"][0, : self._count].astype(np.float64) * float(self._batch.reach[0])
        if goal is None:
            return Command(positions.copy(), np.zeros(self._count), believed)
        if back:
            most = self._batch.velocity[0] * self._period
            after = positions + np.clip(self._middle - positions, -most, most)
            return Command(after, (after - positions) / self._period, believed)
        action = found["action"][:, None, : self._count] * SCALE
        after = expert.step(self._batch, action, seen.offset, state, self._period)[0, 0].astype(np.float64)
        after = np.clip(after, np.minimum(positions, self.robot.lower), np.maximum(positions, self.robot.upper))
        return Command(after, (after - positions) / self._period, believed)


