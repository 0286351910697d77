# SPDX-License-Identifier: Apache-2.0
"""The joints of a robot that a policy moves: their order, graph, limits and kinematics.

Frames: a joint's frame is that of its child link, at the joint's position 0 that of its origin (URDF). Poses are those of
links in the root link's frame, float64 `[..., 4, 4]`, metres.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deeprob_perception.errors import RobotError
from deeprob_perception.robots.urdf import Joint, Urdf


@dataclass(frozen=True)
class Graph:
    """How the moved joints hang together (the matrices of the Graph Embodiment Transformer); int64 `[n, n]` each.

    distance: of the shortest path between two joints, neighbours being those on one body: 0 to itself, -1 for none.
    parent: k where the column is the k-th joint above the row, towards the root, else 0. child: the same below.
    """

    distance: np.ndarray
    parent: np.ndarray
    child: np.ndarray


class Robot:
    """The part of a URDF below a root link, or the chain from it to a tip.

    - `joint_names`: of the n joints that are moved, depth first in the order of the file
    - `lower`, `upper`, `velocity`: limits, float64 `[n]` (rad or m, and per second); infinite where there are none
    - `prismatic`: bool `[n]`
    - `origins`: of each joint in the frame of the moved joint before it (fixed ones are joined into it), float64 `[n, 4, 4]`
    - `axes`: unit vectors in the joints' own frames, float64 `[n, 3]`
    - `root`, `links`: names; `links` are those whose poses can be asked for
    """

    def __init__(self, urdf: Urdf, root: str | None = None, tip: str | None = None, joints: Sequence[str] | None = None):
        """Take what moves below `root`.

        :param root: link to which everything is relative; default: the URDF's root.
        :param tip: keep only the joints between root and this link.
        :param joints: move only these; the others stay at 0, or at their limit next to it.
        :raises RobotError: for an unknown name, a mimic joint that follows none that is there, or when nothing moves.
        """
        self.name = urdf.name
        self.root = urdf.root if root is None else root
        for what, link in (("root", self.root), ("tip", tip)):
            if link is not None and link not in urdf.links:
                raise RobotError(f"the robot {urdf.name!r} has no link {link!r} to be the {what}; it has: {some(urdf.links)}")
        ordered = below(urdf, self.root)
        if tip is not None:
            ordered = chain_to(ordered, self.root, tip)
        moved = [j for j in ordered if j.kind != "fixed" and j.mimic is None and (joints is None or j.name in joints)]
        missing = sorted(set(joints or ()) - {j.name for j in moved})
        if missing:
            there = some([j.name for j in ordered if j.kind != "fixed" and j.mimic is None])
            raise RobotError(f"no joint {', '.join(missing)} can be moved below the link {self.root!r}; there are: {there}")
        if not moved:
            raise RobotError(f"nothing moves below the link {self.root!r}" + (f" up to {tip!r}" if tip else ""))
        self.joint_names = tuple(j.name for j in moved)
        self.lower = np.array([j.lower for j in moved])
        self.upper = np.array([j.upper for j in moved])
        self.velocity = np.array([j.velocity for j in moved])
        self.prismatic = np.array([j.kind == "prismatic" for j in moved])
        self.axes = np.array([j.axis for j in moved])
        self.links = (self.root, *(j.child for j in ordered))
        self._joints = ordered
        self._index = {name: i for i, name in enumerate(self.joint_names)}
        self._at = {link: i for i, link in enumerate(self.links)}  # a link -> its row among the poses
        self._drive = [self._driven_by(j, ordered) for j in ordered]
        self._parents = [self._at[j.parent] for j in ordered]
        self._ends = self._bodies()
        self.origins = self._relative_origins()

    # Kinematics -------------------------------------------------------------------------------------------------------

    def forward_kinematics(self, positions: np.ndarray, links: Sequence[str] | None = None) -> np.ndarray:
        """Return the poses of links, float64 `[..., L, 4, 4]`, at joint positions `[..., n]` (rad, m).

        :param links: names; default: the child link of each moved joint, so that L = n.
        """
        rows = [self._at[name] for name in (self.joint_links if links is None else links)]
        return self._poses(positions)[..., rows, :, :]

    def jacobian(self, positions: np.ndarray, link: str) -> np.ndarray:
        """Return a link's geometric Jacobian, float64 `[..., 6, n]`, in the root's frame: linear above angular velocity."""
        poses = self._poses(positions)
        result = np.zeros((*poses.shape[:-3], 6, len(self.joint_names)))
        target = poses[..., self._at[link], :3, 3]
        row = self._at[link]
        while row:  # from the link up to the root, whose row is 0
            joint, (index, multiplier, _) = self._joints[row - 1], self._drive[row - 1]
            if index is not None and multiplier:
                axis = poses[..., row, :3, :3] @ joint.axis * multiplier
                if joint.kind == "prismatic":
                    result[..., :3, index] += axis
                else:
                    result[..., :3, index] += np.cross(axis, target - poses[..., row, :3, 3])
                    result[..., 3:, index] += axis
            row = self._parents[row - 1]
        return result

    @property
    def joint_links(self) -> tuple[str, ...]:
        """The child link of each moved joint."""
        return tuple(j.child for j in self._joints if j.name in self._index)

    def carrier(self, link: str) -> tuple[int, np.ndarray]:
        """Return the moved joint that carries a link, and the link's pose in that joint's frame, `[4, 4]`, at rest.

        :raises RobotError: for an unknown link, or one that no joint moves.
        """
        if link not in self._at:
            raise RobotError(f"the robot {self.name!r} has no link {link!r} below {self.root!r}; it has: {some(self.links)}")
        row = self._at[link]
        while row and self._joints[row - 1].name not in self._index:
            row = self._parents[row - 1]
        if not row:
            raise RobotError(f"no joint that is moved carries the link {link!r} of {self.name!r}")
        poses = self._poses(np.clip(0.0, self.lower, self.upper))
        return self._index[self._joints[row - 1].name], np.linalg.inv(poses[row]) @ poses[self._at[link]]

    def _poses(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, np.float64)
        if positions.ndim < 1 or positions.shape[-1] != len(self.joint_names):
            raise RobotError(f"positions are {list(positions.shape)}; {self.name!r} moves {len(self.joint_names)} joints")
        poses = np.empty((*positions.shape[:-1], len(self.links), 4, 4))
        poses[..., 0, :, :] = np.eye(4)
        for row, (joint, (index, multiplier, offset), parent) in enumerate(
            zip(self._joints, self._drive, self._parents, strict=True), start=1
        ):
            pose = poses[..., parent, :, :] @ joint.origin
            if joint.kind != "fixed":
                value = np.full(positions.shape[:-1], offset) if index is None else positions[..., index] * multiplier + offset
                pose = pose @ motion(joint, value)
            poses[..., row, :, :] = pose
        return poses

    def _driven_by(self, joint: Joint, ordered: list[Joint]) -> tuple[int | None, float, float]:
        """Return which moved joint drives this one, by what factor, and its offset; None for one that stays where it is."""
        named = {j.name: j for j in ordered}
        factor, offset, seen = 1.0, 0.0, {joint.name}
        while joint.mimic is not None:
            followed, multiplier, shift = joint.mimic
            offset += factor * shift
            factor *= multiplier
            if followed not in named:
                where = "which is not below the root, or not up to the tip"
                raise RobotError(f"the joint {joint.name!r} mimics {followed!r}, {where}")
            if followed in seen:
                raise RobotError(f"the joint {joint.name!r} mimics itself, by way of {followed!r}")
            seen.add(followed)
            joint = named[followed]
        if joint.name in self._index:
            return self._index[joint.name], factor, offset
        rest = 0.0 if joint.kind == "fixed" else float(np.clip(0.0, joint.lower, joint.upper))
        return None, 0.0, factor * rest + offset

    def driven(self) -> list[tuple[Joint, int | None, float, float]]:
        """Return every joint that is not fixed, and what drives it: index of a moved joint (None for one that stays where it
        is), the factor, and the offset (rad, m)."""
        pairs = zip(self._joints, self._drive, strict=True)
        return [(joint, *drive) for joint, drive in pairs if joint.kind != "fixed"]

    # The graph --------------------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        """Return how the moved joints hang together."""
        count = len(self.joint_names)
        above = [self._above(i) for i in range(count)]
        parent = np.zeros((count, count), np.int64)
        for i in range(count):
            k, j = 1, above[i]
            while j is not None:
                parent[i, j] = k
                k, j = k + 1, above[j]
        carries, carried = np.array(self._ends).T  # the body that a joint hangs on, and the one that it moves
        adjacent = carries[:, None] == carries
        adjacent |= (carried[:, None] == carries) | (carries[:, None] == carried)
        np.fill_diagonal(adjacent, False)
        distance = np.full((count, count), -1, np.int64)
        reached = np.eye(count, dtype=bool)
        frontier, steps = reached, 0
        while frontier.any():
            distance[frontier] = steps
            frontier = (frontier.astype(np.int64) @ adjacent > 0) & ~reached
            reached = reached | frontier
            steps += 1
        return Graph(distance, parent, np.ascontiguousarray(parent.T))

    def _above(self, joint: int) -> int | None:
        """Return the next moved joint towards the root."""
        body = self._ends[joint][0]
        return next((i for i, (_, carried) in enumerate(self._ends) if carried == body), None)

    def _bodies(self) -> list[tuple[int, int]]:
        """Number the sets of links between which nothing is moved on its own; return for each moved joint the two it joins."""
        body = {self.root: 0}
        ends: list[tuple[int, int]] = []
        for joint in self._joints:
            if joint.name in self._index:
                body[joint.child] = len(ends) + 1
                ends.append((body[joint.parent], len(ends) + 1))
            else:
                body[joint.child] = body[joint.parent]
        return ends

    def _relative_origins(self) -> np.ndarray:
        """Return each moved joint's origin in the frame of the moved joint before it, all others at rest."""
        rest = np.clip(0.0, self.lower, self.upper)
        poses = self._poses(rest)
        origins = []
        for i, joint in enumerate(j for j in self._joints if j.name in self._index):
            before = self._above(i)
            start = np.eye(4) if before is None else poses[self._at[self.joint_links[before]]]
            origins.append(np.linalg.inv(start) @ poses[self._at[joint.parent]] @ joint.origin)
        return np.array(origins)


