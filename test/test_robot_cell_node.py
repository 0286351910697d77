# SPDX-License-Identifier: Apache-2.0
"""The robot cell node, live: what it publishes, what it makes of trajectories, and the next cell."""

import json

import numpy as np
import pytest
from ros_harness import LATCHED, Probe, Process, isolated_ros
from sensor_msgs.msg import CameraInfo, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from deeprob_perception.errors import PerceptionError
from deeprob_perception.messages.cdr import stamp_ns
from deeprob_perception.messages.images import to_array
from deeprob_perception.robots import Robot, parse

try:
    from deeprob_perception.sim.arms import ARMS, TOOL
    from deeprob_perception.sim.cell import Cell, Wish
    from deeprob_perception.sim.render import SceneRenderer

    with SceneRenderer() as renderer:
        Cell(Wish(0, ARMS["scara"](np.random.default_rng(0)), TOOL), renderer)
except (ImportError, PerceptionError) as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    parameters = {"robot": "scara", "seed": 5, "width": 160, "height": 120, "target_class": "mug"}
    arguments = [word for name, value in parameters.items() for word in ("-p", f"{name}:={value}")]
    process = Process(tmp_path_factory.mktemp("cell") / "log", "deeprob_perception.nodes.robot_cell", "--ros-args", *arguments)
    probe = Probe(process, "/robot_cell")
    probe.described = probe.listen("robot_description", String, LATCHED)
    probe.joints = probe.listen("joint_states", JointState)
    probe.states = probe.listen("/robot_cell/state", String)
    probe.commands = probe.node.create_publisher(JointTrajectory, "joint_trajectory", 10)
    probe.until(probe.commands.get_subscription_count, "the cell's ears")
    probe.until(lambda: probe.described and probe.joints and probe.states, "the cell's voice")
    yield probe
    probe.close()
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output, process.output


def state(cell):
    return json.loads(cell.states[-1].data)


def trajectory(names, positions, seconds=0.5):
    point = JointTrajectoryPoint(positions=positions, velocities=[0.0] * len(positions))
    point.time_from_start.sec, point.time_from_start.nanosec = divmod(round(seconds * 1e9), 10**9)
    return JointTrajectory(joint_names=names, points=[point])


def test_pictures_depth_and_calibration_are_of_one_time_and_the_cameras_frame_is_in_the_description(cell):
    pictures, depths = cell.listen("camera/image_raw"), cell.listen("camera/depth/image_raw")
    infos = cell.listen("camera/camera_info", CameraInfo)
    cell.until(lambda: pictures and depths and infos, "a picture")
    stamps = {stamp_ns(m.header) for m in pictures} & {stamp_ns(m.header) for m in depths} & {stamp_ns(m.header) for m in infos}
    assert stamps
    picture = next(m for m in pictures if stamp_ns(m.header) in stamps)
    depth = next(m for m in depths if stamp_ns(m.header) in stamps)
    assert to_array(picture).shape == (120, 160, 3) and picture.encoding == "bgr8"
    metres = to_array(depth) / 1000
    assert depth.encoding == "16UC1" and 0.3 < np.median(metres) < 5
    assert picture.header.frame_id in parse(cell.described[-1].data).links
    assert infos[-1].width == 160 and infos[-1].k[0] > 0


def test_a_trajectory_is_followed_one_of_other_joints_is_refused_and_the_robot_stays(cell):
    robot = Robot(parse(cell.described[-1].data), tip=TOOL)
    names = list(robot.joint_names)

    def positions() -> np.ndarray:
        told = dict(zip(cell.joints[-1].name, cell.joints[-1].position, strict=True))
        return np.array([told[name] for name in names])

    before = positions()
    goal = np.clip(before + np.array([0.2, -0.2, 0.02, 0.1]), robot.lower, robot.upper)
    order = names[::-1]
    cell.commands.publish(trajectory(order, goal[::-1].tolist()))
    cell.until(lambda: np.allclose(positions(), goal, atol=1e-6), "the joints at the trajectory's end")
    taken = state(cell)["trajectories"]
    cell.commands.publish(trajectory(names[:2], [0.0, 0.0]))
    cell.until(lambda: state(cell)["refused"] == 1, "a refusal")
    assert "this controller has " + ", ".join(names) in state(cell)["reason"]
    assert state(cell)["trajectories"] == taken >= 1
    np.testing.assert_allclose(positions(), goal, atol=1e-6)


def test_next_gives_another_cell_with_another_robot_and_the_class_that_was_set(cell):
    assert state(cell)["seed"] == 5 and state(cell)["target"].startswith("mug")
    assert not cell.set_parameters(target_class="spoon").successful
    assert not cell.set_parameters(robot="capsule_arm").successful, "fixed while the node is active"
    assert cell.set_parameters(target_class="box").successful
    before = cell.described[-1].data
    answer = cell.call(Trigger, "next", Trigger.Request())
    assert answer.success and json.loads(answer.message)["seed"] == 6
    cell.until(lambda: state(cell)["seed"] == 6 and cell.described[-1].data != before, "the next cell")
    assert state(cell)["target"].startswith("box") and state(cell)["touched"] is None
    assert "cell 6: scara" in cell.says("model", "cell 6").message


def test_what_cannot_be_built_is_in_diagnostics(tmp_path):
    process = Process(tmp_path / "log", "deeprob_perception.nodes.robot_cell", "--ros-args", "-p", "robot:=/no/such.urdf",
                      "-r", "__node:=other")  # fmt: skip
    probe = Probe(process, "/other")
    try:
        status = probe.says("model", "not configured")
        assert "/no/such.urdf" in status.message and status.level == b"\x02"
        assert probe.set_parameters(robot="scara").successful
        assert probe.transition("configure") and probe.transition("activate") and probe.transition("deactivate")
        assert probe.transition("cleanup")
    finally:
        probe.close()
        assert process.stop() == 0, process.output
