# SPDX-License-Identifier: Apache-2.0
"""Many robots at once, padded to one number of joints: their kinematics and graphs as plain arrays.

What a policy computes of its own robot is what it was trained on: one robot is a batch of one.

Shapes in comments: R robots, S states of each, n joints (padded).
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from deeprob_perception.errors import RobotError
from deeprob_perception.robots.robot import Graph, Robot


@dataclass(frozen=True)
class RobotBatch:
    """Joints in an order in which each stands behind the one that carries it. Lengths in metres, angles in radians.

    - `origins`: of each joint in the frame of the joint before it (`parent`), or in the root's, float32 `[R, n, 4, 4]`
    - `axes`: unit vectors in the joints' own frames, float32 `[R, n, 3]`; `prismatic`: bool `[R, n]`
    - `parent`: index of the joint before, -1 for none, int64 `[R, n]`
    - `lower`, `upper`, `velocity`: limits, float32 `[R, n]`; infinite where there are none
    - `count`: of joints, int64 `[R]`
    - `tip_joint`: the joint that carries the tip, int64 `[R]`; `tip`: where in its frame, float32 `[R, 3]`
    """

    origins: np.ndarray
    axes: np.ndarray
    prismatic: np.ndarray
    parent: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    count: np.ndarray
    tip_joint: np.ndarray
    tip: np.ndarray

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, rows: np.ndarray | slice) -> "RobotBatch":
        return RobotBatch(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def padding(self) -> np.ndarray:
        """True where there is no joint, bool `[R, n]`."""
        return np.arange(self.origins.shape[1]) >= self.count[:, None]

    @property
    def limited(self) -> np.ndarray:
        """True for the joints that have both limits, bool `[R, n]`."""
        return np.isfinite(self.lower) & np.isfinite(self.upper)

    def poses(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the joints' frames in the root's: rotations float32 `[R, S, n, 3, 3]` and origins `[R, S, n, 3]`.

        :param positions: of the joints, float32 `[R, S, n]`.
        """
        robots, states, joints = positions.shape
        rotations = np.empty((robots, states, joints, 3, 3), np.float32)
        places = np.empty((robots, states, joints, 3), np.float32)
        # Each joint's frame in that of the joint before it, all of them at once; what is left for the loop is the chain.
        origin = self.origins[:, None, :, :3, :3]
        moved = origin @ self._turns(positions)
        slides = np.where(self.prismatic[:, None], positions, 0)[..., None] * self.axes[:, None]  # [R, S, n, 3]
        shift = self.origins[:, None, :, :3, 3] + (origin @ slides[..., None])[..., 0]
        rows, uniform = np.arange(robots), (self.parent == self.parent[:1]).all(0)
        for i in range(joints):
            before = self.parent[:, i]
            if uniform[i] and before[0] < 0:
                rotations[:, :, i], places[:, :, i] = moved[:, :, i], shift[:, :, i]
                continue
            if uniform[i]:
                carrier, at = rotations[:, :, before[0]], places[:, :, before[0]]  # [R, S, ...]
            else:
                carrier, at = rotations[rows, :, before], places[rows, :, before]  # wrong at the root, and mended
                carrier[before < 0], at[before < 0] = np.eye(3), 0
            rotations[:, :, i] = carrier @ moved[:, :, i]
            places[:, :, i] = at + (carrier @ shift[:, :, i, :, None])[..., 0]
        return rotations, places

    def _turns(self, positions: np.ndarray) -> np.ndarray:
        """Return Rodrigues' rotations of all joints, float32 `[R, S, n, 3, 3]`; the identity of those that slide."""
        angles = np.where(self.prismatic[:, None], 0, positions)[..., None, None]
        cosine = np.cos(angles)
        return cosine * np.eye(3, dtype=np.float32) + np.sin(angles) * self._cross + (1 - cosine) * self._outer

    @cached_property
    def _cross(self) -> np.ndarray:
        """Return the matrices of the axes' cross products, float32 `[R, 1, n, 3, 3]`."""
        x, y, z = np.moveaxis(self.axes, -1, 0)
        zero = np.zeros_like(x)
        return np.stack((zero, -z, y, z, zero, -x, -y, x, zero), -1).reshape(len(self), 1, -1, 3, 3)

    @cached_property
    def _outer(self) -> np.ndarray:
        """Return the outer products of the axes with themselves, float32 `[R, 1, n, 3, 3]`."""
        return self.axes[:, None, :, :, None] * self.axes[:, None, :, None, :]

    def tips(self, rotations: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return where the tips are in the roots' frames, `[R, S, 3]`, of what `poses` returned."""
        rows = np.arange(len(self))
        turned = rotations[rows, :, self.tip_joint] @ self.tip[:, None, :, None]
        return places[rows, :, self.tip_joint] + turned[..., 0]

    def jacobian(self, rotations: np.ndarray, places: np.ndarray, tips: np.ndarray) -> np.ndarray:
        """Return how the tips move with the joints, `[R, S, n, 3]` (a row a joint), in the roots' frames."""
        axes = (rotations @ self.axes[:, None, :, :, None])[..., 0]  # [R, S, n, 3]
        columns = np.where(self.prismatic[:, None, :, None], axes, cross(axes, tips[:, :, None] - places))
        return columns * self.carries[:, None, :, None]

    @cached_property
    def carries(self) -> np.ndarray:
        """True for the joints that move the tip, bool `[R, n]`."""
        found = np.zeros(self.parent.shape, bool)
        rows, joint = np.arange(len(self)), self.tip_joint.copy()
        while (joint >= 0).any():
            found[rows[joint >= 0], joint[joint >= 0]] = True
            joint = np.where(joint >= 0, self.parent[rows, joint], -1)
        return found

    @cached_property
    def reach(self) -> np.ndarray:
        """Return how long the stretched chain to the tip is, metres, float32 `[R]`: the unit of lengths for a policy."""
        lengths = np.linalg.norm(self.origins[..., :3, 3], axis=-1)
        slide = np.where(self.prismatic, np.minimum(self.upper - self.lower, 1e3), 0)
        chain = np.where(self.carries, lengths + slide, 0).sum(1)
        return np.maximum(chain + np.linalg.norm(self.tip, axis=-1), 1e-3).astype(np.float32)

    def graphs(self) -> Graph:
        """Return the matrices of all robots, int64 `[R, n, n]`; -1 and 0 at padding. Equal to `Robot.graph`."""
        robots, joints = self.parent.shape
        there = ~self.padding
        parent = np.zeros((robots, joints, joints), np.int64)
        rows = np.arange(robots)
        for i in range(joints):
            above, steps = self.parent[:, i], 1
            while (above >= 0).any():
                on = above >= 0
                parent[rows[on], i, above[on]] = steps
                above, steps = np.where(on, self.parent[rows, above], -1), steps + 1
        carrier = np.where(self.parent < 0, -1, self.parent)
        adjacent = carrier[:, :, None] == carrier[:, None, :]  # on one body
        adjacent |= (parent == 1) | (parent == 1).transpose(0, 2, 1)
        adjacent &= there[:, :, None] & there[:, None, :]
        distance = np.full((robots, joints, joints), -1, np.int64)
        reached = np.broadcast_to(np.eye(joints, dtype=bool), distance.shape) & there[:, :, None]
        frontier, steps = reached.copy(), 0
        while frontier.any():
            distance[frontier] = steps
            frontier = (frontier.astype(np.float32) @ adjacent.astype(np.float32) > 0) & ~reached
            reached = reached | frontier
            steps += 1
        parent *= there[:, :, None] & there[:, None, :]
        return Graph(distance, parent, np.ascontiguousarray(parent.transpose(0, 2, 1)))


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cross products of vectors `[..., 3]`; np.cross takes longer for a few."""
    return a[..., (1, 2, 0)] * b[..., (2, 0, 1)] - a[..., (2, 0, 1)] * b[..., (1, 2, 0)]


def of_robot(robot: Robot, tip: str, joints: int | None = None) -> RobotBatch:
    """Return one robot as a batch of one.

    :param tip: the link that the policy moves. :param joints: pad to so many.
    :raises RobotError: when no joint moves the tip, the robot has more than `joints`, or a mimic joint lies between its joints.
    """
    count = len(robot.joint_names)
    size = joints or count
    if count > size:
        raise RobotError(f"{robot.name!r} has {count} joints to move, the model takes {size}; name fewer of them by `joints`")
    graph = robot.graph()
    parent = np.full((1, size), -1, np.int64)
    for i, j in zip(*np.nonzero(graph.parent == 1), strict=True):
        parent[0, i] = j
    tip_joint, offset = robot.carrier(tip)

    def padded(values: np.ndarray, fill: object) -> np.ndarray:
        out = np.broadcast_to(np.asarray(fill).astype(values.dtype), (1, size, *values.shape[1:])).copy()
        out[0, :count] = values
        return out

    batch = RobotBatch(
        padded(robot.origins.astype(np.float32), np.eye(4)),
        padded(robot.axes.astype(np.float32), (0, 0, 1)),
        padded(robot.prismatic, False),
        parent,
        padded(robot.lower.astype(np.float32), 0),
        padded(robot.upper.astype(np.float32), 0),
        padded(robot.velocity.astype(np.float32), 0),
        np.array([count]),
        np.array([tip_joint]),
        offset[None, :3, 3].astype(np.float32),
    )
    random = np.random.default_rng(0)
    sample = random.uniform(np.maximum(robot.lower, -3), np.minimum(robot.upper, 3), (4, count))
    there = np.zeros((1, 4, size), np.float32)
    there[0, :, :count] = sample
    found = batch.tips(*batch.poses(there))[0]
    true = robot.forward_kinematics(sample, [tip])[:, 0, :3, 3]
    if np.abs(found - true).max() > 1e-4 * max(1.0, float(batch.reach[0])):
        raise RobotError(
            f"between the joints of {robot.name!r} that carry {tip!r} one mimics another, which the policy cannot express"
        )
    return batch
