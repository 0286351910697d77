# SPDX-License-Identifier: Apache-2.0
"""Robots that never were: random chains and trees, and families of arms and fingers, for a policy to learn from.

The families have the order of joints that common designs share, with dimensions, limits and speeds of our own at random; no
real robot's description is in here. Frames are turned at random, as descriptions differ in where they put them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from deeprob_perception.robots.batch import RobotBatch

X, Y, Z = np.eye(3)
Random = np.random.Generator


@dataclass
class Design:
    """A robot being drawn: joints in order, each in the frame of the one before, whose axes are all parallel at zero."""

    shifts: list[np.ndarray] = field(default_factory=list)  # from the joint before, m
    axes: list[np.ndarray] = field(default_factory=list)
    prismatic: list[bool] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    velocity: list[float] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    tip: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def add(
        self, shift: np.ndarray, axis: np.ndarray, limits: tuple[float, float], velocity: float, prismatic: bool = False,
        parent: int | None = None,
    ) -> None:  # fmt: skip
        self.parent.append(len(self.axes) - 1 if parent is None else parent)
        self.shifts.append(np.asarray(shift, float))
        self.axes.append(np.asarray(axis, float))
        self.prismatic.append(prismatic)
        self.lower.append(limits[0])
        self.upper.append(limits[1])
        self.velocity.append(velocity)


def generate(count: int, seed: int, joints: int = 9) -> RobotBatch:
    """Return `count` robots of at most `joints` joints, the same for the same seed."""
    random = np.random.default_rng(seed)
    families = [family for family, share in FAMILIES for _ in range(share)]
    return collect([frames(families[random.integers(len(families))](random), random) for _ in range(count)], joints)


def span(random: Random, least: float, most: float) -> float:
    return float(random.uniform(least, most))


def turn_limits(random: Random, least: float = 1.0, most: float = 3.0) -> tuple[float, float]:
    """Return limits of a turning joint that hold zero, or nearly."""
    return -span(random, least, most) * span(random, 0.3, 1), span(random, least, most)


def chain(random: Random) -> Design:
    """Any chain of 3 to 9 joints."""
    design = Design()
    scale = float(np.exp(random.uniform(np.log(0.15), np.log(1.5))))
    count = int(random.integers(3, 10))
    speed = span(random, 1, 4)
    for i in range(count):
        length = scale * span(random, 0.02, 1) / count * 2 if i or random.random() < 0.5 else 0.0
        way = Z if random.random() < 0.5 else random.normal(size=3)
        axis = (X, Y, Z)[random.integers(3)] if random.random() < 0.8 else random.normal(size=3)
        if i and abs(np.dot(axis, design.axes[-1])) > 0.99 * np.linalg.norm(axis) and random.random() < 0.6:
            axis = np.roll(axis, 1)
        shift = way / np.linalg.norm(way) * length
        axis = axis / np.linalg.norm(axis)
        kind = random.random()
        if kind < 0.12:
            low = -span(random, 0, 0.3) * scale
            design.add(shift, axis, (low, low + scale * span(random, 0.15, 0.6)), scale * span(random, 0.2, 0.8), True)
        elif kind < 0.2:
            design.add(shift, axis, (-np.inf, np.inf), speed * span(random, 0.6, 1.4))
        else:
            design.add(shift, axis, turn_limits(random, 0.7, 3.1), speed * span(random, 0.6, 1.4))
    design.tip = random.normal(size=3) * scale * 0.08 + Z * scale * span(random, 0.02, 0.25)
    return design


def tree(random: Random) -> Design:
    """A chain with joints on the side, which have nothing to do with the tip."""
    design = chain(random)
    while len(design.axes) > 7:
        design = chain(random)
    for _ in range(int(random.integers(1, 10 - len(design.axes)))):
        parent = int(random.integers(-1, len(design.axes)))
        axis = random.normal(size=3)
        design.add(
            random.normal(size=3) * 0.1, axis / np.linalg.norm(axis), turn_limits(random), span(random, 1, 3), parent=parent
        )
    return design


def arm(random: Random) -> Design:
    """Base, shoulder, elbow and a wrist of two or three joints: with axes in one point, or one beside the other."""
    scale, speed = span(random, 0.6, 1.6), span(random, 1.5, 3.5)
    design = Design()
    beside = random.random() < 0.5
    wide = random.random() < 0.4  # every joint turns once around, either way
    side = span(random, -0.15, 0.15) * scale

    def limits(least: float, most: float) -> tuple[float, float]:
        return (-2 * np.pi, 2 * np.pi) if wide else turn_limits(random, least, most)

    design.add(Z * span(random, 0.05, 0.35) * scale, Z, limits(2.6, 3.1), speed)
    design.add(Y * side + X * span(random, 0, 0.1) * scale, Y, limits(1.3, 2.2), speed)
    upper = Z if random.random() < 0.5 else X
    design.add(upper * span(random, 0.25, 0.5) * scale - Y * side * span(random, 0, 1), Y, limits(2.0, 2.8), speed)
    forearm = (Z if random.random() < 0.5 else X) * span(random, 0.2, 0.45) * scale
    quick = speed * span(random, 1, 1.6)
    if beside:
        design.add(forearm, Y, limits(1.8, 3.1), quick)
        design.add(Y * span(random, 0.05, 0.15) * scale, Z, limits(1.8, 3.1), quick)
        design.add(Z * span(random, 0.05, 0.12) * scale, Y, limits(2.5, 3.1), quick)
    else:
        along = forearm / np.linalg.norm(forearm)
        design.add(forearm * span(random, 0, 0.6), along, limits(2.6, 3.1), quick)
        design.add(forearm * span(random, 0.4, 1), Y, limits(1.6, 2.2), quick)
        design.add(along * span(random, 0, 0.1) * scale, along, limits(2.6, 3.1), quick)
    design.tip = random.normal(size=3) * 0.02 * scale + (Z, X, Y)[random.integers(3)] * span(random, 0.02, 0.25) * scale
    return design


def redundant_arm(random: Random) -> Design:
    """Seven joints: turns along the links between turns across them, with or without offsets at the elbow."""
    scale, speed = span(random, 0.6, 1.3), span(random, 1.5, 3)
    elbow = span(random, 0, 0.12) * scale * (random.random() < 0.6)
    design = Design()
    design.add(Z * span(random, 0.15, 0.4) * scale, Z, turn_limits(random, 2.5, 3), speed)
    design.add(Z * 0, Y, turn_limits(random, 1.5, 2.1), speed)
    design.add(Z * span(random, 0.2, 0.4) * scale, Z, turn_limits(random, 2.5, 3), speed)
    # An elbow that bends one way only is common.
    bends = (-span(random, 2.4, 3.1), -span(random, 0, 0.2)) if random.random() < 0.6 else turn_limits(random, 2, 2.6)
    design.add(X * elbow, Y, bends, speed)
    design.add(Z * span(random, 0.2, 0.45) * scale - X * elbow, Z, turn_limits(random, 2.5, 3), speed * 1.2)
    wrist = (-span(random, 0, 0.3), span(random, 2.5, 3.8)) if random.random() < 0.5 else turn_limits(random, 1.8, 2.2)
    design.add(Z * 0, Y, wrist, speed * 1.2)
    design.add(X * span(random, 0, 0.12) * scale, Z, turn_limits(random, 2.5, 3), speed * 1.2)
    design.tip = Z * span(random, 0.05, 0.25) * scale * random.choice((-1, 1))
    return design


def hobby_arm(random: Random) -> Design:
    """A small arm: base, three joints in one plane, a roll of the hand."""
    scale, speed = span(random, 0.15, 0.6), span(random, 2, 8)
    design = Design()
    design.add(Z * span(random, 0.1, 0.3) * scale, Z, turn_limits(random, 1.6, 2.4), speed)
    design.add(Z * span(random, 0, 0.2) * scale + X * span(random, 0, 0.2) * scale, Y, turn_limits(random, 1.4, 2), speed)
    bent = X * span(random, 0, 0.15) * scale
    design.add(Z * span(random, 0.3, 0.5) * scale + bent, Y, turn_limits(random, 1.4, 2), speed)
    design.add(X * span(random, 0.3, 0.5) * scale, Y, turn_limits(random, 1.5, 2), speed)
    design.add(X * span(random, 0.05, 0.25) * scale, X, turn_limits(random, 1.7, 3.1), speed)
    design.tip = X * span(random, 0.1, 0.4) * scale + random.normal(size=3) * 0.03 * scale
    return design


def finger(random: Random) -> Design:
    """Four joints of a few centimetres: a spread and three bends, or a thumb's."""
    scale, speed = span(random, 0.06, 0.18), span(random, 2, 8)
    design = Design()
    bend = (-span(random, 0, 0.5), span(random, 1.2, 2.0))
    spread = (-span(random, 0.3, 1.1), span(random, 0.3, 1.1))
    base = random.normal(size=3) * 0.5 * scale
    kind = random.integers(3)
    if kind == 0:
        design.add(base, Z if random.random() < 0.5 else X, spread, speed)
        design.add(Z * span(random, 0, 0.25) * scale, Y, bend, speed)
    elif kind == 1:
        design.add(base, Y, bend, speed)
        design.add(Z * span(random, 0, 0.25) * scale, X, spread, speed)
    else:  # a thumb: it turns about itself before it bends
        design.add(base, X, (span(random, 0, 0.4), span(random, 1.2, 1.8)), speed)
        design.add(Z * span(random, 0, 0.3) * scale, Z, (-span(random, 0, 0.3), span(random, 0.8, 1.4)), speed)
    design.add(Z * span(random, 0.2, 0.5) * scale, Y, bend, speed)
    if random.random() < 0.9:
        design.add(Z * span(random, 0.2, 0.4) * scale, Y, (-span(random, 0, 0.4), span(random, 1.2, 2)), speed)
    design.tip = Z * span(random, 0.15, 0.4) * scale + random.normal(size=3) * 0.02 * scale
    return design


