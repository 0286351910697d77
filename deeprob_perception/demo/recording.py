# SPDX-License-Identifier: Apache-2.0
"""A recording of the demo -> figures and pictures: latency, score against the played bag's ground truth, video, sheet."""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deeprob_perception import contact_sheet
from deeprob_perception.bags import open_bag
from deeprob_perception.errors import BagError, MessageError
from deeprob_perception.messages.cdr import deserialize, stamp_ns
from deeprob_perception.messages.headers import stamp_of
from deeprob_perception.messages.images import to_array, to_bgr
from deeprob_perception.replay import truth_topic
from deeprob_perception.replay_tasks import MASK
from deeprob_perception.segmentation import overlay
from deeprob_perception.segmentation.scores import Confusion
from deeprob_perception.timing import Samples
from deeprob_perception.video import VideoWriter

SHEET_FRAMES = 6


@dataclass
class Labels:
    """Class names in id order and their colours, uint8 `[K, 3]` RGB."""

    names: list[str]
    palette: np.ndarray


@dataclass
class Figures:
    """What a recording shows.

    frames: camera frames that were played. masks: those that got a mask. seconds: from the first frame to the last.
    latency: ms from a frame's stamp (when it was played) to its mask's arrival at the recorder; series: the same as
    (seconds since the first frame, ms). score: `Confusion.report`, `topic` and `frames`; or None, and `unscored` says why.
    pictures: `poster` and `sheet`, uint8 `[H, W, 3]` BGR.
    """

    frames: int = 0
    masks: int = 0
    seconds: float = 0.0
    latency: Samples = field(default_factory=Samples)
    series: list[tuple[float, float]] = field(default_factory=list)
    score: dict[str, Any] | None = None
    unscored: str = ""
    pictures: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def rate_in(self) -> float:
        """Frames a second that came in."""
        return (self.frames - 1) / self.seconds if self.seconds > 0 else 0.0

    @property
    def rate_out(self) -> float:
        """Masks a second that went out."""
        return self.masks / (self.seconds + 1 / self.rate_in) if self.rate_in > 0 else 0.0


@dataclass
class Truth:
    """The played bag's true masks by the frames that they belong to; `masks` is {} where the bag has none."""

    topic: str = ""
    masks: dict[str, bytes] = field(default_factory=dict)
    msgtype: str = ""


def digest(msg: Any) -> str:
    """Return a hash of an image's pixels or stream: what stays of a frame when the player replaces its stamp."""
    return hashlib.sha256(msg.data).hexdigest()


def truth_of(bag_path: Path, image_topic: str) -> Truth:
    """Read the true masks of a bag and pair them with its camera frames by stamp."""
    with open_bag(bag_path) as bag:
        topic = truth_topic(bag)
        if topic is None:
            return Truth()
        frames: dict[int, str] = {}
        masks: dict[int, bytes] = {}
        for message in bag.messages([image_topic, topic.name]):
            msg = deserialize(message.raw, message.topic.msgtype)
            if message.topic.name == image_topic:
                frames[stamp_ns(msg.header)] = digest(msg)
            else:
                masks[stamp_ns(msg.header)] = bytes(message.raw)
    return Truth(topic.name, {frames[stamp]: raw for stamp, raw in masks.items() if stamp in frames}, topic.msgtype)


