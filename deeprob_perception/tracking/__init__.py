# SPDX-License-Identifier: Apache-2.0
"""Following objects through a video, on arrays: no ROS, no torch."""
