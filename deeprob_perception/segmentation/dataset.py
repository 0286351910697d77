# SPDX-License-Identifier: Apache-2.0
"""Labelled images in a folder: `images/<name>.jpg|png` and `labels/<name>.png`, where a pixel's value is its class id."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from deeprob_perception.errors import DataError

VOID = 255  # in label images as we read them: nothing is known of this pixel
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}


@dataclass(frozen=True)
class Sample:
    name: str
    image: Path
    label: Path


def find_samples(data: Path, names: list[str] | None = None) -> list[Sample]:
    """Pair `data/images/<name>.*` with `data/labels/<name>.png`, in the order of the names.

    :param names: keep these only (a split file's lines).
    :raises DataError: for a folder without images, an image without its label, or a name without an image.
    """
    images = {p.stem: p for p in sorted((data / "images").glob("*")) if p.suffix.lower() in SUFFIXES}
    if not images:
        raise DataError(f"{data}: no images in {data / 'images'}; want images/*.jpg|png and labels/*.png of the same names")
    if names is not None:
        missing = [name for name in names if name not in images]
        if missing:
            raise DataError(f"{data / 'images'}: no image for {len(missing)} names of the split, the first is {missing[0]!r}")
        images = {name: images[name] for name in names}
    samples = [Sample(name, path, data / "labels" / f"{name}.png") for name, path in images.items()]
    unlabelled = [s.label for s in samples if not s.label.is_file()]
    if unlabelled:
        raise DataError(f"{unlabelled[0]}: no such label image ({len(unlabelled)} of {len(samples)} are missing)")
    return samples


def read_image(path: Path) -> np.ndarray:
    """Return the image, BGR uint8 `[H, W, 3]`."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path}: not a readable image")
    return image


def read_label(path: Path, num_classes: int) -> np.ndarray:
    """Return class ids uint8 `[H, W]`; ids that are not a class become `VOID`.

    OpenCV turns a palette PNG into colours, so those are read by Pillow, whose pixel value is the id itself.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode not in ("L", "P"):
                raise DataError(f"{path}: a label image must be 8-bit grey or palette (pixel = class id), not {file.mode}")
            label = np.array(file, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: not a readable image: {error}") from error
    label[label >= num_classes] = VOID
    return label
