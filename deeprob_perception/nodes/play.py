# SPDX-License-Identifier: Apache-2.0
"""A bag onto live topics with its own timing, for machines without `ros2 bag`: serialised messages go out as they are."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import rclpy
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock as ClockMessage

from deeprob_perception.bags import Bag, Topic, open_bag
from deeprob_perception.errors import BagError, PerceptionError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, serialize
from deeprob_perception.messages.headers import has_header, restamped
from deeprob_perception.messages.images import make_image, to_array
from deeprob_perception.nodes.dds import use_large_image_profile

log = logging.getLogger(__name__)
CLOCK_PERIOD = 0.01  # seconds between messages on /clock, as `ros2 bag play --clock 100`
DISCOVERY = 0.05  # seconds between looks at who subscribes


@dataclass(frozen=True)
class PlayOptions:
    """How to play. Times in seconds.

    topics: names as in the bag; empty for all. remap: bag name -> name to publish.
    wait_for_subscribers: start when there are so many subscriptions of the topics played, in sum; give up after
    `wait_timeout`. raw: publish CompressedImage as decoded Image, without `/compressed` in the name.
    restamp: stamps say when a message was played, so that latency can be measured. clock: publish /clock.
    """

    rate: float = 1.0
    loop: bool = False
    topics: tuple[str, ...] = ()
    remap: dict[str, str] = field(default_factory=dict)
    clock: bool = False
    wait_for_subscribers: int = 0
    wait_timeout: float = 30.0
    start_offset: float = 0.0
    raw: bool = False
    restamp: bool = False


def message_class(msgtype: str) -> type | None:
    """Return rclpy's class of e.g. `sensor_msgs/msg/Image`; None where its package is not installed."""
    package, _, name = msgtype.split("/")
    try:
        return getattr(import_module(f"{package}.msg"), name, None)
    except ImportError:
        return None


def decompressed(raw: bytes) -> bytes:
    """Return a serialised CompressedImage as a serialised Image: bgr8, mono8, 16UC1 or 32FC1."""
    msg = deserialize(raw, COMPRESSED_IMAGE)
    pixels = to_array(msg)
    if pixels.ndim == 3:
        pixels, encoding = np.ascontiguousarray(pixels[..., :3]), "bgr8"
    else:
        encoding = {"uint8": "mono8", "uint16": "16UC1", "float32": "32FC1"}[str(pixels.dtype)]
    return serialize(make_image(pixels, encoding, msg.header), IMAGE)


def play(path: str | Path, options: PlayOptions, say: Callable[[str], None] = log.info) -> dict[str, int]:
    """Play a bag until its end, or for ever, or until a signal; return how many messages went out on each topic.

    Raises BagError for a bag that cannot be read or has none of the topics, and if the subscribers don't come.
    """
    use_large_image_profile()
    with open_bag(path, warn=say) as bag:
        rclpy.init()
        try:
            node = Node("deeprob_play", start_parameter_services=False)
            player = Player(node, bag, options, say)
            try:
                player.wait_for_subscribers()
                player.run()
                player.finish()
            except KeyboardInterrupt:
                pass
            except Exception:
                # A signal ends ROS at once, also under what publishes or waits.
                if rclpy.ok():
                    raise
            return player.sent
        finally:
            rclpy.try_shutdown()


