# SPDX-License-Identifier: Apache-2.0
"""The target node, live: a mask, depth and calibration over DDS, and where the object is comes back in the robot's frame."""

import json
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest
import rclpy
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PointStamped
from hypothesis import given
from hypothesis import strategies as st
from rclpy.parameter import Parameter
from ros_harness import LATCHED, PATIENCE, RELIABLE, Probe, Process, isolated_ros
from sensor_msgs.msg import CameraInfo, Image, JointState
from std_msgs.msg import String

from deeprob_perception.messages.cdr import IMAGE, make_header, serialize, stamp_ns
from deeprob_perception.messages.images import make_image
from deeprob_perception.nodes.labels import LABEL_TYPES, label_info
from deeprob_perception.nodes.lifecycle import SUCCESS
from deeprob_perception.nodes.target import TargetNode
from deeprob_perception.target import Pairs

HEIGHT, WIDTH, FOCAL = 48, 64, 100.0
NAMES = ["background", "table", "mug"]
FRAME = "camera_optical"
# The camera hangs on a turning joint, 1 m up, and looks down: x right is the root's -y, y down its -x.
ROBOT = """<robot name="stand">
  <link name="base"/><link name="head"/><link name="camera_optical"/>
  <joint name="neck" type="revolute"><parent link="base"/><child link="head"/><origin xyz="0 0 1"/><axis xyz="0 0 1"/>
    <limit lower="-3" upper="3" velocity="1"/></joint>
  <joint name="mount" type="fixed"><parent link="head"/><child link="camera_optical"/>
    <origin xyz="0.2 0 0" rpy="3.141592653589793 0 -1.5707963267948966"/></joint>
</robot>"""


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    arguments = ["--ros-args", "-p", "target_class:=mug", "-p", "median_frames:=1", "-p", "border:=0", "-p", "stale_after:=0.5"]
    process = Process(tmp_path_factory.mktemp("target") / "log", "deeprob_perception.nodes.target", *arguments)
    yield process
    assert process.alive, process.output
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output, process.output


