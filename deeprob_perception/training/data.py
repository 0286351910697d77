# SPDX-License-Identifier: Apache-2.0
"""Random training crops of labelled images, and their augmentation."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from deeprob_perception.errors import DataError
from deeprob_perception.segmentation.dataset import VOID, Sample, read_image, read_label


@dataclass(frozen=True)
class Augmentation:
    """How a training crop is drawn. Ranges are uniform; the scale is uniform in its logarithm."""

    crop: tuple[int, int] = (256, 256)  # height, width in pixels
    scale: tuple[float, float] = (0.5, 1.75)
    stretch: float = 0.15  # aspect ratio changes by up to this share
    rotate: float = 6.0  # degrees
    balanced: float = 0.5  # share of the crops that are centred on a pixel of a class drawn at random, rare ones more often
    colour: float = 0.35  # strength of brightness, contrast and saturation changes
    hue: float = 9.0  # of OpenCV's 180
    blur: float = 0.15  # share of crops that are blurred
    noise: float = 0.15  # share of crops with sensor noise


# How far pictures are changed. `mild` is for short trainings, in which `strong` leaves a network under-fitted.
AUGMENTATIONS: dict[str, dict[str, float]] = {
    "strong": {},
    "mild": {"stretch": 0.06, "rotate": 2.0, "colour": 0.2, "hue": 5.0, "blur": 0.05, "noise": 0.05},
}


class CropDataset(Dataset):
    """Random augmented crops: `(image uint8 [3, h, w] RGB, label int64 [h, w])`, and the data set's class frequencies."""

    def __init__(self, samples: list[Sample], num_classes: int, augmentation: Augmentation, length: int | None = None):
        self.samples = samples
        self.num_classes = num_classes
        self.augmentation = augmentation
        self.length = length or len(samples)
        counts = np.stack([
            np.bincount(read_label(s.label, num_classes).ravel(), minlength=256)[:num_classes] for s in samples
        ])  # [n, K]
        self.present = counts > 50  # fewer pixels are too few to centre a crop on
        self.frequency = counts.sum(0) / max(1, counts.sum())  # [K]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Each worker's torch seed differs by epoch and worker, numpy's does not: draw from the former.
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        index %= len(self.samples)
        image = read_image(self.samples[index].image)
        label = read_label(self.samples[index].label, self.num_classes)
        if label.shape != image.shape[:2]:
            raise DataError(f"{self.samples[index].label}: {label.shape} pixels, its image has {image.shape[:2]}")
        image, label = self._crop(image, label, self.present[index], rng)
        image = recolour(image, self.augmentation, rng)
        return (
            torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))),
            torch.from_numpy(label.astype(np.int64)),
        )

    def _crop(
        self, image: np.ndarray, label: np.ndarray, present: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scale, stretch, rotate, flip and crop in one affine warp."""
        a = self.augmentation
        height, width = label.shape
        crop_height, crop_width = a.crop
        scale = float(np.exp(rng.uniform(*np.log(a.scale))))
        stretch = float(np.exp(rng.uniform(-a.stretch, a.stretch)))
        sx, sy = scale * stretch, scale / stretch
        # Half the extent of what the crop sees, in source pixels: keeps it inside the image where that is possible.
        half_x, half_y = crop_width / sx / 2, crop_height / sy / 2
        centre_x, centre_y = self._centre(label, present, rng)
        if width > 2 * half_x:
            centre_x = float(np.clip(centre_x, half_x, width - half_x))
        else:
            centre_x = width / 2 + rng.uniform(-1, 1) * (half_x - width / 2)
        if height > 2 * half_y:
            centre_y = float(np.clip(centre_y, half_y, height - half_y))
        else:
            centre_y = height / 2 + rng.uniform(-1, 1) * (half_y - height / 2)
        angle = np.deg2rad(rng.uniform(-a.rotate, a.rotate))
        flip = -1.0 if rng.random() < 0.5 else 1.0
        cos, sin = np.cos(angle), np.sin(angle)
        linear = np.array([[flip * sx * cos, -flip * sx * sin], [sy * sin, sy * cos]])
        # OpenCV counts from the middle of the first pixel, the numbers above from the picture's edge.
        shift = np.array([crop_width / 2 - 0.5, crop_height / 2 - 0.5]) - linear @ np.array([centre_x - 0.5, centre_y - 0.5])
        matrix = np.column_stack((linear, shift))
        size = (crop_width, crop_height)
        # Shrunk pictures are means over areas, as `segmenter.resized` makes them for the engine; bilinear sampling would alias.
        finer = max(1, round(1 / min(sx, sy)))
        fine = finer * matrix + [[0, 0, (finer - 1) / 2]]  # pixel i is the mean of pixels finer * i ... finer * i + finer - 1
        image = cv2.warpAffine(image, fine, (finer * crop_width, finer * crop_height), flags=cv2.INTER_LINEAR,
                               borderValue=cv2.mean(image)[:3])
        if finer > 1:
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        label = cv2.warpAffine(label, matrix, size, flags=cv2.INTER_NEAREST, borderValue=VOID)
        return image, label

    def _centre(self, label: np.ndarray, present: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
        height, width = label.shape
        if rng.random() < self.augmentation.balanced and present.any():
            weight = np.where(present, (self.frequency + 1e-3) ** -0.5, 0.0)
            ys, xs = np.nonzero(label == rng.choice(self.num_classes, p=weight / weight.sum()))
            pick = rng.integers(len(ys))
            jitter = rng.uniform(-40, 40, 2)  # pixels; the object shall not always stand in the middle
            return xs[pick] + jitter[0], ys[pick] + jitter[1]
        return rng.uniform(0, width), rng.uniform(0, height)


def recolour(image: np.ndarray, a: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, and now and then blur, add noise or take the colour away."""
    table = np.arange(256, dtype=np.float32)
    contrast, brightness = np.exp(rng.uniform(-a.colour, a.colour)), rng.uniform(-a.colour, a.colour) * 90
    gamma = np.exp(rng.uniform(-a.colour, a.colour))
    table = 255 * np.clip(((table - 128) * contrast + 128 + brightness) / 255, 0, 1) ** gamma
    image = cv2.LUT(image, table.astype(np.uint8))
    if rng.random() < 0.8:
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        ids = np.arange(256)
        hue = ((ids + rng.uniform(-a.hue, a.hue)) % 180).astype(np.uint8)
        saturation = np.clip(ids * np.exp(rng.uniform(-1.6 * a.colour, 1.2 * a.colour)), 0, 255).astype(np.uint8)
        hsv = cv2.LUT(hsv, np.dstack((hue, saturation, ids.astype(np.uint8))))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    elif rng.random() < 0.25:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    if rng.random() < a.blur:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < a.noise:
        noise = rng.normal(0, rng.uniform(2, 12), image.shape).astype(np.float32)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return image
