# SPDX-License-Identifier: Apache-2.0
"""J and F: the figures of the official evaluation on real masks, and what can be worked out by hand."""

import csv

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeprob_perception.errors import DataError
from deeprob_perception.tracking.scores import contour, contour_accuracy, disk, region_similarity, score_sequence


@pytest.mark.parametrize(("sequence", "j", "f"), [("goat", 0.86938, 0.87593), ("dog", 0.71079, 0.69111)])
def test_every_frame_scores_as_the_official_evaluation_has_it(shared, sequence, j, f):
    folder = shared / "data" / "video" / "osvos_metric_oracle" / sequence
    with (folder / "reference_jf.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = sorted(path.name for path in (folder / "gt").glob("*.png"))
    assert len(rows) == len(names) > 50
    truth, found = ([cv2.imread(str(folder / part / name), cv2.IMREAD_GRAYSCALE) for name in names] for part in ("gt", "pred"))
    columns = {key.lower(): key for key in rows[0]}
    for row, a, b in zip(rows, found, truth, strict=True):
        assert region_similarity(a, b) == pytest.approx(float(row[columns["j"]]), abs=1e-4)
        assert contour_accuracy(a, b) == pytest.approx(float(row[columns["f"]]), abs=1e-4)
    scores = score_sequence(found, truth)
    assert (scores.j, scores.f) == (pytest.approx(j, abs=1e-4), pytest.approx(f, abs=1e-4))
    assert scores.jf == pytest.approx((j + f) / 2, abs=1e-4)


def square(top: int, left: int, side: int = 40) -> np.ndarray:
    mask = np.zeros((120, 160), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_j_of_two_squares_is_their_intersection_over_their_union():
    assert region_similarity(square(10, 10), square(10, 30)) == pytest.approx(20 / 60)
    assert region_similarity(square(10, 10), square(60, 100)) == 0


def test_f_forgives_a_shift_within_the_tolerance_and_not_beyond():
    # 0.008 of the diagonal of 200 pixels, rounded up: 2 pixels
    assert contour_accuracy(square(40, 40), square(42, 40)) == 1
    assert 0 < contour_accuracy(square(40, 40), square(40, 44)) < 1
    assert contour_accuracy(square(10, 10), square(70, 100)) == 0


def test_empty_masks():
    nothing = np.zeros((120, 160), bool)
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == 1
    assert region_similarity(square(0, 0), nothing) == contour_accuracy(square(9, 9), nothing) == 0


def test_first_and_last_frame_do_not_count():
    wrong, right = np.zeros((120, 160), bool), square(40, 40)
    assert score_sequence([wrong, right, right, wrong], [right] * 4).jf == 1


@pytest.mark.parametrize(
    ("found", "truth", "message"),
    [
        ([square(0, 0)] * 3, [square(0, 0)] * 4, "3 masks were found, 4 are true"),
        ([square(0, 0)] * 2, [square(0, 0)] * 2, "2 frames has none to score"),
        ([np.zeros((2, 3))] * 3, [np.zeros((3, 2))] * 3, "shapes"),
    ],
)
def test_what_cannot_be_compared_is_refused(found, truth, message):
    with pytest.raises(DataError, match=message):
        score_sequence(found, truth)


@given(st.integers(0, 2**32 - 1), st.integers(5, 60), st.integers(5, 60))
def test_scores_lie_between_0_and_1_and_a_mask_fits_itself(seed, height, width):
    a, b = np.random.default_rng(seed).random((2, height, width)) < 0.5
    for score in (region_similarity, contour_accuracy):
        assert score(a, a) == 1
        assert 0 <= score(a, b) <= 1
        assert score(a, b) == pytest.approx(score(b, a))


def test_the_contour_of_a_square_is_closed_and_one_pixel_wide():
    edge = contour(square(40, 40, side=10))
    assert edge.sum() == 4 * 10  # the corner below right belongs to both sides
    assert cv2.connectedComponents(edge.astype(np.uint8), connectivity=8)[0] == 2
    assert disk(2).sum() == 13
