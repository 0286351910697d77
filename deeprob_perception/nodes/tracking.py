# SPDX-License-Identifier: Apache-2.0
"""The tracking node: camera images in; point tracks, objects' masks, features, overlay out (docs/tracking.md)."""

import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
from geometry_msgs.msg import PointStamped
from rclpy.service import Service
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image, PointCloud2
from std_srvs.srv import SetBool, Trigger

from deeprob_perception import zoo
from deeprob_perception.errors import PerceptionError, SeedError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, stamp_ns
from deeprob_perception.messages.clouds import POINT_CLOUD, make_tracks
from deeprob_perception.messages.images import make_compressed, make_image, to_array
from deeprob_perception.nodes.base import CameraNode, engine_facts, engine_settings, measured, spin
from deeprob_perception.nodes.parameters import Setting
from deeprob_perception.nodes.seed import SEEDS
from deeprob_perception.tracking.colours import FeatureColours
from deeprob_perception.tracking.overlay import TrackOverlay
from deeprob_perception.tracking.points import Following
from deeprob_perception.tracking.tracker import Tracker, Tracks

SETTINGS = (
    *engine_settings("dino"),
    Setting("points", 256, "Points to follow without being told to; 0 follows those of ~/seed_point only.", between=(0, 4096)),
    Setting("spacing", 12.0, "Pixels between two points when they are chosen.", between=(3.0, 500.0)),
    Setting("add_objects", False, "Whether a seed mask adds to the objects that are tracked, or replaces them.", live=True),
    Setting("trail", 15, "Frames that a point's trail goes back in the overlay.", live=True, between=(1, 1000)),
    Setting("overlay_alpha", 0.5, "Opacity of the objects' colours in the overlay.", live=True, between=(0.0, 1.0)),
    Setting("jpeg_quality", 90, "Quality of ~/overlay/compressed.", live=True, between=(1, 100)),
)


