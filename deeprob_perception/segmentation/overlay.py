# SPDX-License-Identifier: Apache-2.0
"""Labels laid over the camera image in the classes' colours."""

import cv2
import numpy as np


def draw(
    bgr: np.ndarray, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.5, shown: set[int] | None = None
) -> np.ndarray:
    """Return a new image, uint8 `[H, W, 3]` BGR: `alpha` of each shown class's colour over `1 - alpha` of the camera's.

    :param labels: uint8 `[H, W]`, the image's size.
    :param palette: uint8 `[K, 3]`, RGB.
    :param alpha: opacity, 0 to 1.
    :param shown: class ids to colour; None for all. Pixels of other ids, and of ids outside the palette (255 = void), keep
        the camera's colour.
    """
    if labels.shape != bgr.shape[:2]:
        raise ValueError(f"labels are {labels.shape}, the image is {bgr.shape[:2]}: they must be of one size")
    colours = np.zeros((256, 1, 3), np.uint8)
    colours[: len(palette), 0] = palette[:, ::-1]
    bare = np.full(256, 255, np.uint8)  # 255: keeps the camera's pixels
    ids = range(len(palette)) if shown is None else [i for i in shown if 0 <= i < len(palette)]
    bare[list(ids)] = 0
    bgr = np.ascontiguousarray(bgr)
    blended = cv2.addWeighted(cv2.applyColorMap(labels, colours), alpha, bgr, 1 - alpha, 0)
    return cv2.copyTo(bgr, cv2.LUT(labels, bare), blended)
