# SPDX-License-Identifier: Apache-2.0
"""The target node's state on /diagnostics, once a second: what comes in, the goal, and why there is none."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType

from deeprob_perception.nodes.diagnosis import Level
from deeprob_perception.nodes.diagnostics import PERIOD, REPEAT, status_of
from deeprob_perception.nodes.traffic import Rate

if TYPE_CHECKING:
    from deeprob_perception.nodes.target import TargetNode


class TargetDiagnostics:
    """Publishes `NODE: input` and `NODE: output` once a second, in every lifecycle state, and logs why there is no goal."""

    def __init__(self, node: TargetNode):
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        node.create_timer(PERIOD, self.publish, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._masks, self._depths, self._goals = Rate(), Rate(), Rate()
        self._logged, self._since = "", 0.0

    def publish(self) -> None:
        """Gather, publish and log."""
        node, now = self._node, monotonic()
        level, text = self._why()
        missing = [name for name in ("mask", "depth") if not node.count_publishers(self._topic(name))]
        rates = f"masks {self._masks.reading(now, node.masks):.1f} Hz, depth {self._depths.reading(now, node.depths):.1f} Hz"
        goals = f"{self._goals.reading(now, node.published):.1f} Hz"
        message = DiagnosticArray()
        message.header.stamp = node.get_clock().now().to_msg()
        message.status = [
            status_of(node, "input", Level.WARN if missing else Level.OK,
                      "; ".join(f"nobody publishes {self._topic(name)}" for name in missing) or rates, self._input()),
            status_of(node, "output", level, text or goals, self._output(goals, text)),
        ]  # fmt: skip
        self._publisher.publish(message)
        self._log(level, text)

    def _topic(self, name: str) -> str:
        node = self._node
        compressed = name == "depth" and node.settings["depth_transport"] == "compressed"
        return node.topic(name) + ("/compressed" if compressed else "")

    def _why(self) -> tuple[Level, str]:
        node = self._node
        if node.state() != "active":
            verb = "activate" if node.state() == "inactive" else "configure"
            told = f"not configured: {node.failure}" if node.failure else (
                f"{node.state()}: `ros2 lifecycle set {node.get_fully_qualified_name()} {verb}`")
            return (Level.ERROR if node.failure else Level.WARN), told
        if not node.settings["target_class"]:
            return Level.OK, "nothing is looked for: set target_class"
        now, stale = monotonic(), node.settings["stale_after"]
        silent = now - node.goal_at
        if silent <= stale:
            return Level.OK, ""
        for what, name, count, last in (("mask", "mask", node.masks, node.mask_at),
                                        ("depth image", "depth", node.depths, node.depth_at)):  # fmt: skip
            if not count:
                return Level.WARN, f"no {what} has come on {self._topic(name)}"
            if now - last > stale:
                return Level.WARN, f"no {what} has come on {self._topic(name)} for {now - last:.0f} s"
        if node.in_a_row:
            return Level.WARN, f"no goal for {silent:.0f} s: {node.reason}"
        slop = node.settings["slop"]
        return Level.WARN, (f"no goal for {silent:.0f} s: no depth image on {self._topic('depth')} within {slop:g} s of a "
                            "mask's stamp (parameter slop)")

    def _input(self) -> dict[str, str]:
        node = self._node
        return {"masks": str(node.masks), "depth_images": str(node.depths), "unmatched_masks": str(node.pairs.unmatched),
                "mask_topic": self._topic("mask"), "depth_topic": self._topic("depth"),
                "camera_info": str(node.intrinsics) or "none yet"}  # fmt: skip

    def _output(self, goals: str, text: str) -> dict[str, str]:
        node, seen = self._node, self._node.last
        values = {"target_class": node.settings["target_class"], "rate": goals, "published": str(node.published),
                  "failed": str(node.failed), "no_output_because": text}  # fmt: skip
        if node.goal is not None and seen is not None:
            values |= {"goal": " ".join(f"{v:.4f}" for v in node.goal), "age_s": f"{monotonic() - node.goal_at:.2f}",
                       "pixels": str(seen.pixels), "with_depth": str(seen.measured)}  # fmt: skip
        for name, samples in (("locate", node.times), ("stamp_to_goal", node.delays)):
            summary = samples.summary()
            values |= {f"{name}_{p}_ms": f"{summary[p]:.2f}" for p in ("p50", "p95", "p99") if summary["n"]}
        return values

    def _log(self, level: Level, text: str) -> None:
        key = "".join(c for c in text if not c.isdigit())
        now = monotonic()
        if self._node.state() != "active" or (key == self._logged and (level == Level.OK or now - self._since < REPEAT)):
            return
        if not key and self._logged:
            self._node.get_logger().info("goals are published")
        elif level != Level.OK:
            self._node.get_logger().warning(text)
        self._logged, self._since = key, now
