# SPDX-License-Identifier: Apache-2.0
"""Points and masks on features: exact where the truth is known, defined where the input is odd."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprob_perception.engines import Engine
from deeprob_perception.engines.model_file import ModelFile, TensorSpec
from deeprob_perception.errors import DataError, ImageError, MessageError, ModelError, OrderError, SeedError
from deeprob_perception.messages.cdr import deserialize, make_header, serialize
from deeprob_perception.messages.clouds import POINT_CLOUD, TRACK, make_tracks, read_tracks
from deeprob_perception.tracking import evaluate
from deeprob_perception.tracking.colours import FeatureColours
from deeprob_perception.tracking.masks import MaskTracker, Propagation, paint, top_of_groups
from deeprob_perception.tracking.overlay import TrackOverlay
from deeprob_perception.tracking.points import Following, sample, seeds, vertex
from deeprob_perception.tracking.tracker import Tracker

PATCH = 8
HEIGHT, WIDTH = 120, 160


class PixelEngine(Engine):
    """An engine whose features are the mean colours of patches: what a network would tell of these pictures, without one."""

    backend, device, precision = "pixels", "none", "fp32"

    def __init__(self, task: str = "features", height: int = HEIGHT, width: int = WIDTH):
        image = TensorSpec("image", (1, height, width, 3), np.dtype(np.uint8))
        features = TensorSpec("features", (1, height // PATCH, width // PATCH, 4), np.dtype(np.float32))
        metadata = {"task": task, "name": "pixels", "patch_size": str(PATCH)}
        super().__init__(ModelFile(Path("pixels.onnx"), [image], [features], metadata), "auto")
        self._grid = (width // PATCH, height // PATCH)

    def run(self, inputs, outputs):
        means = cv2.resize(inputs["image"][0].astype(np.float32), self._grid, interpolation=cv2.INTER_AREA)
        found = np.dstack((means - 127, np.full(means.shape[:2], 40, np.float32)))
        return {"features": (found / np.linalg.norm(found, axis=-1, keepdims=True))[None]}


def texture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return blobs of colour of several sizes, uint8 `[height, width, 3]`."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (5, 12, 30):
        picture += cv2.resize(rng.random((cells, cells, 3), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture / 3 * 255, 0, 255).astype(np.uint8)


def scene(x: float, y: float, hidden: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture of a bluish square at x, y on a yellowish ground, both with a pattern, and its mask (id 7)."""
    ground = (texture(1) * (0.3, 0.9, 1)).astype(np.uint8)
    square = (texture(2, 48, 48) * (1.2, 0.4, 0.3)).clip(0, 255).astype(np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    if not hidden:
        move = np.array([[1, 0, x], [0, 1, y]], np.float32)
        size = (WIDTH, HEIGHT)
        cv2.warpAffine(square, move, size, ground, borderMode=cv2.BORDER_TRANSPARENT)
        mask = cv2.warpAffine(np.full((48, 48), 7, np.uint8), move, size, flags=cv2.INTER_NEAREST)
    return ground, mask


def scene_of_two() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scene with a red box in a corner, the square's mask (id 7), and the box's (id 3)."""
    picture, mask = scene(24, 32)
    other = np.zeros_like(mask)
    other[88:112, 120:152] = 3
    picture[other > 0] = (20, 20, 230)
    return picture, mask, other


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return np.count_nonzero(a & b) / max(1, np.count_nonzero(a | b))


# Masks ----------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), *(st.integers(1, most) for most in (3, 4, 9, 12, 8)))
@settings(max_examples=60, deadline=None)
def test_the_largest_of_groups_are_the_largest_of_all(seed, batch, columns, groups, size, count):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(batch, size, groups, columns)).astype(np.float32)
    less = rng.normal(size=(groups, columns)).astype(np.float32)
    where, found = top_of_groups(values, less, count)
    flat = (values + less).reshape(batch, -1, columns).transpose(0, 2, 1).reshape(batch * columns, -1)
    assert np.array_equal(found, -np.sort(-flat)[:, : min(count, flat.shape[1])])
    assert np.array_equal(np.take_along_axis(flat, where, 1), found)


@pytest.mark.parametrize("threads", [1, 3])
def test_propagation_equals_its_definition(threads):
    """Against a loop over all patches, with two objects and a neighbourhood that the border cuts, for more frames than stay."""
    rng = np.random.default_rng(4)
    frames = rng.normal(size=(6, 9, 11, 6)).astype(np.float32)
    frames /= np.linalg.norm(frames, axis=-1, keepdims=True)
    mask = np.zeros((90, 110), np.uint8)
    mask[20:50, 30:60], mask[50:80, 70:90] = 1, 2
    propagation = Propagation(context=2, radius=0.35, top_k=3, temperature=0.2)
    tracker = MaskTracker(propagation, threads)
    tracker.seed(frames[0], mask)
    one_hot = [cv2.resize((mask == i).astype(np.float32), (11, 9), interpolation=cv2.INTER_AREA) for i in (1, 2)]
    context = [(frames[0], np.dstack([1 - sum(one_hot), *one_hot]))]
    for frame in frames[1:]:
        found = tracker.update(frame)
        expected = np.zeros((9, 11, 3))
        for y in range(9):
            for x in range(11):
                votes = [
                    (float(frame[y, x] @ seen[v, u]), shares[v, u])
                    for seen, shares in context for v in range(9) for u in range(11) if abs(v - y) <= 3 and abs(u - x) <= 3
                ]  # fmt: skip
                best = sorted(votes, key=lambda vote: -vote[0])[:3]
                weights = np.exp(np.array([likeness for likeness, _ in best]) / 0.2)
                expected[y, x] = sum(w * shares for w, (_, shares) in zip(weights / weights.sum(), best, strict=True))
        np.testing.assert_allclose(found, expected, atol=1e-5)
        context = [context[0], *[*context[1:], (frame, found)][-2:]]


def test_a_mask_follows_its_object_and_several_stay_apart():
    tracker = Tracker(PixelEngine(), Following(count=0))
    for step in range(8):
        picture, mask = scene(30 + 4 * step, 30 + 2 * step)
        if step == 0:
            tracker.seed_mask(mask)
        tracks = tracker.update(picture, 1 + step * 33_000_000)
        assert set(np.unique(tracks.mask)) <= {0, 7}
        assert iou(tracks.mask == 7, mask == 7) > 0.75, step
    assert tracks.lost == ()


def test_an_object_that_returns_from_behind_another_is_found_again():
    tracker = Tracker(PixelEngine(), Following(count=0))
    picture, mask = scene(24, 32)
    tracker.seed_mask(mask)
    tracker.update(picture, 1)
    for step in range(1, 12):
        tracks = tracker.update(scene(0, 0, hidden=True)[0], 1 + step * 33_000_000)
    assert tracks.lost == (7,) and not tracks.mask.any()
    picture, mask = scene(96, 56)  # elsewhere, farther than a neighbourhood reaches
    for step in range(12, 15):
        tracks = tracker.update(picture, 1 + step * 33_000_000)
    assert tracks.lost == () and iou(tracks.mask == 7, mask == 7) > 0.6


def test_a_lost_object_never_takes_the_patches_of_its_twin():
    """Two squares that look alike, one of them hidden: the search for it must not find the other."""
    tracker = Tracker(PixelEngine(), Following(count=0))
    ground = scene(0, 0, hidden=True)[0]

    def frame(second: bool) -> tuple[np.ndarray, np.ndarray]:
        picture, mask = ground.copy(), np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, x in enumerate((8, 104) if second else (8,), start=1):
            picture[40:80, x : x + 40], mask[40:80, x : x + 40] = (230, 60, 20), number
        return picture, mask

    tracker.seed_mask(frame(second=True)[1])
    tracker.update(frame(second=True)[0], 1)
    for step in range(1, 12):
        picture, mask = frame(second=False)
        tracks = tracker.update(picture, 1 + step * 33_000_000)
    assert tracks.lost == (2,) and iou(tracks.mask == 1, mask == 1) > 0.9


def test_objects_can_be_added_and_a_seed_replaces_all_otherwise():
    tracker = Tracker(PixelEngine(), Following(count=0))
    picture, mask, other = scene_of_two()
    tracker.seed_mask(mask)
    tracker.update(picture, 1)
    tracker.seed_mask(other, keep=True)
    tracker.update(picture, 33_000_000)
    tracks = tracker.update(picture, 66_000_000)
    assert set(np.unique(tracks.mask)) == {0, 3, 7} and iou(tracks.mask == 3, other == 3) > 0.6
    tracker.seed_mask(other)
    assert set(np.unique(tracker.update(picture, 99_000_000).mask)) == {0, 3}


@pytest.mark.parametrize("corrections", [1, 3, 12])
def test_an_object_added_or_corrected_later_is_kept_though_older_frames_called_it_background(corrections):
    tracker = Tracker(PixelEngine(), Following(count=0))
    picture, mask, other = scene_of_two()
    tracker.seed_mask(mask)
    for step in range(corrections):
        tracker.seed_mask(other, keep=True)
        tracker.update(picture, 1 + step * 33_000_000)
    for step in range(10):
        tracks = tracker.update(picture, 1 + (corrections + step) * 33_000_000)
        assert iou(tracks.mask == 7, mask == 7) > 0.9 and iou(tracks.mask == 3, other == 3) > 0.9
    assert len(tracker.masks._given) == 2  # the frame of each object's newest mask: corrections do not pile up


@pytest.mark.parametrize("hidden", [False, True])
def test_points_come_back_to_where_they_started(tmp_path, hidden):
    """The whole scene moves; or it does not, and half of it is another one for some frames: then points are lost."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    wide = texture(5, HEIGHT, WIDTH + 40)
    for i in range(8):
        picture = wide[:, 3 * i : 3 * i + WIDTH].copy()
        if hidden and 3 <= i < 6:
            picture[:, : WIDTH // 2] = texture(77)[:, : WIDTH // 2]
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), picture)
    cv2.imwrite(str(tmp_path / "masks" / "0.png"), np.full((HEIGHT, WIDTH), 1, np.uint8))
    sequence = evaluate.find_sequences(tmp_path)[0]
    engine = PixelEngine()
    found = evaluate.there_and_back(lambda image: engine(image=image[None], outputs=("features",))["features"][0], sequence)
    assert found["frames"] == 8 and found["points"] > 20
    assert found["median"] < 0.3
    if hidden:
        assert found["there"] < 0.85
    else:
        assert found["there"] > 0.7 and found["back"] > 0.9 * found["there"] and found["within_2"] > 0.95


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_shares_are_shares_and_paint_gives_ids_that_were_given(seed, objects, frames):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(frames + 1, 6, 7, 4)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    mask = rng.integers(0, objects + 1, (48, 56), np.uint8) * 40
    mask[:8, :8] = 40
    tracker = MaskTracker(Propagation(context=2))
    tracker.seed(features[0], mask)
    for frame in features[1:]:
        shares = tracker.update(frame)
        assert shares.min() >= 0 and np.allclose(shares.sum(-1), 1, atol=1e-4)
        assert set(np.unique(paint(shares, tracker.ids, 48, 56))) <= {0, *np.unique(mask)}


