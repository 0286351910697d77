# SPDX-License-Identifier: Apache-2.0
"""Self-distillation: its parts by their definitions, collapse and what prevents it, and training end to end."""

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from deeprob_perception.bags.from_images import write_bag
from deeprob_perception.errors import DataError

torch = pytest.importorskip("torch", reason="training needs the extra `train` (torch)")

from deeprob_perception import zoo  # noqa: E402
from deeprob_perception.nets.features import build  # noqa: E402
from deeprob_perception.training import dino  # noqa: E402
from deeprob_perception.training.crops import CropPairs, MultiCrop, cut, read_frames  # noqa: E402

SMALL = dino.Settings(
    epochs=4, batch_size=8, learning_rate=3.2e-2, warmup_epochs=1, teacher_momentum=0.9, outputs=64, workers=0, threads=1,
    precision="fp32", drop_path=0.0, crops=MultiCrop(global_size=32, local_size=16, local_count=2,
    brightness=0.1, contrast=0.1, saturation=0.1, hue=4.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures of coloured blobs, each around a colour of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(5)
    for i in range(48):
        blobs = rng.integers(0, 256, (1, 1, 3)) + rng.integers(-40, 40, (3 + i % 5, 4 + i % 7, 3))
        blobs = cv2.resize(np.clip(blobs, 0, 255).astype(np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{i:03d}.png"), blobs)
    return folder


@pytest.fixture(scope="module")
def frames(pictures) -> list[bytes]:
    return read_frames([pictures], 5.0)


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    from deeprob_perception.nets import vit

    monkeypatch.setitem(vit.VARIANTS, "vit-micro", dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, image_size=32))


def test_every_student_crop_answers_to_the_other_teacher_crop_and_never_to_its_own():
    log_p = torch.randn(4, 3, 5)
    student, teacher = log_p * 0.1, torch.randn(2, 3, 5).softmax(-1)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    want = np.mean([
        -(teacher[i] * (student[j] / 0.1).log_softmax(-1)).sum(-1).mean() for i, j in pairs
    ])  # fmt: skip
    assert float(dino.class_loss(student, teacher, 0.1)) == pytest.approx(want, rel=1e-5)


def test_the_centre_is_the_moving_average_of_the_mean_output_and_is_taken_off_before_it_moves():
    answers = dino.TeacherOutputs(4, momentum=0.9)
    logits = torch.randn(2, 6, 4)
    assert torch.allclose(answers(logits, 0.5), (logits / 0.5).softmax(-1))
    assert torch.allclose(answers.centre, 0.1 * logits.mean((0, 1)))
    centre = answers.centre.clone()
    assert torch.allclose(answers(logits, 0.5), ((logits - centre) / 0.5).softmax(-1))


def test_the_teacher_follows_by_its_momentum():
    teacher, student = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    want = 0.75 * teacher.weight + 0.25 * student.weight
    dino.move(teacher, student, 0.75)
    assert torch.allclose(teacher.weight, want)


def test_rows_of_the_last_layer_have_unit_length_whatever_their_parameter():
    head = dino.ProjectionHead(8, 5)
    features = torch.randn(7, 8)
    before = head(features)
    with torch.no_grad():
        head.last *= 13
    assert torch.allclose(head(features), before, atol=1e-6) and before.abs().max() <= 1


@pytest.mark.parametrize("mirrored", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_patches_that_match_show_the_same_place_of_the_frame(mirrored):
    # A frame whose pixels hold their own place; crops of it, as the data set cuts them.
    frame = np.dstack(np.meshgrid(np.arange(160.0), np.arange(120.0)))
    places = torch.tensor([[[20.0, 10, 64, 64, mirrored[0]], [36, 26, 80, 48, mirrored[1]]]])
    seen = []
    for x, y, w, h, flip in places[0].int().tolist():
        view = frame[y : y + h, x : x + w]
        view = view[:, ::-1] if flip else view
        seen.append(view.reshape(8, h // 8, 8, w // 8, 2).mean((1, 3)))  # mean place of each of 8 x 8 patches
    rows, columns, inside = dino.matches(places[:, 0], places[:, 1], 8, 8)
    assert 10 < int(inside.sum()) < 64
    off = np.abs(seen[1][rows[0], columns[0]] - seen[0])[inside[0].numpy()]
    assert (off <= np.array([80 / 16, 48 / 16]) + 1e-3).all()  # half a patch of the other view


def test_the_dense_loss_is_least_when_matching_patches_agree():
    places = torch.tensor([[[0.0, 0, 64, 64, 0], [0, 0, 64, 64, 1]]])
    logits = torch.randn(1, 4, 4, 9)
    views = torch.stack((logits, logits.flip(2)))
    agreeing = dino.dense_loss(views, (views / 0.1).softmax(-1), places, 0.1)
    assert agreeing < dino.dense_loss(torch.stack((logits, logits)), (views / 0.1).softmax(-1), places, 0.1)


def test_crops_have_their_sizes_and_areas(frames):
    crops = MultiCrop(global_size=48, local_size=24, local_count=3)
    large, small, places = CropPairs(frames, crops)[0]
    assert (large.shape, small.shape, places.shape) == ((2, 3, 48, 48), (3, 3, 24, 24), (2, 5))
    assert large.dtype == torch.uint8
    rng = np.random.default_rng(0)
    frame = np.zeros((60, 80, 3), np.uint8)
    areas = [w * h / 4800 for _, (_, _, w, h, _) in (cut(frame, 32, (0.2, 0.4), 4 / 3, rng) for _ in range(200))]
    assert min(areas) > 0.15 and max(areas) < 0.45


def test_the_two_ways_to_collapse_are_told_apart_and_a_healthy_teacher_is_not_blamed():
    flat, one = torch.full((50, 16), 1 / 16), torch.zeros(50, 16)
    one[:, 3] = 1
    for answers, word in ((flat, "sharpen"), (one, "centre"), (torch.eye(16), None)):
        spread = dino.Spread(16)
        spread.add(answers)
        said = dino.collapse(spread.report(), 16)
        assert (word in said) if word else said is None
    assert spread.report()["information"] == pytest.approx(math.log(16))


@pytest.mark.parametrize(
    ("change", "word"),
    [({}, None), ({"centre": False}, "centre"), ({"teacher_temperature": (1.0, 1.0)}, "sharpen")],
    ids=["as_published", "no_centring", "no_sharpening"],
)
def test_without_centring_or_sharpening_it_collapses_and_the_monitor_says_so(frames, tmp_path, change, word):
    report = dino.train(frames, tmp_path, replace(SMALL, epochs=40, **change))
    said = dino.collapse(report, SMALL.outputs)
    assert (said is not None and word in said) if word else said is None, report


def test_a_run_that_was_cut_short_goes_on_and_its_teacher_loads(frames, tmp_path):
    dino.train(frames, tmp_path, replace(SMALL, epochs=1, dense_weight=1.0))
    dino.train(frames, tmp_path, replace(SMALL, epochs=2, dense_weight=1.0), resume=True)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["dense_loss"]) > 0
    recipe, state = zoo.load_checkpoint(tmp_path / "model.safetensors")
    assert recipe["task"] == "features"
    build(recipe).load_state_dict(state)
    assert (tmp_path / "curves.png").is_file()


def test_frames_come_of_folders_bags_and_videos_and_a_source_without_any_is_named(pictures, tmp_path):
    bag = tmp_path / "a.mcap"
    write_bag(pictures, bag, fps=10.0, max_frames=20)
    assert len(read_frames([bag], 5.0)) == 10
    assert len(read_frames([pictures, bag], 10.0)) == 48 + 20
    with pytest.raises(DataError, match="nowhere"):
        read_frames([tmp_path / "nowhere"], 5.0)


def test_two_processes_train_together_by_the_command_line(pictures, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517",
        "-m", "deeprob_perception", "train", "dino", "--data", str(pictures), "--out", str(tmp_path), "--epochs", "1",
        "--batch-size", "8", "--global-size", "32", "--local-size", "16", "--local-crops", "1", "--outputs", "32",
        "--workers", "0", "--threads", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "48 frames" in done.stdout
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["3"]  # 48 frames / 2 processes / 8


def test_a_linear_probe_reads_labels_that_features_hold_and_none_that_they_do_not(tmp_path):
    from deeprob_perception.segmentation.dataset import find_samples
    from deeprob_perception.training.probe import patch_labels, probe

    rng = np.random.default_rng(2)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(6):
        label = np.zeros((64, 96), np.uint8)
        label[:, 32 * (i % 3) : 32 * (i % 3) + 32] = 1
        cv2.imwrite(str(tmp_path / f"labels/{i}.png"), label)
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), np.where(label > 0, 200, 60).astype(np.uint8))
    samples = find_samples(tmp_path)

    def seen(bgr: np.ndarray) -> np.ndarray:
        return cv2.resize(bgr, (12, 8), interpolation=cv2.INTER_AREA).astype(np.float32) / 255

    def blind(bgr: np.ndarray) -> np.ndarray:
        return rng.random((8, 12, 3), np.float32)

    assert probe(seen, samples[:4], samples[4:], ["ground", "block"])["miou"] > 0.95
    assert probe(blind, samples[:4], samples[4:], ["ground", "block"])["miou"] < 0.6
    assert patch_labels(np.array([[0, 0, 1, 1], [0, 255, 1, 0]], np.uint8), (1, 2), 2).tolist() == [[0, 1]]
