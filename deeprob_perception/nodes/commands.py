# SPDX-License-Identifier: Apache-2.0
"""Setpoints -> the messages that controllers take, and the self-model -> markers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from geometry_msgs.msg import Point
from sensor_msgs.msg import JointState
from std_msgs.msg import ColorRGBA, Float64MultiArray
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from deeprob_perception.policy.loop import SelfModel
from deeprob_perception.policy.safety import Setpoint

# parameter `output` -> (topic, type)
OUTPUTS: dict[str, tuple[str, type]] = {
    "joint_trajectory": ("joint_trajectory", JointTrajectory),
    "joint_command": ("joint_command", JointState),
    "commands": ("commands", Float64MultiArray),
}


class Commander:
    """Makes the messages of one robot.

    :param names: of the joints in the order of setpoints. :param order: in which the controller has them; empty: the same.
    :param period: of control, seconds. :param streaming: leave out the point at which a trajectory comes to rest.
    """

    def __init__(self, names: Sequence[str], order: Sequence[str], period: float, streaming: bool):
        self.names = list(order or names)
        self._rows = [list(names).index(name) for name in self.names]
        self._period, self._streaming = period, streaming

    def message(self, output: str, setpoint: Setpoint, stamp: Any) -> Any:
        """Return the message for an `output` of OUTPUTS."""
        positions, velocities = setpoint.positions[self._rows], setpoint.velocities[self._rows]
        if output == "commands":
            return Float64MultiArray(data=positions.tolist())
        if output == "joint_command":
            message = JointState(name=self.names, position=positions.tolist(), velocity=velocities.tolist())
            message.header.stamp = stamp
            return message
        points = [point(positions, velocities, self._period)]
        if velocities.any() and not self._streaming:
            # joint_trajectory_controller refuses one that ends in motion: after the period come another, of braking.
            points.append(point(setpoint.halt[self._rows], np.zeros_like(velocities), 2 * self._period))
        return JointTrajectory(joint_names=self.names, points=points)  # a stamp of 0: from now on


def point(positions: np.ndarray, velocities: np.ndarray, seconds: float) -> JointTrajectoryPoint:
    nanoseconds = round(seconds * 1e9)
    return JointTrajectoryPoint(
        positions=positions.tolist(), velocities=velocities.tolist(),
        time_from_start=Duration(sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9),
    )  # fmt: skip


def markers(self_model: SelfModel, frame: str, stamp: Any) -> Any:
    """Return a visualization_msgs/MarkerArray: red spheres where joints are believed to be, grey where the URDF has them."""
    from visualization_msgs.msg import Marker, MarkerArray

    message = MarkerArray()
    for number, (places, colour) in enumerate(((self_model.true, (0.6, 0.6, 0.6)), (self_model.believed, (1.0, 0.2, 0.1)))):
        marker = Marker(ns="self_model", id=number, type=Marker.SPHERE_LIST, action=Marker.ADD)
        marker.header.frame_id, marker.header.stamp = frame, stamp
        marker.pose.orientation.w = 1.0
        marker.scale.x = marker.scale.y = marker.scale.z = 0.02
        red, green, blue = colour
        marker.color = ColorRGBA(r=red, g=green, b=blue, a=0.8)
        marker.points = [Point(x=x, y=y, z=z) for x, y, z in places.tolist()]
        message.markers.append(marker)
    return message
