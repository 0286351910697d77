# SPDX-License-Identifier: Apache-2.0
"""Scores of label images against ground truth: confusion matrix, IoU per class, mean IoU, pixel accuracy."""

from typing import Any

import numpy as np


class Confusion:
    """A confusion matrix that grows image by image: rows are true classes, columns predicted ones."""

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.matrix = np.zeros((num_classes, num_classes), np.int64)

    def add(self, labels: np.ndarray, truth: np.ndarray) -> None:
        """Count one image: `labels` and `truth` integer `[H, W]`; true ids outside `0..num_classes-1` are void, not counted.

        :raises ValueError: when the shapes differ or a predicted id is not a class.
        """
        if labels.shape != truth.shape:
            raise ValueError(f"labels are {labels.shape}, the ground truth is {truth.shape}: the sizes must be equal")
        valid = truth < self.num_classes
        predicted = labels[valid].astype(np.int64)
        if predicted.size and predicted.max() >= self.num_classes:
            raise ValueError(f"predicted class id {predicted.max()}, but there are {self.num_classes} classes")
        pairs = truth[valid].astype(np.int64) * self.num_classes + predicted
        self.matrix += np.bincount(pairs, minlength=self.num_classes**2).reshape(self.matrix.shape)

    def iou(self) -> np.ndarray:
        """Return intersection over union per class, float64 `[K]`; NaN for a class in neither labels nor truth."""
        hits = np.diag(self.matrix).astype(np.float64)
        union = self.matrix.sum(0) + self.matrix.sum(1) - hits
        return np.divide(hits, union, out=np.full(self.num_classes, np.nan), where=union > 0)

    def miou(self) -> float:
        """Return the mean IoU over the classes that occur; NaN before the first labelled pixel."""
        iou = self.iou()
        return float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan")

    def pixel_accuracy(self) -> float:
        total = self.matrix.sum()
        return float(np.diag(self.matrix).sum() / total) if total else float("nan")

    def report(self, class_names: list[str]) -> dict[str, Any]:
        """Return `{"iou": {name: value or None}, "miou", "pixel_accuracy"}`, ready for JSON."""
        iou = {name: None if np.isnan(v) else float(v) for name, v in zip(class_names, self.iou(), strict=True)}
        return {"iou": iou, "miou": self.miou(), "pixel_accuracy": self.pixel_accuracy()}
