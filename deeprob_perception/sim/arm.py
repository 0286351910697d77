# SPDX-License-Identifier: Apache-2.0
"""A robot arm of capsules, designed for this package: six turning joints and a gripper of two sliding fingers."""

import mujoco
import numpy as np

from deeprob_perception.sim.materials import Materials

# Name, axis in the joint's own frame (the arm stands straight up at zero, x forward), lower and upper limit (rad;
# m for fingers).
JOINTS: tuple[tuple[str, tuple[float, float, float], float, float], ...] = (
    ("base_yaw", (0, 0, 1), -1.7, 1.7),
    ("shoulder_pitch", (0, 1, 0), -0.5, 1.3),
    ("elbow_pitch", (0, 1, 0), 0.2, 2.2),
    ("forearm_roll", (0, 0, 1), -1.6, 1.6),
    ("wrist_pitch", (0, 1, 0), -1.4, 1.6),
    ("wrist_roll", (0, 0, 1), -2.6, 2.6),
    ("finger_left", (0, 1, 0), 0.0, 0.035),
    ("finger_right", (0, -1, 0), 0.0, 0.035),
)
JOINT_NAMES = tuple(name for name, *_ in JOINTS)
LOWER = np.array([lower for *_, lower, _ in JOINTS])
UPPER = np.array([upper for *_, upper in JOINTS])
# The arm is moved along its trajectory, not by forces; this inertia (kg m2) makes contacts yield on the other side.
ARMATURE = 5.0