class Player:
    """Publishers for a bag's topics, and the loop that feeds them."""

    def __init__(self, node: Node, bag: Bag, options: PlayOptions, say: Callable[[str], None]):
        self._node, self._bag, self._options, self._say = node, bag, options, say
        self._publishers: dict[str, Publisher] = {}
        self._stamped: set[str] = set()
        self.sent: dict[str, int] = {}
        for topic in self._chosen():
            self._open(topic)
        if not self._publishers:
            raise BagError(f"nothing of {bag.path} can be played; it holds {bag.listing()}")
        self._clock = node.create_publisher(ClockMessage, "/clock", 10) if options.clock else None

    def _chosen(self) -> list[Topic]:
        known = {topic.name: topic for topic in self._bag.topics}
        for name in (*self._options.topics, *self._options.remap):
            if name not in known:
                raise BagError(f"{self._bag.path} has no topic {name}; it holds {self._bag.listing()}")
        return [known[name] for name in self._options.topics] or self._bag.topics

    def _open(self, topic: Topic) -> None:
        decode = self._options.raw and topic.msgtype == COMPRESSED_IMAGE
        msgtype = IMAGE if decode else topic.msgtype
        name = self._options.remap.get(topic.name, topic.name)
        if decode and topic.name not in self._options.remap:
            name = name.removesuffix("/compressed")
        kind = message_class(msgtype)
        if kind is None:
            self._say(f"{topic.name} is left out: the message type {msgtype} is not installed")
            return
        durability = DurabilityPolicy.TRANSIENT_LOCAL if topic.latched else DurabilityPolicy.VOLATILE
        qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=durability)
        self._publishers[topic.name] = self._node.create_publisher(kind, name, qos)
        self.sent[topic.name] = 0
        if self._options.restamp and has_header(msgtype):  # asked now: the first question takes a second, an eternity later
            self._stamped.add(topic.name)

    def wait_for_subscribers(self) -> None:
        """Return when enough subscriptions are there; BagError after the time-out."""
        deadline = time.monotonic() + self._options.wait_timeout
        while (found := self._subscriptions()) < self._options.wait_for_subscribers and rclpy.ok():
            if time.monotonic() > deadline:
                raise BagError(f"after {self._options.wait_timeout:g} s there are {found} of "
                               f"{self._options.wait_for_subscribers} subscriptions of "
                               f"{', '.join(publisher.topic_name for publisher in self._publishers.values())}")
            time.sleep(DISCOVERY)

    def _subscriptions(self) -> int:
        return sum(publisher.get_subscription_count() for publisher in self._publishers.values())

    def run(self) -> None:
        """Play once, or again and again."""
        for _ in count() if self._options.loop else range(1):
            before = sum(self.sent.values())
            self._once()
            if not rclpy.ok():
                return
            if sum(self.sent.values()) == before:
                raise BagError(f"{self._bag.path} has no message to play after {self._options.start_offset:g} s")

    def _once(self) -> None:
        start: float | None = None
        first = 0
        for topic, log_time, raw in self._messages():
            if start is None:
                start, first = time.monotonic(), log_time
            self._sleep_until(start + (log_time - first) / 1e9 / self._options.rate, start, first)
            if not rclpy.ok():
                return
            if topic.name in self._stamped:
                raw = restamped(raw, time.time_ns())
            self._publish_clock(log_time)
            self._publishers[topic.name].publish(raw)
            self.sent[topic.name] += 1

    def _messages(self) -> Iterator[tuple[Topic, int, bytes]]:
        """Yield what is to be played, before it is due; of what lies before the offset the latched messages."""
        begin: int | None = None
        for topic, log_time, raw in self._bag.messages(list(self._publishers)):
            if begin is None:
                begin = log_time + int(self._options.start_offset * 1e9)
            if log_time < begin:
                if not topic.latched:
                    continue
                log_time = begin
            if self._options.raw and topic.msgtype == COMPRESSED_IMAGE:
                try:
                    raw = decompressed(raw)
                except PerceptionError as error:
                    self._say(f"{topic.name} at {log_time}: {error}")
                    continue
            yield topic, log_time, bytes(raw)

    def _sleep_until(self, due: float, start: float, first: int) -> None:
        """Sleep in slices, so that a signal is heeded and /clock goes on in gaps."""
        while (left := due - time.monotonic()) > 0 and rclpy.ok():
            time.sleep(min(left, CLOCK_PERIOD if self._clock else 0.1))
            if self._clock and due > time.monotonic():
                self._publish_clock(first + int((time.monotonic() - start) * self._options.rate * 1e9))

    def _publish_clock(self, now: int) -> None:
        if self._clock is not None:
            message = ClockMessage()
            message.clock.sec, message.clock.nanosec = divmod(now, 1_000_000_000)
            self._clock.publish(message)

    def finish(self) -> None:
        """Wait until the reliable subscribers have what was sent."""
        for publisher in self._publishers.values():
            if rclpy.ok():
                publisher.wait_for_all_acked(Duration(seconds=5))
