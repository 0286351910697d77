# SPDX-License-Identifier: Apache-2.0
"""Scores, labelled folders, crops, and training end to end on pictures that a network learns in seconds."""

import csv
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprob_perception.errors import DataError, ModelError
from deeprob_perception.segmentation.classes import CLASS_SETS, class_set
from deeprob_perception.segmentation.dataset import VOID, find_samples, read_label
from deeprob_perception.segmentation.scores import Confusion
from deeprob_perception.segmentation.segmenter import resized

torch = pytest.importorskip("torch", reason="training needs the extra `train` (torch)")

from deeprob_perception.training.data import Augmentation, CropDataset  # noqa: E402
from deeprob_perception.training.segmentation import (  # noqa: E402
    SegmentationLoss,
    Settings,
    train,
    undo_class_weights,
    warmup_cosine,
)

NAMES = ["ground", "red", "blue"]
COLOURS = np.array([[90, 90, 90], [40, 40, 220], [220, 60, 40]], np.uint8)  # BGR


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> Path:
    """A folder of pictures with rectangles whose colour is their class."""
    folder = tmp_path_factory.mktemp("coloured")
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    rng = np.random.default_rng(3)
    for i in range(8):
        label = np.zeros((96, 128), np.uint8)
        for class_id in (1, 2):
            x, y = rng.integers(0, 80), rng.integers(0, 50)
            label[y : y + 40, x : x + 40] = class_id
        label[:4] = 200  # not a class: void
        image = COLOURS[np.minimum(label, 2)] + rng.integers(0, 20, (96, 128, 1), np.uint8)
        cv2.imwrite(str(folder / f"images/{i:03d}.png"), image)
        cv2.imwrite(str(folder / f"labels/{i:03d}.png"), label)
    (folder / "classes.json").write_text(json.dumps({"names": NAMES, "palette": COLOURS[:, ::-1].tolist()}))
    return folder


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_iou_equals_the_definition_on_random_labels(seed, num_classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, (17, 13), np.uint8)
    truth = rng.integers(0, num_classes + 1, (17, 13), np.uint8)  # the highest id is void
    confusion = Confusion(num_classes)
    confusion.add(labels[:9], truth[:9])
    confusion.add(labels[9:], truth[9:])
    known = truth < num_classes
    for k, value in enumerate(confusion.iou()):
        both, either = ((labels == k) & (truth == k)).sum(), (((labels == k) & known) | (truth == k)).sum()
        assert np.isnan(value) if either == 0 else value == pytest.approx(both / either)
    assert confusion.pixel_accuracy() == pytest.approx((labels == truth)[known].mean())


def test_a_class_that_never_occurs_does_not_count_in_the_mean():
    confusion = Confusion(3)
    confusion.add(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 1, 0]]))
    assert np.isnan(confusion.iou()[2])
    assert confusion.miou() == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert confusion.report(["a", "b", "c"])["iou"]["c"] is None


def test_scores_refuse_labels_of_another_size():
    with pytest.raises(ValueError, match="sizes must be equal"):
        Confusion(2).add(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))


def test_a_palette_png_is_read_as_ids_not_colours(tmp_path):
    from PIL import Image

    image = Image.fromarray(np.array([[0, 1, 7]], np.uint8), "P")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.save(tmp_path / "label.png")
    assert read_label(tmp_path / "label.png", 2).tolist() == [[0, 1, VOID]]


