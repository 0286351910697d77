# SPDX-License-Identifier: Apache-2.0
"""A goal in any frame -> in the robot's root frame: by the robot's own links, or by tf2 where it is installed."""

from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.time import Time

from deeprob_perception.robots import Robot


class GoalFrames:
    """Relates frames to the root's. :param prefix: what stands before the links' names on this robot's topics."""

    def __init__(self, node: Node, prefix: str):
        self._prefix = prefix
        self._buffer: Any = None
        try:
            import tf2_ros
        except Exception:  # absent, or broken: goals in frames of the robot itself work all the same
            return
        self._buffer = tf2_ros.Buffer()
        self._listener = tf2_ros.TransformListener(self._buffer, node)

    def to_root(self, robot: Robot, positions: np.ndarray, frame: str, point: np.ndarray) -> np.ndarray | str:
        """Return a point `[3]` (m) of `frame` in the root's frame, or why that cannot be done.

        :param positions: of the joints now, `[n]`.
        """
        frame, root = frame.lstrip("/"), self._prefix + robot.root
        if frame == root:
            return point
        if not frame:
            return f"the goal has no frame_id; the robot's root frame is {root}"
        link = frame.removeprefix(self._prefix) if frame.startswith(self._prefix) else ""
        if link in robot.links:
            if not np.isfinite(positions).all():
                return f"the goal is in the frame {frame}, and the joints' positions are not known yet"
            pose = robot.forward_kinematics(positions, [link])[0]
            return pose[:3, :3] @ point + pose[:3, 3]
        if self._buffer is None:
            return (f"the goal is in the frame {frame}, which is neither the root {root} nor a link between it and the tip, "
                    "and tf2 is not installed: publish it in the root's frame")
        try:
            found = self._buffer.lookup_transform(root, frame, Time()).transform
        except Exception as error:  # tf2's exceptions have no common base that can be imported without it
            return f"tf2 does not relate the goal's frame {frame} to {root}: {error}"
        x, y, z, w = (getattr(found.rotation, name) for name in "xyzw")
        axis = np.array([x, y, z])
        turned = point + 2 * np.cross(axis, np.cross(axis, point) + w * point)
        return turned + np.array([found.translation.x, found.translation.y, found.translation.z])

    def close(self) -> None:
        if self._buffer is not None:
            self._listener.unregister()
