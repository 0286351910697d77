# SPDX-License-Identifier: Apache-2.0
"""ROS 2 perception to action: Swin segmentation, DINO tracking and a GET-style policy."""

__version__ = "0.1.0"
