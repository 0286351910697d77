# SPDX-License-Identifier: Apache-2.0
"""The segmenter and the overlay, on arrays."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprob_perception import engines
from deeprob_perception.errors import ImageError, ModelError
from deeprob_perception.segmentation import Segmenter
from deeprob_perception.segmentation.overlay import draw

PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)  # RGB


@pytest.fixture(scope="module")
def segmenter(tiny_model, tmp_path_factory):
    return Segmenter(engines.load(tiny_model, threads=1, cache_dir=tmp_path_factory.mktemp("cache")))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colour blobs, uint8 `[height, width, 3]`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def test_labels_of_the_test_model_vary_over_a_picture(segmenter):
    labels = segmenter(picture(96, 128)).labels
    shares = np.bincount(labels.ravel(), minlength=7) / labels.size
    assert (shares > 0.01).sum() >= 4
    assert shares.max() < 0.8


def test_names_and_palette_are_the_models(segmenter, tiny_recipe):
    assert segmenter.class_names == tiny_recipe["classes"]
    assert segmenter.palette.dtype == np.uint8
    assert segmenter.palette.tolist() == tiny_recipe["palette"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.booleans(), st.integers(0, 1000))
def test_every_size_gives_labels_of_that_size(segmenter, height, width, confidence, seed):
    image = picture(height, width, seed)
    before = image.copy()
    result = segmenter(image, confidence)
    assert (result.labels.dtype, result.labels.shape) == (np.uint8, (height, width))
    assert result.labels.max() < len(segmenter.class_names)
    if confidence:
        assert result.confidence is not None
        assert (result.confidence.dtype, result.confidence.shape) == (np.uint8, (height, width))
        assert result.confidence.min() >= 255 // 7 - 1  # the largest of seven shares is at least a seventh
    else:
        assert result.confidence is None
    np.testing.assert_array_equal(image, before)


def test_an_enlarged_image_gets_the_same_labels_enlarged(segmenter):
    image = picture(96, 128)
    small = segmenter(image).labels
    large = segmenter(cv2.resize(image, (384, 288), interpolation=cv2.INTER_NEAREST)).labels
    # INTER_AREA brings exact 3 x 3 blocks back to the very same pixels.
    np.testing.assert_array_equal(large, np.kron(small, np.ones((3, 3), np.uint8)))


def test_an_image_of_the_models_size_is_not_resized(tiny_model, tmp_path):
    segmenter = Segmenter(engines.load(tiny_model, threads=1, cache_dir=tmp_path))
    segmenter(picture(96, 128))
    assert "resize" not in segmenter.stages
    assert segmenter.stages["infer"].count == 1
    segmenter(picture(50, 60))
    assert segmenter.stages["resize"].count == 2  # there and back
    assert segmenter.stages["infer"].count == 2


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 10, 3), np.uint8), "empty: 10x0"),
        (np.zeros((10, 0, 3), np.uint8), "empty: 0x10"),
        (np.zeros((10, 10), np.uint8), r"uint8 \[10, 10\]"),
        (np.zeros((10, 10, 4), np.uint8), r"\[10, 10, 4\]"),
        (np.zeros((10, 10, 3), np.float32), "float32"),
    ],
)
def test_what_is_no_colour_image_is_refused(segmenter, image, message):
    with pytest.raises(ImageError, match=message):
        segmenter(image)


def test_an_engine_for_another_task_is_refused(segmenter, monkeypatch):
    monkeypatch.setitem(segmenter.engine.metadata, "task", "tracking")
    with pytest.raises(ModelError, match="'tracking', not segmentation"):
        Segmenter(segmenter.engine)


def test_the_overlay_mixes_each_class_colour_into_the_image():
    image = np.full((2, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 2], [1, 2, 255]], np.uint8)
    drawn = draw(image, labels, PALETTE, alpha=0.6)
    expected = {0: [40, 40, 40], 1: [40, 40, 193], 2: [40, 193, 40], 255: [100, 100, 100]}  # BGR; 255 is void: untouched
    assert drawn.tolist() == [[expected[i] for i in row] for row in labels.tolist()]
    assert (image == 100).all()


def test_classes_that_are_not_shown_keep_the_cameras_pixels():
    image = picture(60, 80)
    labels = (np.arange(60 * 80).reshape(60, 80) % 3).astype(np.uint8)
    everything, one = draw(image, labels, PALETTE, 0.5), draw(image, labels, PALETTE, 0.5, {1})
    np.testing.assert_array_equal(one[labels == 1], everything[labels == 1])
    np.testing.assert_array_equal(one[labels != 1], image[labels != 1])
    np.testing.assert_array_equal(draw(image, labels, PALETTE, 0.5, set()), image)


def test_opacity_goes_from_the_image_to_the_colours():
    image, labels = picture(30, 40), np.ones((30, 40), np.uint8)
    np.testing.assert_array_equal(draw(image, labels, PALETTE, 0.0), image)
    assert (draw(image, labels, PALETTE, 1.0) == PALETTE[1, ::-1]).all()


def test_an_overlay_of_another_size_is_refused():
    with pytest.raises(ValueError, match="one size"):
        draw(np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.uint8), PALETTE)
