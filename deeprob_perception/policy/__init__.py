# SPDX-License-Identifier: Apache-2.0
"""What a robot's joints shall do next, on arrays: no ROS, no torch."""
