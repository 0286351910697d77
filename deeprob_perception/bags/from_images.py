# SPDX-License-Identifier: Apache-2.0
"""Frames of a folder or a video -> a bag with one camera topic, and a ground-truth topic where there are labels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deeprob_perception import video
from deeprob_perception.bags.reader import natural_order
from deeprob_perception.bags.writer import BagWriter
from deeprob_perception.errors import DataError, ImageError
from deeprob_perception.messages import cdr, images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# The first stamp. Not zero, which ROS takes for "no stamp"; and fixed, so that the same frames give the same messages.
START_NS = 1_000_000_000


@dataclass(frozen=True)
class Frame:
    """A frame: ns since the first one, its file (None in a video), and its pixels where they had to be decoded."""

    elapsed: int
    file: Path | None
    bgr: np.ndarray | None


def write_bag(
    source: Path,
    out: Path,
    fps: float | None = None,
    topic: str = "/camera/image_raw",
    compressed: bool = True,
    frame_id: str = "camera",
    labels: Path | None = None,
    max_frames: int | None = None,
    on_frame: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the frames of `source` to the mcap file `out`, and return how many there were.

    :param source: a folder of images, in the natural order of their names, or a video file.
    :param fps: the frames' rate; for a video None keeps the file's own stamps, for a folder it must be given.
    :param compressed: CompressedImage on `<topic>/compressed`; a jpeg or png file's bytes go in as they are, a video's
        frames as jpeg of quality 95. Else Image bgr8 on `topic`.
    :param labels: a folder with a label image (8-bit, pixel = class id) for each image, `<name>.png`; they go to
        /ground_truth/mask/compressed as mono8 png.
    :raises DataError: for a missing folder, a file that is no image, or labels that do not fit.
    """
    if fps is not None and not 0 < fps <= 1000:
        raise DataError(f"{fps} frames a second make no sense; give --fps between 0 and 1000")
    frames = _folder(source, fps) if source.is_dir() else _video(source, fps)
    if labels is not None and not source.is_dir():
        raise DataError(f"labels in {labels} belong to the images of a folder, but {source} is a video")
    image_topic = f"{topic}/compressed" if compressed else topic
    truth_topic = "/ground_truth/mask/compressed"
    count = 0
    with BagWriter(out) as bag:
        bag.add_topic(image_topic, cdr.COMPRESSED_IMAGE if compressed else cdr.IMAGE)
        if labels is not None:
            bag.add_topic(truth_topic, cdr.COMPRESSED_IMAGE)
        for frame in frames:
            if max_frames is not None and count >= max_frames:
                break
            stamp = START_NS + frame.elapsed
            header = cdr.make_header(stamp, frame_id)
            bag.write(image_topic, stamp, _compressed(frame, header) if compressed else _raw(frame, header))
            if labels is not None and frame.file is not None:
                truth = images.make_compressed(_label(labels / f"{frame.file.stem}.png"), header, "png")
                bag.write(truth_topic, stamp, truth)
            count += 1
            on_frame(count)
    return count


def _folder(folder: Path, fps: float | None) -> Iterator[Frame]:
    files = sorted((f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES), key=natural_order)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if fps is None:
        raise DataError(f"images in {folder} carry no times; say how many there are a second with --fps")
    for index, file in enumerate(files):
        yield Frame(round(index * 1_000_000_000 / fps), file, None)


def _video(path: Path, fps: float | None) -> Iterator[Frame]:
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; give a folder of images or a video file")
    for index, (elapsed, bgr) in enumerate(video.read_frames(path)):
        yield Frame(elapsed if fps is None else round(index * 1_000_000_000 / fps), None, bgr)


def _pixels(frame: Frame) -> np.ndarray:
    if frame.bgr is not None:
        return frame.bgr
    bgr = cv2.imread(str(frame.file), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if bgr is None:
        raise DataError(f"{frame.file} cannot be read as an image")
    return bgr


def _raw(frame: Frame, header: Any) -> Any:
    return images.make_image(_pixels(frame), "bgr8", header)


def _compressed(frame: Frame, header: Any) -> Any:
    if frame.file is None or frame.file.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        return images.make_compressed(_pixels(frame), header, "jpeg", quality=95)
    kind = "png" if frame.file.suffix.lower() == ".png" else "jpeg"
    message = cdr.message(cdr.COMPRESSED_IMAGE, header, kind, np.fromfile(frame.file, np.uint8))
    try:
        images.to_bgr(message)  # a broken file is found now, and not by whoever plays the bag
    except ImageError as error:
        raise DataError(f"{frame.file} cannot be read as an image: {error}") from error
    return message


def _label(file: Path) -> np.ndarray:
    """Return a label image's class ids, uint8 `[H, W]`; OpenCV would turn a palette's indices into colours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            ids = np.array(image)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{file} cannot be read as a label image: {error}") from error
    if ids.dtype != np.uint8 or ids.ndim != 2:
        raise DataError(f"{file} is no label image: {ids.dtype} {list(ids.shape)}; expected 8 bits, one channel")
    return ids
