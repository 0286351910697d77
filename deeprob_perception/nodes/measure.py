# SPDX-License-Identifier: Apache-2.0
"""The segmentation node measured from outside: a camera process, the node's process, and this one, which hears the masks.

`deeprob bench node` runs this. `nodes.bench_camera` is the camera.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from deeprob_perception.errors import PerceptionError
from deeprob_perception.isolation import isolated
from deeprob_perception.messages.cdr import IMAGE, deserialize, stamp_ns
from deeprob_perception.nodes.bench_camera import FRAME_ID
from deeprob_perception.nodes.dds import use_large_image_profile
from deeprob_perception.nodes.distro import TELLS_MESSAGE_INFO
from deeprob_perception.nodes.traffic import WINDOW
from deeprob_perception.share import share_dir
from deeprob_perception.timing import Samples

START = 120.0  # seconds for the node to load its model and give its first mask
SETTLE = 15.0  # seconds for the last mask to arrive


@dataclass(frozen=True)
class Setting:
    """What runs: the node's parameters, and the camera: `bag` (None: the sample bag) has its pictures, pixels its size."""

    model: str | Path
    backend: str = "auto"
    precision: str = "auto"
    threads: int = 0
    width: int = 640
    height: int = 480
    transport: str = "raw"
    bag: Path | None = None


def measure(setting: Setting, rate_hz: float = 10.0, seconds: float = 60.0) -> dict[str, Any]:
    """Start camera and node for one run, so that the node's own percentiles are of this run; see `Session.run`."""
    with session(setting) as started:
        return started.run(rate_hz, seconds)


@contextmanager
def session(setting: Setting) -> "Iterator[Session]":
    """Start camera and node, and wait for the first mask.

    Sets the process's ROS domain to one of its own. Raises PerceptionError if the node does not come up.
    """
    if not TELLS_MESSAGE_INFO:
        raise PerceptionError("measuring the node needs ROS 2 Iron or newer: Humble's rclpy does not tell when a mask was sent")
    use_large_image_profile()
    os.environ.update(isolated())
    node_command = ["deeprob_perception.nodes.segmentation", "--ros-args", "-p", f"image_transport:={setting.transport}"]
    for name in ("model", "backend", "precision", "threads"):
        node_command += ["-p", f"{name}:={getattr(setting, name)}"]
    bag = setting.bag or share_dir() / "bags" / "sample.mcap"
    camera_command = ["deeprob_perception.nodes.bench_camera", str(bag), str(setting.width), str(setting.height),
                      setting.transport]
    with _process(node_command) as node, _process(camera_command, talks=True) as camera, _listener(node) as listener:
        listener.until(lambda: listener.masks, START, "the first mask")
        _tell(camera, "")  # stop warming up
        yield Session(setting, node, camera, listener)


class Session:
    """A node at work, to be measured at any number of rates."""

    def __init__(
        self, setting: Setting, node: "subprocess.Popen[str]", camera: "subprocess.Popen[str]", listener: "_Listener"
    ):
        self.setting, self._node, self._camera, self._listener = setting, node, camera, listener

    @property
    def model(self) -> dict[str, str]:
        """Return what the node's diagnostics say of its model: name, sha256, backend, precision, device, ..."""
        return self._listener.values("model")

    def run(self, rate_hz: float, seconds: float) -> dict[str, Any]:
        """Send frames at `rate_hz` for `seconds` and return what was seen.

        Keys: `rate_hz`, `seconds`, the setting's; `sent_hz`: the rate that the camera reached; `sent`, `received`, `dropped`,
        `failed`, `lost_in_transport` (the node's own counts), `masks` heard here; `loss`: share of the frames sent without
        a mask; `accounted`: sent = received + lost_in_transport and received = masks + dropped + failed; `stamps_equal`,
        `frame_ids_equal`: every mask has a sent frame's, none twice; `newest_wins`: the last mask is the last frame's, and
        masks never go back in time; `stamp_to_publish`: n, p50, p95, p99, max in ms from the frame's stamp to the node's
        handing its mask to DDS, `stamp_to_receipt`: to its arrival in this process; `stages`: name -> p50, p95, p99 in ms
        of the node's last frames (at most 600, of earlier runs too), `infer` (the engine), `wait`, `decode` and `overhead`
        (all but the engine) among them; `node_memory_mb`: peak resident memory; `rmw`; `model`: what ran it.
        """
        listener, camera = self._listener, self._camera
        listener.until_quiet()
        before = listener.counts()
        listener.clear()
        _tell(camera, f"{rate_hz} {max(2, round(rate_hz * seconds))}")
        sent = json.loads(listener.line_of(camera, seconds + 60.0, "the camera's end"))
        listener.until(lambda: listener.masks and listener.masks[-1][0] == sent[-1], SETTLE, "")
        listener.until_quiet()
        grown = {key: after - before[key] for key, after in listener.counts().items()}
        return {
            **{key: value for key, value in asdict(self.setting).items() if key in ("width", "height", "transport")},
            "rate_hz": rate_hz, "seconds": seconds, "sent_hz": (len(sent) - 1) / (sent[-1] - sent[0]) * 1e9,
            "model": self.model, **_judged(sent, listener.masks, grown), "stages": listener.stages(),
            "stages_of_last": WINDOW, "stamp_to_publish": listener.published.summary(),
            "stamp_to_receipt": listener.latency.summary(), "node_memory_mb": _peak_memory_mb(self._node.pid),
            "rmw": rclpy.get_rmw_implementation_identifier(),
        }  # fmt: skip


