# SPDX-License-Identifier: Apache-2.0
"""URDF text -> links and joints, checked: what a policy moves by must be a tree, with finite numbers and limits.

The text may come from anybody on `/robot_description`, so nothing in it is expanded or fetched (no DTD, no entities, no meshes)
and its size is bounded. Geometry and inertia are not read. Format: http://wiki.ros.org/urdf/XML.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from deeprob_perception.errors import RobotError

MAX_BYTES = 16 << 20  # a description with its meshes' names is some 100 kB
MAX_LINKS = 2000  # the largest humanoids have some 200
MOVING = ("revolute", "continuous", "prismatic")
IMPOSSIBLE = {
    "floating": "a base that floats is not moved by a joint; make it fixed, or name a root link below it",
    "planar": "two motions in one joint have no limits in URDF; describe them as two prismatic joints",
}


@dataclass(frozen=True)
class Joint:
    """A joint as the URDF has it: `origin` float64 `[4, 4]` in the parent link's frame, `axis` of length 1 in the joint's own.

    `lower`, `upper` (rad, m) are infinite for a continuous joint; `velocity` (rad/s, m/s) is infinite where none is given.
    `mimic` is (the joint that it follows, multiplier, offset), or None.
    """

    name: str
    kind: str
    parent: str
    child: str
    origin: np.ndarray
    axis: np.ndarray
    lower: float = -math.inf
    upper: float = math.inf
    velocity: float = math.inf
    mimic: tuple[str, float, float] | None = None


@dataclass(frozen=True)
class Urdf:
    """A robot's links, and joints in the order of the file; `root` is the link that no joint carries."""

    name: str
    links: tuple[str, ...]
    joints: tuple[Joint, ...]
    root: str