# Points ---------------------------------------------------------------------------------------------------------------


def test_points_follow_a_moving_picture_to_a_fraction_of_a_pixel():
    tracker = Tracker(PixelEngine(), Following(count=40))
    big = texture(3, HEIGHT + 80, WIDTH + 80)
    for step in range(20):
        shift = np.array([1.7 * step, 0.9 * step])
        move = np.array([[1, 0, -shift[0]], [0, 1, -shift[1]]], np.float32)
        tracks = tracker.update(cv2.warpAffine(big, move, (WIDTH, HEIGHT)), 1 + step * 33_000_000)
        if step == 0:
            start = dict(zip(tracks.ids.tolist(), tracks.points.tolist(), strict=True))
    there = {i: p for i, p, v in zip(tracks.ids.tolist(), tracks.points, tracks.visible, strict=True) if v and i in start}
    inside = {i for i, p in start.items() if p[0] > shift[0] + 12 and p[1] > shift[1] + 12}
    assert len(start) > 20 and len(inside & there.keys()) >= 0.9 * len(inside)
    errors = [np.linalg.norm(there[i] - (start[i] - shift)) for i in inside & there.keys()]
    assert np.median(errors) < 0.3
    assert tracks.ages.max() == 19 and (tracks.ages[~np.isin(tracks.ids, list(start))] < 19).all()


