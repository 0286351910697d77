# SPDX-License-Identifier: Apache-2.0
"""tf2, where it is installed: it is not on PyPI, and nothing of this package needs it but frames beyond the robot's own."""

from contextlib import suppress
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.time import Time

from deeprob_perception.errors import PerceptionError
from deeprob_perception.messages.cdr import stamp_ns

MAX_AGE = 1.0  # s; a transform that is older says where things were


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
        self._node = node
        self._buffer = tf2_ros.Buffer(node=node)  # it empties itself when the node's clock jumps back, as a bag's that loops
        self._listener = tf2_ros.TransformListener(self._buffer, node)

    def pose(self, target: str, source: str, stamp: int | None = None) -> np.ndarray:
        """Return the pose of the frame `source` in `target`, `[4, 4]`, m.

        :param stamp: when, ns; where tf2 cannot tell, the newest pose serves, if it is at most MAX_AGE away. None: the newest,
            at most MAX_AGE old by the node's clock.
        :raises TransformError: saying what is missing.
        """
        if self._buffer is None:
            raise TransformError(self.absence)
        found = self._at(target, source, stamp).transform
        x, y, z, w = (getattr(found.rotation, name) for name in "xyzw")
        pose = np.eye(4)
        pose[:3, :3] = [[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]  # fmt: skip
        pose[:3, 3] = found.translation.x, found.translation.y, found.translation.z
        return pose

    def _at(self, target: str, source: str, stamp: int | None) -> Any:
        """Return a TransformStamped. tf2's exceptions have no common base that can be imported without it."""
        if stamp is not None:
            with suppress(Exception):  # as it has not come yet, or is forgotten
                return self._buffer.lookup_transform(target, source, Time(nanoseconds=stamp))
        try:
            found = self._buffer.lookup_transform(target, source, Time())
        except Exception as error:
            raise TransformError(str(error)) from error
        newest = stamp_ns(found.header)
        if newest:  # else the frames never move
            when, what = (self._node.get_clock().now().nanoseconds, "now") if stamp is None else (stamp, "the stamp asked for")
            apart = (when - newest) / 1e9
            if abs(apart) > MAX_AGE:
                raise TransformError(f"its newest transform is {abs(apart):.1f} s {'before' if apart > 0 else 'after'} {what}")
        return found

    def close(self) -> None:
        if self._buffer is not None:
            self._listener.unregister()
            if service := getattr(self._buffer, "srv", None):
                self._node.destroy_service(service)
            self._buffer = None