def test_folders_that_are_not_a_data_set_are_named(coloured, tmp_path):
    with pytest.raises(DataError, match="no images"):
        find_samples(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a\.png"):
        find_samples(tmp_path)
    with pytest.raises(DataError, match="street, tabletop"):
        class_set(tmp_path)
    (tmp_path / "bad.json").write_text('{"names": ["a"], "palette": []}')
    with pytest.raises(DataError, match="1 names and 0 colours"):
        class_set(tmp_path, str(tmp_path / "bad.json"))
    assert class_set(coloured).names == NAMES
    assert len(class_set(coloured, "street").names) == 11


@pytest.mark.parametrize("name", CLASS_SETS)
def test_every_class_has_a_colour_of_its_own(name):
    palette = CLASS_SETS[name].palette
    assert len({tuple(c) for c in palette}) == len(palette) == len(CLASS_SETS[name].names)


def test_a_crop_moves_image_and_label_alike(coloured):
    augmentation = Augmentation(crop=(64, 64), colour=0.0, hue=0.0, blur=0.0, noise=0.0)
    data = CropDataset(find_samples(coloured), 3, augmentation)
    torch.manual_seed(0)
    agree = known = 0
    for i in range(24):
        image, label = data[i]
        distance = image.permute(1, 2, 0).int() - torch.tensor(COLOURS[:, ::-1].copy()).int()[:, None, None]
        nearest = distance.abs().sum(-1).argmin(0)
        valid = label != VOID
        agree += int((nearest == label)[valid].sum())
        known += int(valid.sum())
    assert agree / known > 0.97  # the rest: blended pixels on edges


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_crop_that_shrinks_is_what_the_engine_gets(times, tmp_path):
    """Trained on blurred or aliased pictures, a network would see others on the robot."""
    height, width = 48, 64
    picture = np.random.default_rng(times).integers(0, 256, (height * times, width * times, 3), dtype=np.uint8)
    for name, content in (("images", picture), ("labels", picture[..., 0] // 128)):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "a.png"), content)
    augmentation = Augmentation(crop=(height, width), scale=(1 / times, 1 / times), stretch=0.0, rotate=0.0)
    crop = CropDataset(find_samples(tmp_path), 2, augmentation)._crop
    engine = resized(picture, height, width).astype(int)
    flipped = set()
    for seed in range(8):
        image, _ = crop(picture, picture[..., 0] // 128, np.ones(2, bool), np.random.default_rng(seed))
        differences = [np.abs(image[:, ::way] - engine).max() for way in (1, -1)]
        flipped.add(int(np.argmin(differences)))
        assert min(differences) <= 1
    assert flipped == {0, 1}


def test_loss_ignores_void_and_falls_with_the_right_answer():
    loss = SegmentationLoss(torch.tensor([0.8, 0.2]), 0.5)
    labels = torch.tensor([[[0, 1, VOID]]])
    right = torch.tensor([[[[5.0, -5.0, -5.0]], [[-5.0, 5.0, 5.0]]]])
    assert loss(right, labels) < 0.2 < loss(-right, labels)
    changed = right.clone()
    changed[..., 2] = 40.0
    changed[:, 1, :, 2] = -40.0
    assert torch.allclose(loss(right, labels), loss(changed, labels))


def test_class_weights_are_taken_off_the_logits_again(tiny_recipe):
    from deeprob_perception.nets.segmenter import build

    net = build(tiny_recipe).eval()
    weight = torch.linspace(0.5, 6.0, 7)
    image = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        before = net(image)
        undo_class_weights(net, weight, 0.5)
        change = before - net(image)
    assert torch.allclose(change, (0.5 * weight.log()).reshape(1, 7, 1, 1).expand_as(change), atol=1e-5)


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [warmup_cosine(s, 100, 10) for s in range(101)]
    assert factors[9] == 1.0 and factors[0] == 0.1 and factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def toy_settings(**changes) -> Settings:
    augmentation = Augmentation(crop=(64, 64), scale=(0.8, 1.2), rotate=0.0, colour=0.1, hue=2.0)
    return Settings(**{
        "epochs": 20, "batch_size": 4, "workers": 0, "warmup_steps": 5, "ema_decay": 0.9, "learning_rate": 1e-3, "threads": 1,
        "augmentation": augmentation, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(coloured, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    samples = find_samples(coloured)
    return out, train(samples, samples[:4], class_set(coloured), out, toy_settings())


def test_training_learns_colours(trained):
    out, scores = trained
    assert scores["miou"] > 0.8, scores
    assert set(scores) == {"iou", "miou", "pixel_accuracy"}
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in rows] == list(range(1, 21))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"]) / 2
    assert cv2.imread(str(out / "curves.png")) is not None


def test_what_was_saved_is_what_was_scored(trained, coloured):
    from deeprob_perception.nets.segmenter import build
    from deeprob_perception.training.segmentation import scores_of
    from deeprob_perception.zoo import load_checkpoint

    out, scores = trained
    recipe, state = load_checkpoint(out / "model.safetensors")
    assert recipe["classes"] == NAMES
    net = build(recipe)
    net.load_state_dict(state)
    assert scores_of(net.eval(), find_samples(coloured)[:4], recipe) == scores


def test_resuming_goes_on_where_the_run_stopped(coloured, tmp_path):
    samples, classes = find_samples(coloured), class_set(coloured)
    train(samples, [], classes, tmp_path, toy_settings(epochs=1))
    before = torch.load(tmp_path / "last.pt", weights_only=True)
    train(samples, [], classes, tmp_path, toy_settings(epochs=3), resume=True)
    after = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (before["epoch"], after["epoch"]) == (1, 3)
    assert after["step"] == 3 * before["step"]
    with (tmp_path / "log.csv").open() as file:
        assert [int(r["epoch"]) for r in csv.DictReader(file)] == [1, 2, 3]


def test_two_processes_under_torchrun_train_one_model(coloured, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "deeprob_perception",
        "train", "segmentation", "--data", str(coloured), "--out", str(tmp_path), "--epochs", "1", "--batch-size", "2",
        "--crop", "64", "--workers", "0", "--threads", "1",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 2  # 8 images / (2 processes x 2)
    assert (tmp_path / "model.safetensors").is_file()


def test_eval_reports_the_scores_of_the_model_file(tiny_model, tmp_path):
    from deeprob_perception import engines
    from deeprob_perception.segmentation.segmenter import Segmenter

    segmenter = Segmenter(engines.load(tiny_model, backend="onnxruntime"))
    rng = np.random.default_rng(0)
    confusion = Confusion(len(segmenter.class_names))
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(3):
        image = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (128, 96))
        truth = rng.integers(0, len(segmenter.class_names) + 2, (96, 128), np.uint8)
        cv2.imwrite(str(tmp_path / f"images/{i}.png"), image)
        cv2.imwrite(str(tmp_path / f"labels/{i}.png"), truth)
        confusion.add(segmenter(image).labels, truth)
    command = [sys.executable, "-m", "deeprob_perception", "eval", "segmentation", "--data", str(tmp_path), "--model",
               str(tiny_model), "--backend", "onnxruntime", "--json", str(tmp_path / "scores.json")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["miou"] == pytest.approx(confusion.miou())
    assert report["pixel_accuracy"] == pytest.approx(confusion.pixel_accuracy())
    assert set(report["iou"]) == set(segmenter.class_names)


def test_weights_of_another_network_are_refused(coloured, tmp_path):
    init = {"backbone.no.such.weight": torch.zeros(3)}
    with pytest.raises(ModelError, match="nothing of a swin-micro"):
        train(find_samples(coloured), [], class_set(coloured), tmp_path, Settings(epochs=1), init=init)


def test_images_are_scored_at_the_size_asked_for(trained, coloured):
    from deeprob_perception.nets.segmenter import build
    from deeprob_perception.training.segmentation import scores_of
    from deeprob_perception.zoo import load_checkpoint

    out, _ = trained
    recipe, weights = load_checkpoint(out / "model.safetensors")
    net = build(recipe)
    net.load_state_dict(weights)
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    samples = find_samples(coloured)[:2]
    scores = scores_of(net, samples, recipe, (64, 64))
    assert seen == [(1, 3, 64, 64)] * 2 and 0 < scores["miou"] <= 1


def test_muon_takes_the_backbones_matrices_and_adamw_the_rest(tiny_recipe):
    from deeprob_perception.nets.segmenter import build
    from deeprob_perception.training.segmentation import optimizers_for

    net = build(tiny_recipe)
    adamw, muon = optimizers_for(net, Settings(optimizer="muon"))
    taken = [p for group in muon.param_groups for p in group["params"]]
    left = [p for group in adamw.param_groups for p in group["params"]]
    assert {id(p) for p in taken} | {id(p) for p in left} == {id(p) for p in net.parameters()}
    assert not {id(p) for p in taken} & {id(p) for p in left} and all(p.ndim == 2 for p in taken)
    assert any(p is net.backbone.stages[0].blocks[0].mlp.fc1.weight for p in taken)
    assert any(p is net.head.classify.weight for p in left)
