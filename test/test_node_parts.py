# SPDX-License-Identifier: Apache-2.0
"""The parts of the nodes that need no ROS: slot, pace, counters, causes, stamps in bytes, the Fast DDS profile."""

import os
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeprob_perception.errors import MessageError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize, make_header, message, serialize, stamp_ns
from deeprob_perception.messages.headers import has_header, restamped, stamp_of
from deeprob_perception.nodes import dds
from deeprob_perception.nodes.diagnosis import Facts, Level, causes
from deeprob_perception.nodes.slot import Frame, FrameSlot, Pace
from deeprob_perception.nodes.traffic import Rate, Stamps, Traffic

FINE = Facts(node="/segmentation", state="active", topic="/image", msgtype=IMAGE, publishers=1, listeners=1, age=0.01)
SECOND = 1_000_000_000


def frame(number: int) -> Frame:
    return Frame(bytes([number]), float(number))


def test_the_slot_gives_the_newest_frame_and_counts_the_overwritten_one():
    slot = FrameSlot()
    slot.put(frame(1))
    slot.put(frame(2))
    assert slot.take() == frame(2)
    assert slot.take() is None
    assert (slot.received, slot.taken, slot.dropped, slot.waiting) == (2, 1, 1, 0)


@given(st.lists(st.sampled_from(["put", "take", "wake", "open"]), max_size=60))
def test_every_frame_is_counted_once_whatever_happens(actions):
    slot = FrameSlot()
    for number, action in enumerate(actions):
        slot.put(frame(number)) if action == "put" else getattr(slot, action)()
        assert slot.received == slot.taken + slot.dropped + slot.waiting


def test_waking_ends_a_reader_that_waits_for_ever_and_opening_forgets_the_old_frame():
    slot = FrameSlot()
    got = []
    reader = threading.Thread(target=lambda: got.append(slot.take(timeout=None)))
    reader.start()
    slot.wake()
    reader.join(10)
    assert not reader.is_alive() and got == [None]
    slot.put(frame(1))
    slot.open()
    assert slot.take() is None and slot.dropped == 1


def test_a_reader_gets_a_frame_put_while_it_waits():
    slot = FrameSlot()
    got = []
    reader = threading.Thread(target=lambda: got.append(slot.take(timeout=10)))
    reader.start()
    slot.put(frame(7))
    reader.join(10)
    assert got == [frame(7)]


def test_pace_keeps_the_rate_and_does_not_save_up_for_a_burst():
    pace = Pace(10.0)
    assert pace.delay(5.0) == 0.0
    pace.started(5.0)
    assert pace.delay(5.03) == pytest.approx(0.07)
    assert pace.delay(9.0) == 0.0
    pace.started(9.0)
    assert pace.delay(9.0) == pytest.approx(0.1)
    pace.max_rate = 0.0
    assert pace.delay(9.0) == 0.0


def test_rate_is_that_of_the_last_readings_only():
    rate = Rate(readings=3)
    assert rate.reading(0.0, 0) == 0.0
    assert rate.reading(1.0, 30) == 30.0
    assert rate.reading(2.0, 60) == 30.0
    assert rate.reading(3.0, 60) == 15.0
    assert rate.reading(4.0, 60) == 0.0 == rate.value


def test_stamps_count_zero_backward_and_foreign_clocks():
    stamps = Stamps()
    stamps.add(100 * SECOND, 101 * SECOND)
    assert stamps.age == 1.0
    stamps.add(50 * SECOND, 101 * SECOND)
    stamps.add(50 * SECOND, 1_700_000_000 * SECOND)
    stamps.add(0, 101 * SECOND)
    assert (stamps.zero, stamps.backward, stamps.incomparable, stamps.age) == (1, 1, 1, None)


def test_latency_leaves_out_stamps_of_another_clock_and_overhead_leaves_out_the_engine():
    traffic = Traffic()
    traffic.success(10 * SECOND, 10 * SECOND + 80_000_000, {"infer": 70.0, "decode": 2.0})
    traffic.success(10 * SECOND, 10_000 * SECOND, {"infer": 70.0, "decode": 4.0})
    traffic.success(0, 10_000 * SECOND, {"infer": 70.0, "decode": 6.0})
    rows = traffic.summary()
    assert traffic.published == 3
    assert rows["stamp_to_publish"]["n"] == 1 and rows["stamp_to_publish"]["p50"] == pytest.approx(80.0)
    assert rows["overhead"]["p50"] == pytest.approx(10.0)
    assert rows["decode"]["n"] == 3 and rows["decode"]["p50"] == pytest.approx(4.0)


def test_no_cause_when_all_is_well():
    assert causes(FINE) == []