class TrackingNode(CameraNode):
    """Tracks every frame it has time for; publishes, under the frame's stamp and frame_id, what somebody listens to.

    Seeds and services arrive on the executor's thread and wait for the worker, which does them before its next frame.
    """

    # Declare ----------------------------------------------------------------------------------------------------------

    def __init__(self, **node_options: Any):
        self._tracker: Tracker | None = None
        self._facts: dict[str, str] = {}
        self._colours, self._overlay = FeatureColours(), TrackOverlay()
        self._orders: deque[Callable[[], None]] = deque(maxlen=1000)
        self._seeds: list[Subscription] = []
        self._services: list[Service] = []
        self._enabled = True
        self._size: tuple[int, int] | None = None
        super().__init__("tracking", SETTINGS, **node_options)

    # Configure --------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        engine = self.open_engine()
        following = Following(count=self.settings["points"], spacing=self.settings["spacing"])
        tracker = Tracker(engine, following, threads=self.settings["threads"])
        self._facts = {
            "name": engine.metadata["name"],
            "path": str(engine.path),
            "sha256": zoo.checksum(engine.path),
            **engine_facts(engine),
            "input": str(engine.inputs[0]),
            "features": str(engine.outputs[0]),
        }
        # The first inference of a back end takes several times as long as the others: not on the first frame.
        random = np.random.default_rng(0)
        tracker.update(random.integers(0, 255, engine.inputs[0].shape[1:], dtype=np.uint8), 1)
        tracker.reset()
        tracker.stages.clear()
        self._tracker = tracker

    def model_facts(self) -> dict[str, str]:
        if self._tracker is None or not self._facts:
            return self._facts
        last = self._tracker.last
        found = dict(self._facts, enabled=str(self._enabled).lower())
        if last is not None:
            found["points_visible"] = str(int(np.count_nonzero(last.visible)))
            found["points"] = str(len(last.ids))
            found["objects"] = " ".join(map(str, self._tracker.masks.ids)) or "none: no mask came on ~/seed_mask"
            found["objects_lost"] = " ".join(map(str, last.lost)) or "none"
            found["sees_nothing"] = str(last.blind).lower()
        return found

    def open_outputs(self) -> None:
        self.add_output("object_mask", Image, IMAGE)
        self.add_output("tracks", PointCloud2, POINT_CLOUD)
        self.add_output("features", Image, IMAGE)
        self.add_output("features_rgb", Image, IMAGE)
        self.add_output("overlay", Image, IMAGE)
        self.add_output("overlay/compressed", CompressedImage, COMPRESSED_IMAGE)

    # Activate ---------------------------------------------------------------------------------------------------------

    def on_activate(self, state: Any) -> Any:
        result = super().on_activate(state)
        self._seeds = [
            self.create_subscription(Image, "~/seed_mask", self._on_seed_mask, SEEDS, raw=True),
            self.create_subscription(PointStamped, "~/seed_point", self._on_seed_point, SEEDS),
        ]
        self._services = [
            self.create_service(Trigger, "~/reset", self._on_reset),
            self.create_service(SetBool, "~/enable", self._on_enable),
        ]
        return result

    # Callbacks, on the executor's thread ------------------------------------------------------------------------------

    def _on_seed_mask(self, raw: bytes) -> None:
        def plant() -> None:
            mask = to_array(deserialize(raw, IMAGE))
            assert self._tracker is not None
            self._tracker.seed_mask(mask, keep=self.settings["add_objects"])

        self._orders.append(plant)

    def _on_seed_point(self, message: PointStamped) -> None:
        def plant() -> None:
            assert self._tracker is not None
            self._tracker.seed_point(message.point.x, message.point.y)

        self._orders.append(plant)

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        self._orders.append(self._forget)
        response.success, response.message = True, "points and objects are forgotten from the next frame on"
        return response

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        self._enabled = request.data
        response.success, response.message = True, "tracking" if request.data else "frames are left out until it is enabled"
        return response

    # The worker's thread ----------------------------------------------------------------------------------------------

    def process(
        self, bgr: np.ndarray, header: Any, wanted: set[str], stages: dict[str, float]
    ) -> Iterator[tuple[str, Any]]:
        assert self._tracker is not None
        if not self._enabled:
            return
        if engine := self.engine_source.newer():
            self._tracker.engine = engine  # of the same model, so of the same shapes
            self._facts = {**self._facts, **engine_facts(engine)}
        self._obey()
        if bgr.shape[:2] != self._size:
            self._size = (bgr.shape[0], bgr.shape[1])
            self._overlay.reset()
        tracks = self._track(bgr, header)
        for name in self._tracker.stages.summary():
            stages[name] = float(self._tracker.stages[name].values().sum())
        self._tracker.stages.clear()
        yield from self._outputs(bgr, tracks, header, wanted, stages)

    def _obey(self) -> None:
        while self._orders:
            try:
                self._orders.popleft()()
            except PerceptionError as error:  # a bad seed costs itself
                self.traffic.failures.add(f"seed: {error}")

    def _track(self, bgr: np.ndarray, header: Any) -> Tracks:
        assert self._tracker is not None
        try:
            return self._tracker.update(bgr, stamp_ns(header))
        except SeedError as error:  # the frame was tracked nevertheless
            self.traffic.failures.add(f"seed: {error}")
            assert self._tracker.last is not None
            return self._tracker.last

    def _outputs(
        self, bgr: np.ndarray, tracks: Tracks, header: Any, wanted: set[str], stages: dict[str, float]
    ) -> Iterator[tuple[str, Any]]:
        if "object_mask" in wanted and tracks.mask is not None:
            yield "object_mask", make_image(tracks.mask, "mono8", header)
        if "tracks" in wanted:
            cloud = make_tracks(tracks.points, tracks.ids, tracks.ages, tracks.confidence, tracks.visible, header)
            yield "tracks", cloud
        if "features" in wanted:
            yield "features", make_image(tracks.features, f"32FC{tracks.features.shape[-1]}", header)
        if "features_rgb" in wanted:
            with measured(stages, "colours"):
                small = self._colours(tracks.features)
                colours = cv2.resize(small, (bgr.shape[1], bgr.shape[0]), interpolation=cv2.INTER_NEAREST)
            yield "features_rgb", make_image(colours, "rgb8", header)
        self._overlay.trail = self.settings["trail"]
        self._overlay.remember(tracks)
        if wanted & {"overlay", "overlay/compressed"}:
            with measured(stages, "overlay"):
                drawn = self._overlay.draw(bgr, tracks, self.settings["overlay_alpha"])
            if "overlay" in wanted:
                yield "overlay", make_image(drawn, "bgr8", header)
            if "overlay/compressed" in wanted:
                with measured(stages, "jpeg"):
                    picture = make_compressed(drawn, header, "jpeg", self.settings["jpeg_quality"])
                yield "overlay/compressed", picture

    def _forget(self) -> None:
        if self._tracker is not None:
            self._tracker.reset()
        self._colours.reset()
        self._overlay.reset()

    # Deactivate, clean up ---------------------------------------------------------------------------------------------

    def on_deactivate(self, state: Any) -> Any:
        self._close_inputs()
        return super().on_deactivate(state)

    def unload(self) -> None:
        self._forget()
        self._tracker = None
        self._facts = {}
        self._orders.clear()

    def close(self) -> None:
        self._close_inputs()
        super().close()

    def _close_inputs(self) -> None:
        for subscription in self._seeds:
            self.destroy_subscription(subscription)
        for service in self._services:
            self.destroy_service(service)
        self._seeds, self._services = [], []


def main(args: list[str] | None = None) -> None:
    """Run the node: `tracking --ros-args -r image:=/camera/image_raw`."""
    sys.exit(spin(TrackingNode, args))


if __name__ == "__main__":
    main()
