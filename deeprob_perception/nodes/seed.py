# SPDX-License-Identifier: Apache-2.0
"""Tell a running tracking node what to track: a mask of objects, points; for machines without `ros2 topic pub`."""

import time
from collections.abc import Sequence

import numpy as np
import rclpy
from geometry_msgs.msg import Point, PointStamped
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from deeprob_perception.errors import SeedError
from deeprob_perception.messages.cdr import IMAGE, make_header, serialize
from deeprob_perception.messages.images import make_image
from deeprob_perception.nodes.dds import use_large_image_profile

# Seeds are few and each counts.
SEEDS = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.VOLATILE)
LOOK = 0.05  # seconds


def seed(node_name: str, mask: np.ndarray | None, points: Sequence[tuple[float, float]], timeout: float = 30.0) -> None:
    """Send seeds to the node `node_name` (such as `/tracking`) and return when it has them.

    :param mask: uint8 `[H, W]`, 0 for background, else an object's id. :param points: x, y in pixels.
    :raises SeedError: when the node is not there within `timeout` seconds.
    """
    use_large_image_profile()
    rclpy.init()
    try:
        node = Node("deeprob_seed", start_parameter_services=False)
        if mask is not None:
            image = serialize(make_image(mask, "mono8", make_header(time.time_ns(), "")), IMAGE)
            _send(node.create_publisher(Image, f"{node_name}/seed_mask", SEEDS), [image], timeout)
        if points:
            places = [PointStamped(point=Point(x=x, y=y)) for x, y in points]
            _send(node.create_publisher(PointStamped, f"{node_name}/seed_point", SEEDS), places, timeout)
    finally:
        rclpy.try_shutdown()


def _send(publisher: Publisher, messages: Sequence[bytes | PointStamped], timeout: float) -> None:
    """Publish as soon as somebody listens, and return when all are received."""
    deadline = time.monotonic() + timeout
    while not publisher.get_subscription_count():
        if time.monotonic() > deadline:
            raise SeedError(f"nobody listens to {publisher.topic_name} after {timeout:g} s: is the tracking node active, "
                            "and is --node its name?")
        time.sleep(LOOK)
    for message in messages:
        publisher.publish(message)
    if not publisher.wait_for_all_acked(Duration(seconds=timeout)):
        raise SeedError(f"the seeds sent to {publisher.topic_name} were not taken within {timeout:g} s")
