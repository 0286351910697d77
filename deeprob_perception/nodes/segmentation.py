# SPDX-License-Identifier: Apache-2.0
"""The segmentation node: camera images in; label mask, confidence, overlay, class names out (docs/segmentation.md)."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from rclpy.lifecycle.publisher import LifecyclePublisher
from sensor_msgs.msg import CompressedImage, Image

from deeprob_perception import zoo
from deeprob_perception.errors import ModelError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE
from deeprob_perception.messages.images import make_compressed, make_image
from deeprob_perception.nodes.base import LATCHED, CameraNode, engine_facts, engine_settings, measured, spin
from deeprob_perception.nodes.labels import LABEL_TYPES, label_info
from deeprob_perception.nodes.parameters import Setting
from deeprob_perception.segmentation import Segmenter
from deeprob_perception.segmentation.overlay import draw

ALL = "all"

SETTINGS = (
    *engine_settings("street"),
    Setting("overlay_alpha", 0.5, "Opacity of the colours in the overlay.", live=True, between=(0.0, 1.0)),
    Setting("shown_classes", [ALL], "Classes coloured in the overlay, by name; [\"all\"] for all.", live=True),
    Setting("jpeg_quality", 90, "Quality of ~/overlay/compressed.", live=True, between=(1, 100)),
)


class SegmentationNode(CameraNode):
    """Publishes for every frame it has time for, under the frame's stamp and frame_id, what somebody listens to."""

    # Declare ----------------------------------------------------------------------------------------------------------

    def __init__(self, **node_options: Any):
        self._segmenter: Segmenter | None = None
        self._facts: dict[str, str] = {}
        self._label_info: LifecyclePublisher | None = None
        super().__init__("segmentation", SETTINGS, **node_options)
        self.settings.add_check("shown_classes", self._unknown_classes)

    def _unknown_classes(self, names: list[str]) -> str:
        """Return what is wrong with `shown_classes`; before a model is loaded, nothing is known to be."""
        if self._segmenter is None:
            return ""
        known = self._segmenter.class_names
        unknown = [name for name in names if name not in known and name != ALL]
        return f"shown_classes: {self._facts['name']} has no class {', '.join(unknown)}; it has {', '.join(known)}" \
            if unknown else ""

    # Configure --------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        engine = self.open_engine()
        segmenter = Segmenter(engine)
        self._facts = {
            "name": engine.metadata["name"],
            "path": str(engine.path),
            "sha256": zoo.checksum(engine.path),
            **engine_facts(engine),
            "input": str(engine.inputs[0]),
            "classes": " ".join(segmenter.class_names),
        }
        # The first inference of a back end takes several times as long as the others: not on the first frame.
        segmenter(np.zeros(engine.inputs[0].shape[1:], np.uint8))
        segmenter.stages.clear()
        self._segmenter = segmenter
        if wrong := self._unknown_classes(self.settings["shown_classes"]):
            raise ModelError(wrong)

    def model_facts(self) -> dict[str, str]:
        return self._facts

    def open_outputs(self) -> None:
        self.add_output("mask", Image, IMAGE)
        self.add_output("confidence", Image, IMAGE)
        self.add_output("overlay", Image, IMAGE)
        self.add_output("overlay/compressed", CompressedImage, COMPRESSED_IMAGE)
        self._label_info = self.create_lifecycle_publisher(LABEL_TYPES[0], "~/label_info", LATCHED)

    # Activate ---------------------------------------------------------------------------------------------------------

    def on_activate(self, state: Any) -> Any:
        result = super().on_activate(state)
        assert self._segmenter is not None and self._label_info is not None
        self._label_info.publish(label_info(self._segmenter.class_names, self.get_clock().now().to_msg()))
        return result

    # Callbacks --------------------------------------------------------------------------------------------------------

    def process(
        self, bgr: np.ndarray, header: Any, wanted: set[str], stages: dict[str, float]
    ) -> Iterator[tuple[str, Any]]:
        assert self._segmenter is not None
        if engine := self.engine_source.newer():
            self._segmenter.engine = engine  # of the same model, so of the same shapes
            self._facts = {**self._facts, **engine_facts(engine)}
        result = self._segmenter(bgr, confidence="confidence" in wanted)
        for name in self._segmenter.stages.summary():
            stages[name] = float(self._segmenter.stages[name].values().sum())
        self._segmenter.stages.clear()
        if "mask" in wanted:
            yield "mask", make_image(result.labels, "mono8" if result.labels.dtype == np.uint8 else "16UC1", header)
        if "confidence" in wanted and result.confidence is not None:
            yield "confidence", make_image(result.confidence, "mono8", header)
        if wanted & {"overlay", "overlay/compressed"}:
            with measured(stages, "overlay"):
                overlay = self._draw(bgr, result.labels)
            if "overlay" in wanted:
                yield "overlay", make_image(overlay, "bgr8", header)
            if "overlay/compressed" in wanted:
                with measured(stages, "jpeg"):
                    picture = make_compressed(overlay, header, "jpeg", self.settings["jpeg_quality"])
                yield "overlay/compressed", picture

    def _draw(self, bgr: np.ndarray, labels: np.ndarray) -> np.ndarray:
        assert self._segmenter is not None
        names = self.settings["shown_classes"]
        shown = None if ALL in names else {self._segmenter.class_names.index(name) for name in names}
        return draw(bgr, labels, self._segmenter.palette, self.settings["overlay_alpha"], shown)

    # Clean up ---------------------------------------------------------------------------------------------------------

    def unload(self) -> None:
        self._segmenter = None
        self._facts = {}

    def release_outputs(self) -> None:
        super().release_outputs()
        if self._label_info is not None:
            self.destroy_lifecycle_publisher(self._label_info)
            self._label_info = None


def main(args: list[str] | None = None) -> None:
    """Run the node: `segmentation --ros-args -r image:=/camera/image_raw -p model:=street`."""
    sys.exit(spin(SegmentationNode, args))


if __name__ == "__main__":
    main()
