# SPDX-License-Identifier: Apache-2.0
"""Live topics into an mcap, for machines without `ros2 bag`: serialised messages are written as they come."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.topic_endpoint_info import TopicEndpointInfo

from deeprob_perception.bags import BagWriter
from deeprob_perception.errors import BagError
from deeprob_perception.nodes.dds import use_large_image_profile
from deeprob_perception.nodes.play import message_class

log = logging.getLogger(__name__)
LOOK = 0.1  # seconds between looks for new topics
# Messages that may wait while one is written to the disk.
DEPTH = 50


class Recorder(Node):
    """Subscribes to `topics` (names; empty: every topic) as they appear and hands the bytes to `writer`.

    QoS is taken from the publishers: reliable and transient local where all of them offer it, so that latched messages
    are recorded too. `counts` tells how many messages of each topic were written.
    """

    def __init__(self, writer: BagWriter, topics: Sequence[str] = (), say: Callable[[str], None] = log.info):
        super().__init__("deeprob_record", start_parameter_services=False)
        self._writer, self._say = writer, say
        self._wanted = {self.resolve_topic_name(topic) for topic in topics}
        self._refused: set[str] = set()
        self.counts: dict[str, int] = {}
        self.create_timer(LOOK, self._look)
        self._look()

    def _look(self) -> None:
        for topic, msgtypes in self.get_topic_names_and_types():
            if topic in self.counts or topic in self._refused or (self._wanted and topic not in self._wanted):
                continue
            publishers = self.get_publishers_info_by_topic(topic)
            if publishers:
                self._subscribe(topic, msgtypes, publishers)

    def _subscribe(self, topic: str, msgtypes: Sequence[str], publishers: Sequence[TopicEndpointInfo]) -> None:
        kind = message_class(msgtypes[0]) if len(msgtypes) == 1 else None
        latched = all(p.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for p in publishers)
        reliable = all(p.qos_profile.reliability == ReliabilityPolicy.RELIABLE for p in publishers)
        try:
            if kind is None:
                raise BagError(f"the message type {', '.join(msgtypes)} is not installed")
            self._writer.add_topic(topic, msgtypes[0], latched=latched)
        except BagError as error:
            self._refused.add(topic)
            self._say(f"{topic} is not recorded: {error}")
            return
        self.counts[topic] = 0
        qos = QoSProfile(
            depth=DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE)
        self.create_subscription(kind, topic, lambda raw: self._write(topic, raw), qos, raw=True)

    def _write(self, topic: str, raw: bytes) -> None:
        self._writer.write(topic, time.time_ns(), raw)
        self.counts[topic] += 1


def record(
    path: str | Path, topics: Sequence[str] = (), duration: float | None = None, say: Callable[[str], None] = log.info
) -> dict[str, int]:
    """Record to `path` (.mcap) for `duration` seconds, or until a signal; return the messages written for each topic.

    The file appears whole at the end. Raises BagError if it cannot be written.
    """
    use_large_image_profile()
    rclpy.init()
    try:
        with BagWriter(path) as writer:
            recorder = Recorder(writer, topics, say)
            executor = SingleThreadedExecutor()
            executor.add_node(recorder)
            end = None if duration is None else time.monotonic() + duration
            try:
                while rclpy.ok() and (end is None or time.monotonic() < end):
                    executor.spin_once(timeout_sec=LOOK)
            except (KeyboardInterrupt, ExternalShutdownException):
                pass
            except Exception:
                # A signal ends ROS at once, also under a callback that publishes.
                if rclpy.ok():
                    raise
            return recorder.counts
    finally:
        rclpy.try_shutdown()
