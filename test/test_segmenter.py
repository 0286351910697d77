# SPDX-License-Identifier: Apache-2.0
"""The segmenter and the overlay, on arrays."""

import numpy as np
import pytest

from deeprob_perception import engines
from deeprob_perception.segmentation import Segmenter


@pytest.fixture(scope="module")
def segmenter(tiny_model, tmp_path_factory):
    return Segmenter(engines.load(tiny_model, threads=1, cache_dir=tmp_path_factory.mktemp("cache")))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour blobs, uint8 `[height, width, 3]`."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def test_labels_of_the_test_model_vary_over_a_picture(segmenter):
    labels = segmenter(picture(96, 128)).labels
    shares = np.bincount(labels.ravel(), minlength=7) / labels.size
    print(shares)
    assert (shares > 0.01).sum() >= 4
    assert shares.max() < 0.8
