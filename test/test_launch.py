# SPDX-License-Identifier: Apache-2.0
"""The launch files, launched for real: what the nodes then do, through the arguments that they offer."""

import json
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from policy_models import JOINTS, VELOCITY, reach_model, urdf

launch_pytest = pytest.importorskip("launch_pytest", reason="needs launch_pytest, which is part of ROS 2 and not on PyPI")

from geometry_msgs.msg import PointStamped  # noqa: E402
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription  # noqa: E402
from launch.launch_description_sources import PythonLaunchDescriptionSource  # noqa: E402
from launch_pytest.actions import ReadyToTest  # noqa: E402
from ros_harness import PATIENCE, RELIABLE, Probe, Process, isolated_ros  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from std_srvs.srv import SetBool  # noqa: E402
from test_target_node import Camera, at, expected  # noqa: E402
from trajectory_msgs.msg import JointTrajectory  # noqa: E402

from deeprob_perception import engines  # noqa: E402
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, make_header, stamp_ns  # noqa: E402
from deeprob_perception.messages.images import make_compressed, to_array, to_bgr  # noqa: E402
from deeprob_perception.segmentation import Segmenter  # noqa: E402
from launch import LaunchContext, LaunchDescription  # noqa: E402

pytestmark = pytest.mark.ros
LAUNCH = Path(__file__).resolve().parents[1] / "launch"


def include(name: str, **arguments: str) -> IncludeLaunchDescription:
    """Return a launch file as a user includes it."""
    return IncludeLaunchDescription(PythonLaunchDescriptionSource(str(LAUNCH / name)), launch_arguments=arguments.items())


def with_arguments(name: str, **arguments: str) -> LaunchDescription:
    return LaunchDescription([include(name, **arguments), ReadyToTest()])


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


@launch_pytest.fixture
def perception(tiny_model, tmp_path):
    """`precision` comes from the parameter file, the rest from arguments."""
    parameters = tmp_path / "mine.yaml"
    parameters.write_text("/**:\n  ros__parameters:\n    precision: fp32\n    threads: 1\n    model: overridden_below\n")
    return with_arguments(
        "perception.launch.py", params_file=str(parameters), namespace="robot", image_topic="/front/image_raw",
        image_transport="compressed", model=str(tiny_model), backend="onnxruntime")


@pytest.mark.launch(fixture=perception)
def test_the_launched_node_segments_the_camera_that_the_arguments_name(perception, tiny_model):
    segmenter = Segmenter(engines.load(tiny_model, backend="onnxruntime", precision="fp32", threads=1))
    coarse = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
    image = make_compressed(picture, make_header(time.time_ns(), "front_optical_frame"), "jpeg", 95)
    probe = Probe(target="/robot/segmentation")
    try:
        masks = probe.listen("/robot/segmentation/mask")
        camera = probe.publisher("/front/image_raw/compressed", COMPRESSED_IMAGE)
        mask = probe.mask_of(camera, image, masks, COMPRESSED_IMAGE)
        expected = segmenter(to_bgr(image)).labels
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(to_array(mask), expected)
        assert (mask.encoding, mask.height, mask.width) == ("mono8", 120, 160)
        assert stamp_ns(mask.header) == stamp_ns(image.header)
        assert mask.header.frame_id == "front_optical_frame"
        probe.fresh_diagnostics()
        assert probe.values("model")["backend"] == "onnxruntime"
        assert probe.values("model")["requested_precision"] == "fp32", "params_file was not read"
    finally:
        probe.close()


@launch_pytest.fixture
def policy(tmp_path):
    """A robot with a link named 0, which YAML takes for a number; the parameter file slows it down."""
    robot = tmp_path / "arm.urdf"
    robot.write_text(urdf().replace('"tool"', '"0"'))
    parameters = tmp_path / "mine.yaml"
    parameters.write_text("/**:\n  ros__parameters:\n    velocity_share: 0.1\n    tip: overridden_below\n")
    return with_arguments(
        "policy.launch.py", params_file=str(parameters), namespace="arm", goal_topic="/target/goal",
        joint_states_topic="/front/joints", command_topic="/arm_controller/joint_trajectory", rate="30",
        model=str(reach_model(tmp_path / "small.onnx")), robot_file=str(robot), tip="0")


