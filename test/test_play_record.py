# SPDX-License-Identifier: Apache-2.0
"""`deeprob play`, `deeprob record` and the measuring of the node, as processes of their own over DDS."""

import os
import signal
import time
from itertools import pairwise

import cv2
import numpy as np
import pytest
from ros_harness import LATCHED, Probe, Process, isolated_ros
from sensor_msgs.msg import CompressedImage
from std_msgs.msg import String
from typer.testing import CliRunner

from deeprob_perception.bags import BagWriter, open_bag
from deeprob_perception.cli import app, commands  # noqa: F401  commands registers them on app
from deeprob_perception.errors import PerceptionError
from deeprob_perception.isolation import isolated
from deeprob_perception.messages.cdr import (
    COMPRESSED_IMAGE,
    IMAGE,
    STRING,
    deserialize,
    make_header,
    make_string,
    serialize,
    stamp_ns,
)
from deeprob_perception.messages.images import make_compressed, make_image, to_array, to_bgr
from deeprob_perception.nodes.distro import TELLS_MESSAGE_INFO
from deeprob_perception.nodes.measure import Setting, _judged, session

pytestmark = pytest.mark.ros
START = 1_600_000_000_000_000_000
PERIOD = 100_000_000  # 10 Hz
FRAMES = 8
COLOUR, DEPTH, NOTE = "/camera/image_raw/compressed", "/camera/depth/image_raw/compressed", "/note"


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


@pytest.fixture
def probe():
    probe = Probe()
    yield probe
    probe.close()


def picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def bag(tmp_path_factory):
    """Colour (jpeg), depth (16-bit png) and a latched note before them."""
    path = tmp_path_factory.mktemp("bag") / "short.mcap"
    with BagWriter(path) as writer:
        writer.add_topic(COLOUR, COMPRESSED_IMAGE)
        writer.add_topic(DEPTH, COMPRESSED_IMAGE)
        writer.add_topic(NOTE, STRING, latched=True)
        writer.write(NOTE, START, make_string("read me"))
        for number in range(FRAMES):
            stamp = START + number * PERIOD
            header = make_header(stamp, "camera")
            writer.write(COLOUR, stamp, make_compressed(picture(number), header))
            writer.write(DEPTH, stamp, make_compressed(np.full((4, 6), 1000 + number, np.uint16), header, "png"))
    return path


def deeprob(log, *arguments: object, env: dict[str, str] | None = None) -> Process:
    return Process(log, "deeprob_perception", *map(str, arguments), env=env)


def test_play_sends_the_bags_bytes_in_order_and_in_their_time_also_after_the_wheels_restart_of_python(tmp_path, bag, probe):
    heard: list[tuple[float, bytes]] = []
    probe.node.create_subscription(CompressedImage, "/renamed", lambda raw: heard.append((time.monotonic(), raw)), 10,
                                   raw=True)
    probe.node.create_subscription(String, NOTE, lambda m: None, LATCHED)
    env = {name: value for name, value in os.environ.items() if name != "_ROS_WHEELS_BOOTSTRAP_COMPLETE"}
    player = deeprob(tmp_path / "log", "play", bag, "--wait-for-subscribers", 2, "--remap", f"{COLOUR}:=/renamed", env=env)
    probe.until(lambda: not player.alive, "the player's end")
    assert player.wait() == 0, player.output
    probe.until(lambda: len(heard) == FRAMES, f"{FRAMES} messages")
    with open_bag(bag) as opened:
        recorded = [bytes(raw) for _, _, raw in opened.messages([COLOUR])]
    for (_, got), raw in zip(heard, recorded, strict=True):
        assert got[: len(raw)] == raw and len(got) - len(raw) < 4, "DDS pads to 4 bytes, no more"
    took = heard[-1][0] - heard[0][0]
    assert took == pytest.approx((FRAMES - 1) * PERIOD / 1e9, abs=0.3)
    assert f"{FRAMES}  {COLOUR}" in player.output and f"played {2 * FRAMES + 1} messages" in player.output


