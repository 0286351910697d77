# SPDX-License-Identifier: Apache-2.0
"""The tracking node's part of a recording -> figures, pictures and a video: objects and points beside the features."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deeprob_perception.bags import open_bag
from deeprob_perception.demo.recording import ByStamp, Truth, digest
from deeprob_perception.errors import MessageError
from deeprob_perception.messages.cdr import deserialize, stamp_ns
from deeprob_perception.messages.clouds import read_tracks
from deeprob_perception.messages.images import to_array, to_bgr
from deeprob_perception.replay_tasks import FEATURES_RGB, OBJECT_MASK, TRACKS
from deeprob_perception.segmentation.scores import Confusion
from deeprob_perception.timing import Samples
from deeprob_perception.tracking.overlay import TrackOverlay
from deeprob_perception.tracking.tracker import Tracks
from deeprob_perception.video import VideoWriter

WANTED = (TRACKS, OBJECT_MASK, FEATURES_RGB)


@dataclass
class Tracking:
    """What a recording shows of tracking.

    video: the file with the pictures. frames: those that were tracked. latency: ms from a frame's stamp to its tracks'
    arrival at the recorder. visible: points in sight, of each frame. oldest: frames through which the longest-lived point was
    followed. iou: of each object that was given, by name, against the ground truth, over `scored` frames; {} without truth.
    poster: uint8 `[H, W, 3]` BGR.
    """

    video: Path
    frames: int = 0
    latency: Samples = field(default_factory=Samples)
    visible: list[int] = field(default_factory=list)
    oldest: int = 0
    iou: dict[str, float | None] = field(default_factory=dict)
    scored: int = 0
    poster: np.ndarray = field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))

    def summary(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "frames": self.frames,
            "latency_ms": self.latency.summary(),
            "points_visible_median": float(np.median(self.visible)) if self.visible else 0.0,
            "oldest_point_frames": self.oldest,
            "iou": self.iou,
            "scored_frames": self.scored,
        }


def seed_from(truth: Truth, names: dict[int, str]) -> np.ndarray | None:
    """Return the first true mask with only the classes `names` in it, uint8 `[H, W]`; None without one of them."""
    for raw in truth.masks.values():
        mask = to_array(deserialize(raw, truth.msgtype))
        wanted = np.where(np.isin(mask, list(names)), mask, 0).astype(np.uint8)
        return wanted if wanted.any() else None
    return None


def read(recorded: Path, image_topic: str, truth: Truth, objects: dict[int, str], video: Path) -> Tracking | None:
    """Read a recording and write the video: camera with objects and points, beside the features' colours.

    None, and no video, where nothing was tracked.
    :param truth: true masks, in which the objects have the ids that they were given. :param objects: id -> name.
    """
    found = Tracking(video)
    confusion = Confusion(1 + max(objects, default=0))
    drawer = TrackOverlay()
    with ExitStack() as stack:
        bag = stack.enter_context(open_bag(recorded))
        total = next((topic.count for topic in bag.topics if topic.name == TRACKS), 0)
        if not total:
            return None
        frames, masks, colours = (ByStamp(stack, recorded, name) for name in (image_topic, OBJECT_MASK, FEATURES_RGB))
        writer = stack.enter_context(VideoWriter(video, fps=15.0, quality=27))
        for message in bag.messages([TRACKS]):
            cloud = deserialize(message.raw, message.topic.msgtype)
            stamp = stamp_ns(cloud.header)
            camera = frames.at(stamp)
            if camera is None:
                continue
            mask = _pixels(masks.at(stamp))
            tracks = _tracks(read_tracks(cloud), mask)
            drawer.remember(tracks)
            picture = drawer.draw(to_bgr(camera), tracks)
            rgb = _pixels(colours.at(stamp))
            beside = np.zeros_like(picture) if rgb is None else rgb[..., ::-1]
            picture = np.hstack((picture, cv2.resize(beside, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)))
            writer.write(picture, stamp)
            if found.frames == total // 2:
                found.poster = picture
            found.frames += 1
            found.latency.add((message.log_time - stamp) / 1e6)
            found.visible.append(int(np.count_nonzero(tracks.visible)))
            found.oldest = max(found.oldest, int(tracks.ages.max(initial=0)))
            raw = truth.masks.get(digest(camera))
            if raw is not None and mask is not None and objects:
                true = to_array(deserialize(raw, truth.msgtype))
                confusion.add(mask, np.where(np.isin(true, list(objects)), true, 0).astype(np.uint8))
                found.scored += 1
    if found.scored:
        values = confusion.iou()
        found.iou = {name: None if np.isnan(values[i]) else float(values[i]) for i, name in objects.items()}
    return found if found.frames else None


def _pixels(image: Any) -> np.ndarray | None:
    if image is None:
        return None
    try:
        return to_array(image)
    except MessageError:  # a damaged image costs its own picture
        return None


def _tracks(rows: np.ndarray, mask: np.ndarray | None) -> Tracks:
    places = np.stack((rows["u"], rows["v"]), -1)
    nothing = np.zeros((0, 0, 0), np.float32)
    return Tracks(places, rows["id"].astype(np.int64), rows["age"].astype(np.int64), rows["confidence"],
                  rows["visible"] > 0, mask, (), nothing, False)