class Camera(Probe):
    """Publishes what a segmentation node and a depth camera would, of one mug, and hears the goals."""

    def __init__(self, process, target="/target", names_as=LABEL_TYPES[0]):
        super().__init__(process, target)
        create = self.node.create_publisher
        self.masks, self.depths = create(Image, "mask", RELIABLE), create(Image, "depth", RELIABLE)
        self.infos = create(CameraInfo, "camera_info", RELIABLE)
        self.labels = create(names_as, "label_info", LATCHED)
        self._names_as = names_as
        self.descriptions = create(String, "robot_description", LATCHED)
        self.states = create(JointState, "joint_states", RELIABLE)
        self.goals = self.listen(f"{target}/goal", PointStamped)
        for publisher in (self.masks, self.depths, self.infos):
            self.until(publisher.get_subscription_count, publisher.topic_name)

    def ready(self, neck=0.0, description=ROBOT):
        self.descriptions.publish(String(data=description))
        as_text = self._names_as is String
        self.labels.publish(String(data=json.dumps(dict(enumerate(NAMES)))) if as_text else label_info(NAMES, Time()))
        self.states.publish(JointState(name=["neck", "wheel"], position=[neck, 3.0]))
        info = CameraInfo(width=WIDTH, height=HEIGHT, k=[FOCAL, 0.0, 31.5, 0.0, FOCAL, 23.5, 0.0, 0.0, 1.0])
        self.infos.publish(info)

    def frame(self, rows=slice(14, 34), columns=slice(40, 50), depth=0.5, late=0.0, stamp=None):
        """Publish one frame; return its stamp."""
        stamp = time.time_ns() if stamp is None else stamp
        mask, picture = np.zeros((HEIGHT, WIDTH), np.uint8), np.full((HEIGHT, WIDTH), 1000, np.uint16)
        mask[rows, columns] = 2
        picture[rows, columns] = np.round(np.asarray(depth) * 1000)
        self.depths.publish(serialize(make_image(picture, "16UC1", make_header(stamp + round(late * 1e9), FRAME)), IMAGE))
        self.masks.publish(serialize(make_image(mask, "mono8", make_header(stamp, FRAME)), IMAGE))
        return stamp

    def goal(self, **how):
        """Publish frames until there are goals of two; return the second: by then the first one's surroundings have come."""
        deadline = time.monotonic() + PATIENCE
        sent = set()
        self.goals.clear()
        while time.monotonic() < deadline:
            self.ready(how.get("neck", 0.0))
            sent.add(self.frame(**{key: value for key, value in how.items() if key != "neck"}))
            again = time.monotonic() + 0.3
            while time.monotonic() < again:
                found = [g for g in self.goals if stamp_ns(g.header) in sent]
                if len(found) > 1:
                    return found[-1]
                self._executor.spin_once(timeout_sec=0.02)
        return self.until(lambda: None, "a goal", timeout=0)

    def while_sending(self, text, **how):
        """Publish frames until the output's diagnostics say `text`, and return the status."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.frame(**how)
            self._executor.spin_once(timeout_sec=0.05)
            if "output" in self.status and text in self.status["output"].message:
                return self.status["output"]
        return self.until(lambda: None, f"diagnostics with {text!r}", timeout=0)

    def silent(self, text, **how):
        """Publish frames until diagnostics warn why there is no goal."""
        self.goals.clear()
        assert self.while_sending(text, **how).level == b"\x01"


@pytest.fixture
def camera(node):
    made = Camera(node)
    yield made
    made.close()


def expected(neck=0.0, depth=0.5):
    x, y = (44.5 - 31.5) * depth / FOCAL, (23.5 - 23.5) * depth / FOCAL
    place = np.array([0.2 - y, -x, 1 - depth])  # in head's frame and that of base at 0
    c, s = np.cos(neck), np.sin(neck)
    return np.array([c * place[0] - s * place[1], s * place[0] + c * place[1], place[2]])


def at(goal):
    return np.array([goal.point.x, goal.point.y, goal.point.z])


@pytest.mark.ros
def test_the_goal_is_where_the_object_is_in_the_root_frame(camera):
    goal = camera.goal()
    assert goal.header.frame_id == "base"
    np.testing.assert_allclose(at(goal), expected(), atol=1e-6)
    assert camera.while_sending("Hz").level == b"\x00"
    assert camera.values("output")["target_class"] == "mug" and float(camera.values("output")["pixels"]) == 200


@pytest.mark.ros
def test_a_camera_that_a_joint_turns_is_followed(camera):
    np.testing.assert_allclose(at(camera.goal(neck=0.8)), expected(0.8), atol=1e-6)


@pytest.mark.ros
def test_depth_within_slop_counts_and_beyond_it_does_not(camera):
    camera.goal(late=0.015)
    camera.silent("within 0.02 s of a mask's stamp", late=-3600)


@pytest.mark.ros
def test_an_input_that_ends_is_what_diagnostics_name(camera):
    camera.goal()
    assert camera.says("output", "no mask has come on /mask for").level == b"\x01"
    camera.goal()


@pytest.mark.ros
def test_why_there_is_no_goal_is_told_and_the_next_good_frame_gives_one(camera):
    camera.goal()
    camera.silent("no mug in view", columns=slice(0, 0))
    camera.silent("0 of the mug's 200 pixels have depth", depth=0.0)
    camera.goal()


@pytest.mark.ros
@pytest.mark.parametrize("names_as", LABEL_TYPES, ids=lambda kind: kind.__name__)
def test_names_are_heard_in_the_type_that_their_publisher_has(node, names_as):
    """A node with vision_msgs beside a segmentation node, or a bag, without."""
    camera = Camera(node, names_as=names_as)
    try:
        assert all(camera.transition(label) for label in ("deactivate", "cleanup", "configure"))  # old names are forgotten
        assert camera.transition("activate")
        np.testing.assert_allclose(at(camera.goal()), expected(), atol=1e-6)
    finally:
        camera.close()


@pytest.mark.ros
def test_what_raises_while_it_is_activated_is_told(monkeypatch):
    """rclpy drops the exception and ends in `unconfigured`, and nobody would know why."""
    rclpy.init(context=(context := rclpy.Context()))
    node = TargetNode(context=context, parameter_overrides=[Parameter("target_class", value="mug")])
    try:
        monkeypatch.setattr(node, "create_subscription", Mock(side_effect=RuntimeError("no library for this type")))
        assert node.trigger_configure() == SUCCESS
        node.trigger_activate()
        assert node.state() == "unconfigured" and node.failure.endswith("no library for this type")
        monkeypatch.undo()
        assert node.trigger_configure() == node.trigger_activate() == SUCCESS and not node.failure
    finally:
        node.close()
        node.destroy_node()
        rclpy.try_shutdown(context=context)


@pytest.mark.ros
def test_masks_without_a_frame_are_told_with_what_to_set(camera, monkeypatch):
    camera.goal()
    monkeypatch.setattr(sys.modules[__name__], "FRAME", "")
    camera.silent("have no frame_id: name the camera's frame by camera_frame")
    monkeypatch.setattr(sys.modules[__name__], "FRAME", "/camera_optical")  # as in the days of tf
    camera.goal()


@pytest.mark.ros
def test_the_class_is_changed_live_and_one_that_the_mask_lacks_is_refused(camera):
    camera.goal()
    refused = camera.set_parameters(target_class="spoon")
    assert not refused.successful and "the mask has: background, table, mug" in refused.reason
    assert camera.set_parameters(target_class="table").successful
    camera.silent("no table in view")
    assert camera.set_parameters(target_class="2").successful  # by id
    np.testing.assert_allclose(at(camera.goal()), expected(), atol=1e-6)
    assert camera.set_parameters(target_class="mug").successful


@pytest.mark.ros
def test_a_description_without_the_camera_or_that_is_none_is_named_and_the_next_one_serves(camera):
    camera.goal()
    camera.descriptions.publish(String(data=ROBOT.replace("camera_optical", "lens")))
    camera.silent("has no link 'camera_optical'")
    camera.descriptions.publish(String(data="<robot"))
    camera.silent("no XML")
    camera.goal()


@pytest.mark.ros
def test_an_object_is_sought_where_it_was_while_that_is_news(camera):
    camera.goal()
    camera.silent("from where it was just now (max_jump is 0.15 m)", columns=slice(2, 12), depth=0.9)
    camera.goal(columns=slice(2, 12), depth=0.9)  # median_seconds later it may be anywhere
    assert camera.set_parameters(max_jump=0.0).successful
    np.testing.assert_allclose(at(camera.goal()), expected(), atol=1e-6)
    assert camera.set_parameters(max_jump=0.15).successful


@pytest.mark.ros
def test_damaged_messages_cost_themselves(camera):
    camera.goal()
    whole = serialize(make_image(np.zeros((4, 4), np.uint8), "mono8", make_header(5, "")), IMAGE)
    for raw in (b"\x00\x01\x00\x00", whole[:40]):
        camera.masks.publish(raw)
        camera.depths.publish(raw)
    camera.infos.publish(CameraInfo(width=WIDTH, height=HEIGHT))  # not calibrated: zeros
    camera.silent("camera_info is no calibration")
    camera.goal()


@pytest.mark.ros
def test_the_pose_may_be_a_parameter_and_what_it_lacks_is_said(tmp_path):
    command = ["--ros-args", "-r", "__node:=other", "-p", "camera_pose_from:=parameter", "-p", "target_class:='2'",
               "-p", "border:=0", "-p", "bounds:=[0.0, -0.2, 0.4, 0.3, 0.2, 0.6]",
               "-p", "camera_pose:=[0.2, 0.0, 1.0, 3.141592653589793, 0.0, -1.5707963267948966]"]
    process = Process(tmp_path / "log", "deeprob_perception.nodes.target", *command)
    probe = Probe(process, "/other")
    try:
        assert "name the frame that camera_pose is in by base_frame" in probe.says("output", "not configured").message
        assert probe.set_parameters(base_frame="world").successful
        assert probe.transition("configure") and probe.transition("activate")
        camera = Camera(process, "/other")
        goal = camera.goal()
        assert goal.header.frame_id == "world"
        np.testing.assert_allclose(at(goal), expected(), atol=1e-6)
        camera.silent("the 2 in view is at [0.2, -0.09, 0.3], outside bounds", depth=0.7)
        camera.close()
        assert probe.transition("deactivate") and probe.transition("cleanup")
    finally:
        probe.close()
        assert process.stop() == 0, process.output


# Pairs


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=60), st.integers(0, 20))
def test_pairs_are_within_slop_and_each_mask_is_used_once(events, slop):
    pairs: Pairs[int, int] = Pairs(slop, kept=5)
    used, newest = set(), 0
    for is_mask, stamp in events:
        if is_mask and stamp < newest:  # starts anew: earlier stamps may come again
            used.clear()
        newest = stamp if is_mask else newest
        found = (pairs.mask if is_mask else pairs.depth)(stamp, stamp)
        if found is not None:
            at_stamp, mask, depth = found
            assert at_stamp == mask and abs(mask - depth) <= slop and mask == newest
            used.add(mask)


def test_a_mask_waits_for_slow_depth_and_takes_the_nearest():
    pairs: Pairs[str, str] = Pairs(10)
    assert pairs.depth(85, "too old") is None and pairs.mask(100, "mask") is None
    assert pairs.depth(109, "a") == (100, "mask", "a")
    assert pairs.depth(101, "b") is None, "the mask is used up"
    assert pairs.mask(105, "next") == (105, "next", "a")
    assert pairs.mask(300, "lost") is None and pairs.mask(400, "newer") is None
    assert pairs.unmatched == 1
    assert pairs.mask(50, "bag loops") is None and pairs.depth(50, "again") == (50, "bag loops", "again")