def test_play_raw_decodes_restamps_and_keeps_latched_messages_from_before_the_offset(tmp_path, bag, probe):
    player = deeprob(tmp_path / "log", "play", bag, "--raw", "--restamp", "--start-offset", 0.35, "--rate", 2,
                     "--wait-for-subscribers", 3)
    colour = probe.listen("/camera/image_raw", IMAGE)
    depth = probe.listen("/camera/depth/image_raw", IMAGE)
    notes = probe.listen(NOTE, String, LATCHED)
    probe.until(lambda: len(colour) == len(depth) == FRAMES - 4 and notes, "the messages after the offset")
    assert player.wait() == 0, player.output
    for number, (image, distance) in enumerate(zip(colour, depth, strict=True), start=4):
        np.testing.assert_array_equal(to_bgr(image), to_bgr(make_compressed(picture(number), make_header(0, ""))))
        assert image.encoding == "bgr8" and image.header.frame_id == "camera"
        assert distance.encoding == "16UC1" and (to_array(distance) == 1000 + number).all()
        assert abs(stamp_ns(image.header) - time.time_ns()) < 60e9
    assert notes[0].data == "read me"


def test_play_loops_until_it_is_told_to_stop_and_publishes_the_clock(tmp_path, bag, probe):
    from rosgraph_msgs.msg import Clock

    player = deeprob(tmp_path / "log", "play", bag, "--loop", "--clock", "--rate", 4, "--topics", COLOUR)
    clock = probe.listen("/clock", Clock)
    images = probe.listen(COLOUR, COMPRESSED_IMAGE)
    probe.until(lambda: len(images) > 2 * FRAMES, "the third round")
    assert player.stop(signal.SIGINT) == 0, player.output
    times = [message.clock.sec * 10**9 + message.clock.nanosec for message in clock]
    assert min(times) >= START and max(times) <= START + FRAMES * PERIOD
    assert len(set(times)) > 2 * FRAMES, "nothing between the messages"
    assert any(later < earlier for earlier, later in pairwise(times)), "never looped"


@pytest.mark.parametrize("alive", [True, False])
def test_a_signal_while_the_last_messages_are_awaited_is_no_error(monkeypatch, bag, alive):
    from deeprob_perception.nodes import play

    answers = iter([True, alive])  # the signal comes after the first look, or the fault is none of a signal's
    monkeypatch.setattr(play.rclpy, "ok", lambda: next(answers))
    monkeypatch.setattr(play.rclpy, "init", lambda: None)
    monkeypatch.setattr(play.rclpy, "try_shutdown", lambda: None)
    monkeypatch.setattr(play, "Node", lambda *_, **__: None)

    class Publisher:
        def wait_for_all_acked(self, timeout):
            raise RuntimeError("publisher's context is invalid")

    class Played(play.Player):
        def __init__(self, *_):
            self._publishers, self.sent = {"/a": Publisher()}, {"/a": 3}

        def wait_for_subscribers(self):
            pass

        def run(self):
            pass

    monkeypatch.setattr(play, "Player", Played)
    if alive:
        with pytest.raises(RuntimeError, match="context"):
            play.play(bag, play.PlayOptions())
    else:
        assert play.play(bag, play.PlayOptions()) == {"/a": 3}


