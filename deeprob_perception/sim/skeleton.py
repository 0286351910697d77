# SPDX-License-Identifier: Apache-2.0
"""Any robot description as capsules in a MuJoCo scene: a link is drawn from its frame to the frames that hang on it.

A URDF's meshes are files that need not be there, and nothing here needs to look like them: what matters is where the joints
are.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

from deeprob_perception.robots import Joint, Robot, Urdf
from deeprob_perception.robots.robot import below

# The robot is put where it shall be, not moved by forces; this inertia (kg m2) makes contacts yield on the other side.
ARMATURE = 5.0
TIP = "background:tip"  # the unseen geom at the tool, named as geom_classes reads it
TIP_RADIUS = 1e-3  # m
_THICK, _THIN = 0.055, 0.022  # radius of a chain's first and last capsule, share of its length
_SHORT = 0.008  # m: below, two frames count as one


@dataclass(frozen=True)
class Skeleton:
    """A robot in a model. `names`: of the joints that are moved; `robot`: all of them, from its root.

    `qpos`, `qvel`: where the model has its joints, int `[m]`, mimicking ones among them; `gains`, `offsets`: what each makes of
    the moved joint `source` `[m]` that drives it.
    """

    robot: Robot
    qpos: np.ndarray
    qvel: np.ndarray
    source: np.ndarray
    gains: np.ndarray
    offsets: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        return self.robot.joint_names

    def place(self, data: mujoco.MjData, positions: np.ndarray, velocities: np.ndarray) -> None:
        """Put the joints where they shall be: positions and velocities of the moved joints, `[n]` each."""
        data.qpos[self.qpos] = positions[self.source] * self.gains + self.offsets
        data.qvel[self.qvel] = velocities[self.source] * self.gains


def add_robot(
    spec: mujoco.MjSpec, urdf: Urdf, tip: str, position: np.ndarray, yaw: float, finishes: tuple[str, str, str]
) -> None:
    """Add the robot to a specification, its root link at `position` (m), turned by `yaw` (rad) about z.

    Geoms are named `robot:<n>`, bodies `robot/<link>`, joints `robot/<joint>`; `TIP` is a geom at the link `tip`.
    :param finishes: materials of links, joints and what is beyond the last joint, as `sim.arm.finishes` draws them.
    """
    links, joints, tools = finishes
    children: dict[str, list[Joint]] = {}
    for joint in urdf.joints:
        children.setdefault(joint.parent, []).append(joint)
    reach = length_to(urdf, tip)
    depth = {urdf.root: 0.0}
    for joint in below(urdf, urdf.root):
        depth[joint.child] = depth[joint.parent] + float(np.linalg.norm(joint.origin[:3, 3]))
    root = spec.worldbody.add_body(
        name=f"robot/{urdf.root}", pos=position.tolist(), quat=[np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)], gravcomp=1)
    bodies, count = {urdf.root: root}, 0

    def capsule(body: mujoco.MjsBody, start: np.ndarray, end: np.ndarray, radius: float, material: str) -> None:
        nonlocal count
        # Contact bits: the robot meets objects (bit 2), never the table or itself.
        body.add_geom(name=f"robot:{count}", type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[*start, *end], size=[radius, 0, 0],
                      material=material, contype=2, conaffinity=0, mass=0.5)  # fmt: skip
        count += 1

    def radius_at(link: str) -> float:
        share = min(depth[link] / reach, 1.0)
        return reach * (_THICK + (_THIN - _THICK) * share)

    for joint in below(urdf, urdf.root):
        body = bodies[joint.parent].add_body(
            name=f"robot/{joint.child}", pos=joint.origin[:3, 3].tolist(), quat=_quaternion(joint.origin[:3, :3]), gravcomp=1)
        bodies[joint.child] = body
        if joint.kind == "fixed":
            continue
        slides = joint.kind == "prismatic"
        body.add_joint(
            name=f"robot/{joint.name}", type=mujoco.mjtJoint.mjJNT_SLIDE if slides else mujoco.mjtJoint.mjJNT_HINGE,
            axis=joint.axis.tolist(), armature=ARMATURE)  # without limits: whoever places it keeps to them
        radius = radius_at(joint.child)
        if not slides and depth[joint.child] > _SHORT:
            capsule(body, -joint.axis * radius * 0.9, joint.axis * radius * 0.9, radius * 1.1, joints)
        elif not slides:  # on the ground: a foot
            capsule(body, np.zeros(3), np.array([0, 0, 1e-3]), radius * 1.1, joints)
    leading = leads(urdf)
    for link, body in bodies.items():
        ends_here = [(joint.origin[:3, 3], joint.child) for joint in children.get(link, ())]
        if not ends_here and link != tip:  # a finger, say: which way it points no URDF tells
            ends_here = [(np.array([0, 0, radius_at(link) * 1.2]), "")]
        for end, child in ends_here:
            radius, length = radius_at(link) * 0.85, float(np.linalg.norm(end))
            if length <= _SHORT:
                continue
            if child == tip:  # the tool is where the hand's surface ends, or it could never touch anything
                radius = min(radius, 0.5 * length)
                end = end * (1 - radius / length)
            capsule(body, np.zeros(3), end, radius, links if link in leading else tools)
    bodies[tip].add_geom(name=TIP, type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[TIP_RADIUS, 0, 0], group=3, contype=0,
                         conaffinity=0, mass=0)  # fmt: skip


def find(model: mujoco.MjModel, urdf: Urdf) -> Skeleton:
    """Return where the robot that `add_robot` added is in the compiled model."""
    robot = Robot(urdf)
    rows = []
    for joint, index, gain, offset in robot.driven():
        at = model.joint(f"robot/{joint.name}")
        rows.append((int(at.qposadr[0]), int(at.dofadr[0]), index or 0, 0.0 if index is None else gain, offset))
    qpos, qvel, source, gains, offsets = (np.array(column) for column in zip(*rows, strict=True))
    return Skeleton(robot, qpos, qvel, source, gains.astype(float), offsets.astype(float))


def leads(urdf: Urdf) -> set[str]:
    """Return the links that carry a joint which is moved, directly or further on."""
    carrier = {joint.child: joint for joint in urdf.joints}
    found: set[str] = set()
    for joint in urdf.joints:
        link = joint.parent
        while joint.kind != "fixed" and link not in found:
            found.add(link)
            if link not in carrier:
                break
            link = carrier[link].parent
    return found


def length_to(urdf: Urdf, tip: str) -> float:
    """Return how long the stretched chain from the root to a link is, m, without what slides."""
    carrier = {joint.child: joint for joint in urdf.joints}
    length, link = 0.0, tip
    while link in carrier:
        length += float(np.linalg.norm(carrier[link].origin[:3, 3]))
        link = carrier[link].parent
    return max(length, 0.05)


def _quaternion(rotation: np.ndarray) -> list[float]:
    result = np.zeros(4)
    mujoco.mju_mat2Quat(result, np.ascontiguousarray(rotation).ravel())
    return result.tolist()
