# SPDX-License-Identifier: Apache-2.0
"""A few frames to calibrate on or to compare engines on: of a folder, a bag, or the sample bag that ships."""

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from deeprob_perception.bags import open_bag
from deeprob_perception.engines.model_file import ModelFile, image_shape
from deeprob_perception.engines.parity import Samples
from deeprob_perception.errors import DataError
from deeprob_perception.messages.cdr import deserialize, stamp_ns
from deeprob_perception.messages.images import to_array, to_bgr
from deeprob_perception.replay import truth_topic
from deeprob_perception.segmentation.classes import CLASS_SETS
from deeprob_perception.segmentation.dataset import SUFFIXES, find_samples, read_image, read_label
from deeprob_perception.share import share_dir

Frame = tuple[np.ndarray, np.ndarray | None]  # BGR uint8 [H, W, 3]; true labels uint8 [H, W], or None


def read_samples(model: ModelFile, source: Path | None = None, count: int = 8) -> Samples:
    """Return frames of the model's size, evenly spread over the source, with ground truth where it fits the model.

    :param source: a folder of images, a folder with `images/` and `labels/` (pixel = class id of the model), a bag with or
        without a topic of true masks; None for the sample bag, whose masks count for models of its classes.
    :param count: how many at most.
    :raises DataError, BagError: when there are no frames in it.
    """
    _, height, width, _ = image_shape(model)
    classes = json.loads(model.metadata.get("classes", "[]"))  # none of a model of features
    if source is None:
        fitting = classes == CLASS_SETS["tabletop"].names
        frames, origin = list(of_bag(share_dir() / "bags" / "sample.mcap", count, fitting)), "the sample bag"
    elif source.is_dir() and (source / "images").is_dir():
        frames, origin = list(of_dataset(source, count, len(classes))), source.name
    elif source.is_dir() and any(p.suffix.lower() in SUFFIXES for p in source.iterdir()):
        frames, origin = list(of_folder(source, count)), source.name
    elif source.exists():
        frames, origin = list(of_bag(source, count, True)), source.name
    else:
        raise DataError(f"there is no {source}; give a folder of images or a bag")
    if not frames:
        raise DataError(f"{source}: no frames in it")
    images = [cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA) for bgr, _ in frames]
    truths = [
        None if truth is None else cv2.resize(truth, (width, height), interpolation=cv2.INTER_NEAREST) for _, truth in frames
    ]
    return Samples([np.ascontiguousarray(image)[None] for image in images], origin, truths)


def of_dataset(folder: Path, count: int, num_classes: int) -> Iterator[Frame]:
    labelled = (folder / "labels").is_dir()
    if not labelled:
        yield from of_folder(folder / "images", count)
        return
    for sample in spread(find_samples(folder), count):
        yield read_image(sample.image), read_label(sample.label, num_classes)


def of_folder(folder: Path, count: int) -> Iterator[Frame]:
    for path in spread(sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES), count):
        yield read_image(path), None


def of_bag(path: Path, count: int, with_truth: bool) -> Iterator[Frame]:
    """Yield frames of the bag's camera; those with a true mask of the same stamp, where `with_truth` and it has such."""
    with open_bag(path) as bag:
        topic = bag.image_topic()
        truth = truth_topic(bag) if with_truth else None
        masks = {}
        if truth is not None:
            for message in bag.messages([truth.name]):
                masks[stamp_ns(deserialize(message.raw, truth.msgtype).header)] = message.raw
        step = max(1, topic.count // count)
        for i, message in enumerate(bag.messages([topic.name])):
            if i % step or i // step >= count:
                continue
            msg = deserialize(message.raw, topic.msgtype)
            raw = masks.get(stamp_ns(msg.header))
            mask = None if raw is None or truth is None else to_array(deserialize(raw, truth.msgtype))
            yield to_bgr(msg), mask if mask is None or mask.dtype == np.uint8 else None


def spread(items: list, count: int) -> list:
    """Return `count` items evenly spread, or all where there are fewer."""
    step = max(1, len(items) // count)
    return items[::step][:count]
