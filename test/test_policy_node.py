# SPDX-License-Identifier: Apache-2.0
"""The policy node, live: a process of its own, joint states and goals in, trajectories out, and every reason to hold."""

import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from policy_models import JOINTS, LOWER, UPPER, hand, leap_model, reach_model, urdf
from ros_harness import LATCHED, PATIENCE, RELIABLE, Probe, Process, isolated_ros
from test_transforms import StandIn

from deeprob_perception import engines
from deeprob_perception.nodes.commands import Commander, markers
from deeprob_perception.nodes.goal_frames import GoalFrames
from deeprob_perception.policy.leap import LeapPolicy
from deeprob_perception.policy.loop import SelfModel
from deeprob_perception.policy.safety import Setpoint
from deeprob_perception.robots import Robot, parse, read

from builtin_interfaces.msg import Time  # isort: skip
from geometry_msgs.msg import PointStamped, TransformStamped  # isort: skip
from sensor_msgs.msg import JointState  # isort: skip
from std_msgs.msg import Float64MultiArray, String  # isort: skip
from std_srvs.srv import SetBool, Trigger  # isort: skip
from trajectory_msgs.msg import JointTrajectory  # isort: skip

pytestmark = pytest.mark.ros
HOME = np.array([0.3, 0.2, 0.4, 0.05])
MAX_VELOCITY = np.array([1.0, 1.0, 1.0, 0.2])  # tighter than the URDF, so that the network wishes for more
RATE = 20.0
ROUNDING = 1e-9


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


def policy_node(log, *remaps, **parameters):
    arguments = ["--ros-args"]
    for name, value in parameters.items():
        arguments += ["-p", f"{name}:={value}"]
    for remap in remaps:
        arguments += ["-r", remap]
    return Process(log, "deeprob_perception.nodes.policy", *arguments)


class Arm(Probe):
    """The robot around the node: it is where it is told to be at once, and tells its joints unordered and in parts."""

    def __init__(self, process, names=JOINTS, limits=(LOWER, UPPER, MAX_VELOCITY), kind=JointTrajectory,
                 topic="joint_trajectory", start=HOME, target="/policy"):  # fmt: skip
        super().__init__(process, target)
        self.names, self.lower, self.upper, self.velocity = names, *limits
        self.q, self.follows, self.speaks, self.goal = np.array(start), True, True, None
        self.spoken = dict(zip(names, range(len(names)), strict=True))  # the names under which joints are told
        self.frame = "base"
        space = target.removesuffix("/policy")
        self.states = self.node.create_publisher(JointState, f"{space}/joint_states", RELIABLE)
        self.goals = self.node.create_publisher(PointStamped, f"{space}/goal", RELIABLE)
        self.descriptions = self.node.create_publisher(String, f"{space}/robot_description", LATCHED)
        self.commands = []
        self.node.create_subscription(kind, f"{target}/{topic}", self._on_command, RELIABLE)
        self.node.create_timer(0.02, self._speak)

    def _speak(self):
        stamp = self.node.get_clock().now().to_msg()
        if self.speaks:
            told = list(self.spoken.items())[::-1]
            for part in (told[:2], told[2:]):
                message = JointState(name=["gripper", *(name for name, _ in part)],
                                     position=[0.5, *(float(self.q[i]) for _, i in part)])  # fmt: skip
                message.header.stamp = stamp
                self.states.publish(message)
        if self.goal is not None:
            message = PointStamped()
            message.header.stamp, message.header.frame_id = stamp, self.frame
            message.point.x, message.point.y, message.point.z = map(float, self.goal)
            self.goals.publish(message)

    def _on_command(self, message):
        """Check all that is ever published, then go there."""
        if isinstance(message, Float64MultiArray):
            self.commands.append((np.array(message.data), None))
        else:
            assert list(message.joint_names) == list(self.names), "a controller wants all of its joints"
            times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points]
            assert times and times[0] > 0 and all(a < b for a, b in pairwise(times))
            for p in message.points:
                self.check(np.array(p.positions), np.array(p.velocities))
            assert not np.any(message.points[-1].velocities), "a trajectory has to end at rest"
            self.commands.append((np.array(message.points[0].positions), np.array(message.points[0].velocities)))
        position = self.commands[-1][0]
        self.check(position, np.zeros(len(position)))
        if len(self.commands) > 1:
            step = np.abs(position - self.commands[-2][0])
            assert (step <= self.velocity / RATE + ROUNDING).all(), step
        if self.follows:
            self.q = position.copy()

    def check(self, positions, velocities):
        assert np.isfinite(positions).all() and np.isfinite(velocities).all()
        assert (positions >= self.lower - ROUNDING).all() and (positions <= self.upper + ROUNDING).all()
        assert (np.abs(velocities) <= self.velocity + ROUNDING).all()

    def anew(self, start=HOME):
        """Disarm, put everything back to where it was, and let the node take that for the commanded pose."""
        self.call(SetBool, "enable", SetBool.Request(data=False))
        self.q, self.follows, self.speaks, self.frame = np.array(start), True, True, "base"
        self.spoken = dict(zip(self.names, range(len(self.names)), strict=True))
        self.goal = None
        self.fresh_diagnostics()
        self.until(lambda: self.call(Trigger, "reset", Trigger.Request()).success, "a reset", PATIENCE)
        self.commands.clear()

    def enable(self):
        return self.call(SetBool, "enable", SetBool.Request(data=True))

    def move(self):
        """Enable and wait until it moves towards a goal that is a while away."""
        self.goal = tip(np.array([-1.5, 0.6, -0.4, 0.1]))
        self.until(lambda: self.enable().success, "being enabled")
        seen = len(self.commands)
        self.until(lambda: len(self.commands) > seen + 3, "motion")

    def holds(self, reason, state="holding"):
        """Wait until diagnostics say that it holds, and why; then check that it commands no more."""
        self.says("output", reason)
        assert self.status["output"].message.startswith(state), self.status["output"].message
        assert reason in self.values("output")["reason"] and self.values("output")["state"] == state
        if state == "holding":
            assert self.status["output"].level == b"\x01"
        count, end = len(self.commands), time.monotonic() + 0.2
        self.until(lambda: time.monotonic() > end, "a while")
        assert len(self.commands) == count, "it commands while it holds"

    def refused(self, name):
        return int(self.values("output")[f"refused_{name}"])


