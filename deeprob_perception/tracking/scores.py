# SPDX-License-Identifier: Apache-2.0
"""How well a mask fits the true one, by the measures of DAVIS: region similarity J and contour accuracy F.

Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016), section 5; F after
Martin et al., "Learning to Detect Natural Image Boundaries" (TPAMI 2004). The tolerance and the contour are those of the
official evaluation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from deeprob_perception.errors import DataError

TOLERANCE = 0.008  # of the image's diagonal: how far apart two contours may lie and still count as one


@dataclass(frozen=True)
class MaskScores:
    """Means over an object's frames: region similarity `j`, contour accuracy `f`, and their mean `jf`; 0 to 1."""

    j: float
    f: float

    @property
    def jf(self) -> float:
        return (self.j + self.f) / 2


def score_sequence(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> MaskScores:
    """Score one object's masks in the frames of a sequence.

    The first frame, whose mask is given, and the last one are left out, as the DAVIS protocol has it.

    :param found: bool or 0 for outside `[H, W]`, one a frame. :param truth: likewise, of the same shapes.
    :raises DataError: when the two differ in number or size, or fewer than three frames leave none to score.
    """
    if len(found) != len(truth):
        raise DataError(f"{len(found)} masks were found, {len(truth)} are true ones: give one for each frame")
    if len(found) < 3:
        raise DataError(f"a sequence of {len(found)} frames has none to score: its first and last frame are left out")
    pairs = list(zip(found, truth, strict=True))[1:-1]
    return MaskScores(
        float(np.mean([region_similarity(a, b) for a, b in pairs])), float(np.mean([contour_accuracy(a, b) for a, b in pairs]))
    )


def region_similarity(found: np.ndarray, truth: np.ndarray) -> float:
    """Return J, the intersection over the union; 1 when both masks are empty."""
    a, b = as_masks(found, truth)
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def contour_accuracy(found: np.ndarray, truth: np.ndarray) -> float:
    """Return F, the harmonic mean of the shares of each contour that lie within the tolerance of the other one.

    Two empty contours agree (1); one empty contour beside one that is not scores 0.
    """
    a, b = (contour(mask) for mask in as_masks(found, truth))
    if not a.any() or not b.any():
        return float(not a.any() and not b.any())
    radius = math.ceil(TOLERANCE * math.hypot(*a.shape))
    reach = disk(radius)
    precision = np.count_nonzero(a & cv2.dilate(b.view(np.uint8), reach).view(bool)) / np.count_nonzero(a)
    recall = np.count_nonzero(b & cv2.dilate(a.view(np.uint8), reach).view(bool)) / np.count_nonzero(b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Return the pixels, bool `[H, W]`, that differ from their neighbour to the right, below, or both."""
    edge = np.zeros_like(mask)
    edge[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edge[:-1] |= mask[:-1] ^ mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edge


def disk(radius: int) -> np.ndarray:
    """Return the pixels within `radius` of the centre, uint8 `[2r + 1, 2r + 1]`."""
    offset = np.arange(-radius, radius + 1)
    return (offset[:, None] ** 2 + offset**2 <= radius**2).astype(np.uint8)


def as_masks(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if found.ndim != 2 or found.shape != truth.shape:
        raise DataError(f"the masks to compare have the shapes {list(found.shape)} and {list(truth.shape)}; give equal [H, W]")
    return np.ascontiguousarray(found != 0), np.ascontiguousarray(truth != 0)
