# SPDX-License-Identifier: Apache-2.0
"""The published policy of GET-Zero: a LEAP hand of any build turns a cube (task `leap_rotation`).

Its observation, histories, phase and action rule are those of Patel and Song, "GET-Zero: Graph Embodiment Transformer for
Zero-shot Embodiment Generalization" (ICRA 2025), written from a specification of the release. Where the release fails on
hardware, the simulator's ways are kept: a reset fills the joints' history with the state at that moment and restarts the phase.
"""

import math
from copy import copy

import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import ModelError, RobotError
from deeprob_perception.policy.command import Command
from deeprob_perception.policy.graph_inputs import graph_inputs, slots
from deeprob_perception.robots import Robot
from deeprob_perception.robots.robot import euler

RATE = 20.0  # Hz; the policy was trained at it, and its history and steps mean time
STEPS = 6  # of history
LAYOUT = "leap-1"  # of the tokens; a model says which one it was trained with
TOKEN = 30  # floats: 12 of the phase, 12 of the joint's history, 6 of its place
LARGEST = 1 / 24  # rad, of a step
TURN = math.pi  # rad of phase a second: the gait's period is 2 s


class History:
    """The tokens of one hand: what is the same for all joints, what each did lately, and where it sits.

    Oldest first. Everything starts at zero; a reset fills the joints' part with the current values, and leaves the phase's.

    :param lower, upper: limits, rad `[n]`. :param origins: of the joints in the link before each, `[n, 4, 4]`.
    """

    def __init__(self, lower: np.ndarray, upper: np.ndarray, origins: np.ndarray):
        self._middle, self._half = (lower + upper) / 2, (upper - lower) / 2
        count = len(lower)
        self._phase = np.zeros((2, STEPS))  # sine, cosine
        self._joints = np.zeros((count, 2, STEPS))  # position of -1 to 1, target in rad
        self._place = np.concatenate((origins[:, :3, 3], euler(origins[:, :3, :3])), -1)  # m and rad

    def push(self, phase: tuple[float, float], positions: np.ndarray, targets: np.ndarray, reset: bool) -> None:
        """Take in one control step.

        :param phase: sine and cosine. :param positions, targets: rad `[n]`. :param reset: fill the joints' history.
        """
        self._phase = np.roll(self._phase, -1, -1)
        self._phase[:, -1] = phase
        newest = np.stack(((positions - self._middle) / self._half, targets), -1)  # [n, 2]
        self._joints = np.roll(self._joints, -1, -1)
        self._joints[:, :, slice(None) if reset else slice(-1, None)] = newest[..., None]

    def tokens(self) -> np.ndarray:
        """Return the tokens, float32 `[n, 30]`."""
        count = len(self._joints)
        shared = np.broadcast_to(self._phase.ravel(), (count, 2 * STEPS))
        return np.concatenate((shared, self._joints.reshape(count, -1), self._place), -1).astype(np.float32)


def next_target(target: np.ndarray, action: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Return the next position target, rad `[..., n]`: from the last *target*, not from where the joint is."""
    return np.clip(target + np.clip(action, -1, 1) * LARGEST, lower, upper)


class LeapPolicy:
    """Turns a cube in the hand. Has no goal: it is told the joints' positions only.

    :param rate: of control; the policy was trained at 20 Hz.
    :raises ModelError: for another rate or another layout of tokens. :raises RobotError: for a hand that it cannot express.
    """

    def __init__(self, engine: Engine, robot: Robot, rate: float = RATE):
        if rate != RATE:
            raise ModelError(f"{engine.path.name} was trained at {RATE:g} Hz and cannot run at {rate:g}; set rate to {RATE:g}")
        if engine.metadata["layout"] != LAYOUT:
            raise ModelError(f"{engine.path} takes tokens {engine.metadata['layout']!r}; this version makes {LAYOUT!r}")
        size = next(spec.shape[2] for spec in engine.inputs if spec.name == "tokens")
        if size != TOKEN:
            raise ModelError(f"{engine.path} takes tokens of {size} numbers, leap_rotation's have {TOKEN}; export it again")
        endless = [n for n, low, up in zip(robot.joint_names, robot.lower, robot.upper, strict=True)
                   if not (np.isfinite(low) and np.isfinite(up) and up > low)]  # fmt: skip
        if endless or robot.prismatic.any():
            names = endless or [n for n, slides in zip(robot.joint_names, robot.prismatic, strict=True) if slides]
            raise RobotError(f"leap_rotation moves joints that turn between two limits; {', '.join(names)} is none")
        self._engine = engine
        self._graph = graph_inputs(engine, robot.graph(), robot.name)
        self._lower, self._upper = robot.lower, robot.upper
        self._history = History(robot.lower, robot.upper, robot.origins)
        self._tokens = np.zeros((1, slots(engine), TOKEN), np.float32)
        self._target = np.zeros(len(robot.joint_names))
        self._step = 0

    def reset(self, positions: np.ndarray) -> None:
        """Start anew from the measured positions `[n]`: they are the targets too, and the phase starts again."""
        self._target = np.array(positions, np.float64)
        self._step = 0
        self._history = copy(self._history)  # what is pushed from now on is not seen by a copy of this policy

    def act(self, positions: np.ndarray, goal: np.ndarray | None = None) -> Command:
        """Return the next step from the measured positions `[n]`, rad; a goal means nothing here."""
        angle = (self._step - 1) / RATE * TURN
        self._history.push((math.sin(angle), math.cos(angle)), positions, self._target, reset=self._step == 0)
        self._step += 1
        count = len(positions)
        self._tokens[0, :count] = self._history.tokens()
        found = self._engine(outputs=None, tokens=self._tokens, **self._graph)
        action = found["policy"].reshape(-1)[:count].astype(np.float64)
        target = next_target(self._target, action, self._lower, self._upper)
        change, self._target = target - self._target, target
        places = found.get("policy_forward_kinematics")
        return Command(target, change * RATE, None if places is None else places[0, :count].astype(np.float64))

    def follow(self, commanded: np.ndarray) -> None:
        """Take what was commanded in the end, `[n]`, for the target: it may be less than was asked for."""
        self._target = np.array(commanded, np.float64)
