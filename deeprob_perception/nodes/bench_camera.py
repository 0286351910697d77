# SPDX-License-Identifier: Apache-2.0
"""The camera of `nodes.measure`, a process of its own: publishes pictures of a bag from memory, reliably, at given rates.

`python -m deeprob_perception.nodes.bench_camera BAG WIDTH HEIGHT TRANSPORT` publishes slowly until the first line comes on
stdin (by then the node has found it). Each further line, `RATE FRAMES`, is one run; it answers with the stamps in ns
of what it sent, a line of JSON. It ends with its stdin.
"""

import json
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from deeprob_perception.bags import open_bag
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, make_header, serialize
from deeprob_perception.messages.headers import restamped
from deeprob_perception.messages.images import make_compressed, make_image, to_bgr
from deeprob_perception.nodes.dds import use_large_image_profile

FRAME_ID = "bench_optical_frame"
PICTURES = 30  # kept in memory: 28 MB of 640x480 bgr8


def pictures(bag: Path, width: int, height: int) -> list[np.ndarray]:
    """Return evenly spread frames of the bag's camera at a size, uint8 `[height, width, 3]` BGR each."""
    with open_bag(bag) as opened:
        topic = opened.image_topic()
        step = max(1, topic.count // PICTURES)
        chosen = [m.raw for i, m in enumerate(opened.messages([topic.name])) if i % step == 0][:PICTURES]
        frames = [to_bgr(deserialize(raw, topic.msgtype)) for raw in chosen]
    return [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames]


def main(bag: Path, width: int, height: int, transport: str) -> None:
    header = make_header(0, FRAME_ID)
    frames = pictures(bag, width, height)
    use_large_image_profile()
    rclpy.init()
    node = rclpy.create_node("bench_camera", start_parameter_services=False)
    qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
    if transport == "compressed":
        raw = [serialize(make_compressed(frame, header), COMPRESSED_IMAGE) for frame in frames]
        publisher = node.create_publisher(CompressedImage, "image/compressed", qos)
    else:
        raw = [serialize(make_image(frame, "bgr8", header), IMAGE) for frame in frames]
        publisher = node.create_publisher(Image, "image", qos)
    os.set_blocking(sys.stdin.fileno(), False)
    while not sys.stdin.readline():
        if not rclpy.ok():
            return
        publisher.publish(restamped(raw[0], time.time_ns()))
        time.sleep(0.2)
    os.set_blocking(sys.stdin.fileno(), True)
    for line in sys.stdin:
        rate_hz, count = line.split()
        sent = []
        start = time.monotonic()
        for number in range(int(count)):
            time.sleep(max(0.0, start + number / float(rate_hz) - time.monotonic()))
            sent.append(time.time_ns())
            publisher.publish(restamped(raw[number % len(raw)], sent[-1]))
        print(json.dumps(sent), flush=True)
    rclpy.try_shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
