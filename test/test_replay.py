# SPDX-License-Identifier: Apache-2.0
"""replay: every frame of a bag is segmented, twice the same, bad ones are named, and a change is noticed."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from deeprob_perception import contact_sheet, expectation, video
from deeprob_perception.bags import BagWriter, open_bag
from deeprob_perception.bags.from_images import write_bag
from deeprob_perception.cli import app, commands  # noqa: F401  commands registers `replay`
from deeprob_perception.errors import BagError, ModelError
from deeprob_perception.messages import cdr, images
from deeprob_perception.replay import Options, replay
from deeprob_perception.replay_tasks import CONFIDENCE, LABEL_INFO, MASK, OVERLAY, mask_hash
from deeprob_perception.segmentation import Segmenter

SECOND = 1_000_000_000
TOPIC = "/camera/image_raw"


def picture(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Smooth blobs of colour, on which the test model's labels vary."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def write_frames(path: Path, frames: list, truths: dict[int, np.ndarray] | None = None) -> Path:
    """Write frames (arrays, or whole messages) at 10 Hz, stamped a little before they were recorded."""
    with BagWriter(path) as bag:
        bag.add_topic(TOPIC, cdr.IMAGE)
        bag.add_topic("/ground_truth/mask", cdr.IMAGE)
        for i, frame in enumerate(frames):
            header = header_of(i)
            if isinstance(frame, np.ndarray):
                frame = images.make_image(frame, "bgr8", header)
            if truths and i in truths:
                bag.write("/ground_truth/mask", cdr.stamp_ns(header) + 1, images.make_image(truths[i], "mono8", header))
            bag.write(TOPIC, cdr.stamp_ns(header) + 5_000_000, frame)
    return path


def header_of(i: int):
    return cdr.make_header(SECOND + i * SECOND // 10, "optical")


def read(path: Path, topic: str) -> list:
    with open_bag(path) as bag:
        return [(m.log_time, cdr.deserialize(m.raw, m.topic.msgtype)) for m in bag.messages([topic])]


@pytest.fixture(scope="module")
def segmenter(tiny_model):
    from deeprob_perception import engines

    return Segmenter(engines.load(tiny_model, backend="onnxruntime", threads=1))


def options(tmp_path: Path, bag: Path, model: Path, **more) -> Options:
    return Options(bag, tmp_path / "out.mcap", str(model), backend="onnxruntime", threads=1, **more)


def test_masks_are_the_segmenters_with_stamps_and_frames_of_the_camera(tmp_path, tiny_model, segmenter):
    bag = write_frames(tmp_path / "in.mcap", [picture(i) for i in range(5)])
    result = replay(options(tmp_path, bag, tiny_model, confidence=True))
    masks, sources = read(tmp_path / "out.mcap", MASK), read(bag, TOPIC)
    assert len(masks) == len(sources) == 5
    for (out_time, mask), (in_time, source), digest in zip(masks, sources, result.summary["hashes"], strict=True):
        assert (out_time, cdr.stamp_ns(mask.header)) == (in_time, cdr.stamp_ns(source.header))
        assert (mask.header.frame_id, mask.encoding, mask.height, mask.width) == ("optical", "mono8", 96, 128)
        expected = segmenter(images.to_bgr(source), confidence=True)
        assert len(np.unique(expected.labels)) > 2, "the test model must tell the blobs apart"
        assert np.array_equal(images.to_array(mask), expected.labels) and digest == mask_hash(expected.labels)
    (_, confidence), *_ = read(tmp_path / "out.mcap", CONFIDENCE)
    first = segmenter(images.to_bgr(sources[0][1]), confidence=True)
    assert np.array_equal(images.to_array(confidence), first.confidence)
    (_, drawn), *_ = read(tmp_path / "out.mcap", OVERLAY)
    assert images.to_bgr(drawn).shape == (96, 128, 3) and drawn.header.frame_id == "optical"
    ((_, names),) = read(tmp_path / "out.mcap", LABEL_INFO)
    assert json.loads(names.data) == {str(i): name for i, name in enumerate(segmenter.class_names)}
    with open_bag(tmp_path / "out.mcap") as out:
        assert {t.name for t in out.topics if t.latched} == {LABEL_INFO}


def test_two_replays_are_equal_and_the_summary_says_what_ran(tmp_path, tiny_model):
    bag = write_frames(tmp_path / "in.mcap", [picture(i, 120, 100) for i in range(4)])
    first, second = (replay(options(tmp_path, bag, tiny_model)).summary for _ in range(2))
    assert first["hashes"] == second["hashes"] and len(set(first["hashes"])) == 4
    assert first["frames"] == 4 and first["skipped"] == [] and first["bag"]["damage"] == []
    assert first["stamps"] == [SECOND + i * SECOND // 10 for i in range(4)]
    assert list(first["stages"]) == ["decode", "resize", "infer", "overlay", "write", "total"]
    for name, stage in first["stages"].items():
        assert 0 < stage["p50"] <= stage["p95"] <= stage["p99"], name
        assert stage["n"] == (8 if name == "resize" else 4), "the warm-up must not be counted"
    import hashlib

    assert first["model"] == {"name": "tiny", "sha256": hashlib.sha256(tiny_model.read_bytes()).hexdigest()}
    assert first["bag"]["sha256"] == {"in.mcap": hashlib.sha256(bag.read_bytes()).hexdigest()}
    assert (first["backend"], first["topic"]) == ("onnxruntime", TOPIC) and "numpy" in first["versions"]
    json.dumps(first)


def test_bad_frames_are_named_and_the_run_goes_on(tmp_path, tiny_model):
    cut = images.make_image(picture(1), "bgr8", header_of(1))
    cut.data = cut.data[:-7]
    unknown = images.make_image(picture(2), "bgr8", header_of(2))
    unknown.encoding = "bgr7"
    frames = [picture(0), cut, unknown, b"\x00\x01\x00\x00no image", picture(4, 60, 80), picture(5)]
    summary = replay(options(tmp_path, write_frames(tmp_path / "in.mcap", frames), tiny_model)).summary
    assert summary["frames"] == 3 and [s["frame"] for s in summary["skipped"]] == [1, 2, 3]
    for skipped, reason in zip(summary["skipped"], ("truncated", "bgr7", "not a serialised"), strict=True):
        assert reason in skipped["reason"] and skipped["log_time"] > SECOND
    assert [m.width for _, m in read(tmp_path / "out.mcap", MASK)] == [128, 80, 128]  # the size changed mid-stream


def test_corrupt_jpegs_of_a_compressed_topic_are_skipped(tmp_path, tiny_model):
    bag = tmp_path / "in.mcap"
    with BagWriter(bag) as writer:
        writer.add_topic(TOPIC, cdr.COMPRESSED_IMAGE)
        for i in range(3):
            message = images.make_compressed(picture(i), header_of(i), "jpeg")
            message.data = message.data[: len(message.data) // 2] if i == 1 else message.data
            writer.write(TOPIC, i, message)
    summary = replay(options(tmp_path, bag, tiny_model)).summary
    assert summary["frames"] == 2 and summary["skipped"][0]["frame"] == 1 and "jpeg" in summary["skipped"][0]["reason"]


def test_a_bag_without_one_good_frame_is_an_error_and_leaves_nothing(tmp_path, tiny_model):
    bag = write_frames(tmp_path / "in.mcap", [b"\x00\x01\x00\x00", b""])
    with pytest.raises(BagError, match="not one image"):
        replay(options(tmp_path, bag, tiny_model, overlay_video=tmp_path / "o.mp4"))
    assert list(tmp_path.iterdir()) == [bag]


def test_damage_of_the_bag_is_in_the_summary(tmp_path, tiny_model):
    bag = tmp_path / "in.mcap"
    frames = [np.random.default_rng(i).integers(0, 256, (240, 320, 3), dtype=np.uint8) for i in range(12)]
    write_frames(bag, frames)
    bag.write_bytes(bag.read_bytes()[: int(bag.stat().st_size * 0.8)])
    warnings: list[str] = []
    summary = replay(options(tmp_path, bag, tiny_model), warn=warnings.append).summary
    assert 3 <= summary["frames"] < 12 and summary["bag"]["damage"] == warnings and "damaged" in warnings[0]


def test_scores_against_ground_truth_of_equal_stamp(tmp_path, tiny_model, segmenter):
    frames = [picture(i) for i in range(4)]
    truths = {0: segmenter(frames[0]).labels, 2: segmenter(frames[2]).labels.copy()}
    truths[2][:48] = 255  # void, not counted
    truths[0] = (truths[0] + 1) % 7  # all wrong
    summary = replay(options(tmp_path, write_frames(tmp_path / "in.mcap", frames, truths), tiny_model)).summary
    truth = summary["ground_truth"]
    assert (truth["topic"], truth["frames"], truth["problems"]) == ("/ground_truth/mask", 2, [])
    assert truth["pixel_accuracy"] == pytest.approx(1 / 3)


def test_ground_truth_of_another_size_is_a_problem_not_a_crash(tmp_path, tiny_model):
    bag = write_frames(tmp_path / "in.mcap", [picture(0)], {0: np.zeros((5, 5), np.uint8)})
    truth = replay(options(tmp_path, bag, tiny_model)).summary["ground_truth"]
    assert truth["frames"] == 0 and "size" in truth["problems"][0]


def test_video_and_contact_sheet_show_the_frames(tmp_path, tiny_model):
    bag = write_frames(tmp_path / "in.mcap", [picture(i) for i in range(6)])
    result = replay(options(tmp_path, bag, tiny_model, overlay_video=tmp_path / "overlay.mp4", max_frames=5))
    drawn = [images.to_bgr(m) for _, m in read(tmp_path / "out.mcap", OVERLAY)]
    shown = list(video.read_frames(tmp_path / "overlay.mp4"))
    assert len(drawn) == len(shown) == result.summary["frames"] == 5
    assert np.allclose(np.diff([stamp for stamp, _ in shown]), SECOND / 10, atol=1e6)
    for a, (_, b) in zip(drawn, shown, strict=True):
        assert np.abs(a.astype(int) - b).mean() < 12  # two lossy codings of one picture
    sheet = cv2.imread(str(result.contact_sheet))
    assert result.contact_sheet == tmp_path / "out.png" and sheet.shape[1] > 1800 and sheet.std() > 20


def test_the_contact_sheet_takes_frames_evenly():
    assert contact_sheet.evenly(100, 4) == [0, 33, 66, 99]
    assert contact_sheet.evenly(3, 12) == [0, 1, 2] and contact_sheet.evenly(0, 5) == []
    sheet = contact_sheet.draw(
        [("a", [np.full((50, 100, 3), (255, 0, 0), np.uint8)]), ("b", [np.full((80, 40, 3), (0, 0, 255), np.uint8)])],
        "title", ["one"], np.array([[0, 255, 0]], np.uint8), columns=2, picture_width=100)  # fmt: skip
    for colour, area in (((255, 0, 0), 100 * 50), ((0, 0, 255), 100 * 200), ((0, 255, 0), 150)):
        assert (sheet == colour).all(-1).sum() >= area * 0.99


def test_replays_refuse_to_overwrite_their_input_and_name_missing_models(tmp_path, tiny_model):
    bag = write_frames(tmp_path / "in.mcap", [picture(0)])
    with pytest.raises(BagError, match="--out"):
        replay(Options(bag, bag, str(tiny_model)))
    with pytest.raises(ModelError, match=r"gone\.onnx"):
        replay(options(tmp_path, bag, tmp_path / "gone.onnx"))
    assert list(tmp_path.iterdir()) == [bag]


@pytest.fixture
def runs(tmp_path, tiny_model):
    """A bag, an earlier run's JSON, and a function that runs `deeprob replay` on it again."""
    bag = write_frames(tmp_path / "in.mcap", [picture(i) for i in range(4)])

    def run(name: str, *more: str):
        arguments = ["replay", str(bag), "--model", str(tiny_model), "--backend", "onnxruntime", "--threads", "1"]
        arguments += ["--out", str(tmp_path / f"{name}.mcap"), "--json", str(tmp_path / f"{name}.json"), *more]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})

    assert run("first").exit_code == 0
    return tmp_path, run


