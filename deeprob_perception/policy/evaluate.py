# SPDX-License-Identifier: Apache-2.0
"""How often a policy reaches: closed loop on real robots' descriptions, whose joints follow what they are told."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeprob_perception.errors import DataError
from deeprob_perception.policy import expert
from deeprob_perception.policy.command import Policy
from deeprob_perception.robots import Robot, read
from deeprob_perception.robots.batch import RobotBatch, of_robot

SECONDS, RATE = 5.0, 20.0
ARM, FINGER = 0.01, 0.005  # m: how near to the goal counts
# File -> name, the link that reaches, and how near; of others the end of the longest chain is taken.
KNOWN = {
    "franka_panda": ("franka_panda", "panda_hand_tcp", ARM),
    "ur5e": ("ur5e", "tool0", ARM),
    "so101": ("so101", "gripper_frame_link", ARM),
    "allegro_hand_right": ("allegro", "link_3.0_tip", FINGER),
    "stretch_se3": ("stretch", "link_grasp_center", ARM),
}


@dataclass(frozen=True)
class Subject:
    """A robot to reach with: `robot` has the joints between its root and `tip`; `near` is in metres."""

    name: str
    robot: Robot
    tip: str
    near: float


@dataclass(frozen=True)
class Score:
    """`success`: share of the episodes that ended near their goal; `broken`: steps beyond a limit; `error`: median, m."""

    success: float
    broken: int
    error: float


def subjects(folder: Path) -> list[Subject]:
    """Return the robots of a folder (`*.urdf`), in the order of their names.

    :raises DataError: when there are none. :raises RobotError: for a broken description.
    """
    files = sorted(folder.glob("*.urdf")) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder} holds no robot descriptions (*.urdf)")
    found = []
    for file in files:
        urdf = read(file)
        name, tip, near = KNOWN.get(file.stem, (file.stem, "", 0.0))
        tip = tip or Robot(urdf).links[-1]
        robot = Robot(urdf, tip=tip)
        if not near:
            near = FINGER if float(of_robot(robot, tip).reach[0]) < 0.25 else ARM
        found.append(Subject(name, robot, tip, near))
    return found


def episodes(robot: Robot, tip: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts float64 `[count, n]` and goals `[count, 3]`: anywhere within the limits; each goal can be reached."""
    random = np.random.default_rng(seed)
    lower, upper = np.maximum(robot.lower, -np.pi), np.minimum(robot.upper, np.pi)
    shape = (count, len(lower))
    starts, ends = random.uniform(lower, upper, shape), random.uniform(lower, upper, shape)
    return starts, robot.forward_kinematics(ends, [tip])[:, 0, :3, 3]


def score_policy(subject: Subject, make: Callable[[Robot, str, float], Policy], count: int, seed: int = 0) -> Score:
    """Run a policy, one episode after another, as a node would."""
    robot = subject.robot
    starts, goals = episodes(robot, subject.tip, count, seed)
    policy = make(robot, subject.tip, RATE)
    batch = of_robot(robot, subject.tip)
    broken, ends = 0, np.empty_like(starts)
    for i, (positions, goal) in enumerate(zip(starts, goals, strict=True)):
        policy.reset(positions)
        for _ in range(round(SECONDS * RATE)):
            after = policy.act(positions, goal).positions
            broken += beyond(batch, positions, after)
            positions = after
        ends[i] = positions
    return score(subject, ends, goals, broken)


def score_expert(subject: Subject, count: int, seed: int = 0) -> Score:
    """Run damped least squares on the same episodes, all at once."""
    robot, batch = subject.robot, of_robot(subject.robot, subject.tip)
    starts, goals = episodes(robot, subject.tip, count, seed)
    positions, there = starts[None].astype(np.float32), goals[None].astype(np.float32)
    for _ in range(round(SECONDS * RATE)):
        rotations, places = batch.poses(positions)
        tips = batch.tips(rotations, places)
        offset = there - tips
        found = expert.direction(batch, batch.jacobian(rotations, places, tips), offset, positions)
        positions = expert.step(batch, found, offset, positions, 1 / RATE).astype(np.float32)
    return score(subject, positions[0].astype(np.float64), goals, 0)


def beyond(batch: RobotBatch, before: np.ndarray, after: np.ndarray) -> int:
    """Return 1 when a step goes beyond a limit of position or velocity, else 0."""
    out = (after > np.maximum(batch.upper[0], before) + 1e-6) | (after < np.minimum(batch.lower[0], before) - 1e-6)
    fast = np.abs(after - before) * RATE > batch.velocity[0] * (1 + 1e-3) + 1e-5
    return int(bool((out | (fast & (batch.velocity[0] > 0))).any()))


def score(subject: Subject, ends: np.ndarray, goals: np.ndarray, broken: int) -> Score:
    tips = subject.robot.forward_kinematics(ends, [subject.tip])[:, 0, :3, 3]
    distance = np.linalg.norm(tips - goals, axis=-1)
    return Score(float((distance < subject.near).mean()), broken, float(np.median(distance)))
