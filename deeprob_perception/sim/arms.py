# SPDX-License-Identifier: Apache-2.0
"""Robot descriptions of our own for the robot cell, drawn from a seed: the arm of the pictures, and one of another kind.

Both have the frame `tool`, at the end of the hand, which is what shall touch things.
"""

from collections.abc import Callable

import numpy as np

from deeprob_perception.sim.arm import JOINTS

TOOL = "tool"
# As for many small arms; a driver has to keep to them.
TURNING, SLIDING = 2.0, 0.4  # rad/s, m/s


def capsule_arm(rng: np.random.Generator) -> str:
    """Return the URDF of an arm as `sim.arm` builds it: six turning joints and a gripper, with proportions of its own."""
    upper, fore, wrist = rng.uniform(0.22, 0.34), rng.uniform(0.18, 0.28), rng.uniform(0.07, 0.11)
    heights = (0.12, 0.07, upper, fore * 0.6, fore * 0.45, wrist + 0.02, 0.03, 0.03)
    rows, parent = [], "base_link"
    for i, ((name, axis, lower, most), z) in enumerate(zip(JOINTS, heights, strict=True), start=1):
        finger = name.startswith("finger")
        y = 0.016 * axis[1] if finger else 0.0
        rows.append(_joint(name, "prismatic" if finger else "revolute", "link6" if finger else parent, f"link{i}", (0, y, z),
                           axis, (lower, most), SLIDING if finger else TURNING))
        parent = f"link{i}"
    rows.append(_fixed("tool_mount", "link6", TOOL, (0, 0, 0.1)))
    return _robot("capsule_arm", rows)


def scara(rng: np.random.Generator) -> str:
    """Return the URDF of a SCARA: two links that turn in the plane above the table, a quill that slides down, a roll.

    The reaching policy's training (`robots.generate`) has no such family.
    """
    height, first, second = rng.uniform(0.4, 0.46), rng.uniform(0.24, 0.34), rng.uniform(0.22, 0.3)
    down = rng.uniform(0.3, 0.34)
    return _robot("scara", [
        _joint("shoulder_yaw", "revolute", "base_link", "upper_arm", (0, 0, height), (0, 0, 1), (-2.2, 2.2), TURNING),
        _joint("elbow_yaw", "revolute", "upper_arm", "forearm", (first, 0, 0), (0, 0, 1), (-2.5, 2.5), TURNING),
        _joint("quill", "prismatic", "forearm", "quill", (second, 0, 0), (0, 0, -1), (0, down), SLIDING),
        _joint("quill_roll", "revolute", "quill", "hand", (0, 0, -0.05), (0, 0, 1), (-3.0, 3.0), TURNING),
        _fixed("tool_mount", "hand", TOOL, (0, 0, -0.08)),
    ])  # fmt: skip


ARMS: dict[str, Callable[[np.random.Generator], str]] = {"capsule_arm": capsule_arm, "scara": scara}


def _robot(name: str, joints: list[str]) -> str:
    links = ["base_link", *(row.split('<child link="')[1].split('"')[0] for row in joints)]
    inner = "\n".join([*(f'  <link name="{link}"/>' for link in links), *joints])
    return f'<?xml version="1.0"?>\n<robot name="{name}">\n{inner}\n</robot>\n'


def _fixed(name: str, parent: str, child: str, xyz: tuple[float, ...]) -> str:
    return f"""  <joint name="{name}" type="fixed">
    <origin xyz="{_text(xyz)}" rpy="0 0 0"/><parent link="{parent}"/><child link="{child}"/>
  </joint>"""


def _joint(
    name: str, kind: str, parent: str, child: str, xyz: tuple[float, ...], axis: tuple[float, ...],
    limits: tuple[float, float], velocity: float,
) -> str:  # fmt: skip
    return f"""  <joint name="{name}" type="{kind}">
    <origin xyz="{_text(xyz)}" rpy="0 0 0"/><parent link="{parent}"/><child link="{child}"/>
    <axis xyz="{_text(axis)}"/><limit lower="{limits[0]:g}" upper="{limits[1]:g}" velocity="{velocity:g}" effort="50"/>
  </joint>"""


def _text(numbers: tuple[float, ...]) -> str:
    return " ".join(f"{number:.6g}" for number in numbers)