@pytest.mark.launch(fixture=policy)
def test_the_launched_policy_moves_the_robot_that_the_arguments_name_once_it_is_enabled(policy):
    probe = Probe(target="/arm/policy")
    try:
        states = probe.node.create_publisher(JointState, "/front/joints", RELIABLE)
        goals = probe.node.create_publisher(PointStamped, "/target/goal", RELIABLE)

        def speak():
            stamp = probe.node.get_clock().now().to_msg()
            state = JointState(name=list(JOINTS), position=[0.3, 0.2, 0.4, 0.05])
            goal = PointStamped()
            goal.point.x, goal.point.y, goal.point.z = 0.1, -0.4, 0.3
            state.header.stamp = goal.header.stamp = stamp
            goal.header.frame_id = "base"
            states.publish(state)
            goals.publish(goal)

        probe.node.create_timer(0.02, speak)
        commands = probe.listen("/arm_controller/joint_trajectory", JointTrajectory)
        probe.says("output", "disarmed: not enabled")
        assert probe.values("model")["name"] == "small" and not commands
        probe.until(lambda: probe.call(SetBool, "enable", SetBool.Request(data=True)).success, "being enabled")
        probe.until(lambda: len(commands) > 3, "trajectories")
        assert tuple(commands[-1].joint_names) == JOINTS
        period = commands[-1].points[0].time_from_start
        assert period.sec == 0 and period.nanosec == pytest.approx(1e9 / 30, rel=1e-3)
        fastest = np.max([np.abs(command.points[0].velocities) for command in commands], axis=0)
        assert (fastest > 0).any() and (fastest <= 0.1 * VELOCITY + 1e-9).all(), "params_file was not read"
    finally:
        probe.close()


@launch_pytest.fixture
def target(tmp_path):
    """The class by its id, which YAML takes for a number; the parameter file makes one position a goal."""
    parameters = tmp_path / "mine.yaml"
    parameters.write_text("/**:\n  ros__parameters:\n    median_frames: 1\n    border: 0\n    target_class: overridden_below\n")
    return with_arguments(
        "target.launch.py", params_file=str(parameters), target_class="2", mask_topic="mask", label_info_topic="label_info",
        depth_topic="/depth", camera_info_topic="/camera_info")


@pytest.mark.launch(fixture=target)
def test_the_launched_target_node_finds_the_object_on_the_topics_that_the_arguments_name(target):
    camera = Camera(None)
    try:
        goal = camera.goal(neck=0.8)
        assert goal.header.frame_id == "base"
        np.testing.assert_allclose(at(goal), expected(0.8), atol=1e-6)
        camera.fresh_diagnostics()
        assert camera.values("output")["target_class"] == "2"
        assert float(camera.values("output")["pixels"]) == 200, "params_file was not read: border"
    finally:
        camera.close()


@pytest.fixture
def rendering():
    """Skip where no scene can be drawn."""
    pytest.importorskip("mujoco", reason="needs MuJoCo (extra `sim`)")
    from deeprob_perception.sim import SimulationError
    from deeprob_perception.sim.arms import ARMS, TOOL
    from deeprob_perception.sim.cell import Cell, Wish
    from deeprob_perception.sim.render import SceneRenderer

    with SceneRenderer() as renderer:
        try:
            Cell(Wish(0, ARMS["scara"](np.random.default_rng(0)), TOOL, "ball", size=(64, 48)), renderer)
        except SimulationError as error:
            pytest.skip(str(error))


@launch_pytest.fixture
def closed_loop(rendering):
    return with_arguments("closed_loop.launch.py", robot="scara", target_class="mug", seed="3", log_level="warn")


@pytest.mark.slow
@pytest.mark.launch(fixture=closed_loop)
def test_the_launched_loop_sees_the_object_where_it_is_and_moves_once_it_is_enabled(closed_loop):
    probe = Probe()
    try:
        goals = probe.listen("/target/goal", PointStamped)
        states = probe.listen("/robot_cell/state", String)
        probe.until(lambda: goals and states, "goals and the truth")
        nodes = {"robot_cell", "segmentation", "target", "policy"}
        probe.until(lambda: nodes <= set(probe.node.get_node_names()), "the names of all four nodes")
        truth = json.loads(states[-1].data)
        assert (truth["seed"], truth["robot"], truth["trajectories"]) == (3, "scara", 0) and "mug" in truth["target"]
        assert np.linalg.norm(at(goals[-1]) - truth["place"]) < 0.1  # its visible surface, its middle
        probe.target = "/policy"
        probe.until(lambda: probe.call(SetBool, "enable", SetBool.Request(data=True)).success, "being enabled")
        probe.until(lambda: json.loads(states[-1].data)["trajectories"] > 5, "trajectories that the robot follows")
        assert json.loads(states[-1].data)["refused"] == 0
    finally:
        probe.close()


