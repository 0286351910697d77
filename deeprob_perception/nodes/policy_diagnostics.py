# SPDX-License-Identifier: Apache-2.0
"""The policy node's state on /diagnostics, once a second: what it does, why it holds, what it refused, how punctual it is."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.clock import Clock, ClockType

from deeprob_perception.nodes.diagnosis import Level
from deeprob_perception.nodes.diagnostics import PERIOD, REPEAT, status_of
from deeprob_perception.policy.safety import DISARMED, HOLDING, REFUSALS

if TYPE_CHECKING:
    from deeprob_perception.nodes.policy import PolicyNode


class PolicyDiagnostics:
    """Publishes three statuses, `NODE: input`, `NODE: output` and `NODE: model`, in every lifecycle state."""

    def __init__(self, node: PolicyNode):
        self._node = node
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # A steady clock, so that a simulation which has not started yet is reported too.
        node.create_timer(PERIOD, self.publish, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._logged, self._since = "", 0.0

    def publish(self) -> None:
        """Gather, publish and log."""
        node = self._node
        level, state, reason = self._why()
        model_level, model_text = self._model_state()
        message = DiagnosticArray()
        message.header.stamp = node.get_clock().now().to_msg()
        told = f"{state}: {reason}" if reason else state
        message.status = [
            self._status("input", *self._input_state(), self._input()),
            self._status("output", level, told, {"state": state, "reason": reason, **self._output()}),
            self._status("model", model_level, model_text, self._model()),
        ]
        self._publisher.publish(message)
        self._log(told, level)

    def _why(self) -> tuple[Level, str, str]:
        """Return the level, `disarmed`, `holding` or `moving`, and why it isn't moving."""
        node = self._node
        if node.state() != "active":
            name = node.get_fully_qualified_name()
            verb = "activate" if node.state() == "inactive" else "configure"
            reason = f"not configured: {node.failure}" if node.failure else f"`ros2 lifecycle set {name} {verb}`"
            return (Level.ERROR if node.failure else Level.WARN), node.state(), reason
        if node.loop is None:
            if node.robot_failure:
                return Level.ERROR, DISARMED, node.robot_failure
            return Level.WARN, DISARMED, f"nobody has published {node.description_topic} yet"
        clock = node.get_clock()
        if clock.ros_time_is_active and clock.now().nanoseconds == 0:
            return Level.WARN, node.loop.safety.state, "use_sim_time is set, but nobody publishes /clock: no step is made"
        safety = node.loop.safety
        return (Level.WARN if safety.state == HOLDING else Level.OK), safety.state, safety.reason

    def _input_state(self) -> tuple[Level, str]:
        loop = self._node.loop
        if loop is None:
            return Level.WARN, self._node.robot_failure or "no robot yet"
        if loop.readings.bad and not np.isfinite(loop.readings.when).any():
            return Level.ERROR, "joint_states has messages with another number of positions than of names"
        missing = [name for name, when in zip(loop.readings.names, loop.readings.when, strict=True) if np.isnan(when)]
        if missing:
            others = ", ".join(list(loop.readings.others)[:8])
            seen = f"; joint_states has {others}" if others else "; no message has come"
            return Level.WARN, f"no position of {', '.join(missing[:8])} on joint_states{seen}"
        return Level.OK, f"{len(loop.readings.names)} joints"

    def _input(self) -> dict[str, str]:
        node, loop = self._node, self._node.loop
        values = {"robot_description": node.settings["robot_file"] or node.description_topic}
        if loop is None:
            return values
        now = node.now()
        ages = now - loop.readings.when
        goal = now - loop.goal.when
        return values | {
            "robot": loop.robot.name,
            "root": loop.robot.root,
            "joints": " ".join(loop.readings.names),
            "joint_states": str(loop.readings.messages),
            "oldest_joint_s": "n/a" if np.isnan(ages).any() else f"{ages.max():.3f}",
            "older_positions": str(loop.readings.backward),
            "bad_joint_states": str(loop.readings.bad),
            "other_joints": " ".join(loop.readings.others),
            "goal": "n/a" if loop.goal.position is None else " ".join(f"{x:.4f}" for x in loop.goal.position),
            "goal_age_s": "n/a" if np.isnan(goal) else f"{goal:.3f}",
        }

    def _output(self) -> dict[str, str]:
        node = self._node
        beat = node.beat
        values = {
            "rate": f"{node.settings['rate']:g}",
            "steps": str(beat.steps),
            "late_steps": str(beat.late),
            "worst_lateness_ms": f"{beat.worst * 1e3:.3f}",
            "published": str(node.published),
        }
        if node.loop is not None:
            counts = node.loop.safety.refusals
            values |= {f"refused_{name}": str(counts[name]) for name in REFUSALS}
            summary = node.loop.times.summary()
            values |= {f"step_{name}_ms": f"{summary[name]:.3f}" for name in ("p50", "p95", "p99", "max") if name in summary}
        return values

    def _model_state(self) -> tuple[Level, str]:
        node = self._node
        if not node.facts:
            return Level.WARN, "not loaded"
        text = f"{node.facts['name']} on {node.facts['backend']} {node.facts['precision']}"
        loop = node.loop
        if loop is not None and loop.look_failure:
            return Level.ERROR, loop.look_failure
        if loop is not None and loop.self_model is not None:
            error = loop.self_model.error_mm
            worst = int(error.argmax())
            limit = node.settings["self_model_warn_mm"]
            if error[worst] > limit:
                name = loop.readings.names[worst]
                return Level.WARN, (f"the self-model puts the joint {name} {error[worst]:.0f} mm away from where the URDF has "
                                    f"it (warned above {limit:g} mm): is the URDF this robot's, and are the joints' names "
                                    "and zeros right?")
            text += f"; the self-model is {error[worst]:.1f} mm off at most"
        return Level.OK, text

    def _model(self) -> dict[str, str]:
        loop = self._node.loop
        values = dict(self._node.facts)
        if loop is not None and loop.self_model is not None:
            error = loop.self_model.error_mm
            values |= {"self_model_error_mm": f"{error.max():.2f}", "self_model_mean_mm": f"{error.mean():.2f}"}
        return values

    def _status(self, item: str, level: Level, text: str, values: dict[str, str]) -> DiagnosticStatus:
        return status_of(self._node, item, level, text, values, values.get("robot", values.get("device", "")))

    def _log(self, told: str, level: Level) -> None:
        """Log what it does when that changes, and a standing cause every REPEAT seconds. Numbers in the text don't count."""
        key = "".join(c for c in told if not c.isdigit())
        now = monotonic()
        if self._node.state() != "active" or (key == self._logged and (level == Level.OK or now - self._since < REPEAT)):
            return
        self._logged, self._since = key, now
        if level == Level.OK:  # rclpy wants one severity for each line of code
            self._node.get_logger().info(told)
        else:
            self._node.get_logger().warning(told)