def motion(joint: Joint, value: np.ndarray) -> np.ndarray:
    """Return what a joint adds to its origin at `value` `[...]` (rad, m), float64 `[..., 4, 4]`."""
    result = np.zeros((*value.shape, 4, 4))
    result[..., range(4), range(4)] = 1.0
    x, y, z = joint.axis
    if joint.kind == "prismatic":
        result[..., :3, 3] = value[..., None] * joint.axis
        return result
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sine, cosine = np.sin(value)[..., None, None], np.cos(value)[..., None, None]
    result[..., :3, :3] = np.eye(3) + sine * cross + (1 - cosine) * (cross @ cross)  # Rodrigues
    return result


def euler(rotation: np.ndarray) -> np.ndarray:
    """Return roll, pitch, yaw (rad) of matrices `[..., 3, 3]`, float64 `[..., 3]`; yaw is 0 where roll and yaw are one turn."""
    pitch = np.arcsin(np.clip(-rotation[..., 2, 0], -1.0, 1.0))
    singular = np.abs(rotation[..., 2, 0]) > 1 - 1e-12
    roll = np.where(
        singular,
        np.arctan2(-rotation[..., 1, 2], rotation[..., 1, 1]),
        np.arctan2(rotation[..., 2, 1], rotation[..., 2, 2]),
    )
    yaw = np.where(singular, 0.0, np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0]))
    return np.stack((roll, pitch, yaw), -1)


def below(urdf: Urdf, root: str) -> list[Joint]:
    """Return the joints below a link, depth first, those of one link in the order of the file."""
    children: dict[str, list[Joint]] = {}
    for joint in urdf.joints:
        children.setdefault(joint.parent, []).append(joint)
    found: list[Joint] = []
    pending = children.get(root, [])[::-1]
    while pending:
        joint = pending.pop()
        found.append(joint)
        pending.extend(children.get(joint.child, [])[::-1])
    return found


def chain_to(joints: list[Joint], root: str, tip: str) -> list[Joint]:
    """Return those of the joints that lie between root and tip."""
    carrier = {joint.child: joint for joint in joints}
    kept: list[Joint] = []
    link = tip
    while link != root:
        if link not in carrier:
            raise RobotError(f"the link {tip!r} does not hang on {root!r}")
        kept.append(carrier[link])
        link = carrier[link].parent
    return kept[::-1]


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"
