# SPDX-License-Identifier: Apache-2.0
"""Bag files, read and written without ROS: rosbag2 (sqlite3, mcap), ROS 1, whole and damaged ones."""

from deeprob_perception.bags.reader import Bag, BagMessage, Topic, open_bag
from deeprob_perception.bags.writer import BagWriter

__all__ = ["Bag", "BagMessage", "BagWriter", "Topic", "open_bag"]
