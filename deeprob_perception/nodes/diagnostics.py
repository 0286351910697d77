# SPDX-License-Identifier: Apache-2.0
"""A camera node's state on /diagnostics, once a second, by the names of REP 107; and its warnings in the log."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, qos_check_compatible

from deeprob_perception.messages.cdr import COMPRESSED_IMAGE
from deeprob_perception.nodes.diagnosis import Cause, Facts, Level, causes
from deeprob_perception.nodes.traffic import Rate

if TYPE_CHECKING:
    from deeprob_perception.nodes.base import CameraNode

PERIOD = 1.0  # seconds, REP 107
GRACE = 3.0  # seconds after activation in which DDS discovery may still be under way: nothing is logged yet
REPEAT = 30.0  # seconds after which a standing cause is logged again


def status_of(node: Node, item: str, level: Level, text: str, values: dict[str, str], hardware: str = "") -> DiagnosticStatus:
    """Return the status `NODE: item`."""
    return DiagnosticStatus(
        level=bytes([level]),
        name=f"{node.get_fully_qualified_name().lstrip('/')}: {item}",
        message=text,
        hardware_id=hardware,
        values=[KeyValue(key=key, value=value) for key, value in values.items()],
    )


class Diagnostics:
    """Publishes three statuses, `NODE: input`, `NODE: output` and `NODE: model`, in every lifecycle state."""

    def __init__(self, node: CameraNode):
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # A steady clock, so that a simulation which has not started yet is reported too.
        node.create_timer(PERIOD, self.publish, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._rate_in, self._rate_lost, self._rate_out = Rate(), Rate(), Rate()
        self._logged: dict[str, float] = {}
        self._active_since: float | None = None

    def publish(self) -> None:
        """Gather, publish and log."""
        facts = self.facts()
        found = causes(facts)
        self._log(facts, found)
        model = self._node.model_facts()
        if model:
            model = {**model, "building": self._node.engine_source.building}
        message = DiagnosticArray()
        message.header.stamp = self._node.get_clock().now().to_msg()
        message.status = [
            self._status("input", facts.topic, found, self._input(facts)),
            self._status("output", model.get("device", ""), found, self._output(found)),
            self._status("model", model.get("device", ""), found, model),
        ]
        self._publisher.publish(message)

    def facts(self) -> Facts:
        """Return what is known of the node and its surroundings now."""
        node = self._node
        topic, msgtype = node.topic, node.msgtype
        fitting, incompatible, other_types = self._publishers(topic, msgtype)
        neighbour = topic.removesuffix("/compressed") if msgtype == COMPRESSED_IMAGE else f"{topic}/compressed"
        stamps = node.traffic.stamps
        clock = node.get_clock()
        arrived = self._rate_in.reading(monotonic(), node.slot.received)
        lost = self._rate_lost.reading(monotonic(), node.lost_in_transport)
        return Facts(
            node=node.get_fully_qualified_name(),
            state=node.state(),
            topic=topic,
            msgtype=msgtype,
            failure=node.failure,
            publishers=fitting,
            incompatible=tuple(incompatible),
            other_types=tuple(other_types),
            neighbour=neighbour if not fitting and node.count_publishers(neighbour) else "",
            silent=monotonic() - node.last_arrival,
            listeners=len(node.wanted()),
            lost=lost / (arrived + lost) if lost > 0 else 0.0,
            failing=node.traffic.failures.reason if node.traffic.failures.in_a_row else "",
            age=stamps.age,
            zero_stamps=stamps.last_was_zero,
            clock_missing=clock.ros_time_is_active and clock.now().nanoseconds == 0,
            stale_after=node.settings["stale_after"],
            build_failure=node.engine_source.failure,
        )

    def _publishers(self, topic: str, msgtype: str) -> tuple[int, list[str], list[str]]:
        """Return how many publishers of `topic` fit, what is incompatible in the others, and their other types."""
        fitting, incompatible, other_types = 0, [], []
        for publisher in self._node.get_publishers_info_by_topic(topic):
            if publisher.topic_type != msgtype:
                other_types.append(publisher.topic_type)
                continue
            subscription = self._node.subscription
            if subscription is not None:
                compatible, reason = qos_check_compatible(publisher.qos_profile, subscription.qos_profile)
                if compatible == QoSCompatibility.ERROR:
                    incompatible.append(f"{publisher.node_name}: {reason.strip().rstrip(';')}")
                    continue
            fitting += 1
        return fitting, incompatible, sorted(set(other_types))

    def _input(self, facts: Facts) -> dict[str, str]:
        slot, traffic = self._node.slot, self._node.traffic
        return {
            "topic": facts.topic,
            "type": facts.msgtype,
            "publishers": str(facts.publishers),
            "rate_hz": f"{self._rate_in.value:.2f}",
            "received": str(slot.received),
            "dropped": str(slot.dropped),
            "lost_in_transport": str(self._node.lost_in_transport) if self._node.tells_losses else "unknown",
            "failed": str(traffic.failures.count),
            "last_failure": traffic.failures.reason,
            "seconds_since_last_frame": f"{facts.silent:.2f}",
            "age_s": "n/a" if facts.age is None else f"{facts.age:.3f}",
            "zero_stamps": str(traffic.stamps.zero),
            "backward_stamps": str(traffic.stamps.backward),
            "incomparable_stamps": str(traffic.stamps.incomparable),
        }

    def _output(self, found: list[Cause]) -> dict[str, str]:
        node, traffic = self._node, self._node.traffic
        values = {
            "rate_hz": f"{self._rate_out.reading(monotonic(), traffic.published):.2f}",
            "published": str(traffic.published),
            "unheard": str(traffic.unheard),
            "listened_to": " ".join(sorted(node.wanted())),
            "no_output_because": "; ".join(cause.text for cause in found),
        }
        for stage, row in traffic.summary().items():
            for percentile in ("p50", "p95", "p99"):
                values[f"{stage}_{percentile}_ms"] = f"{row[percentile]:.3f}"
        return values

    def _status(self, item: str, hardware: str, found: list[Cause], values: dict[str, str]) -> DiagnosticStatus:
        # What keeps the output away is told there too, wherever it lies.
        mine = [cause for cause in found if item in (cause.item, "output")]
        level = max((cause.level for cause in mine), default=Level.OK)
        good = {"input": f"{values.get('rate_hz')} Hz, {values.get('dropped')} dropped",
                "output": f"{values.get('rate_hz')} Hz",
                "model": values.get("building") or f"{values.get('name')} on {values.get('backend')} {values.get('precision')}"
                if values else "not loaded"}[item]
        message = "; ".join(cause.text for cause in mine) or good
        return status_of(self._node, item, level, message, values, hardware)

    def _log(self, facts: Facts, found: list[Cause]) -> None:
        """Log a cause when it appears and every REPEAT seconds, and once when the last one has gone."""
        now = monotonic()
        if facts.state != "active":
            self._active_since = None
            self._logged.clear()
            return  # the transition has been logged
        self._active_since = self._active_since or now
        if now - self._active_since < GRACE:
            return
        log = self._node.get_logger()
        for cause in found:
            if now - self._logged.get(cause.name, -REPEAT) < REPEAT:
                continue
            self._logged[cause.name] = now
            if cause.level == Level.OK:  # rclpy wants one severity for each line of code
                log.info(cause.text)
            else:
                log.warning(cause.text)
        gone = self._logged.keys() - {cause.name for cause in found}
        for name in gone:
            del self._logged[name]
        if gone and not found:
            log.info(f"frames arrive on {facts.topic} and are processed again")