ARGUMENTS = {
    "perception": {"tasks", "params_file", "tracking_params_file", "namespace", "image_topic", "image_transport", "model",
                   "tracking_model", "backend", "use_sim_time", "log_level", "autostart", "build_only"},
    "policy": {"params_file", "namespace", "goal_topic", "joint_states_topic", "command_topic", "model", "root", "tip",
               "robot_file", "output", "rate", "use_sim_time", "log_level", "autostart"},
    "target": {"params_file", "namespace", "mask_topic", "label_info_topic", "depth_topic", "camera_info_topic",
               "joint_states_topic", "target_class", "camera_pose_from", "base_frame", "depth_transport", "robot_file",
               "use_sim_time", "log_level", "autostart"},
    "closed_loop": {"robot", "tip", "target_class", "seed", "model", "policy", "log_level"},
}  # fmt: skip


def declared(name: str) -> dict[str, DeclareLaunchArgument]:
    description = PythonLaunchDescriptionSource(str(LAUNCH / f"{name}.launch.py")).get_launch_description(LaunchContext())
    return {action.name: action for action in description.entities if isinstance(action, DeclareLaunchArgument)}


@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".launch.py") for path in LAUNCH.glob("*.launch.py")))
def test_every_argument_is_declared_at_top_level_with_a_description(name):
    found = declared(name)
    assert set(found) == ARGUMENTS[name]
    assert all(len(action.description) > 10 for action in found.values())


def test_the_back_ends_on_offer_are_all_that_there_are():
    assert declared("perception")["backend"].choices == ["", "auto", *engines.BACKENDS]


# `ros2 launch` as a process of its own


class Ros2Launch(Process):
    def __init__(self, log: Path, name: str, **arguments: str):
        ros2 = shutil.which("ros2", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if ros2 is None or find_spec("ros2launch") is None:
            pytest.skip("needs `ros2 launch`, which is part of ROS 2 and not on PyPI")
        pairs = [f"{key}:={value}" for key, value in arguments.items()]
        super().__init__(log, "launch", str(LAUNCH / f"{name}.launch.py"), *pairs, program=(ros2,))


@pytest.mark.parametrize("name, arguments, words", [
    ("perception", {"params_file": "/no/such.yaml"}, "params_file is '/no/such.yaml': there is no such file"),
    ("perception", {"tasks": "tracking", "tracking_params_file": "/no.yaml"}, "tracking_params_file is '/no.yaml'"),
    ("policy", {"params_file": "/no/such.yaml"}, "params_file is '/no/such.yaml': there is no such file"),
    ("policy", {"rate": "fast"}, "rate is 'fast': give a number"),
    ("target", {"params_file": "/no/such.yaml"}, "params_file is '/no/such.yaml': there is no such file"),
    ("closed_loop", {"target_class": "spoon"}, 'Argument "target_class" provided value "spoon" is not valid'),
])  # fmt: skip
def test_a_wrong_value_ends_the_launch_before_a_node_starts_and_is_named(name, arguments, words, tmp_path):
    launched = Ros2Launch(tmp_path / "log", name, **arguments)
    assert launched.wait() == 1, launched.output
    assert words in launched.output and "process started" not in launched.output, launched.output


def test_an_engine_that_cannot_be_built_is_told_by_the_exit_status(tmp_path):
    launched = Ros2Launch(tmp_path / "log", "perception", build_only="true", model="/no/such.onnx")
    assert launched.wait() == 1, launched.output
    assert "there is no model file /no/such.onnx" in launched.output
    assert "segmentation-1 ended with 1: no engine was built" in launched.output


def test_an_interrupt_ends_the_launch_and_its_node_without_a_traceback(tmp_path):
    launched = Ros2Launch(tmp_path / "log", "target", target_class="mug")
    deadline = time.monotonic() + PATIENCE
    while "active:" not in launched.output and launched.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert launched.stop() == 0, launched.output
    assert "[target-1]: process has finished cleanly" in launched.output, launched.output
    assert "Traceback" not in launched.output, launched.output