def read(recorded: Path, image_topic: str, truth: Truth, labels: Labels, video: Path, sheet: Path) -> Figures:
    """Read a recording, write the overlay video and the contact sheet PNG, and return the figures.

    :raises BagError: when there is no mask in it.
    """
    with open_bag(recorded) as bag:
        topics = {topic.name: topic for topic in bag.topics}
        if MASK not in topics or not topics[MASK].count:
            raise BagError(f"{recorded} has no message on {MASK}")
        stamps = [stamp_of(message.raw) for message in bag.messages([image_topic])]
        first = min(stamps, default=0)
        figures = Figures(frames=len(set(stamps)), seconds=(max(stamps, default=0) - first) / 1e9)
        pictures = _Pictures(labels, truth, topics[MASK].count)
        with ExitStack() as stack:
            writer = stack.enter_context(VideoWriter(video, fps=figures.rate_in or 15.0, quality=26))
            frames = ByStamp(stack, recorded, image_topic)
            for message in bag.messages([MASK]):
                mask = deserialize(message.raw, message.topic.msgtype)
                stamp = stamp_ns(mask.header)
                camera = frames.at(stamp)
                if camera is None:
                    raise BagError(f"{recorded}: a mask is stamped {stamp} ns, but no frame on {image_topic} is")
                latency = (message.log_time - stamp) / 1e6
                figures.latency.add(latency)
                figures.series.append(((stamp - first) / 1e9, latency))
                figures.masks += 1
                writer.write(pictures.add(camera, to_array(mask), figures.series[-1][0]), stamp)
    figures.score, figures.unscored = pictures.score()
    figures.pictures["poster"] = pictures.poster
    figures.pictures["sheet"] = pictures.sheet(f"{image_topic}: {figures.masks} masks")
    if not cv2.imwrite(str(sheet), figures.pictures["sheet"]):
        raise BagError(f"cannot write {sheet}")
    return figures


class ByStamp:
    """Messages of one topic, asked for by stamps that rise: one at a time in memory, for images of a long bag fill it."""

    def __init__(self, stack: ExitStack, recorded: Path, topic: str):
        self._messages = stack.enter_context(open_bag(recorded)).messages([topic])
        self._next: Any = None
        self._advance()

    def _advance(self) -> None:
        message = next(self._messages, None)
        self._next = None if message is None else deserialize(message.raw, message.topic.msgtype)

    def at(self, stamp: int) -> Any:
        """Return the message of this stamp, or None."""
        while self._next is not None and stamp_ns(self._next.header) < stamp:
            self._advance()
        return self._next if self._next is not None and stamp_ns(self._next.header) == stamp else None


class _Pictures:
    """Draws frame after frame, keeps those of the sheet, and counts the score on the way."""

    def __init__(self, labels: Labels, truth: Truth, total: int):
        self._labels, self._truth = labels, truth
        self._confusion = Confusion(len(labels.names))
        self._scored = 0
        self._problem = ""
        self._wanted = set(contact_sheet.evenly(total, SHEET_FRAMES))
        self._cells: list[tuple[str, list[np.ndarray]]] = []
        self._seen = 0
        self.poster = np.zeros((1, 1, 3), np.uint8)
        self._middle = total // 2

    def add(self, camera: Any, mask: np.ndarray, seconds: float) -> np.ndarray:
        """Take a camera's message and its mask (`[H, W]`); return the overlay, uint8 `[H, W, 3]` BGR."""
        bgr = to_bgr(camera)
        drawn = overlay.draw(bgr, mask, self._labels.palette)
        cells = [bgr, drawn]
        truth = self._true_mask(camera)
        if truth is not None:
            try:
                self._confusion.add(mask, truth)
                self._scored += 1
                cells.append(overlay.draw(bgr, truth, self._labels.palette, alpha=1.0))
            except ValueError as error:
                self._problem = self._problem or str(error)
        if self._seen in self._wanted:
            self._cells.append((f"{seconds:.1f} s", [picture.copy() for picture in cells]))
        if self._seen == self._middle:
            self.poster = drawn.copy()
        self._seen += 1
        return drawn

    def _true_mask(self, camera: Any) -> np.ndarray | None:
        raw = self._truth.masks.get(digest(camera))
        if raw is None:
            return None
        try:
            return to_array(deserialize(raw, self._truth.msgtype))
        except MessageError as error:
            self._problem = self._problem or str(error)
            return None

    def score(self) -> tuple[dict[str, Any] | None, str]:
        if not self._truth.masks:
            return None, "the bag holds no true masks"
        if not self._scored:
            return None, self._problem or "no frame with a true mask got a mask"
        return {"topic": self._truth.topic, "frames": self._scored, **self._confusion.report(self._labels.names)}, ""

    def sheet(self, title: str) -> np.ndarray:
        widest = max(len(pictures) for _, pictures in self._cells)
        title += ("  (camera, overlay, ground truth)" if widest == 3 else "  (camera, overlay)")
        return contact_sheet.draw(self._cells, title, self._labels.names, self._labels.palette, columns=2)