def read(path: str | Path) -> Urdf:
    """Read a URDF file; errors are those of `parse`, and name the file."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RobotError(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        text = path.read_bytes()
    except OSError as error:
        raise RobotError(f"cannot read {path}: {error.strerror}") from error
    try:
        return parse(text)
    except RobotError as error:
        raise RobotError(f"{path}: {error}") from error


def parse(text: str | bytes) -> Urdf:
    """Parse a robot description.

    :raises RobotError: for what is no URDF, holds a DTD, is too large, has no tree (cycles, several roots, unknown links), or
        has a joint that cannot be expressed: by the joint's or link's name.
    """
    if len(text) > MAX_BYTES:
        raise RobotError(f"the robot description has {len(text)} bytes; at most {MAX_BYTES} are read")
    root = elements(text)
    if root.tag != "robot":
        raise RobotError(f"the description's outermost element is <{root.tag}>, not <robot>; is it a URDF? (xacro runs first)")
    links = [named(element, "link") for element in root.findall("link")]
    if len(links) > MAX_LINKS:
        raise RobotError(f"the robot has {len(links)} links; at most {MAX_LINKS} are taken")
    if not links:
        raise RobotError("the robot has no links")
    joints = [joint(element) for element in root.findall("joint")]
    unique(links, "links")
    unique([j.name for j in joints], "joints")
    return Urdf(root.get("name", ""), tuple(links), tuple(joints), tree_root(links, joints))


def elements(text: str | bytes) -> ElementTree.Element:
    """Parse XML that declares nothing: a DTD is how an entity comes to be expanded a billionfold, or a file to be read."""
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise RobotError("the robot description holds a DTD (<!DOCTYPE ...>), which a URDF does not need; remove it")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = lambda tag, attributes: builder.start(tag, attributes)
    parser.EndElementHandler = lambda tag: builder.end(tag)
    try:
        parser.Parse(text.encode() if isinstance(text, str) else text, True)
        return builder.close()
    except (expat.ExpatError, UnicodeError, AssertionError) as error:
        raise RobotError(f"the robot description is no XML ({error})") from error


def named(element: ElementTree.Element, what: str) -> str:
    name = element.get("name", "")
    if not name:
        raise RobotError(f"a <{what}> of the robot has no name")
    return name


def joint(element: ElementTree.Element) -> Joint:
    """Read one <joint>."""
    name, kind = named(element, "joint"), element.get("type", "")
    if kind in IMPOSSIBLE:
        raise RobotError(f"the joint {name!r} is {kind}, which cannot be expressed: {IMPOSSIBLE[kind]}")
    if kind not in (*MOVING, "fixed"):
        raise RobotError(f"the joint {name!r} has the type {kind!r}; there are: {', '.join(MOVING)}, fixed")
    parent, child = (end(element, name, tag) for tag in ("parent", "child"))
    place = element.find("origin")
    origin = np.eye(4)
    if place is not None:
        origin[:3, :3] = rotation(*numbers(place.get("rpy", "0 0 0"), 3, f"rpy of the joint {name!r}"))
        origin[:3, 3] = numbers(place.get("xyz", "0 0 0"), 3, f"xyz of the joint {name!r}")
    axis = np.array([1.0, 0.0, 0.0])  # URDF's default
    given = element.find("axis")
    if given is not None and kind != "fixed":
        axis = numbers(given.get("xyz", "1 0 0"), 3, f"axis of the joint {name!r}")
        length = float(np.linalg.norm(axis))
        if length < 1e-6:
            raise RobotError(f"the axis of the joint {name!r} is zero; give a direction")
        axis = axis / length
    return Joint(name, kind, parent, child, origin, axis, *limits(element, name, kind), mimic(element, name))


def end(element: ElementTree.Element, name: str, tag: str) -> str:
    found = element.find(tag)
    link = "" if found is None else found.get("link", "")
    if not link:
        raise RobotError(f"the joint {name!r} names no {tag} link")
    return link


def limits(element: ElementTree.Element, name: str, kind: str) -> tuple[float, float, float]:
    """Return lower, upper (rad, m) and velocity (per second) of a joint; a continuous one has no ends."""
    found = element.find("limit")
    if kind == "fixed":
        return 0.0, 0.0, 0.0
    velocity = math.inf
    if found is not None and found.get("velocity") is not None:
        velocity = float(numbers(found.get("velocity", ""), 1, f"velocity limit of the joint {name!r}")[0])
        if velocity < 0:
            raise RobotError(f"the velocity limit of the joint {name!r} is {velocity:g}; it must not be negative")
        velocity = velocity or math.inf  # 0 is what exporters write for "unknown"
    if kind == "continuous":
        return -math.inf, math.inf, velocity
    if found is None or (found.get("lower") is None and found.get("upper") is None):
        raise RobotError(f"the {kind} joint {name!r} has no limits; add <limit lower=... upper=...>, or make it continuous")
    lower, upper = (
        float(numbers(found.get(side, "0"), 1, f"{side} limit of the joint {name!r}")[0]) for side in ("lower", "upper")
    )
    if lower > upper:
        raise RobotError(f"the limits of the joint {name!r} are {lower:g} and {upper:g}: the lower lies above the upper")
    return lower, upper, velocity


def mimic(element: ElementTree.Element, name: str) -> tuple[str, float, float] | None:
    found = element.find("mimic")
    if found is None:
        return None
    followed = found.get("joint", "")
    if not followed:
        raise RobotError(f"the joint {name!r} mimics no joint by name")
    multiplier, offset = (
        float(numbers(found.get(key, default), 1, f"mimic {key} of the joint {name!r}")[0])
        for key, default in (("multiplier", "1"), ("offset", "0"))
    )
    return followed, multiplier, offset


def numbers(text: str, count: int, what: str) -> np.ndarray:
    """Return finite numbers, float64 `[count]`."""
    try:
        values = np.array([float(part) for part in text.split()])
    except ValueError:
        raise RobotError(f"{what} is {text!r}, not {count} numbers") from None
    if values.shape != (count,) or not np.isfinite(values).all():
        raise RobotError(f"{what} is {text!r}, not {count} finite numbers")
    return values


def rotation(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Return the matrix `[3, 3]` of turns about the fixed x, then y, then z axis (rad), as URDF means rpy."""
    (sr, cr), (sp, cp), (sy, cy) = ((math.sin(angle), math.cos(angle)) for angle in (roll, pitch, yaw))
    return np.array([
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ])  # fmt: skip


def unique(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RobotError(f"two {what} of the robot are called {name!r}")
        seen.add(name)


def tree_root(links: list[str], joints: list[Joint]) -> str:
    """Return the one link that no joint carries; raise RobotError unless links and joints are one tree."""
    known = set(links)
    carrier: dict[str, Joint] = {}
    for found in joints:
        for link in (found.parent, found.child):
            if link not in known:
                raise RobotError(f"the joint {found.name!r} names the link {link!r}, which the robot does not have")
        if found.child in carrier:
            raise RobotError(f"the link {found.child!r} hangs on two joints, {carrier[found.child].name!r} and {found.name!r}")
        carrier[found.child] = found
    roots = [link for link in links if link not in carrier]
    if not roots:
        raise RobotError("the robot's joints run in a circle: no link is its root")
    if len(roots) > 1:
        raise RobotError(f"the robot has {len(roots)} roots ({', '.join(roots[:4])}); join them by fixed joints")
    # Each link has one carrier at most and there is one root, so what is not reached from it runs in a circle.
    children: dict[str, list[str]] = {}
    for found in joints:
        children.setdefault(found.parent, []).append(found.child)
    reached, pending = 0, roots[:]
    while pending:
        reached += 1
        pending.extend(children.get(pending.pop(), ()))
    if reached < len(links):
        raise RobotError(f"{len(links) - reached} links hang on one another in a circle, not on the root {roots[0]!r}")
    return roots[0]
