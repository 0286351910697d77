# SPDX-License-Identifier: Apache-2.0
"""What a replay does with each frame: the tasks of the live nodes, as steps that give messages, a picture and a hash."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import DataError, SeedError
from deeprob_perception.messages import cdr, images
from deeprob_perception.messages.clouds import POINT_CLOUD, make_tracks
from deeprob_perception.segmentation import Segmenter, overlay
from deeprob_perception.segmentation.scores import Confusion
from deeprob_perception.timing import Stages
from deeprob_perception.tracking.evaluate import read_mask
from deeprob_perception.tracking.overlay import TrackOverlay, colour_of
from deeprob_perception.tracking.tracker import Tracker

# The names which the live nodes have when they run as /segmentation and /tracking.
MASK = "/segmentation/mask"
CONFIDENCE = "/segmentation/confidence"
OVERLAY = "/segmentation/overlay/compressed"
LABEL_INFO = "/segmentation/label_info"
OBJECT_MASK = "/tracking/object_mask"
TRACKS = "/tracking/tracks"
TRACKING_OVERLAY = "/tracking/overlay/compressed"
FEATURES_RGB = "/tracking/features_rgb"


@dataclass(frozen=True)
class Seeds:
    """What tracking is told to track: a mask image of the first frame, points x, y of it, or classes of the ground truth."""

    mask: Path | None = None
    points: Sequence[tuple[float, float]] = ()
    classes: Sequence[int] = ()


@dataclass
class Result:
    """Of one frame: the mask that is scored and compared, the picture for people, messages by topic, and a hash of all."""

    mask: np.ndarray
    drawn: np.ndarray
    messages: list[tuple[str, Any]] = field(default_factory=list)
    digest: str = ""


class Task(Protocol):
    """A task in a replay.

    `topics`: name -> (type, latched); `mask_topic`: where the mask is; `names`, `palette` (RGB): of the ids in masks;
    `stages`: the task's own durations; `confusion`: of scores, or None while there is nothing to score.
    """

    engine: Engine
    topics: dict[str, tuple[str, bool]]
    mask_topic: str
    names: list[str]
    palette: np.ndarray
    stages: Stages
    confusion: Confusion

    def __call__(self, bgr: np.ndarray, header: Any, stages: Stages) -> Result:
        """Do one frame; `stages` takes the duration of `overlay`."""

    def truth(self, ids: np.ndarray, stamp: int) -> np.ndarray:
        """Return true labels as the task is scored against; a task may take seeds from the first."""


class SegmentationTask:
    """Labels of every pixel, as the segmentation node gives them."""

    mask_topic = MASK

    def __init__(self, engine: Engine, confidence: bool, alpha: float):
        self.engine, self._confidence, self._alpha = engine, confidence, alpha
        self.segmenter = Segmenter(engine)
        # The first inference allocates and would stand out in the stage times.
        self.segmenter(np.zeros((engine.inputs[0].shape[1], engine.inputs[0].shape[2], 3), np.uint8))
        self.segmenter.stages.clear()
        self.stages = self.segmenter.stages
        self.names, self.palette = self.segmenter.class_names, self.segmenter.palette
        self.confusion = Confusion(len(self.names))
        self.topics = {LABEL_INFO: (cdr.STRING, True), MASK: (cdr.IMAGE, False)}
        if confidence:
            self.topics[CONFIDENCE] = (cdr.IMAGE, False)
        self.topics[OVERLAY] = (cdr.COMPRESSED_IMAGE, False)
        self._told = False

    def __call__(self, bgr: np.ndarray, header: Any, stages: Stages) -> Result:
        found = self.segmenter(bgr, confidence=self._confidence)
        with stages.measure("overlay"):
            drawn = overlay.draw(bgr, found.labels, self.palette, self._alpha)
        result = Result(found.labels, drawn, digest=mask_hash(found.labels))
        if not self._told:
            result.messages.append((LABEL_INFO, cdr.make_string(label_info(self.names))))
            self._told = True
        result.messages.append((MASK, images.make_image(found.labels, "mono8", header)))
        if found.confidence is not None:
            result.messages.append((CONFIDENCE, images.make_image(found.confidence, "mono8", header)))
        result.messages.append((OVERLAY, images.make_compressed(drawn, header, "jpeg")))
        return result

    def truth(self, ids: np.ndarray, stamp: int) -> np.ndarray:
        return ids


class TrackingTask:
    """Points and objects, as the tracking node gives them."""

    mask_topic = OBJECT_MASK

    def __init__(self, engine: Engine, seeds: Seeds, alpha: float, first_truth: tuple[int, np.ndarray] | None):
        """:param first_truth: stamp and ids of the first true mask, for seeds of classes."""
        self.engine, self._alpha = engine, alpha
        self.tracker = Tracker(engine)
        random = np.random.default_rng(0)
        self.tracker.update(random.integers(0, 255, engine.inputs[0].shape[1:], dtype=np.uint8), 1)
        self.tracker.reset()
        self.tracker.stages.clear()
        self.stages = self.tracker.stages
        self._overlay = TrackOverlay()
        self._classes = list(seeds.classes)
        self._waiting: tuple[int, np.ndarray] | None = None
        ids = list(seeds.classes)
        if seeds.mask is not None:
            mask = read_mask(seeds.mask)
            self.tracker.seed_mask(mask)
            ids = [int(i) for i in np.unique(mask) if i]
        if seeds.classes:
            if first_truth is None:
                raise DataError("--seed-class needs a topic of true masks in the bag, and there is none; give --seed-mask")
            stamp, truth = first_truth
            wanted = np.where(np.isin(truth, self._classes), truth, 0).astype(np.uint8)
            if not wanted.any():
                there = np.unique(truth).tolist()
                raise SeedError(f"the first true mask has none of the classes {self._classes}; it has {there}")
            self._waiting = (stamp, wanted)
        for x, y in seeds.points:
            self.tracker.seed_point(x, y)
        self.names = ["background", *(f"object {i}" for i in range(1, max(ids, default=0) + 1))]
        self.palette = np.array([(0, 0, 0), *(colour_of(i)[::-1] for i in range(1, len(self.names)))], np.uint8)
        self.confusion = Confusion(len(self.names))
        self.topics = {
            OBJECT_MASK: (cdr.IMAGE, False), TRACKS: (POINT_CLOUD, False), TRACKING_OVERLAY: (cdr.COMPRESSED_IMAGE, False),
        }  # fmt: skip

    def __call__(self, bgr: np.ndarray, header: Any, stages: Stages) -> Result:
        stamp = cdr.stamp_ns(header)
        if self._waiting is not None and stamp >= self._waiting[0]:
            self.tracker.seed_mask(self._waiting[1])
            self._waiting = None
        tracks = self.tracker.update(bgr, stamp)
        mask = np.zeros(bgr.shape[:2], np.uint8) if tracks.mask is None else tracks.mask
        with stages.measure("overlay"):
            self._overlay.remember(tracks)
            drawn = self._overlay.draw(bgr, tracks, self._alpha)
        cloud = make_tracks(tracks.points, tracks.ids, tracks.ages, tracks.confidence, tracks.visible, header)
        digest = hashlib.sha256(mask_hash(mask).encode() + bytes(cloud.data)).hexdigest()
        written = [(TRACKS, cloud), (TRACKING_OVERLAY, images.make_compressed(drawn, header, "jpeg"))]
        if tracks.mask is not None:
            written.insert(0, (OBJECT_MASK, images.make_image(mask, "mono8", header)))
        return Result(mask, drawn, written, digest)

    def truth(self, ids: np.ndarray, stamp: int) -> np.ndarray:
        """Keep the classes that were seeded; the rest is background."""
        return np.where(np.isin(ids, self._classes), ids, 0).astype(np.uint8)


def mask_hash(labels: np.ndarray) -> str:
    """Return the sha256 of a mask, its size included."""
    digest = hashlib.sha256(f"{labels.shape[1]}x{labels.shape[0]}\n".encode())
    digest.update(np.ascontiguousarray(labels).data)
    return digest.hexdigest()


def label_info(class_names: list[str]) -> str:
    """Return the class names as the JSON that the live node publishes, `{"0": "background", ...}`."""
    return json.dumps(dict(enumerate(class_names)))