def tip(positions, robot=None):
    robot = robot or Robot(parse(urdf()), None, "tool")
    return robot.forward_kinematics(positions, ["tool"])[0, :3, 3]


def pair(turning, sliding):
    return f"[{turning}, {sliding}]"


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    model = reach_model(folder / "tiny.onnx")
    process = policy_node(folder / "log", model=model, tip="tool", cache_dir=folder / "cache",
                          max_velocity=pair(1.0, 0.2), max_gap=pair(0.06, 0.03),
                          max_age=1.0)  # fmt: skip  # a busy machine may be silent for some tenths of a second
    yield process
    assert process.alive, process.output
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output, process.output


@pytest.fixture(scope="module")
def shared_arm(process):
    arm = Arm(process)
    arm.descriptions.publish(String(data=urdf()))
    yield arm
    arm.close()


@pytest.fixture
def arm(shared_arm):
    shared_arm.anew()
    return shared_arm


def test_it_is_disarmed_until_enabled_then_reaches_the_goal_within_the_limits_and_counts_what_it_cut(shared_arm):
    arm = shared_arm
    arm.goal = tip(np.array([-0.5, 0.6, -0.4, 0.1]))
    arm.says("output", "not enabled")
    assert arm.values("output")["state"] == "disarmed" and not arm.commands
    assert arm.enable().success
    arm.until(lambda: np.linalg.norm(tip(arm.q) - arm.goal) < 1e-3, "the tip at the goal")
    arm.until(lambda: arm.values("output")["state"] == "moving" and arm.refused("step_limit"), "diagnostics of the motion")
    assert arm.values("input")["joints"] == " ".join(JOINTS) and arm.values("input")["other_joints"] == "gripper"
    assert float(arm.values("output")["step_p99_ms"]) > 0
    # The test's self-model puts all joints at the root: the farthest one is as far off as it is from there.
    robot = Robot(parse(urdf()), None, "tool")

    def off() -> float:  # diagnostics come once a second, and the last millimetres take a while
        truth = np.linalg.norm(robot.forward_kinematics(arm.q)[:, :3, 3], axis=-1).max() * 1e3
        return abs(float(arm.values("model")["self_model_error_mm"]) - truth)

    arm.until(lambda: off() < 1.0, "the self-model's error in diagnostics")
    assert "is the URDF this robot's" in arm.status["model"].message


def test_disarmed_in_motion_it_comes_to_rest_where_it_is(arm):
    arm.move()
    assert arm.call(SetBool, "enable", SetBool.Request(data=False)).success
    arm.holds("disarmed by ~/enable", "disarmed")
    position, velocity = arm.commands[-1]
    assert not velocity.any() and not np.allclose(position, HOME)