def test_a_point_that_is_hidden_is_said_to_be_and_comes_back_under_its_id():
    tracker = Tracker(PixelEngine(), Following(count=0))
    picture, _ = scene(24, 32)
    tracker.seed_point(24 + 24, 32 + 24)
    tracker.update(picture, 1)
    (number,) = tracker.update(picture, 33_000_000).ids
    for step in range(2, 8):
        tracks = tracker.update(scene(0, 0, hidden=True)[0], step * 33_000_000)
    assert not tracks.visible[0] and tracks.confidence[0] == 0
    for step in range(8, 11):
        tracks = tracker.update(scene(28, 32)[0], step * 33_000_000)
    assert tracks.ids.tolist() == [number] and tracks.visible[0]
    assert np.linalg.norm(tracks.points[0] - (28 + 24, 32 + 24)) < 1.0


def test_a_point_that_leaves_the_image_is_not_found_again_on_what_looks_like_it():
    tracker = Tracker(PixelEngine(), Following(count=0))
    tracker.seed_point(60 + 24, 32 + 24)
    for step in range(15):  # out to the right, 6 pixels a frame
        tracks = tracker.update(scene(60 + 6 * step, 32)[0], 1 + step * 33_000_000)
        assert step > 11 or tracks.visible.all(), step
    assert not len(tracks.ids)
    for step in range(15, 20):  # its twin, where it was last in sight
        tracks = tracker.update(scene(108, 32)[0], 1 + step * 33_000_000)
    assert not len(tracks.ids)


