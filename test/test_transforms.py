# SPDX-License-Identifier: Apache-2.0
"""Poses by tf2: at the stamp where it knows, else the newest, and never one that is too old. And the names of classes."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="needs ROS 2 (extra `ros`)")

from builtin_interfaces.msg import Time
from geometry_msgs.msg import TransformStamped
from std_msgs.msg import String

from deeprob_perception.messages.cdr import LABEL_INFO, deserialize, message, serialize, stamp_ns
from deeprob_perception.nodes.labels import LABEL_TYPES, label_info, names_of, ros_name
from deeprob_perception.nodes.transforms import TransformError, Transforms

SECOND = 10**9
NOW = 5000 * SECOND


def transform(seconds: float, x: float) -> TransformStamped:
    made = TransformStamped()
    made.header.frame_id, made.child_frame_id = "base", "camera"
    made.header.stamp.sec, made.header.stamp.nanosec = divmod(round(seconds * SECOND), SECOND)
    made.transform.translation.x, made.transform.rotation.w = x, 1.0
    return made


class StandIn:
    """tf2_ros for one pair of frames: straight lines between the transforms that it was given."""

    class Buffer:
        def __init__(self, node=None):
            self.known: list[TransformStamped] = []

        def set_transform(self, made, authority):
            self.known.append(made)

        set_transform_static = set_transform

        def lookup_transform(self, target, source, when):
            times = [stamp_ns(t.header) / SECOND for t in self.known]
            if not times:
                raise LookupError(f'"{target}" passed to lookupTransform argument target_frame does not exist.')
            seconds = when.nanoseconds / SECOND or times[-1]
            if times != [0.0] and not times[0] <= seconds <= times[-1]:
                raise LookupError("extrapolation")
            return transform(seconds if times != [0.0] else 0.0,
                             float(np.interp(seconds, times, [t.transform.translation.x for t in self.known])))

    class TransformListener:
        def __init__(self, buffer, node):
            pass

        def unregister(self):
            pass


class Real:
    """The real buffer, without a topic to listen to."""

    def __init__(self):
        tf2_ros = pytest.importorskip("tf2_ros", reason="tf2_ros is not installed (it comes with a ROS distribution)")
        self.Buffer = lambda node: tf2_ros.Buffer()
        self.TransformListener = StandIn.TransformListener


@pytest.fixture(params=["stand-in", "tf2_ros"])
def transforms(request, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2_ros", StandIn if request.param == "stand-in" else Real())
    clock = SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=NOW))
    return Transforms(SimpleNamespace(get_clock=lambda: clock))


def x_at(transforms, seconds=None):
    return transforms.pose("base", "camera", None if seconds is None else round(seconds * SECOND))[0, 3]


def test_a_moving_frame_is_where_it_was_at_the_stamp(transforms):
    transforms._buffer.set_transform(transform(4999.0, 1.0), "test")
    transforms._buffer.set_transform(transform(5000.0, 3.0), "test")
    assert x_at(transforms, 4999.25) == pytest.approx(1.5)
    assert x_at(transforms, 5000.3) == 3.0  # it has not come yet: the newest serves
    assert x_at(transforms) == 3.0


def test_a_transform_that_is_too_old_is_refused_and_told(transforms):
    with pytest.raises(TransformError, match="base"):
        x_at(transforms)
    transforms._buffer.set_transform(transform(4990.0, 1.0), "test")
    with pytest.raises(TransformError, match=r"newest transform is 9\.5 s before the stamp asked for"):
        x_at(transforms, 4999.5)
    with pytest.raises(TransformError, match=r"newest transform is 10\.0 s before now"):
        x_at(transforms)
    with pytest.raises(TransformError, match=r"newest transform is 90\.0 s after the stamp asked for"):
        x_at(transforms, 4900)  # a bag that begins again


def test_frames_that_never_move_have_no_age(transforms):
    transforms._buffer.set_transform_static(transform(0.0, 2.0), "test")
    assert x_at(transforms) == x_at(transforms, 4999.5) == 2.0


def test_without_tf2_its_absence_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2_ros", None)
    with pytest.raises(TransformError, match="tf2 is not installed"):
        Transforms(None).pose("base", "camera")


def test_names_of_classes_are_read_from_either_type():
    entries = [SimpleNamespace(class_id=2, class_name="mug"), SimpleNamespace(class_id=0, class_name="a")]
    info = SimpleNamespace(class_map=entries)
    assert names_of(info) == names_of(String(data='{"2": "mug", "0": "a"}')) == ["a", "", "mug"]
    assert names_of(label_info(["a", "b"], Time())) == ["a", "b"]
    for wrong in (String(data="[]"), String(data="mug"), String(data='{"-1": "a"}'), SimpleNamespace(class_map=[])):
        with pytest.raises(ValueError, match="no names of classes"):
            names_of(wrong)
    assert ros_name(String) == "std_msgs/msg/String" and ros_name(LABEL_TYPES[-1]) == "std_msgs/msg/String"


def test_the_recorder_knows_label_info():
    header = message("std_msgs/msg/Header", message("builtin_interfaces/msg/Time", 3, 4), "")
    made = message(LABEL_INFO, header, [message("vision_msgs/msg/VisionClass", 1, "mug")], 0.5)
    raw = serialize(made, LABEL_INFO)
    again = deserialize(raw, LABEL_INFO)
    assert names_of(again) == ["", "mug"] and again.threshold == 0.5
    if len(LABEL_TYPES) > 1:
        from rclpy.serialization import deserialize_message

        assert names_of(deserialize_message(raw, LABEL_TYPES[0])) == ["", "mug"]
