# SPDX-License-Identifier: Apache-2.0
"""The segmentation node measured from outside: a camera process, the node's process, and this one, which hears the masks.

`measure` is what `deeprob bench node` runs. `python -m deeprob_perception.nodes.measure` is its camera: it publishes reliably
at a fixed rate and prints the stamps of what it sent.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from deeprob_perception.errors import PerceptionError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, make_header, serialize, stamp_ns
from deeprob_perception.messages.images import make_compressed, make_image
from deeprob_perception.nodes.dds import use_large_image_profile
from deeprob_perception.nodes.headers import restamped
from deeprob_perception.nodes.traffic import WINDOW
from deeprob_perception.timing import Samples

FRAME_ID = "bench_optical_frame"
START = 120.0  # seconds for the node to load its model and give its first mask
SETTLE = 15.0  # seconds for the last mask to arrive


def measure(
    model: str | Path,
    rate_hz: float = 10.0,
    seconds: float = 60.0,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    width: int = 640,
    height: int = 480,
    transport: str = "raw",
) -> dict[str, Any]:
    """Run camera and node for `seconds` and return what was seen.

    Keys: `sent`, `received`, `dropped`, `failed`, `lost_in_transport` (the node's own counts), `masks` heard here;
    `accounted`: sent = received + lost_in_transport and received = masks + dropped + failed;
    `stamps_equal`, `frame_ids_equal`: every mask has a sent frame's, none twice; `newest_wins`: the last mask is the last
    frame's, and masks never go back in time; `stages`: name -> p50, p95, p99 in ms of the node's last frames (at most
    600), `stamp_to_publish`, `overhead` (the same less the engine) and `infer` (the engine) among them;
    `stamp_to_receipt`: the same seen from here; `node_memory_mb`: peak resident memory; `model`: what ran it.
    Sets the process's ROS domain to one of its own. Raises PerceptionError if the node does not come up.
    """
    use_large_image_profile()
    os.environ.update(ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST", ROS_DOMAIN_ID=str(1 + os.getpid() % 100))
    parameters = {"model": model, "backend": backend, "precision": precision, "threads": threads, "image_transport": transport}
    node_command = ["deeprob_perception.nodes.segmentation", "--ros-args"]
    for name, value in parameters.items():
        node_command += ["-p", f"{name}:={value}"]
    camera_command = ["deeprob_perception.nodes.measure", str(rate_hz), str(round(rate_hz * seconds)), str(width),
                      str(height), transport]
    with _process(node_command) as node, _process(camera_command, talks=True) as camera, _listener(node) as listener:
        listener.until(lambda: listener.masks, START, "the first mask")
        _tell(camera)  # stop warming up
        listener.until_quiet()
        before = listener.counts()
        listener.clear()
        _tell(camera)
        listener.until(lambda: camera.poll() is not None, seconds + 60.0, "the camera's end")
        assert camera.stdout is not None
        sent = json.loads(camera.stdout.read())
        listener.until(lambda: listener.masks and listener.masks[-1][0] == sent[-1], SETTLE, "")
        listener.until_quiet()
        grown = {key: after - before[key] for key, after in listener.counts().items()}
        memory = _peak_memory_mb(node.pid)
    return {
        "rate_hz": rate_hz, "seconds": seconds, "width": width, "height": height, "transport": transport,
        "model": listener.values("model"), **_judged(sent, listener.masks, grown), "stages": listener.stages(),
        "stages_of_last": min(WINDOW, len(listener.masks)), "stamp_to_receipt": listener.latency.summary(),
        "node_memory_mb": memory,
    }


def _judged(sent: list[int], masks: list[tuple[int, str]], grown: dict[str, int]) -> dict[str, Any]:
    """Compare what the camera sent, what the node counted and what was heard."""
    stamps = [stamp for stamp, _ in masks]
    return {
        "sent": len(sent),
        "masks": len(masks),
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
        self.latency = Samples()
        self._status: dict[str, Any] = {}
        self._heard = 0
        reliable = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        ros.create_subscription(Image, "/segmentation/mask", self._on_mask, reliable, raw=True)
        ros.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)

    def _on_mask(self, raw: bytes) -> None:
        now = time.time_ns()
        header = deserialize(raw, IMAGE).header
        self.masks.append((stamp_ns(header), header.frame_id))
        self.latency.add((now - stamp_ns(header)) / 1e6)

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

    def values(self, item: str) -> dict[str, str]:
        return {pair.key: pair.value for pair in self._status[item].values} if item in self._status else {}

    def counts(self) -> dict[str, int]:
        values = self.values("input")
        return {key: int(values.get(key, 0)) for key in ("received", "dropped", "failed", "lost_in_transport")}

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
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tell(camera: "subprocess.Popen[str]") -> None:
    assert camera.stdin is not None
    camera.stdin.write("\n")
    camera.stdin.flush()


def _peak_memory_mb(pid: int) -> float | None:
    """Return the peak resident memory of a process in MB (10^6 bytes); None where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)


def camera(rate_hz: float, frames: int, width: int, height: int, transport: str) -> None:
    """Publish `frames` images at `rate_hz` on `image`, and print their stamps as JSON.

    Before, images are published until a line comes on stdin (the node has found us), then nothing until the next line.
    """
    use_large_image_profile()
    rclpy.init()
    node = rclpy.create_node("bench_camera", start_parameter_services=False)
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    bgr = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    header = make_header(0, FRAME_ID)
    qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
    if transport == "compressed":
        raw = serialize(make_compressed(bgr, header), COMPRESSED_IMAGE)
        publisher = node.create_publisher(CompressedImage, "image/compressed", qos)
    else:
        raw = serialize(make_image(bgr, "bgr8", header), IMAGE)
        publisher = node.create_publisher(Image, "image", qos)
    os.set_blocking(sys.stdin.fileno(), False)
    while not sys.stdin.read(1):
        publisher.publish(restamped(raw, time.time_ns()))
        time.sleep(0.2)
    os.set_blocking(sys.stdin.fileno(), True)
    sys.stdin.readline()
    sent = []
    start = time.monotonic()
    for number in range(frames):
        time.sleep(max(0.0, start + number / rate_hz - time.monotonic()))
        sent.append(time.time_ns())
        publisher.publish(restamped(raw, sent[-1]))
    # Whoever is slow may still fetch the last ones.
    time.sleep(1.0)
    print(json.dumps(sent))
    rclpy.try_shutdown()


if __name__ == "__main__":
    camera(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
