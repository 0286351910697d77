# SPDX-License-Identifier: Apache-2.0
"""`deeprob demo` as a user runs it: processes, recording, score, report, and what it says when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from deeprob_perception import engines
from deeprob_perception.bags import BagWriter, open_bag
from deeprob_perception.demo import report
from deeprob_perception.demo.recording import ByStamp, Figures, Labels
from deeprob_perception.demo.run import sample_bag, unfit_for_sample
from deeprob_perception.doctor.ros import wheels
from deeprob_perception.isolation import isolated
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, make_header, stamp_ns
from deeprob_perception.messages.headers import stamp_of
from deeprob_perception.messages.images import make_compressed, make_image, to_array, to_bgr
from deeprob_perception.replay_tasks import OBJECT_MASK
from deeprob_perception.segmentation import Segmenter
from deeprob_perception.segmentation.scores import Confusion
from deeprob_perception.video import read_frames

pytestmark = [
    pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("rclpy") is None, reason="needs ROS 2 (extra `ros`)"),
]

CAMERA, TRUTH, MASK = "/camera/image_raw/compressed", "/ground_truth/mask/compressed", "/segmentation/mask"
MARK = "DEEPROB_TEST_DEMO"


def demo(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the demo with a mark in its environment, by which its children can be found."""
    return subprocess.Popen(
        [sys.executable, "-m", "deeprob_perception", "demo", "--out", str(out), *arguments],
        env=os.environ | {MARK: str(out), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts the suite in the background lets it ignore SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def left_over(out: Path) -> list[str]:
    """Return the command lines of the processes that a demo started and that still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={out}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has just ended, or is not ours
            continue
    return found


class Run:
    def __init__(self, out: Path, model: Path):
        self.out, self.model = out, model
        process = demo(out, "--seconds", "3", "--model", str(model))
        self.printed, errors = process.communicate(timeout=500)
        assert process.returncode == 0, self.printed + errors
        self.summary = json.loads((out / "summary.json").read_text())
        with open_bag(out / "demo.mcap") as bag:
            messages = [(m.topic.name, deserialize(m.raw, m.topic.msgtype)) for m in bag.messages([CAMERA, MASK, OBJECT_MASK])]
        self.frames = {stamp_ns(msg.header): msg for topic, msg in messages if topic == CAMERA}
        self.masks = {stamp_ns(msg.header): msg for topic, msg in messages if topic == MASK}
        self.objects = {stamp_ns(msg.header): msg for topic, msg in messages if topic == OBJECT_MASK}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    return Run(tmp_path_factory.mktemp("demo") / "out", tiny_model)


def test_every_recorded_mask_is_what_the_model_says_of_the_frame_with_its_stamp(run: Run) -> None:
    assert len(run.masks) >= 3
    segmenter = Segmenter(engines.load(run.model))
    for stamp, mask in run.masks.items():
        frame = run.frames[stamp]
        assert (mask.encoding, mask.header.frame_id) == ("mono8", frame.header.frame_id)
        np.testing.assert_array_equal(to_array(mask), segmenter(to_bgr(frame)).labels)


def test_score_is_that_of_the_published_masks(run: Run) -> None:
    with open_bag(sample_bag()) as bag:
        messages = [(m.topic.name, deserialize(m.raw, m.topic.msgtype)) for m in bag.messages([CAMERA, TRUTH])]
    truths = {stamp_ns(msg.header): to_array(msg) for topic, msg in messages if topic == TRUTH}
    played = {bytes(msg.data): truths[stamp_ns(msg.header)] for topic, msg in messages if topic == CAMERA}
    confusion = Confusion(7)
    for stamp, mask in run.masks.items():
        confusion.add(to_array(mask), played[bytes(run.frames[stamp].data)])
    assert run.summary["score"]["frames"] == len(run.masks)
    assert run.summary["score"]["miou"] == pytest.approx(confusion.miou())
    assert run.summary["score"]["pixel_accuracy"] == pytest.approx(confusion.pixel_accuracy())


def test_counters_account_for_every_frame(run: Run) -> None:
    summary = run.summary
    assert summary["frames"] == len(run.frames)
    assert summary["masks"] == len(run.masks)
    assert summary["frames"] == sum(summary[name] for name in ("masks", "dropped", "failed", "unheard", "not_received"))
    # In this order on every frame: received, inferred, published, recorded.
    assert 0 < summary["stages"]["infer"]["p50"] < summary["stages"]["stamp_to_publish"]["p50"]
    assert summary["stages"]["stamp_to_publish"]["p50"] < summary["latency_ms"]["p50"] * 1.05


def test_report_holds_everything_and_asks_no_other_machine(run: Run) -> None:
    html = (run.out / "report.html").read_text()
    linked: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            linked.extend(value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset"))

    Links().feed(html)
    assert len(linked) == 6, "two videos, their posters, plot, contact sheet"
    assert all(re.match(r"data:(video/mp4|image/jpeg|image/svg\+xml);base64,[\w/+]", link) for link in linked)
    assert "http" not in re.sub(r"data:[^\"]*", "", html) and "@import" not in html and "url(" not in html
    assert f"{run.summary['score']['miou']:.3f}" in html
    assert run.summary["model"]["sha256"] in html


def test_video_and_contact_sheet_show_the_frames(run: Run) -> None:
    pictures = [picture for _, picture in read_frames(run.out / "overlay.mp4")]
    assert len(pictures) == len(run.masks)
    assert pictures[0].shape == (480, 640, 3)
    sheet = cv2.imread(str(run.out / "contact_sheet.png"))
    assert sheet is not None and sheet.std() > 20


def test_what_was_pointed_at_is_tracked_from_the_first_frame_on(run: Run) -> None:
    given = cv2.imread(str(run.out / "seed_mask.png"), cv2.IMREAD_GRAYSCALE)
    assert given is not None and set(np.unique(given)) == {0, 3, 5}, "background, balls, mugs"
    first = min(run.objects)
    np.testing.assert_array_equal(to_array(run.objects[first]), given)
    tracking = run.summary["tracking"]
    assert tracking["frames"] == len(run.objects) == tracking["latency_ms"]["n"] >= 2
    assert tracking["points_visible_median"] > 100
    assert set(tracking["iou"]) == {"ball", "mug"} and all(0.3 < iou <= 1 for iou in tracking["iou"].values())
    pictures = [picture for _, picture in read_frames(run.out / "tracking.mp4")]
    assert len(pictures) == tracking["frames"] and pictures[0].shape == (480, 1280, 3)
    assert pictures[-1][:, 640:].std() > 20, "the features' colours"


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "--mask or --point"),
    (["--mask", "no-such.png"], "no-such.png"),
    (["--point", "3"], "X,Y"),
    (["--point", "3,4", "--node", "/nobody", "--timeout", "0.3"], "/nobody/seed_point"),
])  # fmt: skip
def test_seed_says_what_is_wrong(arguments: list[str], words: str) -> None:
    run = subprocess.run([sys.executable, "-m", "deeprob_perception", "seed", *arguments], capture_output=True, text=True,
                         env=os.environ | isolated())
    assert run.returncode == 2 and words in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_terminal_shows_rates_and_the_table(run: Run) -> None:
    assert re.search(r"in +[\d.]+ Hz +masks +[\d.]+ Hz +latency p50 +\d+ ms +p95 +\d+ ms +dropped \d+", run.printed)
    assert f"{run.summary['score']['miou']:.3f}" in run.printed
    assert str(run.out / "report.html") in run.printed.replace("\n", "")


def test_nothing_runs_on_after_the_demo(run: Run) -> None:
    assert left_over(run.out) == []


def test_interrupted_demo_takes_its_processes_along(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    process = demo(out, "--model", str(tiny_model))
    try:
        deadline = time.monotonic() + 300
        while not (out / "logs" / "player.log").exists():  # all four are there by then
            assert process.poll() is None and time.monotonic() < deadline, "the demo did not get to playing"
            time.sleep(0.05)
        assert len(left_over(out)) >= 5
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert left_over(out) == []


INTERRUPTED = """
import signal, subprocess, sys
from pathlib import Path
from deeprob_perception.demo.processes import Group

first, number, started = int(sys.argv[1]), int(sys.argv[2]), []

class Interrupted(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        started.append(self)
        if len(started) == first:
            signal.raise_signal(number)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
subprocess.Popen = Interrupted
try:
    with Group(Path(sys.argv[3]), []) as group:
        group.begin("sleeper", "timeit", "-n", "1", "-r", "1", "import time; time.sleep(600)")
except KeyboardInterrupt:
    print(len(started), [process.returncode is None for process in started].count(True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [1, 2])  # while it enters, and after
def test_an_interrupt_while_a_process_starts_ends_that_process_too(
        tmp_path: Path, number: signal.Signals, first: int) -> None:  # fmt: skip
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(first), str(int(number)), str(tmp_path)],
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{first} 0\n"), done.stderr


def test_two_distributions_at_once_are_refused_before_anything_starts(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("ROS_DISTRO", "humble" if "jazzy" in wheels() else "jazzy")
    monkeypatch.setenv("AMENT_PREFIX_PATH", "/opt/ros/rolling")
    process = demo(tmp_path / "out")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "needs one ROS 2, and there are mixed distributions" in errors, errors
    assert not (tmp_path / "out").exists()


def test_no_mask_is_a_failure_that_names_the_cause(tmp_path: Path, tiny_model: Path) -> None:
    bag = tmp_path / "broken.mcap"
    picture = make_compressed(np.zeros((48, 64, 3), np.uint8), make_header(0, "camera"))
    with BagWriter(bag) as writer:
        writer.add_topic(CAMERA, COMPRESSED_IMAGE)
        for i in range(20):
            stamp = 1_700_000_000_000_000_000 + i * 100_000_000
            picture.header, picture.data = make_header(stamp, "camera"), np.full(500, i, np.uint8)
            writer.write(CAMERA, stamp, picture)
    process = demo(tmp_path / "out", "--bag", str(bag), "--model", str(tiny_model), "--no-tracking")
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 2
    assert "no mask came" in errors and "jpeg" in errors.lower() and "Traceback" not in errors
    assert not (tmp_path / "out" / "report.html").exists()
    assert left_over(tmp_path / "out") == []


def test_missing_model_is_named_before_anything_starts(tmp_path: Path) -> None:
    process = demo(tmp_path / "out", "--model", "no-such-model")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2 and "no-such-model" in errors
    assert not (tmp_path / "out").exists()


def test_a_node_that_cannot_load_its_model_ends_the_demo(tmp_path: Path, tiny_model: Path) -> None:
    """The description is intact, the graph is not: only the back end notices."""
    import onnx

    proto = onnx.load(str(tiny_model))
    proto.graph.node[0].op_type = "NoSuchOperator"
    broken = tmp_path / "broken.onnx"
    onnx.save(proto, str(broken))
    process = demo(tmp_path / "out", "--model", str(broken))
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 2 and "not configured" in errors and "broken.onnx" in errors
    assert left_over(tmp_path / "out") == []


def test_a_model_of_other_classes_is_not_scored_against_the_sample_bag() -> None:
    assert "table" in unfit_for_sample(None, ["sky", "road"])
    own_bag = Path("drive.mcap")
    assert unfit_for_sample(own_bag, ["sky", "road"]) == ""


def test_report_without_a_score_says_why(run: Run) -> None:
    figures = Figures(frames=3, masks=2, seconds=0.2, series=[(0.0, 30.0), (0.1, 31.0)])
    figures.pictures = dict.fromkeys(("poster", "sheet"), np.zeros((4, 4, 3), np.uint8))
    summary = run.summary | {"score": None, "unscored": "the bag holds <no> true masks", "tracking": None}
    path = run.out / "unscored.html"
    report.write(path, summary, figures, Labels(["a"], np.zeros((1, 3), np.uint8)), run.out / "overlay.mp4", {})
    assert "No score: the bag holds &lt;no&gt; true masks." in path.read_text()


def test_masks_find_their_frames_and_frames_are_let_go(tmp_path: Path) -> None:
    bag = tmp_path / "recorded.mcap"
    with BagWriter(bag) as writer:
        for topic in (CAMERA, MASK):
            writer.add_topic(topic, IMAGE)
        # 3 was overtaken, the recorder heard 4's mask before its frame, and 9 is of a frame that was not recorded.
        order = ((CAMERA, 1), (CAMERA, 2), (MASK, 1), (MASK, 2), (CAMERA, 3), (MASK, 4), (CAMERA, 4), (MASK, 9))
        for time_, (topic, stamp) in enumerate(order):
            writer.write(topic, time_, make_image(np.zeros((2, 2), np.uint8), "mono8", make_header(stamp, "camera")))
    with ExitStack() as stack:
        frames = ByStamp(stack, bag, CAMERA)
        masks = stack.enter_context(open_bag(bag)).messages([MASK])
        stamps = [stamp_of(mask.raw) for mask in masks]
        found = [(frame and stamp_ns(frame.header), stamp) for stamp in stamps for frame in (frames.at(stamp),)]
    assert found == [(1, 1), (2, 2), (4, 4), (None, 9)]
