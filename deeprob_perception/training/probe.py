# SPDX-License-Identifier: Apache-2.0
"""A linear probe: what frozen features tell of labels, by a linear classifier of patches (Alain and Bengio, 2016)."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from deeprob_perception.segmentation.dataset import VOID, Sample, read_image, read_label
from deeprob_perception.segmentation.scores import Confusion

PATCHES = 200  # of a training image: neighbours tell little more
STEPS, DECAY = 60, 1e-5

Features = Callable[[np.ndarray], np.ndarray]


def probe(
    features: Features, training: Sequence[Sample], validation: Sequence[Sample], classes: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """Fit a linear classifier on patches, and score it on whole images; the features stay as they are.

    :param features: image uint8 `[H, W, 3]` BGR -> float32 `[h, w, C]`.
    :returns: `iou` by class, `miou`, `pixel_accuracy`; logits are interpolated to the labels' size.
    """
    random = np.random.default_rng(seed)
    inputs, targets = [], []
    for sample in training:
        found = features(read_image(sample.image))
        ids = patch_labels(read_label(sample.label, len(classes)), found.shape[:2], len(classes)).ravel()
        known = np.flatnonzero(ids != VOID)
        chosen = random.choice(known, min(PATCHES, len(known)), replace=False)
        inputs.append(found.reshape(-1, found.shape[-1])[chosen])
        targets.append(ids[chosen])
    x, y = torch.from_numpy(np.concatenate(inputs)), torch.from_numpy(np.concatenate(targets)).long()
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS((weight, bias), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    confusion = Confusion(len(classes))
    with torch.no_grad():
        for sample in validation:
            label = read_label(sample.label, len(classes))
            found = torch.from_numpy(features(read_image(sample.image)))
            logits = ((found - mean) / std @ weight + bias).permute(2, 0, 1)[None]
            full = F.interpolate(logits, size=label.shape, mode="bilinear", align_corners=False)
            confusion.add(full.argmax(1)[0].numpy(), label)
    return confusion.report(list(classes))


def patch_labels(label: np.ndarray, grid: tuple[int, int], count: int) -> np.ndarray:
    """Return the most frequent class of each patch, `VOID` where most of it is none, uint8 `[h, w]`."""
    size = (grid[1], grid[0])
    shares = np.stack([
        cv2.resize((label == i).astype(np.float32), size, interpolation=cv2.INTER_AREA) for i in range(count)
    ])  # fmt: skip
    return np.where(shares.max(0) >= 0.5, shares.argmax(0), VOID).astype(np.uint8)