@pytest.mark.parametrize(("arguments", "words"), [
    (["--topics", "/nope"], "no topic /nope"),
    (["--remap", "/nope:=/b"], "no topic /nope"),
    (["--remap", "a=b"], "FROM:=TO"),
    (["--wait-for-subscribers", "9", "--wait-timeout", "0.2"], "0 of 9 subscriptions"),
])
def test_play_says_what_is_wrong(bag, arguments, words):
    result = CliRunner().invoke(app, ["play", str(bag), *arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, (PerceptionError, SystemExit))
    assert words in f"{result.output} {result.exception}"


def test_record_writes_what_was_sent_with_latched_topics_and_a_whole_file_on_ctrl_c(tmp_path, probe):
    out = tmp_path / "out.mcap"
    note = probe.node.create_publisher(String, "/late/note", LATCHED)
    note.publish(String(data="before the recorder came"))
    camera = probe.publisher("/image", IMAGE, wait=False)
    recorder = deeprob(tmp_path / "log", "record", out, "--topics", "/image", "--topics", "/late/note")
    probe.until(camera.get_subscription_count, "the recorder")
    probe.until(note.get_subscription_count, "the recorder")
    images = [serialize(make_image(picture(n), "bgr8", make_header(START + n, "camera")), IMAGE) for n in range(5)]
    for raw in images:
        camera.publish(raw)
    from rclpy.duration import Duration

    assert camera.wait_for_all_acked(Duration(seconds=20)) and note.wait_for_all_acked(Duration(seconds=20))
    # Acknowledged means arrived in the recorder's process; that it was written shows in the file only.
    due = time.monotonic() + 1.0
    probe.until(lambda: time.monotonic() > due, "a moment")
    assert recorder.stop(signal.SIGINT) == 0, recorder.output
    with open_bag(out) as opened:
        assert [(t.name, t.count, t.latched) for t in opened.topics] == [("/image", 5, False), ("/late/note", 1, True)]
        assert [bytes(raw)[: len(images[0])] for _, _, raw in opened.messages(["/image"])] == images
        (message,) = opened.messages(["/late/note"])
        assert deserialize(message.raw, STRING).data == "before the recorder came"
    assert "5  /image" in recorder.output


@pytest.mark.skipif(not TELLS_MESSAGE_INFO, reason="Humble's rclpy does not tell when a message was sent")
def test_measuring_counts_every_frame_of_a_short_run(tiny_model, monkeypatch):
    for name in isolated():
        monkeypatch.setenv(name, os.environ[name])  # restored after measure() has set its own
    with session(Setting(tiny_model, precision="fp32", threads=1, width=160, height=120)) as started:
        first, seen = started.run(rate_hz=20, seconds=1), started.run(rate_hz=10, seconds=2)
    assert first["sent"] == 20
    assert seen["sent"] == 20 and seen["accounted"], seen
    assert seen["loss"] == 1 - seen["masks"] / 20
    assert 5 < seen["sent_hz"] < 15
    assert seen["stamps_equal"] and seen["frame_ids_equal"] and seen["newest_wins"], seen
    assert seen["failed"] == 0 and seen["masks"] >= 1
    assert 20 < seen["node_memory_mb"] < 700
    for stage in ("overhead", "infer", "decode", "publish"):
        assert 0 < seen["stages"][stage]["p50"] <= seen["stages"][stage]["p99"], stage
    assert seen["stamp_to_publish"]["n"] == seen["stamp_to_receipt"]["n"] == seen["masks"]
    for p in ("p50", "p95", "p99"):
        assert 0 < seen["stamp_to_publish"][p] < seen["stamp_to_receipt"][p], p


def test_the_judge_of_a_run_sees_lost_doubled_foreign_and_backward_masks():
    good = dict(received=3, dropped=1, failed=0, lost_in_transport=0)
    frame = "bench_optical_frame"
    fine = _judged([1, 2, 3], [(1, frame), (3, frame)], good)
    assert fine["accounted"] and fine["stamps_equal"] and fine["frame_ids_equal"] and fine["newest_wins"]
    assert not _judged([1, 2, 3, 4], [(1, frame), (3, frame)], good)["accounted"]
    assert not _judged([1, 2, 3], [(1, frame)], good)["accounted"]
    assert not _judged([1, 2, 3], [(1, frame), (1, frame)], good)["stamps_equal"]
    assert not _judged([1, 2, 3], [(1, frame), (9, frame)], good)["stamps_equal"]
    assert not _judged([1, 2, 3], [(1, "x"), (3, frame)], good)["frame_ids_equal"]
    assert not _judged([1, 2, 3], [(1, frame), (2, frame)], good)["newest_wins"]
    assert not _judged([1, 2, 3], [(3, frame), (2, frame), (3, frame)], good)["newest_wins"]
