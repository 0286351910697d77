# SPDX-License-Identifier: Apache-2.0
"""The part that every camera node shares: lifecycle, newest frame, one worker, outputs, parameters, diagnostics.

The executor's thread only swaps the newest serialised image into the slot and answers services; the worker thread owns
the engine and does decode -> infer -> publish. A node with several cameras would have a slot and a Traffic for each.
"""

import contextlib
import traceback
from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from time import monotonic
from typing import Any

import numpy as np
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.lifecycle.publisher import LifecyclePublisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy, qos_policy_name_from_kind
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from deeprob_perception import engines, zoo
from deeprob_perception.errors import PerceptionError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, make_header, serialize
from deeprob_perception.messages.headers import stamp_of
from deeprob_perception.messages.images import make_compressed, make_image, to_bgr
from deeprob_perception.nodes.diagnostics import Diagnostics
from deeprob_perception.nodes.distro import SubscriptionEventCallbacks, UnsupportedEventTypeError
from deeprob_perception.nodes.engine_source import EngineSource, Wish
from deeprob_perception.nodes.lifecycle import PerceptionNode, reported, spin
from deeprob_perception.nodes.parameters import Setting, Settings
from deeprob_perception.nodes.slot import Frame, FrameSlot, Pace
from deeprob_perception.nodes.traffic import Traffic, measured

__all__ = ["CameraNode", "engine_facts", "engine_settings", "measured", "spin"]
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
# REP-2003: consumers of sensor data subscribe best effort, which matches every publisher; outputs are reliable.
# Depth 1 would do for the newest frame, but on a busy machine DDS then overwrites frames before the callback has run and
# tells nobody (1 of 450 at 30 Hz): with 5 they all reach the slot, which keeps the newest and counts the others.
SENSOR = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
OUTPUT = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)

CAMERA_SETTINGS = (
    Setting("autostart", True, "Configure and activate at start; false leaves that to a lifecycle manager."),
    Setting("image_transport", "raw", "Subscribe to `image` (raw) or to `image/compressed`.",
            choices=("raw", "compressed")),
    Setting("max_rate", 0.0, "Frames to process a second at most; 0 is no limit.", live=True, between=(0.0, 1000.0)),
    Setting("stale_after", 1.0, "Seconds without a frame, or between its stamp and its processing, before a warning.",
            live=True, between=(0.01, 3600.0)),
)


def engine_settings(model: str) -> tuple[Setting, ...]:
    """Return the parameters that say which engine a node runs; `model` is the default of the first."""
    return (
        Setting("model", model, "A model's name (`deeprob models list`) or the path of an .onnx of `deeprob export`."),
        Setting("backend", "auto", "What runs the model.", choices=("auto", *engines.BACKENDS)),
        Setting("precision", "auto", "Arithmetic: auto takes int8 of a quantised model, else bf16 where it is native.",
                choices=engines.PRECISIONS),
        Setting("threads", 0, "Threads for one inference; 0 is all cores.", between=(0, 1024)),
        Setting("cache_dir", "", "Where compiled models are kept; empty is the user's cache folder."),
        Setting("serve_while_building", True, "While an engine is built (minutes, with TensorRT), serve on another back end."),
        Setting("build_only", False, "Load the model, which builds its engine into the cache, then end: for baking images."),
    )


def engine_facts(engine: engines.Engine) -> dict[str, str]:
    """Return what diagnostics say of the engine that runs."""
    return {
        "backend": engine.backend,
        "precision": engine.precision,
        "requested_precision": engine.requested_precision,
        "device": engine.device,
    }


