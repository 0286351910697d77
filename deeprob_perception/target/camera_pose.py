# SPDX-License-Identifier: Apache-2.0
"""Where the camera is in the robot's base frame: by forward kinematics of the robot description, or as given."""

from collections.abc import Mapping

import numpy as np

from deeprob_perception.errors import TargetError
from deeprob_perception.robots.robot import motion
from deeprob_perception.robots.urdf import Joint, Urdf, rotation


def pose_of(xyz_rpy: np.ndarray) -> np.ndarray:
    """Return the pose float64 `[4, 4]` of x, y, z (m) and roll, pitch, yaw (rad, about fixed axes, as in URDF).

    :raises TargetError: unless they are six finite numbers.
    """
    values = np.asarray(xyz_rpy, np.float64)
    if values.shape != (6,) or not np.isfinite(values).all():
        raise TargetError(f"camera_pose is {list(xyz_rpy)}; give x, y, z in metres and roll, pitch, yaw in radians")
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(*values[3:]), values[:3]
    return pose


class CameraMount:
    """The chain of joints between a base frame and a camera frame of one robot, whichever carries the other.

    - `joint_names`: of the moved joints that it takes to know the camera's pose; none for a camera that stands still
    - `base`, `camera`: names of the links
    """

    def __init__(self, urdf: Urdf, camera: str, base: str = ""):
        """:param base: link; "" for the root. :raises TargetError: when the robot has no link of such a name."""
        self.base, self.camera = base or urdf.root, camera
        for what, link in (("base_frame", self.base), ("camera frame", camera)):
            if link not in urdf.links:
                raise TargetError(
                    f"the robot {urdf.name!r} has no link {link!r} to be the {what}; name one of its links, or give "
                    "camera_pose_from:=parameter and camera_pose"
                )
        carriers = {joint.child: joint for joint in urdf.joints}
        self._named = {joint.name: joint for joint in urdf.joints}
        to_base, to_camera = ancestry(carriers, self.base), ancestry(carriers, camera)
        while to_base and to_camera and to_base[0] is to_camera[0]:  # what carries both alike
            del to_base[0], to_camera[0]
        self._to_base, self._to_camera = to_base, to_camera
        self.joint_names = tuple(dict.fromkeys(name for j in (*to_base, *to_camera) if (name := self._driver(j)) is not None))

    def pose(self, positions: Mapping[str, float]) -> np.ndarray:
        """Return the camera's pose in the base frame, float64 `[4, 4]`.

        :param positions: of the joints, by name: rad, m. :raises TargetError: when one is missing or no number.
        """
        missing = [name for name in self.joint_names if not np.isfinite(positions.get(name, np.nan))]
        if missing:
            raise TargetError(f"joint_states lacks {', '.join(missing)}, which carries the camera frame {self.camera!r}")
        return np.linalg.inv(self._chain(self._to_base, positions)) @ self._chain(self._to_camera, positions)

    def _chain(self, joints: list[Joint], positions: Mapping[str, float]) -> np.ndarray:
        pose = np.eye(4)
        for joint in joints:
            pose = pose @ joint.origin
            if joint.kind != "fixed":
                pose = pose @ motion(joint, np.asarray(self._value(joint, positions)))
        return pose

    def _value(self, joint: Joint, positions: Mapping[str, float]) -> float:
        if joint.mimic is None:
            return positions[joint.name]
        followed, multiplier, offset = joint.mimic
        return self._value(self._named[followed], positions) * multiplier + offset

    def _driver(self, joint: Joint) -> str | None:
        """Return the joint that moves this one: itself, or at the end of what it mimics."""
        seen = set()
        while joint.mimic is not None:
            seen.add(joint.name)
            followed = joint.mimic[0]
            if followed not in self._named or followed in seen:
                raise TargetError(f"the joint {joint.name!r} on the camera's way mimics {followed!r} in vain; mend the URDF")
            joint = self._named[followed]
        return None if joint.kind == "fixed" else joint.name


def ancestry(carriers: dict[str, Joint], link: str) -> list[Joint]:
    """Return the joints from the root to a link, the root's first."""
    found = []
    while link in carriers:
        found.append(carriers[link])
        link = carriers[link].parent
    return found[::-1]
