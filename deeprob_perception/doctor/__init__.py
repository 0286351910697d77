# SPDX-License-Identifier: Apache-2.0
"""What `deeprob doctor` looks at: plain functions that return a `Check`, in `system`, `ros` and `models`. No rclpy here."""