def test_it_holds_when_joint_states_stop_and_goes_on_when_they_come_back(arm):
    arm.move()
    arm.speaks = False
    arm.holds("s old (max_age is 1 s)")
    assert arm.refused("joint_stale") > 0 and not arm.commands[-1][1].any()
    seen = len(arm.commands)
    arm.speaks = True
    arm.until(lambda: len(arm.commands) > seen + 3, "motion again")


def test_it_holds_when_a_joint_is_nan_missing_or_renamed_and_names_it(arm):
    arm.move()
    arm.q[1] = np.nan
    arm.follows = False
    arm.holds("joint_states says nan for the joint shoulder")
    arm.anew()
    arm.move()
    del arm.spoken["elbow"]
    arm.holds("the position of the joint elbow is")
    arm.spoken["elbow_1"] = 2
    arm.fresh_diagnostics()
    assert arm.values("output")["state"] == "holding" and "elbow_1" in arm.values("input")["other_joints"]
    arm.descriptions.publish(String(data=urdf(elbow="forearm")))  # a joint that has never been told
    arm.says("input", "no position of forearm on joint_states; joint_states has")
    refused = arm.enable()
    assert not refused.success and "no position of the joint forearm" in refused.message
    arm.descriptions.publish(String(data=urdf()))


def test_it_holds_when_the_goal_is_stale_unreachable_no_number_or_in_a_frame_that_it_cannot_relate(arm):
    arm.move()
    arm.goal = None
    arm.holds("s old (goal_max_age is 1 s)")
    for goal, frame, reason, name in (
        ((2.0, 0.0, 0.0), "base", "the stretched chain measures", "goal_unreachable"),
        ((np.nan, 0.0, 0.3), "base", "the goal is [nan", "goal_not_finite"),
        ((0.3, 0.0, 0.3), "map", "the frame map, which is neither the root base", "goal_frame"),
    ):
        arm.goal, arm.frame = np.array(goal), frame
        arm.holds(reason)
        assert arm.refused(name) > 0
    arm.goal, arm.frame = np.array([0.05, 0.0, 0.02]), "tool"  # of the robot's own links it knows how they move
    seen = len(arm.commands)
    arm.until(lambda: len(arm.commands) > seen + 3, "motion again")


def test_it_holds_while_the_model_answers_nan(arm):
    arm.move()
    arm.goal = tip(arm.q) - [0, 0, 0.1]  # where the test's model has a hole
    arm.follows = False
    arm.holds("the policy's answer is no number for")
    assert arm.refused("policy_not_finite") > 0
    assert "shoulder" in arm.values("output")["reason"]


def test_it_does_not_start_far_from_where_it_was_commanded_until_reset(arm):
    arm.move()
    arm.call(SetBool, "enable", SetBool.Request(data=False))
    arm.holds("disarmed by ~/enable", "disarmed")
    arm.q[0] += 0.3
    arm.fresh_diagnostics()
    refused = arm.enable()
    assert not refused.success and "the joint pan is at" in refused.message and "call ~/reset" in refused.message
    arm.fresh_diagnostics()
    assert arm.refused("start_gap") > 0 and arm.values("output")["state"] == "disarmed"
    assert arm.call(Trigger, "reset", Trigger.Request()).success
    arm.commands.clear()
    assert arm.enable().success
    arm.until(lambda: len(arm.commands) > 3, "motion")


def test_a_robot_that_does_not_follow_is_not_left_behind_by_more_than_max_gap(arm):
    arm.move()
    arm.follows = False
    x, y, z = tip(arm.q)
    arm.goal = np.array([x, y, z]) + np.array([y, -x, 0]) / np.hypot(x, y) * 0.3  # straight across, which the pan does best
    arm.until(lambda: arm.refused("gap_limit") > 3, "commands that are cut")
    ahead = np.abs(arm.commands[-1][0] - arm.q)
    assert ahead.max() > 0.0599 and (ahead <= np.array([0.06, 0.06, 0.06, 0.03]) + ROUNDING).all()


def test_a_new_robot_description_disarms_and_a_broken_one_is_named(arm):
    arm.move()
    arm.descriptions.publish(String(data=urdf(upper_arm=0.4)))
    arm.holds("robot_description has changed", "disarmed")
    assert not arm.commands[-1][1].any()
    other = Robot(parse(urdf(upper_arm=0.4)), None, "tool")
    arm.goal = tip(np.array([-0.5, 0.6, -0.4, 0.1]), other)
    arm.commands.clear()
    arm.until(lambda: arm.enable().success, "being enabled")
    arm.until(lambda: np.linalg.norm(tip(arm.q, other) - arm.goal) < 1e-3, "the new arm's tip at the goal")
    arm.descriptions.publish(String(data="<robot name='x'><link name='a'/></robot>"))
    arm.says("output", "/robot_description: the robot 'x' has no link 'tool'")
    assert arm.status["output"].level == b"\x02"
    assert not arm.enable().success
    arm.descriptions.publish(String(data=urdf()))
    arm.says("output", "robot_description has changed")


