# SPDX-License-Identifier: Apache-2.0
"""Unlabelled frames of folders, videos and bags, and the crops of them that self-distillation compares.

Frames are held as jpeg, short side at most `SHORT_SIDE`: a robot's hour at five frames a second is half a gigabyte so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deeprob_perception import video
from deeprob_perception.bags import open_bag
from deeprob_perception.bags.from_images import IMAGE_SUFFIXES
from deeprob_perception.errors import DataError, ImageError
from deeprob_perception.messages.cdr import deserialize
from deeprob_perception.messages.images import to_bgr

SHORT_SIDE = 288
JPEG_QUALITY = 90


def read_frames(sources: Iterable[Path], frames_per_second: float) -> list[bytes]:
    """Return the frames of all sources as jpeg.

    :param sources: folders of images (and their subfolders), video files, bags.
    :param frames_per_second: of video files and bags; neighbouring frames show nearly the same. Folders are read whole.
    :raises DataError, BagError: for a source that is missing or holds no frames.
    """
    kept: list[bytes] = []
    for source in sources:
        before = len(kept)
        if not source.exists():
            raise DataError(f"there is no {source}; give a folder of images, a video or a bag")
        for bgr in thinned(source, frames_per_second):
            scale = SHORT_SIDE / min(bgr.shape[:2])
            if scale < 1:
                bgr = cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            kept.append(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes())
        if len(kept) == before:
            raise DataError(f"{source} holds no frames")
    return kept


def thinned(source: Path, frames_per_second: float) -> Iterator[np.ndarray]:
    """Yield frames uint8 `[H, W, 3]` BGR of one source."""
    pictures = sorted(p for p in source.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if source.is_dir() else []
    if pictures:
        for path in pictures:
            bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if bgr is None:
                raise DataError(f"{path} is damaged, or no image")
            yield bgr
        return
    gap = round(1e9 / frames_per_second)
    yield from of_video(source, gap) if source.suffix.lower() in video.SUFFIXES else of_bag(source, gap)


def of_video(path: Path, gap: int) -> Iterator[np.ndarray]:
    due = 0
    for stamp, bgr in video.read_frames(path):
        if stamp >= due:
            due = stamp + gap
            yield bgr


def of_bag(path: Path, gap: int) -> Iterator[np.ndarray]:
    """Yield frames of the bag's camera at least `gap` ns apart; those that cannot be decoded are left out."""
    with open_bag(path) as bag:
        topic = bag.image_topic()
        due = 0
        for message in bag.messages([topic.name]):
            if message.log_time < due:
                continue
            try:
                yield to_bgr(deserialize(message.raw, topic.msgtype))
            except ImageError:
                continue
            due = message.log_time + gap


@dataclass(frozen=True)
class MultiCrop:
    """How views of a frame are drawn (Caron et al., section 3.1 and appendix; areas are shares of the frame's).

    Two global views of `global_size` pixels and `local_count` local ones of `local_size`.
    """

    global_size: int = 112
    local_size: int = 48
    local_count: int = 6
    global_area: tuple[float, float] = (0.25, 1.0)
    local_area: tuple[float, float] = (0.05, 0.25)
    aspect: float = 4 / 3
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 18.0  # degrees


class CropPairs(Dataset):
    """A frame's views: global `[2, 3, G, G]` and local `[L, 3, S, S]`, uint8 RGB, and where the global ones lie `[2, 5]`.

    The latter are x, y, width, height of each crop in the frame's pixels and 1 where it is mirrored: what a dense loss
    needs to know which patches of two views show the same.
    """

    def __init__(self, frames: list[bytes], crops: MultiCrop):
        self.frames = frames
        self.crops = crops

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        # Each worker's torch seed differs by epoch and worker, numpy's does not: draw from the former.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        frame = cv2.imdecode(np.frombuffer(self.frames[index], np.uint8), cv2.IMREAD_COLOR)
        if frame is None:
            raise DataError(f"frame {index} of the data is damaged")
        crops = self.crops
        views, places = [], []
        for blur, solarize in ((1.0, 0.0), (0.1, 0.2)):  # the paper's two kinds of global views, after BYOL
            view, place = cut(frame, crops.global_size, crops.global_area, crops.aspect, rng)
            views.append(distort(view, crops, rng, blur, solarize))
            places.append(place)
        local = [
            distort(cut(frame, crops.local_size, crops.local_area, crops.aspect, rng)[0], crops, rng, 0.5, 0.0)
            for _ in range(crops.local_count)
        ]
        size = crops.local_size
        return stack(views), stack(local) if local else torch.empty(0, 3, size, size, dtype=torch.uint8), torch.tensor(places)


def stack(views: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(views)[..., ::-1].transpose(0, 3, 1, 2)))


def cut(
    frame: np.ndarray, size: int, area: tuple[float, float], aspect: float, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[float, float, float, float, float]]:
    """Return a random part of the frame scaled to `size` x `size`, mirrored half of the times, and its place."""
    height, width = frame.shape[:2]
    ratio = np.exp(rng.uniform(-np.log(aspect), np.log(aspect)))
    pixels = rng.uniform(*area) * height * width
    w = min(width, max(2, round(float(np.sqrt(pixels * ratio)))))
    h = min(height, max(2, round(float(np.sqrt(pixels / ratio)))))
    x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    smaller = w > size or h > size
    view = cv2.resize(
        frame[y : y + h, x : x + w], (size, size), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    )
    mirrored = rng.random() < 0.5
    return (view[:, ::-1] if mirrored else view), (float(x), float(y), float(w), float(h), float(mirrored))


def distort(view: np.ndarray, crops: MultiCrop, rng: np.random.Generator, blur: float, solarize: float) -> np.ndarray:
    """Change colours, and with the given probabilities blur and solarise (DINO's augmentation; strengths of BYOL)."""
    if rng.random() < 0.8:
        ids = np.arange(256, dtype=np.float32)
        gain = rng.uniform(1 - crops.contrast, 1 + crops.contrast)
        light = rng.uniform(1 - crops.brightness, 1 + crops.brightness)
        mean = float(view.mean())
        table = np.clip((ids - mean) * light * gain + mean * light, 0, 255).astype(np.uint8)
        view = cv2.LUT(np.ascontiguousarray(view), table)
        hsv = cv2.cvtColor(view, cv2.COLOR_BGR2HSV)
        hue = ((ids + rng.uniform(-crops.hue, crops.hue) / 2) % 180).astype(np.uint8)  # OpenCV's hue is half the degrees
        saturation = np.clip(ids * rng.uniform(1 - crops.saturation, 1 + crops.saturation), 0, 255).astype(np.uint8)
        view = cv2.cvtColor(cv2.LUT(hsv, np.dstack((hue, saturation, ids.astype(np.uint8)))), cv2.COLOR_HSV2BGR)
    if rng.random() < 0.2:
        view = cv2.cvtColor(cv2.cvtColor(np.ascontiguousarray(view), cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if rng.random() < blur:
        # 0.1 to 2 pixels of a view of 224; in proportion for smaller ones.
        sigma = rng.uniform(0.1, 2.0) * len(view) / 224
        view = cv2.GaussianBlur(np.ascontiguousarray(view), (0, 0), max(sigma, 0.05))
    if rng.random() < solarize:
        view = np.where(view < 128, view, 255 - view)
    return view