def lift(random: Random) -> Design:
    """A lift, a telescope of one to four parts, and a wrist; some on a base that turns."""
    scale = span(random, 0.7, 1.4)
    design = Design()
    if random.random() < 0.3:
        design.add(Z * 0.1, Z, turn_limits(random, 2, 3), span(random, 0.5, 2))
    design.add(random.normal(size=3) * 0.1 * scale, Z, (0.0, span(random, 0.5, 1.1) * scale), span(random, 0.1, 0.5), True)
    parts = int(random.integers(1, 5))
    way = (-Y, Y, X)[random.integers(3)]
    for _ in range(parts):
        slide = (0.0, span(random, 0.35, 0.7) * scale / parts)
        design.add(way * span(random, 0, 0.15), way, slide, span(random, 0.1, 0.5), True)
    speed = span(random, 1, 3)
    design.add(random.normal(size=3) * 0.03 + way * span(random, 0, 0.1), Z, turn_limits(random, 1.5, 3), speed)
    if random.random() < 0.8:
        design.add(-Z * span(random, 0, 0.06), np.cross(Z, way), turn_limits(random, 0.6, 1.7), speed)
        design.add(way * span(random, 0, 0.06), way, turn_limits(random, 2, 3.1), speed)
    design.tip = way * span(random, 0.08, 0.3) + random.normal(size=3) * 0.02
    return design