def _judged(sent: list[int], masks: list[tuple[int, str]], grown: dict[str, int]) -> dict[str, Any]:
    """Compare what the camera sent, what the node counted and what was heard."""
    stamps = [stamp for stamp, _ in masks]
    return {
        "sent": len(sent),
        "masks": len(masks),
        "loss": 1 - len(masks) / len(sent),
        **grown,
        "accounted": len(sent) == grown["received"] + grown["lost_in_transport"]
        and grown["received"] == len(masks) + grown["dropped"] + grown["failed"],
        "stamps_equal": set(stamps) <= set(sent) and len(set(stamps)) == len(stamps),
        "frame_ids_equal": all(frame_id == FRAME_ID for _, frame_id in masks),
        "newest_wins": bool(stamps) and stamps[-1] == sent[-1] and stamps == sorted(stamps),
    }


class _Listener:
    """Hears masks and diagnostics."""

    def __init__(self, node: "subprocess.Popen[str]", ros: Node, executor: SingleThreadedExecutor):
        self._process, self._executor = node, executor
        self.masks: list[tuple[int, str]] = []
        self.latency, self.published = Samples(), Samples()
        self._status: dict[str, Any] = {}
        self._heard = 0
        reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        ros.create_subscription(Image, "/segmentation/mask", self._on_mask, reliable, raw=True)
        ros.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _on_mask(self, raw: bytes, info: dict[str, int]) -> None:
        now = time.time_ns()
        header = deserialize(raw, IMAGE).header
        stamp = stamp_ns(header)
        self.masks.append((stamp, header.frame_id))
        self.latency.add((now - stamp) / 1e6)
        # Written by DDS in the node's process when the mask was handed over.
        self.published.add((info["source_timestamp"] - stamp) / 1e6)

    def _on_diagnostics(self, message: Any) -> None:
        self._heard += 1
        self._status = {status.name.rpartition(": ")[2]: status for status in message.status}

    def until(self, condition: Any, patience: float, what: str) -> None:
        """Spin until `condition()`; after `patience` seconds raise, or just return if there is no `what`."""
        deadline = time.monotonic() + patience
        while not condition():
            if self._process.poll() is not None:
                raise PerceptionError(f"the segmentation node ended with status {self._process.returncode}: {self.log()}")
            if time.monotonic() > deadline:
                if what:
                    raise PerceptionError(f"waited {patience:g} s in vain for {what}: {self.log()}")
                return
            self._executor.spin_once(timeout_sec=0.05)

    def line_of(self, process: "subprocess.Popen[str]", patience: float, what: str) -> str:
        """Spin until the other process has written a line, and return it."""
        assert process.stdout is not None
        self.until(lambda: select.select([process.stdout], [], [], 0)[0] or process.poll() is not None, patience, what)
        line = process.stdout.readline()
        if not line:
            raise PerceptionError(f"the camera ended with status {process.wait()}; its log is above")
        return line

    def until_quiet(self) -> None:
        """Spin until two diagnostics in a row count the same frames, and none is under way in the node."""
        while True:
            counts, heard = self.counts(), self._heard
            self.until(lambda: self._heard > heard, START, "diagnostics")  # noqa: B023
            output = self.values("output")
            done = int(output["published"]) + int(output["unheard"]) + counts["dropped"] + counts["failed"]
            if self.counts() == counts and counts["received"] == done:
                return

    def log(self) -> str:
        """Return why there is no output, as the node has it."""
        return self.values("output").get("no_output_because", "") or "its log is above"

    def clear(self) -> None:
        self.masks.clear()
        self.latency.clear()
        self.published.clear()

    def values(self, item: str) -> dict[str, str]:
        return {pair.key: pair.value for pair in self._status[item].values} if item in self._status else {}

    def counts(self) -> dict[str, int]:
        values = self.values("input")
        names = ("received", "dropped", "failed", "lost_in_transport")
        return {key: int(text) if (text := values.get(key, "0")).isdecimal() else 0 for key in names}  # "unknown"

    def stages(self) -> dict[str, dict[str, float]]:
        stages: dict[str, dict[str, float]] = {}
        for key, value in self.values("output").items():
            stage, _, percentile = key.removesuffix("_ms").rpartition("_")
            if key.endswith("_ms") and percentile in ("p50", "p95", "p99"):
                stages.setdefault(stage, {})[percentile] = float(value)
        return stages


@contextmanager
def _listener(node: "subprocess.Popen[str]") -> Iterator[_Listener]:
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=int(os.environ["ROS_DOMAIN_ID"]))
    ros = rclpy.create_node("bench", context=context, start_parameter_services=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(ros)
    try:
        yield _Listener(node, ros, executor)
    finally:
        executor.shutdown()
        ros.destroy_node()
        rclpy.try_shutdown(context=context)


@contextmanager
def _process(command: list[str], talks: bool = False) -> "Iterator[subprocess.Popen[str]]":
    pipe = subprocess.PIPE if talks else None
    process = subprocess.Popen([sys.executable, "-u", "-m", *command], stdin=pipe, stdout=pipe, text=True)
    try:
        yield process
    finally:
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()  # rclpy's signal handler doesn't wake who reads it
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tell(camera: "subprocess.Popen[str]", line: str) -> None:
    assert camera.stdin is not None
    with suppress(BrokenPipeError):  # whoever waits for its answer says that it died
        camera.stdin.write(f"{line}\n")
        camera.stdin.flush()


def _peak_memory_mb(pid: int) -> float | None:
    """Return the peak resident memory of a process in MB (10^6 bytes); None where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)