def test_expected_hashes_set_the_exit_status(runs):
    folder, run = runs
    for expected in ("first.json", "first.mcap"):
        same = run("second", "--expect", str(folder / expected))
        assert same.exit_code == 0 and "as expected" in same.output, same.output
    summary = json.loads((folder / "first.json").read_text())
    assert summary["frames"] == 4 and len(summary["hashes"]) == 4 and summary["stages"]["infer"]["p99"] > 0
    summary["hashes"][2] = "0" * 64
    (folder / "first.json").write_text(json.dumps(summary))
    other = run("second", "--expect", str(folder / "first.json"))
    assert other.exit_code == 1 and "not as expected" in other.output and "1 of 4" in other.output
    assert json.loads((folder / "second.json").read_text())["expected"]["differing"] == 1


def test_fewer_frames_than_expected_are_a_difference(runs):
    folder, run = runs
    fewer = run("second", "--expect", str(folder / "first.json"), "--max-frames", "3")
    assert fewer.exit_code == 1 and "only in the earlier run" in fewer.output


@pytest.mark.parametrize(("changed", "min_iou", "status"), [(40, "0.5", 0), (40, "0.9999", 1), (9000, "0.9", 1)])
def test_masks_that_differ_a_little_pass_with_min_iou(runs, changed, min_iou, status):
    folder, run = runs
    masks = read(folder / "first.mcap", MASK)
    with BagWriter(folder / "edited.mcap") as bag:
        bag.add_topic(MASK, cdr.IMAGE)
        for time, message in masks:
            labels = images.to_array(message).copy().reshape(-1)
            labels[:changed] = (labels[:changed] + 1) % 7
            bag.write(MASK, time, images.make_image(labels.reshape(96, 128), "mono8", message.header))
    result = run("second", "--expect", str(folder / "edited.mcap"), "--min-iou", min_iou)
    assert result.exit_code == status, result.output
    assert "4 frames differ" in result.output