def test_points_out_of_sight_for_long_are_dropped_and_others_take_their_place():
    tracker = Tracker(PixelEngine(), Following(count=20, patience=3))
    tracker.update(texture(5), 1)
    first = set(tracker.last.ids.tolist())
    for step in range(1, 8):
        tracks = tracker.update(255 - texture(6) // 3, step * 33_000_000)
    assert not first & set(tracks.ids.tolist()) and len(tracks.ids) >= 15


def test_seeds_keep_apart_and_off_what_is_plain():
    picture = texture(7)
    picture[:, : WIDTH // 2] = 90
    grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    found = seeds(grey, evaluate.rgb_patches(HEIGHT, WIDTH, PATCH)(picture), 50, 10.0, np.array([[120.0, 60.0]]))
    assert len(found) > 10 and (found[:, 0] > WIDTH // 2 - 8).all()
    gaps = np.linalg.norm(found[:, None] - found[None], axis=-1) + np.eye(len(found)) * 99
    assert gaps.min() > 9 and np.linalg.norm(found - (120, 60), axis=1).min() > 9


def test_sampled_features_are_the_patches_own_at_their_centres_and_mixed_between():
    features = evaluate.rgb_patches(HEIGHT, WIDTH, PATCH)(texture(8))
    centres = np.array([[3 * PATCH + 3.5, 2 * PATCH + 3.5]], np.float32)
    np.testing.assert_allclose(sample(features, centres, (HEIGHT, WIDTH))[0], features[2, 3], atol=1e-6)
    middle = sample(features, centres + np.array([PATCH / 2, 0]), (HEIGHT, WIDTH))[0]
    mixed = features[2, 3] + features[2, 4]
    np.testing.assert_allclose(middle, mixed / np.linalg.norm(mixed), atol=1e-6)


@given(st.floats(-0.5, 0.5), st.integers(1, 5))
def test_the_vertex_of_a_parabola_is_found(offset, peak):
    values = -((np.arange(7) - peak - offset) ** 2)
    assert vertex(values, peak) == pytest.approx(peak + offset, abs=1e-6)


# Odd input ------------------------------------------------------------------------------------------------------------


def test_seeds_that_do_not_fit_are_refused_by_name_and_the_frame_is_tracked():
    tracker = Tracker(PixelEngine(), Following(count=20))
    tracker.seed_point(500, 20)  # no image yet: it is known to be outside only with one
    with pytest.raises(SeedError, match=r"\(500, 20\) is outside the image of 160x120"):
        tracker.update(texture(1), 1)
    assert len(tracker.last.ids)
    for place in ((160, 20), (-1, 4), (float("nan"), 3)):
        with pytest.raises(SeedError):
            tracker.seed_point(*place)
    with pytest.raises(SeedError, match="empty"):
        tracker.seed_mask(np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(SeedError, match="differ in shape"):
        tracker.seed_mask(np.ones((HEIGHT, HEIGHT), np.uint8))
    with pytest.raises(SeedError, match="float32"):
        tracker.seed_mask(np.ones((HEIGHT, WIDTH), np.float32))
    assert tracker.update(texture(1), 33_000_000).mask is None


def test_a_mask_of_another_size_is_scaled():
    tracker = Tracker(PixelEngine(), Following(count=0))
    picture, mask = scene(24, 32)
    tracker.seed_mask(cv2.resize(mask, (WIDTH * 2, HEIGHT * 2), interpolation=cv2.INTER_NEAREST))
    tracks = tracker.update(picture, 1)
    assert tracks.mask.shape == (HEIGHT, WIDTH) and iou(tracks.mask == 7, mask == 7) > 0.95


def test_without_a_seed_there_is_no_mask():
    assert Tracker(PixelEngine()).update(texture(1), 1).mask is None


def test_a_black_frame_changes_nothing_and_is_called_blind():
    tracker = Tracker(PixelEngine(), Following(count=20))
    picture, mask = scene(24, 32)
    tracker.seed_mask(mask)
    before = tracker.update(picture, 1)
    black = tracker.update(np.zeros_like(picture), 33_000_000)
    assert black.blind and not black.visible.any() and black.lost == (7,) and not black.mask.any()
    after = tracker.update(picture, 66_000_000)
    assert not after.blind and iou(after.mask == 7, mask == 7) > 0.8
    kept = after.visible[np.isin(after.ids, before.ids)]
    assert kept.mean() > 0.9 and np.array_equal(after.ids[: len(before.ids)], before.ids)


def test_a_late_frame_is_left_out_and_a_jump_back_begins_anew():
    tracker = Tracker(PixelEngine(), Following(count=20))
    second = 1_000_000_000
    first = tracker.update(texture(1), 10 * second)
    with pytest.raises(OrderError, match="left out"):
        tracker.update(texture(2), 10 * second - 40_000_000)
    with pytest.raises(OrderError):
        tracker.update(texture(2), 10 * second)
    assert np.array_equal(tracker.update(texture(1), 10 * second + 1).ids, first.ids)
    anew = tracker.update(texture(1), 2 * second)  # a bag that loops
    assert not set(anew.ids.tolist()) & set(first.ids.tolist()) and (anew.ages == 0).all()


def test_another_resolution_begins_anew():
    tracker = Tracker(PixelEngine(), Following(count=20))
    picture, mask = scene(24, 32)
    tracker.seed_mask(mask)
    tracker.update(picture, 1)
    tracks = tracker.update(cv2.resize(picture, (WIDTH * 2, HEIGHT * 2)), 33_000_000)
    assert tracks.mask is None and (tracks.ages == 0).all() and tracks.points.max() > HEIGHT


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 4), (0, 5, 3)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(ImageError):
        Tracker(PixelEngine()).update(np.zeros(shape, np.uint8), 1)


def test_a_model_for_another_task_is_refused():
    with pytest.raises(ModelError, match="segmentation"):
        Tracker(PixelEngine(task="segmentation"))


# What goes out --------------------------------------------------------------------------------------------------------


def test_tracks_survive_the_way_through_a_message():
    tracker = Tracker(PixelEngine(), Following(count=20))
    t = tracker.update(texture(1), 1)
    cloud = make_tracks(t.points, t.ids, t.ages, t.confidence, t.visible, make_header(5, "camera"))
    rows = read_tracks(deserialize(serialize(cloud, POINT_CLOUD), POINT_CLOUD))
    assert rows.dtype == TRACK and np.array_equal(np.column_stack((rows["u"], rows["v"])), t.points)
    assert np.array_equal(rows["id"], t.ids) and rows["visible"].all()
    empty = make_tracks(t.points[:0], t.ids[:0], t.ages[:0], t.confidence[:0], t.visible[:0], make_header(5, ""))
    assert not len(read_tracks(deserialize(serialize(empty, POINT_CLOUD), POINT_CLOUD)))
    cloud.fields = cloud.fields[:2]
    with pytest.raises(MessageError, match="u, v"):
        read_tracks(cloud)


def test_colours_of_one_scene_stay_and_tell_its_parts_apart():
    colours, rng = FeatureColours(), np.random.default_rng(0)
    base = np.zeros((6, 8, 16), np.float32)
    base[:, :4, 0], base[:, 4:, 1] = 1, 1
    seen = [colours(base + rng.normal(scale=0.02, size=base.shape).astype(np.float32)).astype(int) for _ in range(40)]
    assert np.abs(seen[0][:, :4].mean((0, 1)) - seen[0][:, 4:].mean((0, 1))).max() > 150
    for later in seen[1:]:
        assert np.abs(later[:, :4].mean((0, 1)) - seen[0][:, :4].mean((0, 1)))[0] < 30


def test_the_overlay_colours_objects_and_leaves_the_rest(tmp_path):
    tracker = Tracker(PixelEngine(), Following(count=0))
    picture, mask = scene(24, 32)
    tracker.seed_mask(mask)
    tracks = tracker.update(picture, 1)
    drawn = TrackOverlay().draw(picture, tracks)
    inner = cv2.erode((mask == 7).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert np.abs(drawn[inner].astype(int) - picture[inner]).mean() > 20
    assert np.array_equal(drawn[110:, :10], picture[110:, :10])


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def moving(tmp_path) -> Path:
    """A sequence of the square that moves by four pixels a frame."""
    for name in ("images", "masks"):
        (tmp_path / "moving" / name).mkdir(parents=True)
    for step in range(6):
        picture, mask = scene(20 + 8 * step, 30)
        cv2.imwrite(str(tmp_path / f"moving/images/{step:03d}.png"), picture)
        cv2.imwrite(str(tmp_path / f"moving/masks/{step:03d}.png"), mask)
    return tmp_path


def test_methods_are_scored_by_how_well_they_follow(moving):
    (sequence,) = evaluate.find_sequences(moving)
    still = evaluate.evaluate(sequence, evaluate.still)["j"]
    # Square at x, then at x + 8 step: the intersection over the union of squares of 48.
    expected = np.mean([(48 - 8 * s) / (48 + 8 * s) for s in range(1, 5)])
    assert still == pytest.approx(expected, abs=0.02)
    assert evaluate.evaluate(sequence, evaluate.warped)["jf"] > still
    assert evaluate.evaluate(sequence, evaluate.propagate(evaluate.rgb_patches(HEIGHT, WIDTH, PATCH)))["jf"] > still


def test_objects_introduced_later_are_tracked_and_not_scored(moving):
    for step in (1, 2, 4, 5):
        (moving / f"moving/masks/{step:03d}.png").unlink()
    (sequence,) = evaluate.find_sequences(moving)
    assert sequence.given(0) is not None and sequence.given(1) is None and sequence.given(3) is not None
    assert evaluate.evaluate(sequence, evaluate.still) is None


def test_a_folder_without_sequences_or_a_first_mask_is_named(moving):
    with pytest.raises(DataError, match="no sequence"):
        evaluate.find_sequences(moving / "moving/images")
    (moving / "moving/masks/000.png").unlink()
    with pytest.raises(DataError, match=r"masks/000\.png"):
        evaluate.find_sequences(moving)


def test_real_sequences_with_a_palette_and_an_odd_size_go_through(shared):
    sequences = {s.name: s for s in evaluate.find_sequences(shared / "data/video")}
    assert {"lucia", "motorbike", "soccerball", "swing", "judo_multi"} <= sequences.keys()
    judo = sequences["judo_multi"]
    masks = evaluate.propagate(evaluate.rgb_patches(240, 424, PATCH))(judo)
    assert [sorted(set(np.unique(masks[i])) - {0}) for i in (0, 5, 13)] == [[1], [1, 2], [1, 2, 3, 4]]
    assert masks[5].shape == (480, 854)


# Exact truth ----------------------------------------------------------------------------------------------------------


def test_points_on_rendered_surfaces_are_kept_and_their_places_right():
    """The figure of docs/tracking.md on one short clip, by colours alone: what there is beside the network."""
    pytest.importorskip("mujoco", reason="needs MuJoCo (extra `sim`)")
    os.environ.setdefault("MUJOCO_GL", "egl")
    from deeprob_perception.sim import SimulationError
    from deeprob_perception.sim.clip import SurfacePoints, render_clip

    tracker = Tracker(PixelEngine(height=240, width=320), Following(count=100))
    try:
        for step, frame in enumerate(render_clip(20, 30.0, seed=3)):
            tracks = tracker.update(frame.bgr, 1 + step * 33_000_000)
            if step == 0:
                start, truth = tracks.ids, SurfacePoints(frame, tracks.points)
    except SimulationError as error:
        pytest.skip(f"nothing can be rendered here: {error}")
    places, seen = truth.at(frame)
    rows = {number: row for row, number in enumerate(tracks.ids.tolist())}
    kept = np.array([number in rows and tracks.visible[rows[number]] for number in start.tolist()])
    found = np.array([tracks.points[rows[n]] if n in rows else (np.nan, np.nan) for n in start.tolist()])
    assert seen.sum() > 50 and (kept & seen).sum() >= 0.9 * seen.sum()
    assert np.median(np.linalg.norm(found - places, axis=1)[kept & seen]) < 1.0
