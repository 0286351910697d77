# SPDX-License-Identifier: Apache-2.0
"""One robot under one policy: readings and goal in, setpoints out, a step a control period. No clock, no ROS."""

from copy import copy
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import ModelError, RobotError, describe
from deeprob_perception.policy.approach import Approach
from deeprob_perception.policy.command import Command, Policy
from deeprob_perception.policy.leap import LeapPolicy
from deeprob_perception.policy.reach import ReachPolicy
from deeprob_perception.policy.readings import Goal, JointReadings
from deeprob_perception.policy.safety import DISARMED, MOVING, Limits, Safety, Setpoint
from deeprob_perception.policy.workspace import Workspace
from deeprob_perception.robots import Robot
from deeprob_perception.timing import Samples

TASKS = ("reach", "leap_rotation")
WINDOW = 6000  # steps whose times are kept: five minutes at 20 Hz


def policy_of(engine: Engine, robot: Robot, tip: str, rate: float, approach: Approach | None = None) -> Policy:
    """Return the policy that a model is for.

    :param tip: the link that shall reach, and :param approach: how; `leap_rotation` has neither. :param rate: of control, Hz.
    :raises ModelError, RobotError: when model, robot and rate do not go together.
    """
    task = engine.metadata.get("task")
    if task == "leap_rotation":
        return LeapPolicy(engine, robot, rate)
    if task != "reach":
        raise ModelError(f"{engine.path} is for the task {task!r}; the policy node runs {', '.join(TASKS)}")
    if not tip:
        raise RobotError(f"name the link of {robot.name!r} that shall reach by the parameter tip; it has: "
                         f"{', '.join(robot.links[-12:])}")
    return ReachPolicy(engine, robot, tip, rate, approach)


@dataclass(frozen=True)
class SelfModel:
    """Where the network believes the joints' frames to be, `[n, 3]`, m, in the root's frame, at the positions `[n]`."""

    robot: Robot
    positions: np.ndarray
    believed: np.ndarray

    @cached_property
    def true(self) -> np.ndarray:
        """Where they are by the URDF, `[n, 3]`; computed when somebody asks, as most steps nobody does."""
        return self.robot.forward_kinematics(self.positions)[:, :3, 3]

    @property
    def error_mm(self) -> np.ndarray:
        """Distance for each joint, mm, float64 `[n]`."""
        return np.linalg.norm(self.believed - self.true, axis=-1) * 1e3


class ControlLoop:
    """Runs a policy within the safety contract.

    - `safety`: its state, reason and counts. - `readings`, `goal`: what is known; whoever hears of it puts it there
    - `self_model`: of the last step or look, or None. - `times`: of a step, ms
    """

    def __init__(self, robot: Robot, policy: Policy, limits: Limits, max_age: float, goal_max_age: float):
        self.robot = robot
        self.policy = policy
        self.safety = Safety(limits, max_age)
        self.readings = JointReadings(robot.joint_names)
        self.goal = Goal()
        self.needs_goal = not isinstance(policy, LeapPolicy)
        self.goal_max_age = goal_max_age
        self._workspace = Workspace(robot, policy.tip) if isinstance(policy, ReachPolicy) else None
        self.self_model: SelfModel | None = None
        self.look_failure = ""
        self.times = Samples(WINDOW)

    def step(self, now: float) -> Setpoint | None:
        """Run one control period; return what goes to the joints, or None when nothing does.

        :param now: seconds, of the clock that readings and goal were stamped by.
        """
        safety, readings = self.safety, self.readings
        started = safety.state == MOVING
        if not safety.admit(now, readings.positions, readings.when, self._goal_refusal(now)):
            return safety.take_halt()
        start = perf_counter()
        try:
            if not started:  # a history with a gap in it would be none
                self.policy.reset(readings.positions)
            command = self._act(self.policy, readings.positions)
        except Exception as error:  # whatever a back end throws: the robot holds
            safety.hold("policy_failed", f"the policy failed: {describe(error)}")
            return safety.take_halt()
        setpoint = safety.limit(command.positions, command.velocities, readings.positions)
        self.times.add((perf_counter() - start) * 1e3)
        if setpoint is None:
            return safety.take_halt()
        if isinstance(self.policy, LeapPolicy):
            self.policy.follow(setpoint.positions)
        return setpoint

    def look(self, now: float) -> None:
        """Ask the self-model of a robot that is not moving, and move nothing: a wrong URDF shows before it is enabled."""
        readings = self.readings
        if self.safety.state == MOVING or not np.isfinite(readings.positions).all():
            return
        if not (now - readings.when <= self.safety.max_age).all():
            return
        self.look_failure = ""
        try:
            policy = copy(self.policy)  # a look leaves no trace in the policy's memory
            policy.reset(readings.positions)
            self._act(policy, readings.positions)
        except Exception as error:
            self.look_failure = f"the policy failed: {describe(error)}"

    def enable(self, now: float) -> str:
        """Arm; return why not, or "". A goal may still be missing: the robot then holds until one comes."""
        return self.safety.enable(now, self.readings.positions, self.readings.when)

    def reset(self, now: float) -> str:
        """Start anew from the measured pose: the policy's memory, and what counts as commanded; return why not, or ""."""
        readings = self.readings
        if not (np.isfinite(readings.positions).all() and (now - readings.when <= self.safety.max_age).all()):
            return "the joints' positions are not known (see diagnostics)"
        self.policy.reset(readings.positions)
        self.safety.anchor(readings.positions)
        return ""

    def _act(self, policy: Policy, positions: np.ndarray) -> Command:
        with np.errstate(invalid="ignore", over="ignore"):  # a NaN is refused by name, not warned of by numpy
            command = policy.act(positions, self.goal.position)
        if command.joint_positions is not None and np.isfinite(command.joint_positions).all():
            self.self_model = SelfModel(self.robot, positions.copy(), command.joint_positions)
        return command

    def _goal_refusal(self, now: float) -> tuple[str, str] | None:
        if not self.needs_goal or self.safety.state == DISARMED:
            return None
        refused = self.goal.refusal(now, self.goal_max_age)
        if refused is None and self._workspace is not None and self.goal.position is not None:
            return self._workspace.refusal(self.goal.position)
        return refused
