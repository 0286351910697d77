# SPDX-License-Identifier: Apache-2.0
"""Camera images -> features, point tracks and objects' masks, on arrays: no ROS, no threads; all state is in the tracker."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from deeprob_perception.engines import Engine
from deeprob_perception.errors import ImageError, ModelError, OrderError, SeedError
from deeprob_perception.timing import Stages
from deeprob_perception.tracking.blas import one_thread
from deeprob_perception.tracking.masks import MaskTracker, Propagation, paint
from deeprob_perception.tracking.points import Following, PointTracker

JUMP_NS = 1_000_000_000  # a stamp that goes back by more is a clock that was set, or a bag that began anew
FLAT = 3.0  # grey levels: an image of less contrast (standard deviation) shows nothing to track
SHAPES_DIFFER = 0.02  # how much the aspect ratio of a mask may differ from the image's


@dataclass(frozen=True)
class Tracks:
    """What is known of a frame. Pixels are the camera's; the centre of the first one is at 0, 0.

    - `points`: x, y, float32 `[n, 2]`; `ids`, `ages` (frames): int64 `[n]`; `confidence`: float32 `[n]`, 0 to 1;
      `visible`: bool `[n]`
    - `mask`: ids of objects, uint8 `[H, W]`, 0 for none; None before an object was given
    - `lost`: ids of objects that are out of sight
    - `features`: float32 `[h, w, C]`, of unit length, one a patch
    - `blind`: the image showed nothing (black, or covered): all is as it was in the frame before
    """

    points: np.ndarray
    ids: np.ndarray
    ages: np.ndarray
    confidence: np.ndarray
    visible: np.ndarray
    mask: np.ndarray | None
    lost: tuple[int, ...]
    features: np.ndarray
    blind: bool


class Tracker:
    """Tracks points and objects through the images of one camera.

    Seeds (`seed_point`, `seed_mask`) belong to the next image. The state is forgotten when the image's size changes and when
    time jumps back.
    - `stages`: durations of `resize`, `infer`, `points`, `mask`
    """

    def __init__(
        self, engine: Engine, following: Following | None = None, propagation: Propagation | None = None, threads: int = 0
    ):
        """:param threads: of mask propagation; 0 for one a core, up to four.

        :raises ModelError: when the engine's model is for another task.
        """
        if engine.metadata.get("task") != "features":
            raise ModelError(f"{engine.path} is for the task {engine.metadata.get('task')!r}; tracking takes one for features")
        self.engine = engine
        self.stages = Stages()
        self.points = PointTracker(following)
        self.masks = MaskTracker(propagation, threads)
        _, self._height, self._width, _ = engine.inputs[0].shape
        self.reset()

    def reset(self) -> None:
        """Forget points, objects and seeds that wait."""
        self.points.reset()
        self.masks.reset()
        self._size: tuple[int, int] | None = None
        self._stamp: int | None = None
        self._last: Tracks | None = None
        self._waiting_points: list[np.ndarray] = []
        self._waiting_masks: list[tuple[np.ndarray, bool]] = []

    def seed_point(self, x: float, y: float) -> None:
        """Follow a point of the next image, pixels.

        :raises SeedError: for a place that is no number, or outside of the last image's size.
        """
        if not (np.isfinite(x) and np.isfinite(y)) or x < 0 or y < 0:
            raise SeedError(f"the point ({x:g}, {y:g}) is no place in an image")
        if self._size is not None and (x > self._size[1] - 1 or y > self._size[0] - 1):
            raise SeedError(f"the point ({x:g}, {y:g}) is outside the image of {self._size[1]}x{self._size[0]} pixels")
        self._waiting_points.append(np.array([[x, y]], np.float32))

    def seed_mask(self, mask: np.ndarray, keep: bool = False) -> None:
        """Track the objects of a mask, from the next image on.

        :param mask: uint8 (or bool) `[H, W]`: 0 for background, else an object's id. A mask of another size but the image's
            aspect ratio is scaled.
        :param keep: go on with the objects that are tracked already, too.
        :raises SeedError: for an empty mask, another dtype or shape, or another aspect ratio than the last image's.
        """
        if mask.dtype == bool:
            mask = mask.astype(np.uint8)
        if mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
            raise SeedError(f"a mask is uint8 [H, W], not {mask.dtype} {list(mask.shape)}")
        if not mask.any():
            raise SeedError("the mask is empty: no pixel of it is an object's")
        if self._size is not None:
            check_aspect(mask, *self._size)
        self._waiting_masks.append((mask.copy(), keep))

    def update(self, bgr: np.ndarray, stamp: int) -> Tracks:
        """Take the next image.

        :param bgr: uint8 `[H, W, 3]`. :param stamp: ns.
        :raises ImageError: for another shape or dtype. :raises OrderError: for an image that is a little older than the last
            one, or as old; it is left out. :raises SeedError: for seeds that do not fit this image; they are dropped, and
            the image was taken nevertheless (its tracks are `last`).
        """
        if bgr.dtype != np.uint8 or bgr.ndim != 3 or bgr.shape[2] != 3 or not bgr.size:
            raise ImageError(f"the tracker takes uint8 [H, W, 3], not {bgr.dtype} {list(bgr.shape)}")
        if self._stamp is not None and stamp <= self._stamp:
            if self._stamp - stamp < JUMP_NS:
                last = self._stamp / 1e9
                raise OrderError(f"the image of {stamp / 1e9:.3f} s came after that of {last:.3f} s; it is left out")
            self._begin_anew()
        if self._size is not None and bgr.shape[:2] != self._size:
            self._begin_anew()
        self._stamp, self._size = stamp, (bgr.shape[0], bgr.shape[1])
        with self.stages.measure("resize"):
            small = bgr
            if self._size != (self._height, self._width):
                shrinks = bgr.shape[0] * bgr.shape[1] > self._height * self._width
                way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
                small = cv2.resize(bgr, (self._width, self._height), interpolation=way)
            blind = float(cv2.meanStdDev(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY))[1][0, 0]) < FLAT
        with self.stages.measure("infer"):
            features = self.engine(image=small[None], outputs=("features",))["features"][0]
        if blind and self._last is not None:
            self._last = self._unseen(features)
            return self._last
        with self.stages.measure("points"), one_thread():
            self.points.update(cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY), features)
        mask = None
        with self.stages.measure("mask"):
            if self.masks.ids:
                shares = self.masks.update(features)
                mask = paint(shares, self.masks.ids, *self._size)
        problem = self._plant(features)
        if self._planted is not None:
            mask = self._planted if mask is None or not self._kept else np.where(self._planted > 0, self._planted, mask)
        self._last = self._tracks(features, mask, blind)
        if problem is not None:
            raise problem
        return self._last

    @property
    def last(self) -> Tracks | None:
        """What was known after the last image."""
        return self._last

    def _begin_anew(self) -> None:
        """Forget what was tracked, but not the seeds that wait for the next image."""
        waiting = self._waiting_points, self._waiting_masks
        self.reset()
        self._waiting_points, self._waiting_masks = waiting

    def _plant(self, features: np.ndarray) -> SeedError | None:
        """Plant the seeds that wait, in this image; return what was wrong with one."""
        assert self._size is not None
        problem: SeedError | None = None
        self._planted: np.ndarray | None = None
        self._kept = False
        points, masks = self._waiting_points, self._waiting_masks
        self._waiting_points, self._waiting_masks = [], []
        for place in points:
            try:
                self.points.seed(place)
            except SeedError as error:
                problem = error
        for mask, keep in masks:
            try:
                fitted = fit(mask, *self._size)
            except SeedError as error:
                problem = error
                continue
            self.masks.seed(features, fitted, keep)
            self._planted = fitted if self._planted is None or not keep else np.where(fitted > 0, fitted, self._planted)
            self._kept = keep
        return problem

    def _tracks(self, features: np.ndarray, mask: np.ndarray | None, blind: bool) -> Tracks:
        p = self.points
        return Tracks(
            p.places.copy(), p.ids.copy(), p.ages.copy(), p.confidence.copy(), p.visible.copy(), mask, tuple(self.masks.lost),
            features, blind,
        )  # fmt: skip

    def _unseen(self, features: np.ndarray) -> Tracks:
        """Return what is known while nothing is seen: everything is where it was, and out of sight."""
        last = self._last
        assert last is not None
        nothing = np.zeros(len(last.ids), np.float32)
        mask = None if last.mask is None else np.zeros_like(last.mask)
        lost = tuple(self.masks.ids)
        return Tracks(last.points, last.ids, last.ages, nothing, nothing > 0, mask, lost, features, True)


def features_of(engine: Engine) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from an image uint8 `[H, W, 3]` BGR of any size to the engine's features float32 `[h, w, C]`."""
    _, height, width, _ = engine.inputs[0].shape

    def features(bgr: np.ndarray) -> np.ndarray:
        small = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)
        return engine(image=small[None], outputs=("features",))["features"][0]

    return features


def check_aspect(mask: np.ndarray, height: int, width: int) -> None:
    """Raise SeedError when a mask has another aspect ratio than an image."""
    theirs, ours = mask.shape[1] / mask.shape[0], width / height
    if abs(theirs / ours - 1) > SHAPES_DIFFER:
        raise SeedError(f"the mask is {mask.shape[1]}x{mask.shape[0]}, the image {width}x{height}: they differ in shape")


def fit(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a mask at an image's size; raise SeedError where it does not fit or nothing is left of it."""
    check_aspect(mask, height, width)
    if mask.shape != (height, width):
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        if not mask.any():
            raise SeedError(f"nothing is left of the mask at the image's size, {width}x{height}")
    return mask
