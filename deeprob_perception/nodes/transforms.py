# SPDX-License-Identifier: Apache-2.0
"""tf2, where it is installed: it is not on PyPI, and nothing of this package needs it but frames beyond the robot's own."""

from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.time import Time

from deeprob_perception.errors import PerceptionError


class TransformError(PerceptionError):
    """A pose that tf2 cannot tell: it is not installed, or the frames are not related."""


class Transforms:
    """Listens to /tf and /tf_static from the start on; `absence` says why it cannot, and is empty where it does."""

    def __init__(self, node: Node):
        self.absence = ""
        self._buffer: Any = None
        try:
            import tf2_ros
        except Exception as error:  # absent, or broken
            self.absence = f"tf2 is not installed ({error})"
            return
        self._buffer = tf2_ros.Buffer()
        self._listener = tf2_ros.TransformListener(self._buffer, node)

    def pose(self, target: str, source: str) -> np.ndarray:
        """Return the newest pose of the frame `source` in `target`, `[4, 4]`, m.

        :raises TransformError: saying what is missing.
        """
        if self._buffer is None:
            raise TransformError(self.absence)
        try:
            found = self._buffer.lookup_transform(target, source, Time()).transform
        except Exception as error:  # tf2's exceptions have no common base that can be imported without it
            raise TransformError(str(error)) from error
        x, y, z, w = (getattr(found.rotation, name) for name in "xyzw")
        pose = np.eye(4)
        pose[:3, :3] = [[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]  # fmt: skip
        pose[:3, 3] = found.translation.x, found.translation.y, found.translation.z
        return pose

    def close(self) -> None:
        if self._buffer is not None:
            self._listener.unregister()
            self._buffer = None
