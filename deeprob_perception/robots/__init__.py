# SPDX-License-Identifier: Apache-2.0
"""A robot's description -> its joints, their graph, limits and kinematics, on arrays: no ROS, no torch."""

from deeprob_perception.robots.robot import Graph, Robot
from deeprob_perception.robots.urdf import Joint, Urdf, parse, read

__all__ = ["Graph", "Joint", "Robot", "Urdf", "parse", "read"]
