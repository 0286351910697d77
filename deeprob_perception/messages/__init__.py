# SPDX-License-Identifier: Apache-2.0
"""ROS messages <-> numpy arrays and bytes, for rclpy's and rosbags' message objects alike. Imports no rclpy."""
