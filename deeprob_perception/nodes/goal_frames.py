# SPDX-License-Identifier: Apache-2.0
"""A goal in any frame -> in the robot's root frame: by the robot's own links, or by tf2 where it is installed."""

import numpy as np
from rclpy.node import Node

from deeprob_perception.nodes.transforms import TransformError, Transforms
from deeprob_perception.robots import Robot


class GoalFrames:
    """Relates frames to the root's. :param prefix: what stands before the links' names on this robot's topics."""

    def __init__(self, node: Node, prefix: str):
        self._prefix = prefix
        self._transforms = Transforms(node)

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
        else:
            try:
                pose = self._transforms.pose(root, frame)
            except TransformError as error:
                why = str(error) if self._transforms.absence else f"tf2 does not relate them: {error}"
                return (f"the goal is in the frame {frame}, which is neither the root {root} nor a link between it and the "
                        f"tip, and {why}; publish it in the root's frame")
        return pose[:3, :3] @ point + pose[:3, 3]

    def close(self) -> None:
        self._transforms.close()
