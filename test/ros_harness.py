# SPDX-License-Identifier: Apache-2.0
"""What tests of live nodes need: processes with their logs, and a probe node that publishes, listens and waits."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

rclpy = pytest.importorskip("rclpy", reason="needs ROS 2 (extra `ros`)")

from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from rcl_interfaces.msg import SetParametersResult  # noqa: E402
from rcl_interfaces.srv import SetParametersAtomically  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image  # noqa: E402

from deeprob_perception.isolation import isolated  # noqa: E402
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, serialize, stamp_ns  # noqa: E402
from deeprob_perception.nodes.dds import use_large_image_profile  # noqa: E402

# Long, because the machine may be busy; a test that passes never waits so long.
PATIENCE = 40.0
CLASSES = {IMAGE: Image, COMPRESSED_IMAGE: CompressedImage}
RELIABLE = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)


@contextmanager
def isolated_ros() -> Iterator[None]:
    """Keep DDS on loopback and in a domain of this process's own, for itself and its children."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in isolated().items():
            patch.setenv(name, value)
        for name in ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
            patch.delenv(name, raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        use_large_image_profile()
        yield


class Process:
    """A child process with its output in a file. program: what runs `command`; by default that is a Python module."""

    def __init__(self, log: Path, *command: str, env: dict[str, str] | None = None,
                 program: Sequence[str] = (sys.executable, "-u", "-m")):  # fmt: skip
        self.log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [*program, *command], stdout=stream, stderr=subprocess.STDOUT, env=env)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """Ask the process to end and return its exit status."""
        if self.alive:
            self._process.send_signal(how)
        return self.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return the exit status; kills the process and fails after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            pytest.fail(f"still running after {timeout} s; its output:\n{self.output}")


def segmentation_node(log: Path, *remaps: str, **parameters: Any) -> Process:
    """Start the node under test; names of parameters with __ for a dot."""
    arguments = ["--ros-args"]
    for name, value in parameters.items():
        arguments += ["-p", f"{name}:={value}"]
    for remap in remaps:
        arguments += ["-r", remap]
    return Process(log, "deeprob_perception.nodes.segmentation", *arguments)


class Probe:
    """A node in the test's process: publishes serialised messages, keeps what it hears, asks for services."""

    def __init__(self, watched: Process | None = None, target: str = "/segmentation"):
        self.watched, self.target = watched, target
        self._context = rclpy.Context()
        rclpy.init(context=self._context)
        self.node = rclpy.create_node("probe", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.heard: dict[str, list[Any]] = {}
        self.status: dict[str, Any] = {}
        self.diagnostics_heard = 0
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._clients: dict[str, Any] = {}

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        rclpy.try_shutdown(context=self._context)

    def _on_diagnostics(self, message: Any) -> None:
        self.diagnostics_heard += message.status[0].name.startswith(self.target[1:] + ":")
        for status in message.status:
            node, _, item = status.name.rpartition(": ")
            if f"/{node}" == self.target:
                self.status[item] = status

    def until(self, condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
        """Spin until the condition holds and return its value; fail with what is known of the node otherwise."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline or (self.watched and not self.watched.alive):
                values = {name: (status.message, self.values(name)) for name, status in self.status.items()}
                log = self.watched.output if self.watched else ""
                pytest.fail(f"waited in vain for {what}\nheard: { {k: len(v) for k, v in self.heard.items()} }\n"
                            f"diagnostics: {values}\nlog:\n{log}")
            self._executor.spin_once(timeout_sec=0.05)
        return value

    def listen(self, topic: str, msgtype: str | type = IMAGE, qos: QoSProfile = RELIABLE) -> list[Any]:
        """Subscribe, wait for the publisher, and return the list to which messages are added."""
        heard = self.heard.setdefault(topic, [])
        if isinstance(msgtype, str):
            subscription = self.node.create_subscription(
                CLASSES[msgtype], topic, lambda raw: heard.append(deserialize(raw, msgtype)), qos, raw=True)
        else:
            subscription = self.node.create_subscription(msgtype, topic, heard.append, qos)
        self.until(lambda: self.node.count_publishers(subscription.topic_name), f"a publisher of {topic}")
        return heard

    def deaf(self) -> None:
        """End all subscriptions but that of /diagnostics."""
        for subscription in list(self.node.subscriptions):
            if subscription.topic_name != "/diagnostics":
                self.node.destroy_subscription(subscription)
        self.heard.clear()

    def publisher(self, topic: str, msgtype: str = IMAGE, qos: QoSProfile = RELIABLE, wait: bool = True) -> Any:
        """Return a publisher that somebody listens to already (unless told not to wait)."""
        publisher = self.node.create_publisher(CLASSES[msgtype], topic, qos)
        if wait:
            self.until(publisher.get_subscription_count, f"a subscriber of {topic}")
        return publisher

    def mask_of(self, publisher: Any, message: Any, masks: list[Any], msgtype: str = IMAGE) -> Any:
        """Publish one image until its mask, told by the stamp, is heard, and return that.

        Again and again, because the node subscribes best effort and right after discovery a message may get lost.
        """
        stamp = stamp_ns(message.header)
        raw = serialize(message, msgtype)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            publisher.publish(raw)
            again = time.monotonic() + 2.0
            while time.monotonic() < again:
                mask = next((m for m in masks if stamp_ns(m.header) == stamp), None)
                if mask is not None:
                    return mask
                self._executor.spin_once(timeout_sec=0.05)
        return self.until(lambda: None, "the mask of an image", timeout=0)

    def values(self, item: str) -> dict[str, str]:
        """Return the key-value pairs of the last diagnostics of `input`, `output` or `model`."""
        return {pair.key: pair.value for pair in self.status[item].values} if item in self.status else {}

    def fresh_diagnostics(self) -> None:
        """Wait for diagnostics that were gathered after this call."""
        seen = self.diagnostics_heard
        self.until(lambda: self.diagnostics_heard >= seen + 2, "fresh diagnostics")

    def says(self, item: str, text: str) -> Any:
        """Wait until the diagnostics' message of `item` contains `text`, and return the status."""
        return self.until(lambda: item in self.status and text in self.status[item].message and self.status[item],
                          f"diagnostics of {item} with {text!r}")

    def call(self, kind: Any, name: str, request: Any) -> Any:
        """Call a service of the node and return the answer."""
        client = self._clients.setdefault(name, self.node.create_client(kind, f"{self.target}/{name}"))
        self.until(client.service_is_ready, f"service {name}")
        future = client.call_async(request)
        self.until(future.done, f"an answer of {name}")
        return future.result()

    def set_parameters(self, **values: Any) -> SetParametersResult:
        """Set several parameters at once (all or none)."""
        request = SetParametersAtomically.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        return self.call(SetParametersAtomically, "set_parameters_atomically", request).result

    def transition(self, label: str) -> bool:
        """Ask for a lifecycle transition and return whether it succeeded."""
        request = ChangeState.Request()
        request.transition.id = {"configure": 1, "cleanup": 2, "activate": 3, "deactivate": 4}[label]
        return self.call(ChangeState, "change_state", request).success

    def state(self) -> str:
        """Return the label of the node's lifecycle state."""
        return self.call(GetState, "get_state", GetState.Request()).current_state.label