@pytest.mark.parametrize(
    ("change", "name", "level", "words"),
    [
        (dict(state="unconfigured", failure="no model x"), "not_configured", Level.ERROR, ["no model x"]),
        (dict(state="unconfigured"), "not_active", Level.WARN, ["ros2 lifecycle set /segmentation configure"]),
        (dict(state="inactive"), "not_active", Level.WARN, ["ros2 lifecycle set /segmentation activate"]),
        (dict(publishers=0), "no_publisher", Level.WARN, ["nobody publishes /image", "remap"]),
        (dict(publishers=0, neighbour="/image/compressed"), "no_publisher", Level.WARN,
         ["/image/compressed", "image_transport to compressed"]),
        (dict(publishers=0, topic="/image/compressed", msgtype=COMPRESSED_IMAGE, neighbour="/image"), "no_publisher",
         Level.WARN, ["image_transport to raw"]),
        (dict(publishers=0, incompatible=("camera: reliability",)), "incompatible_qos", Level.ERROR,
         ["camera: reliability", "qos_overrides./image.subscription"]),
        (dict(publishers=0, other_types=(COMPRESSED_IMAGE,)), "other_type", Level.ERROR, [COMPRESSED_IMAGE, IMAGE]),
        (dict(silent=4.0), "silent", Level.WARN, ["4.0 s"]),
        (dict(lost=0.5), "lost", Level.WARN, ["50%", "fastdds_large_images.xml"]),
        (dict(failing="unknown encoding"), "failing", Level.ERROR, ["unknown encoding"]),
        (dict(listeners=0), "unheard", Level.OK, ["nobody listens"]),
        (dict(age=1e9), "stale_stamps", Level.WARN, ["behind", "use_sim_time"]),
        (dict(age=-5.0), "stale_stamps", Level.WARN, ["5.0 s ahead"]),
        (dict(age=3.0), "stale_stamps", Level.WARN, ["3.0 s old", "stale_after"]),
        (dict(age=None, zero_stamps=True), "zero_stamps", Level.WARN, ["are 0"]),
        (dict(clock_missing=True, age=-1e9), "no_clock", Level.WARN, ["/clock"]),
    ],
)
def test_each_cause_is_named_with_what_to_do(change, name, level, words):
    (cause,) = causes(replace(FINE, **change))
    assert (cause.name, cause.level) == (name, level)
    for word in words:
        assert word in cause.text


def test_restamping_changes_the_stamp_and_nothing_else():
    image = message(IMAGE, make_header(5 * SECOND + 6, "cam"), 1, 2, "mono8", 0, 2, bytes([1, 2]))
    raw = serialize(image, IMAGE)
    assert stamp_of(raw) == 5 * SECOND + 6
    again = restamped(raw, 77 * SECOND + 999_999_999)
    assert stamp_of(again) == stamp_ns(deserialize(again, IMAGE).header) == 77 * SECOND + 999_999_999
    assert again[:4] == raw[:4] and again[12:] == raw[12:]


def test_restamping_heeds_the_byte_order_and_refuses_what_is_too_short():
    big = b"\0\0\0\0" + (3).to_bytes(4, "big") + (4).to_bytes(4, "big") + b"rest"
    assert stamp_of(big) == 3 * SECOND + 4
    assert restamped(big, SECOND + 2) == b"\0\0\0\0" + (1).to_bytes(4, "big") + (2).to_bytes(4, "big") + b"rest"
    with pytest.raises(MessageError, match="too short"):
        restamped(b"\0\1\0\0", 1)


def test_only_types_that_begin_with_a_header_are_restamped():
    assert has_header(IMAGE) and has_header("sensor_msgs/msg/JointState")
    assert not has_header("std_msgs/msg/String") and not has_header("tf2_msgs/msg/TFMessage")
    assert not has_header("nobody_msgs/msg/Knows")


@pytest.mark.parametrize(("distribution", "names"), [
    ("humble", dds.VARIABLES), ("", dds.VARIABLES), ("kilted", ("FASTDDS_DEFAULT_PROFILES_FILE",)),
])  # fmt: skip
def test_the_profile_is_used_unless_the_user_set_one(monkeypatch, distribution, names):
    for name in dds.VARIABLES:
        monkeypatch.setenv(name, "")  # restored at the end
    monkeypatch.setenv("ROS_DISTRO", distribution)
    path = dds.use_large_image_profile()
    assert path is not None
    assert {name: os.environ[name] for name in dds.VARIABLES if os.environ[name]} == dict.fromkeys(names, str(path))
    monkeypatch.setenv(dds.VARIABLES[0], "/mine.xml")
    monkeypatch.delenv(dds.VARIABLES[1])
    assert dds.use_large_image_profile() is None
    assert os.environ[dds.VARIABLES[0]] == "/mine.xml" and dds.VARIABLES[1] not in os.environ


@pytest.mark.parametrize(("free", "segment"), [(dds.ROOM_FOR_LARGE, 32 << 20), (60 << 20, dds.SMALL_SEGMENT)])
def test_the_shared_memory_segment_fits_the_room_there_is(monkeypatch, tmp_path, free, segment):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dds.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    tree = ET.parse(dds.profile())
    found = {element.tag.rpartition("}")[2]: element.text for element in tree.iter()}
    assert int(found["segment_size"]) == segment
    assert int(found["maxMessageSize"]) == 8 << 20


def test_parts_without_ros_import_no_ros_and_no_torch():
    nodes, messages = "from deeprob_perception.nodes import", "from deeprob_perception.messages import"
    parts = f"{nodes} slot, traffic, diagnosis, dds; {messages} headers"
    code = f"import sys; {parts}; print(sorted({{'rclpy', 'torch'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"