class CameraNode(PerceptionNode):
    """A lifecycle node with one camera in. Subclasses say what is loaded, what goes out, and how it is computed."""

    def __init__(self, name: str, settings: tuple[Setting, ...], **node_options: Any):
        super().__init__(name, **node_options)
        self.settings = Settings(self, (*CAMERA_SETTINGS, *settings), self.state)
        self.slot = FrameSlot()
        self.traffic = Traffic()
        self.outputs: dict[str, LifecyclePublisher] = {}
        self.subscription: Subscription | None = None
        self.engine_source = EngineSource()
        self.lost_in_transport = 0
        self.tells_losses = True  # the middleware
        self.last_arrival = monotonic()
        self._types: dict[str, str] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="worker")
        self._work: Future[None] | None = None
        self._stop = Event()
        self._diagnostics = Diagnostics(self)

    # What a subclass provides ----------------------------------------------------------------------------------------

    @abstractmethod
    def load(self) -> None:
        """Load what the worker needs; runs on the worker's thread. Raises PerceptionError."""

    @abstractmethod
    def unload(self) -> None:
        """Forget what `load` loaded; runs on the worker's thread, also after a `load` that raised."""

    @abstractmethod
    def open_outputs(self) -> None:
        """Create the publishers, by `add_output`."""

    @abstractmethod
    def process(
        self, bgr: np.ndarray, header: Any, wanted: set[str], stages: dict[str, float]
    ) -> Iterator[tuple[str, Any]]:
        """Compute what is wanted of one image and yield (output, message), the most urgent first; add ms to `stages`.

        Runs on the worker's thread. bgr: uint8 `[H, W, 3]`, read-only. Raises PerceptionError.
        """

    @abstractmethod
    def model_facts(self) -> dict[str, str]:
        """Return what diagnostics say of the loaded model; {} while none is loaded. Has `device` and `name`."""

    # Configure, activate ---------------------------------------------------------------------------------------------

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        self.failure = ""
        self.slot, self.traffic, self.lost_in_transport = FrameSlot(), Traffic(), 0
        try:
            self._worker.submit(self.load).result()
            self._worker.submit(self._warm_up).result()
            self.open_outputs()
        except Exception as error:  # whatever a model file or a back end throws: the node stays up and says it
            return self.not_configured(error)
        return super().on_configure(state)

    @reported
    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        self.slot.open()
        self._stop.clear()
        self.last_arrival = monotonic()
        self._work = self._worker.submit(self._run)
        self.subscription = self._subscribe()
        self.get_logger().info(f"active: {self.topic} ({self.msgtype}) -> "
                               f"{', '.join(publisher.topic_name for publisher in self.outputs.values())}")
        return result

    def _subscribe(self) -> Subscription:
        def create(**events: Any) -> Subscription:
            return self.create_subscription(
                CompressedImage if self.msgtype == COMPRESSED_IMAGE else Image, self.topic, self._on_image, SENSOR,
                raw=True,
                qos_overriding_options=QoSOverridingOptions.with_default_policies(),
                event_callbacks=SubscriptionEventCallbacks(**events))

        try:
            subscription = create(incompatible_qos=self._on_incompatible_qos, message_lost=self._on_message_lost)
            self.tells_losses = True
        except UnsupportedEventTypeError as error:
            self.get_logger().warning(f"the middleware does not tell everything, so that lost frames are not counted: {error}")
            subscription = create()
            self.tells_losses = False
        return subscription

    @property
    def msgtype(self) -> str:
        return COMPRESSED_IMAGE if self.settings["image_transport"] == "compressed" else IMAGE

    @property
    def topic(self) -> str:
        """Return the image topic after remapping; as image_transport has it, `/compressed` comes after that."""
        base = self.resolve_topic_name("image")
        return self.resolve_topic_name(f"{base}/compressed") if self.msgtype == COMPRESSED_IMAGE else base

    def add_output(self, name: str, msg_class: type, msgtype: str, qos: QoSProfile = OUTPUT) -> None:
        """Create a publisher of `~/name`, whose messages (rosbags' objects of `msgtype`) are serialised here."""
        self._types[name] = msgtype
        self.outputs[name] = self.create_lifecycle_publisher(
            msg_class, f"~/{name}", qos, qos_overriding_options=QoSOverridingOptions.with_default_policies())

    def wanted(self) -> set[str]:
        """Return the outputs that somebody listens to."""
        return {name for name, publisher in self.outputs.items() if publisher.get_subscription_count()}

    def open_engine(self) -> engines.Engine:
        """Load the engine of `engine_settings`, or one to serve until it is built; `engine_source.newer()` is the next."""
        settings = self.settings
        wish = Wish(zoo.resolve(settings["model"]), settings["backend"], settings["precision"], settings["cache_dir"] or None,
                    settings["threads"])
        self.engine_source = EngineSource()
        return self.engine_source.open(wish, settings["serve_while_building"] and not settings["build_only"])

    # Callbacks, on the executor's thread ------------------------------------------------------------------------------

    def _on_image(self, raw: bytes) -> None:
        self.last_arrival = monotonic()
        self.slot.put(Frame(raw, self.last_arrival))

    def _on_incompatible_qos(self, event: Any) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        self.get_logger().warning(f"a publisher of {self.topic} offers incompatible QoS ({policy}): none of its "
                                  f"frames will arrive; override it with qos_overrides.{self.topic}.subscription.*")

    def _on_message_lost(self, event: Any) -> None:
        self.lost_in_transport = event.total_count

    # The worker's thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pace = Pace()
        while not self._stop.is_set():
            pace.max_rate = self.settings["max_rate"]
            if self._stop.wait(pace.delay(monotonic())):
                break
            frame = self.slot.take(timeout=None)
            if frame is None:
                continue
            pace.started(monotonic())
            try:
                self._handle(frame)
            except PerceptionError as error:
                self.traffic.failures.add(str(error))
            except Exception as error:  # a bug in one frame's way must not end the stream
                if not self.context.ok():
                    return  # a signal has ended ROS under us
                self.traffic.failures.add(f"{type(error).__name__}: {error}")
                self.get_logger().error(traceback.format_exc(), throttle_duration_sec=10.0)

    def _warm_up(self) -> None:
        """Build the message types and their readers now: that takes 0.4 s, which the first frame need not wait."""
        picture = make_image(np.zeros((2, 2, 3), np.uint8), "bgr8", make_header(0, ""))
        for msg, msgtype in ((picture, IMAGE), (make_compressed(to_bgr(picture), picture.header), COMPRESSED_IMAGE)):
            to_bgr(deserialize(serialize(msg, msgtype), msgtype))

    def _handle(self, frame: Frame) -> None:
        stamp = stamp_of(frame.raw)
        self.traffic.stamps.add(stamp, self.get_clock().now().nanoseconds)
        wanted = self.wanted()
        if not wanted:
            self.traffic.unheard += 1
            return
        stages = {"wait": (monotonic() - frame.arrived) * 1e3}
        with measured(stages, "decode"):
            msg = deserialize(frame.raw, self.msgtype)
            bgr = to_bgr(msg)
        published = 0
        for name, output in self.process(bgr, msg.header, wanted, stages):
            with measured(stages, "publish"):
                self.outputs[name].publish(serialize(output, self._types[name]))
            published = published or self.get_clock().now().nanoseconds
        self.traffic.success(stamp, published, stages)

    # Deactivate, clean up ---------------------------------------------------------------------------------------------

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        self._stop_work()
        return super().on_deactivate(state)

    def close(self) -> None:
        """End the worker and release everything; may be called twice."""
        super().close()
        self._worker.shutdown()

    def _stop_work(self) -> None:
        if self.subscription is not None:
            self.destroy_subscription(self.subscription)
            self.subscription = None
        self._stop.set()
        self.slot.wake()
        if self._work is not None:
            self._work.result()
            self._work = None

    def release_outputs(self) -> None:
        """Destroy what `open_outputs` created."""
        for publisher in self.outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        self.outputs = {}

    def _release(self) -> None:
        self._stop_work()
        self.release_outputs()
        self.engine_source.close()
        with contextlib.suppress(RuntimeError):  # the worker is shut down already: nothing is loaded
            self._worker.submit(self.unload).result()
