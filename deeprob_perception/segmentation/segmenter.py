# SPDX-License-Identifier: Apache-2.0
"""Camera image -> labels of every pixel, on arrays: no ROS, no threads, no state beside the timings."""

import json
from dataclasses import dataclass

import cv2
import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import ImageError, ModelError
from deeprob_perception.timing import Stages


@dataclass(frozen=True)
class Segmentation:
    """`labels` uint8 `[H, W]`, class ids; `confidence` uint8 `[H, W]`, 255 = 1.0, or None when it was not asked for."""

    labels: np.ndarray
    confidence: np.ndarray | None = None


class Segmenter:
    """A segmentation engine for images of any size.

    - `class_names`: in id order; `palette`: uint8 `[K, 3]`, RGB
    - `stages`: durations of `resize` (both ways) and `infer`
    """

    def __init__(self, engine: Engine):
        """:raises ModelError: when the engine's model is for another task."""
        if engine.metadata.get("task") != "segmentation":
            raise ModelError(f"{engine.path} is for the task {engine.metadata.get('task')!r}, not segmentation")
        self.engine = engine
        self.class_names: list[str] = json.loads(engine.metadata["classes"])
        self.palette = np.array(json.loads(engine.metadata["palette"]), np.uint8)
        self.stages = Stages()
        _, self._height, self._width, _ = engine.inputs[0].shape

    def __call__(self, bgr: np.ndarray, confidence: bool = False) -> Segmentation:
        """Segment one image.

        :param bgr: uint8 `[H, W, 3]`. When its size is not the model's it is resized (its aspect ratio is not kept),
            and the results are brought back to the camera's size by nearest neighbour.
        :raises ImageError: for another shape or dtype, or an empty image.
        """
        if bgr.dtype != np.uint8 or bgr.ndim != 3 or bgr.shape[2] != 3:
            raise ImageError(f"the segmenter takes uint8 [H, W, 3], not {bgr.dtype} {list(bgr.shape)}")
        height, width = bgr.shape[:2]
        if not height or not width:
            raise ImageError(f"the image is empty: {width}x{height} pixels")
        same = (height, width) == (self._height, self._width)
        image = bgr
        if not same:
            with self.stages.measure("resize"):
                image = resized(bgr, self._height, self._width)
        with self.stages.measure("infer"):
            out = self.engine(image=image[None], outputs=("labels", "confidence") if confidence else ("labels",))
        maps = {name: array[0] for name, array in out.items()}
        if not same:
            with self.stages.measure("resize"):
                maps = {name: restored(a, height, width) for name, a in maps.items()}
        return Segmentation(maps["labels"], maps.get("confidence"))


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return an image `[H, W, 3]` at a model's size: averaged where it shrinks, or it would alias."""
    shrinks = image.shape[0] * image.shape[1] > height * width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def restored(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return what a model says of each pixel, `[H, W]`, at the camera's size, by nearest neighbour."""
    return cv2.resize(values, (width, height), interpolation=cv2.INTER_NEAREST)