def test_deactivated_in_motion_it_comes_to_rest_and_starts_disarmed_again(arm):
    arm.move()
    assert arm.transition("deactivate")
    arm.says("output", "ros2 lifecycle set /policy activate")
    assert not arm.commands[-1][1].any()
    assert not arm.enable().success
    assert arm.transition("activate")
    arm.says("output", "the node was deactivated")
    assert arm.values("output")["state"] == "disarmed"


def test_the_leap_policy_runs_in_the_same_node_by_its_own_rule_and_in_the_controllers_order(tmp_path):
    robot = tmp_path / "hand.urdf"
    robot.write_text(hand())
    process = policy_node(tmp_path / "log", "__ns:=/left", model=leap_model(tmp_path / "leap.onnx"), robot_file=robot,
                          output="commands", cache_dir=tmp_path / "cache", command_joints="['3', '1', '0', '2']")  # fmt: skip
    lower, upper = np.full(4, -0.5), np.full(4, 2.0)
    start = np.array([0.1, 0.2, 0.3, 0.4])
    limits = lower, upper, np.full(4, 20 / 24)
    arm = Arm(process, ("3", "1", "0", "2"), limits, Float64MultiArray, "commands", start, "/left/policy")
    try:
        arm.says("output", "not enabled")
        arm.until(lambda: arm.enable().success, "being enabled")
        arm.until(lambda: len(arm.commands) > 8, "motion")
        # The first push is by the sine of -0.157 rad, and so on: all fingers go by the clock.
        angles = (np.arange(8) - 1) * 0.05 * np.pi
        expected = start + np.cumsum(np.sin(angles))[:, None] / 24
        np.testing.assert_allclose([position for position, _ in arm.commands[:8]], expected, atol=1e-6)
        assert process.stop() == 0, process.output
        assert "Traceback" not in process.output, process.output
    finally:
        arm.close()


def test_a_published_checkpoint_of_get_zero_runs_in_the_node_on_a_leap_hand(shared, tmp_path):
    """Random weights: the first step, from a pose that is known, is what the policy asks for; the later ones keep its rule."""
    torch = pytest.importorskip("torch", reason="the checkpoint is converted by torch (extra `train`)")
    from test_get_checkpoint import deeprob, published

    torch.save(published(), tmp_path / "published.pt")
    deeprob("models", "convert", tmp_path / "published.pt", "--export", tmp_path / "leap.onnx")
    description = shared / "robots" / "leap_variants" / "139.urdf"
    robot = Robot(read(description))
    policy = LeapPolicy(engines.load(tmp_path / "leap.onnx", "onnxruntime", cache_dir=tmp_path, threads=1), robot)
    start = (robot.lower + robot.upper) / 2
    expected = []
    for _ in range(7):  # no reset empties the phase's six steps, and the node asks for the self-model before it is enabled
        policy.reset(start)
        expected.append(policy.act(start))
    process = policy_node(tmp_path / "log", model=tmp_path / "leap.onnx", robot_file=description, cache_dir=tmp_path / "cache")
    limits = robot.lower, robot.upper, np.full(len(start), 2.0)  # the node's own; the policy asks for less on the way
    arm = Arm(process, robot.joint_names, limits, start=start)
    try:
        arm.says("output", "not enabled")  # both sides have found each other
        arm.until(lambda: arm.enable().success, "being enabled")
        arm.until(lambda: len(arm.commands) > 20, "motion")
        positions, velocities = arm.commands[0]
        nearest = min(expected, key=lambda command: np.abs(command.positions - positions).max())
        np.testing.assert_allclose(positions, nearest.positions, atol=1e-6)
        np.testing.assert_allclose(velocities, nearest.velocities, atol=1e-5)
        assert np.abs(arm.commands[20][0] - start).max() > 1e-3, "nothing moves"
        assert process.stop() == 0, process.output
        assert "Traceback" not in process.output, process.output
    finally:
        arm.close()