def test_min_iou_without_the_earlier_masks_says_what_is_needed(runs):
    folder, run = runs
    summary = json.loads((folder / "first.json").read_text())
    summary["hashes"][0] = "0" * 64
    (folder / "first.json").write_text(json.dumps(summary))
    (folder / "first.mcap").unlink()
    result = run("second", "--expect", str(folder / "first.json"), "--min-iou", "0.9")
    assert isinstance(result.exception, BagError) and "first.mcap" in str(result.exception)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hashes": ["a"], "stamps": []}'])
def test_a_file_that_is_no_summary_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(BagError, match="no summary"):
        expectation.compare({"hashes": [], "stamps": [], "out": ""}, path)


def test_expectations_that_cannot_be_read_stop_before_the_work(runs):
    folder, run = runs
    result = run("second", "--expect", str(folder / "gone.json"))
    assert isinstance(result.exception, BagError) and not (folder / "second.mcap").exists()
    result = run("first", "--expect", str(folder / "first.mcap"))
    assert isinstance(result.exception, BagError) and "overwrite" in str(result.exception)


def test_every_shared_bag_is_replayed_or_answered_clearly(shared, tmp_path, tiny_model):
    bags = shared / "data" / "bags"
    frames = {}
    for path in sorted([*bags.rglob("*.db3"), *bags.rglob("*.mcap"), *bags.rglob("*.bag")]):
        try:
            frames[path.name] = replay(options(tmp_path, path, tiny_model)).summary["frames"]
        except BagError as error:
            assert "no camera images" in str(error) and str(path) in str(error)
    assert frames == {"sample.db3": 1, "tiny.bag": 4}


def test_camvid_masks_score_as_the_segmenter_does_on_the_files(shared, tmp_path, tiny_model, segmenter):
    from PIL import Image

    from deeprob_perception.segmentation.scores import Confusion

    val = shared / "data" / "camvid" / "val"
    write_bag(val / "images", tmp_path / "in.mcap", fps=15, labels=val / "labels", max_frames=8)
    truth = replay(options(tmp_path, tmp_path / "in.mcap", tiny_model)).summary["ground_truth"]
    confusion = Confusion(7)
    for file in sorted((val / "images").iterdir())[:8]:
        confusion.add(segmenter(cv2.imread(str(file))).labels, np.array(Image.open(val / "labels" / f"{file.stem}.png")))
    assert truth["frames"] == 8 and truth["miou"] == confusion.miou()


def test_robot_clips_are_replayed(shared, tmp_path, tiny_model):
    clips = sorted((shared / "data" / "robot_video").rglob("*.mp4"))
    assert len(clips) == 5
    for clip in clips:
        write_bag(clip, tmp_path / "in.mcap", max_frames=3)
        assert replay(options(tmp_path, tmp_path / "in.mcap", tiny_model)).summary["frames"] == 3
