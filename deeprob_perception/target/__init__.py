# SPDX-License-Identifier: Apache-2.0
"""Where an object is: label mask, depth and calibration in, a 3-D position out. On arrays: no ROS, no torch."""

from deeprob_perception.target.camera_pose import CameraMount, pose_of
from deeprob_perception.target.locate import Intrinsics, Sighting, components, locate, metres
from deeprob_perception.target.pairs import Pairs
from deeprob_perception.target.steady import Steady

__all__ = ["CameraMount", "Intrinsics", "Pairs", "Sighting", "Steady", "components", "locate", "metres", "pose_of"]