def test_a_model_or_robot_file_that_cannot_be_loaded_leaves_the_node_up_with_the_reason(tmp_path):
    process = policy_node(tmp_path / "log", "__ns:=/left", model=leap_model(tmp_path / "leap.onnx"),
                          robot_file=tmp_path / "absent.urdf", cache_dir=tmp_path / "cache")  # fmt: skip
    probe = Probe(process, "/left/policy")
    try:
        probe.says("output", "absent.urdf: No such file")
        robot = tmp_path / "hand.urdf"
        robot.write_text(hand())
        assert not probe.set_parameters(max_step=[1.0]).successful
        assert probe.set_parameters(robot_file=str(robot)).successful
        assert probe.transition("configure") and probe.transition("activate")
        probe.says("output", "not enabled")
        assert process.stop() == 0, process.output
    finally:
        probe.close()


class QuarterTurn(StandIn):
    """tf2_ros with one transform, a quarter turn about z and a shift."""

    class Buffer(StandIn.Buffer):
        def lookup_transform(self, target, source, when):
            if (target, source) != ("left_base", "map"):
                raise LookupError(f"no frame {source}")
            found = TransformStamped()
            found.transform.rotation.z = found.transform.rotation.w = 0.5**0.5
            found.transform.translation.x = 1.0
            return found


def test_goals_come_from_the_root_the_robots_own_links_and_tf2(monkeypatch):
    robot, point = Robot(parse(urdf()), None, "tool"), np.array([0.1, 0.2, 0.3])
    monkeypatch.setitem(sys.modules, "tf2_ros", QuarterTurn)
    frames = GoalFrames(None, "left_")
    np.testing.assert_array_equal(frames.to_root(robot, HOME, "left_base", point), point)
    pose = robot.forward_kinematics(HOME, ["fore"])[0]
    np.testing.assert_allclose(frames.to_root(robot, HOME, "left_fore", point), pose[:3, :3] @ point + pose[:3, 3])
    np.testing.assert_allclose(frames.to_root(robot, HOME, "map", point), [0.8, 0.1, 0.3], atol=1e-12)
    assert "not known yet" in frames.to_root(robot, HOME * np.nan, "left_fore", point)
    assert "no frame odom" in frames.to_root(robot, HOME, "odom", point)
    assert "the robot's root frame is left_base" in frames.to_root(robot, HOME, "", point)
    monkeypatch.setitem(sys.modules, "tf2_ros", None)
    assert "tf2 is not installed" in GoalFrames(None, "left_").to_root(robot, HOME, "map", point)


def test_messages_have_the_controllers_order_and_end_at_rest_unless_streaming():
    setpoint = Setpoint(np.array([1.0, 2.0]), np.array([0.1, -0.2]), np.array([1.0025, 1.995]))
    still = Setpoint(setpoint.halt, np.zeros(2), setpoint.halt)
    stamp = Time(sec=3)
    swapped = Commander(("a", "b"), ("b", "a"), 0.05, False)
    message = swapped.message("joint_trajectory", setpoint, stamp)
    assert message.joint_names == ["b", "a"] and message.header.stamp == Time()
    assert [list(p.positions) for p in message.points] == [[2.0, 1.0], [1.995, 1.0025]]
    assert [list(p.velocities) for p in message.points] == [[-0.2, 0.1], [0.0, 0.0]]
    assert [p.time_from_start.nanosec for p in message.points] == [50_000_000, 100_000_000]
    assert len(swapped.message("joint_trajectory", still, stamp).points) == 1
    streamed = Commander(("a", "b"), (), 2.0, True).message("joint_trajectory", setpoint, stamp)
    assert len(streamed.points) == 1 and list(streamed.points[0].velocities) == [0.1, -0.2]
    assert (streamed.points[0].time_from_start.sec, streamed.points[0].time_from_start.nanosec) == (2, 0)
    state = swapped.message("joint_command", setpoint, stamp)
    assert (state.name, list(state.position), list(state.velocity)) == (["b", "a"], [2.0, 1.0], [-0.2, 0.1])
    assert state.header.stamp == stamp
    assert list(swapped.message("commands", setpoint, stamp).data) == [2.0, 1.0]


def test_markers_show_where_joints_are_and_where_they_are_believed_to_be():
    pytest.importorskip("visualization_msgs")
    robot = Robot(parse(urdf()), None, "tool")
    message = markers(SelfModel(robot, HOME, np.ones((4, 3))), "base", Time(sec=1))
    true, believed = message.markers
    places = robot.forward_kinematics(HOME)[:, :3, 3]
    np.testing.assert_allclose([(p.x, p.y, p.z) for p in true.points], places)
    assert true.header.frame_id == believed.header.frame_id == "base"
    assert [(p.x, p.y, p.z) for p in believed.points] == [(1, 1, 1)] * 4 and believed.color.r > believed.color.g