FAMILIES: tuple[tuple[Callable[[Random], Design], int], ...] = (
    (chain, 5), (tree, 1), (arm, 4), (redundant_arm, 3), (hobby_arm, 3), (finger, 3), (lift, 3)
)  # fmt: skip


def frames(design: Design, random: Random) -> tuple[Design, np.ndarray]:
    """Turn the joints' frames at random; return the design, changed to them, and each one's rotation in the one before."""
    count = len(design.axes)
    style = random.random()
    turned = [np.eye(3) if style < 0.25 else rotation(random, quarter=style < 0.8) for _ in range(count)]
    base = np.eye(3) if random.random() < 0.6 else rotation(random, quarter=False)
    origins = []
    for i in range(count):
        before = base if design.parent[i] < 0 else turned[design.parent[i]]
        design.shifts[i] = before.T @ design.shifts[i]
        design.axes[i] = turned[i].T @ design.axes[i]
        origins.append(before.T @ turned[i])
    design.tip = turned[last_of_chain(design)].T @ design.tip
    return design, np.array(origins)


def last_of_chain(design: Design) -> int:
    """Return the joint that carries the tip: the last before the joints on the side begin."""
    last = 0
    while last + 1 < len(design.parent) and design.parent[last + 1] == last and design.parent[: last + 2].count(last) == 1:
        last += 1
    return last


def rotation(random: Random, quarter: bool) -> np.ndarray:
    """Return a random rotation `[3, 3]`, or one by quarter turns."""
    if quarter:
        rows = random.permutation(3)
        matrix = np.eye(3)[rows] * random.choice((-1.0, 1.0), 3)[:, None]
    else:
        matrix, _ = np.linalg.qr(random.normal(size=(3, 3)))
    return matrix * np.sign(np.linalg.det(matrix))


def collect(drawn: list[tuple[Design, np.ndarray]], joints: int) -> RobotBatch:
    count = len(drawn)
    origins = np.broadcast_to(np.eye(4, dtype=np.float32), (count, joints, 4, 4)).copy()
    axes = np.broadcast_to(Z.astype(np.float32), (count, joints, 3)).copy()
    parent = np.full((count, joints), -1, np.int64)
    values = {name: np.zeros((count, joints), np.float32) for name in ("lower", "upper", "velocity")}
    prismatic = np.zeros((count, joints), bool)
    tip, sizes, tip_joint = np.zeros((count, 3), np.float32), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for row, (design, turns) in enumerate(drawn):
        n = sizes[row] = len(design.axes)
        origins[row, :n, :3, :3], origins[row, :n, :3, 3] = turns, design.shifts
        axes[row, :n], prismatic[row, :n], parent[row, :n] = design.axes, design.prismatic, design.parent
        for name, array in values.items():
            array[row, :n] = getattr(design, name)
        tip[row], tip_joint[row] = design.tip, last_of_chain(design)
    return RobotBatch(origins, axes, prismatic, parent, count=sizes, tip_joint=tip_joint, tip=tip, **values)