class Trajectory:
    """Minimum-jerk motion from one set of joint positions to the next (Flash and Hogan 1985), resting at each."""

    def __init__(self, waypoints: np.ndarray, times: np.ndarray):
        """`waypoints` float64 `[n, joints]`, `times` float64 `[n]` in seconds, increasing."""
        self.waypoints, self.times = waypoints, times

    def at(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Return positions (rad, m) and velocities (per second) at `time` seconds, `[joints]` each; held past the ends."""
        index = int(np.clip(np.searchsorted(self.times, time, "right") - 1, 0, len(self.times) - 2))
        start, end = self.times[index], self.times[index + 1]
        s = float(np.clip((time - start) / (end - start), 0.0, 1.0))
        step = self.waypoints[index + 1] - self.waypoints[index]
        blend = s**3 * (10 - 15 * s + 6 * s**2)
        rate = 30 * s**2 * (1 - s) ** 2 / (end - start)
        return self.waypoints[index] + blend * step, rate * step


def add_arm(spec: mujoco.MjSpec, materials: Materials, rng: np.random.Generator, position: np.ndarray, yaw: float) -> None:
    """Add an arm with random proportions and colours to the world; its base stands at `position` (m), turned by `yaw`.

    Geoms are named `robot:<n>`; joints as in JOINTS.
    """
    links, joints, fingers = finishes(materials, rng)
    slim = rng.uniform(0.8, 1.25)
    upper, fore, wrist = rng.uniform(0.22, 0.34), rng.uniform(0.18, 0.28), rng.uniform(0.07, 0.11)
    count = 0

    def capsule(body: mujoco.MjsBody, start: tuple, end: tuple, radius: float, material: str) -> None:
        nonlocal count
        # Contact bits: the arm meets objects (bit 2), never the table or itself.
        body.add_geom(name=f"robot:{count}", type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[*start, *end],
                      size=[radius * slim, 0, 0], material=material, contype=2, conaffinity=0, mass=0.5)
        count += 1

    def child(body: mujoco.MjsBody, z: float, joint: int, y: float = 0.0) -> mujoco.MjsBody:
        name, axis, lower, upper_limit = JOINTS[joint]
        link = body.add_body(name=f"link{joint + 1}", pos=[0, y, z], gravcomp=1)
        slides = name.startswith("finger")
        kind = mujoco.mjtJoint.mjJNT_SLIDE if slides else mujoco.mjtJoint.mjJNT_HINGE
        link.add_joint(name=name, type=kind, axis=list(axis), range=[lower, upper_limit], armature=ARMATURE)
        return link

    base = spec.worldbody.add_body(name="arm_base", pos=position.tolist(), quat=[np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
    capsule(base, (0, 0, 0.0), (0, 0, 0.07), 0.07, joints)
    turret = child(base, 0.12, 0)
    capsule(turret, (0, 0, 0), (0, 0, 0.06), 0.055, links)
    shoulder = child(turret, 0.07, 1)
    capsule(shoulder, (0, -0.05, 0), (0, 0.05, 0), 0.05, joints)
    capsule(shoulder, (0, 0, 0.03), (0, 0, upper), 0.04, links)
    elbow = child(shoulder, upper, 2)
    capsule(elbow, (0, -0.04, 0), (0, 0.04, 0), 0.043, joints)
    capsule(elbow, (0, 0, 0.02), (0, 0, fore * 0.55), 0.035, links)
    forearm = child(elbow, fore * 0.6, 3)
    capsule(forearm, (0, 0, 0), (0, 0, fore * 0.4), 0.031, links)
    pitch = child(forearm, fore * 0.45, 4)
    capsule(pitch, (0, -0.03, 0), (0, 0.03, 0), 0.033, joints)
    capsule(pitch, (0, 0, 0), (0, 0, wrist), 0.027, links)
    hand = child(pitch, wrist + 0.02, 5)
    capsule(hand, (0, -0.045, 0.01), (0, 0.045, 0.01), 0.022, joints)
    for joint, side in ((6, 1.0), (7, -1.0)):
        finger = child(hand, 0.03, joint, y=side * 0.016)
        capsule(finger, (0, 0, 0), (0, 0, 0.065), 0.011, fingers)


def random_trajectory(model: mujoco.MjModel, rng: np.random.Generator, floor_height: float, duration: float,
                      pause: tuple[float, float] = (1.2, 2.6)) -> Trajectory:
    """Draw a trajectory of at least `duration` seconds on which no link dips below `floor_height` (m, world z).

    :param pause: shortest and longest time from one waypoint to the next, seconds.
    """
    data = mujoco.MjData(model)
    address = joint_addresses(model)[0]
    geoms = [index for index in range(model.ngeom) if model.geom(index).name.startswith("robot:")][1:]

    def clear(positions: np.ndarray) -> bool:
        data.qpos[address] = positions
        mujoco.mj_kinematics(model, data)
        axis = data.geom_xmat[geoms].reshape(-1, 3, 3)[:, 2, 2]  # z part of each capsule's axis
        lowest = data.geom_xpos[geoms, 2] - np.abs(axis) * model.geom_size[geoms, 1] - model.geom_size[geoms, 0]
        return bool(lowest.min() > floor_height)

    upright = np.clip(np.zeros(len(JOINTS)), LOWER, UPPER)
    current = next((q for q in rng.uniform(LOWER, UPPER, (200, len(JOINTS))) if clear(q)), upright)
    waypoints, times = [current], [0.0]
    while times[-1] < duration:
        target = upright
        for candidate in rng.uniform(LOWER, UPPER, (40, len(JOINTS))):
            if all(clear(current + s * (candidate - current)) for s in np.linspace(0.1, 1.0, 10)):
                target = candidate
                break
        times.append(times[-1] + rng.uniform(*pause))
        waypoints.append(target)
        current = target
    return Trajectory(np.array(waypoints), np.array(times))


def joint_addresses(model: mujoco.MjModel) -> tuple[np.ndarray, np.ndarray]:
    """Return where the arm's joints lie in qpos and in qvel, int `[joints]` each, in the order of JOINTS."""
    joints = [model.joint(name) for name in JOINT_NAMES]
    return np.array([j.qposadr[0] for j in joints]), np.array([j.dofadr[0] for j in joints])


def finishes(materials: Materials, rng: np.random.Generator) -> tuple[str, str, str]:
    """Draw the materials of links, joints and fingers: often factory greys, else anything, so that colour tells nothing."""
    if rng.random() < 0.6:
        grey = rng.uniform(0.1, 0.95)
        links = materials.plain(np.clip(grey + rng.uniform(-0.04, 0.04, 3), 0, 1))
    else:
        links = materials.any(plain=0.8)
    joints = links if rng.random() < 0.25 else materials.plain(
        np.full(3, rng.uniform(0.05, 0.5)) if rng.random() < 0.5 else None)
    return links, joints, joints if rng.random() < 0.5 else materials.any(plain=0.8)
