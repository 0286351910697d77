# SPDX-License-Identifier: Apache-2.0
"""The pinhole camera: intrinsics and poses in the optical convention of REP 103 (x right, y down, z forward)."""

from dataclasses import dataclass

import numpy as np

OPTICAL_FRAME = "camera_color_optical_frame"


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion.

    `pose` is float64 `[4, 4]`, from the optical frame to the world, metres. `fovy` is the vertical field of view, radians.
    """

    width: int
    height: int
    fovy: float
    pose: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """Return K, float64 `[3, 3]`, in pixels; the centre of the upper left pixel is (0, 0), as in OpenCV and ROS."""
        focal = 0.5 * self.height / np.tan(0.5 * self.fovy)
        return np.array([[focal, 0, 0.5 * (self.width - 1)], [0, focal, 0.5 * (self.height - 1)], [0, 0, 1.0]])

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels float64 `[n, 2]` (u, v) and depths `[n]` (m) of world points `[n, 3]`."""
        local = (points - self.pose[:3, 3]) @ self.pose[:3, :3]
        image = local @ self.matrix.T
        return image[:, :2] / image[:, 2:], local[:, 2]


def look_at(eye: np.ndarray, target: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """Return the pose `[4, 4]` of a camera at `eye` that looks at `target` (m, world z up), turned by `roll` radians."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([c * right + s * down, c * down - s * right, forward], axis=1)
    pose[:3, 3] = eye
    return pose
