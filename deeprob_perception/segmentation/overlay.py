# SPDX-License-Identifier: Apache-2.0
"""Labels laid over the camera image in the classes' colours."""

import cv2
import numpy as np


def draw(
    bgr: np.ndarray, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.5, shown: set[int] | None = None
) -> np.ndarray:
    """Return a new image, uint8 `[H, W, 3]` BGR: `alpha` of each shown class's colour over `1 - alpha` of the camera's.

    :param labels: uint8 `[H, W]`, the image's size. :param palette: uint8 `[K, 3]`, RGB.
    :param alpha: opacity, 0 to 1. :param shown: class ids to colour; None for all. Pixels of other ids, and of ids outside
        the palette (255 = void), keep the camera's colour.
    """
    if labels.shape != bgr.shape[:2]:
        raise ValueError(f"labels are {labels.shape}, the image is {bgr.shape[:2]}: they must be of one size")
    table = np.zeros((1, 256, 3), np.uint8)
    table[0, : len(palette)] = palette[:, ::-1]
    painted = np.zeros(256, np.uint8)
    painted[: len(palette)] = 255
    if shown is not None:
        painted[[i for i in range(256) if i not in shown]] = 0
    bgr = np.ascontiguousarray(bgr)
    colour = cv2.LUT(cv2.merge((labels, labels, labels)), table)
    blended = cv2.addWeighted(colour, alpha, bgr, 1 - alpha, 0)
    if painted.all():
        return blended
    # Back to the camera's own pixels wherever the class is not shown.
    np.copyto(blended, bgr, where=(cv2.LUT(labels, painted) == 0)[..., None])
    return blended
