# SPDX-License-Identifier: Apache-2.0
"""Run episodes of the closed loop and judge them: the arm shall touch the named object of one robot cell after another.

Run it as `python -m deeprob_perception.nodes.episodes --episodes 50`, beside the nodes robot_cell,
segmentation, target and policy.
An episode prints one line of JSON; it is judged by the cell's own `~/state`, never by what the other nodes believe.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PointStamped
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from deeprob_perception.errors import PerceptionError
from deeprob_perception.nodes.dds import use_large_image_profile

CELL, TARGET, POLICY = "/robot_cell", "/target", "/policy"
ANSWER = 20.0  # seconds that a service has
READY = 20.0  # seconds until the policy moves; afterwards the episode has failed
RELIABLE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)


class Episodes(Node):
    """Speaks to the nodes' services and hears what the cell says of itself."""

    def __init__(self) -> None:
        super().__init__("deeprob_episodes", start_parameter_services=False)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        self._clients_: dict[str, Any] = {}
        self.cell: dict[str, Any] = {}
        self.goals = 0
        self.goal: list[float] | None = None
        self.reasons: dict[str, str] = {}
        self.create_subscription(String, f"{CELL}/state", self._on_state, RELIABLE)
        self.create_subscription(PointStamped, f"{TARGET}/goal", self._on_goal, RELIABLE)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _on_state(self, message: String) -> None:
        self.cell = json.loads(message.data)

    def _on_goal(self, message: PointStamped) -> None:
        self.goals += 1
        self.goal = [message.point.x, message.point.y, message.point.z]

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.reasons[status.name] = status.message

    def until(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Spin until the condition holds, at most so long; return whether it does."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or not rclpy.ok():
                return False
            self._executor.spin_once(timeout_sec=0.02)
        return True

    def call(self, kind: Any, name: str, request: Any) -> Any:
        """Call a service and return its answer. :raises PerceptionError: when there is none."""
        client = self._clients_.setdefault(name, self.create_client(kind, name))
        if not self.until(client.service_is_ready, ANSWER):
            raise PerceptionError(f"nobody offers the service {name} within {ANSWER:g} s: is that node running?")
        future = client.call_async(request)
        if not self.until(future.done, ANSWER):
            raise PerceptionError(f"{name} does not answer within {ANSWER:g} s")
        return future.result()

    def set(self, node: str, **values: Any) -> None:
        """Set parameters of a node. :raises PerceptionError: when it refuses."""
        request = SetParametersAtomically.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        result = self.call(SetParametersAtomically, f"{node}/set_parameters_atomically", request).result
        if not result.successful:
            raise PerceptionError(f"{node}: {result.reason}")

    def episode(self, kind: str, seconds: float, first: bool) -> dict[str, Any]:
        """Run one: a new cell (unless it is the first), a goal, then the arm; return what the cell says at its end."""
        self.call(SetBool, f"{POLICY}/enable", SetBool.Request(data=False))
        self.set(CELL, target_class=kind)
        self.set(TARGET, target_class=kind)
        if not first or not self.cell.get("target", "").startswith(kind):
            answer = self.call(Trigger, f"{CELL}/next", Trigger.Request())
            if not answer.success:
                raise PerceptionError(f"{CELL}/next: {answer.message}")
            seed = json.loads(answer.message)["seed"]
            if not self.until(lambda: self.cell.get("seed") == seed, ANSWER):
                raise PerceptionError(f"{CELL}/state does not tell of seed {seed} within {ANSWER:g} s")
        self.goals, self.goal = 0, None
        enabled = self._enable()
        started = self.cell["time"]
        touched = enabled and self.until(lambda: self.cell["touched"] is not None, seconds)
        state = dict(self.cell)
        self.call(SetBool, f"{POLICY}/enable", SetBool.Request(data=False))
        asked = ("target: output", "policy: output")
        why = "" if touched else "; ".join(f"{name}: {self.reasons.get(name, 'unknown')}" for name in asked)
        taken = state["touched"] - started if state["touched"] is not None else None
        return {"kind": kind, **state, "success": bool(touched), "seconds": taken, "started": started, "goals": self.goals,
                "last_goal": self.goal, "why": why}  # fmt: skip

    def _enable(self) -> bool:
        """Wait for a goal, then arm the policy, which may have to read a new robot description first."""
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline and rclpy.ok():
            if not self.until(lambda: self.goals, max(0.0, deadline - time.monotonic())):
                return False
            self.call(Trigger, f"{POLICY}/reset", Trigger.Request())
            if self.call(SetBool, f"{POLICY}/enable", SetBool.Request(data=True)).success:
                return True
            self.until(lambda: False, 0.1)
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run episodes of the closed loop; a line of JSON each.")
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="that the arm has for one")
    parser.add_argument("--kinds", default="ball", help="classes to touch, in turn, comma-separated")
    options = parser.parse_args(arguments)
    use_large_image_profile()
    rclpy.init()
    try:
        node = Episodes()
        node.until(lambda: node.cell, ANSWER)
        for number, kind in enumerate(islice(cycle(options.kinds.split(",")), options.episodes)):
            print(json.dumps(node.episode(kind, options.seconds, first=number == 0)), flush=True)
    except (KeyboardInterrupt, ExternalShutdownException, BrokenPipeError):
        pass
    except PerceptionError as error:
        raise SystemExit(str(error)) from error
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
