# SPDX-License-Identifier: Apache-2.0
"""The safety contract without ROS: whatever goes in, nothing outside the limits comes out, and each reason has its name."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_models import JOINTS, LOWER, UPPER, hand, reach_model, urdf

from deeprob_perception import engines
from deeprob_perception.errors import PerceptionError, RobotError
from deeprob_perception.policy.beat import Beat
from deeprob_perception.policy.loop import ControlLoop, policy_of
from deeprob_perception.policy.readings import Goal, JointReadings
from deeprob_perception.policy.safety import DISARMED, HOLDING, MOVING, REFUSALS, Bound, Limits, Safety, limits_of
from deeprob_perception.robots import Robot, parse

PERIOD = 0.05
VELOCITY = np.array([2.0, 2.0, 0.3])
LIMITS = Limits(
    ("a", "b", "c"), np.array([-1.0, -math.inf, 0.0]), np.array([1.5, math.inf, 0.2]), VELOCITY, VELOCITY * PERIOD,
    np.full(3, 0.1), np.full(3, 0.4), PERIOD,
)  # fmt: skip
NOW = np.zeros(3)
ROUNDING = 1e-9

anything = st.one_of(st.floats(), st.floats(-3, 3), st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -0.0]))
# A pose and an age that the contract would take are likely, so that motion is reached, and everything else may come.
poses = st.one_of(st.just((0.0, 0.0, 0.1)), st.tuples(*[st.floats(-0.05, 0.2)] * 3), st.tuples(anything, anything, anything))
ages = st.one_of(st.just((0.0, 0.0, 0.0)), st.tuples(anything, anything, anything))
wishes = st.one_of(poses, st.lists(anything, max_size=5).map(tuple))
events = st.one_of(
    st.tuples(st.just("step"), poses, ages, wishes, wishes, st.booleans()),
    st.tuples(st.just("enable"), poses, ages),
    st.tuples(st.just("reset"), poses),
    st.tuples(st.sampled_from(["disable", "forget"])),
)


@given(st.lists(events, max_size=60))
@settings(max_examples=300, deadline=None)
def test_whatever_goes_in_nothing_outside_the_limits_comes_out(history):
    safety, now = Safety(LIMITS, 0.2), 100.0
    for event in [("enable", (0.0, 0.0, 0.1), (0.0, 0.0, 0.0)), *history]:
        before = None if safety.commanded is None else safety.commanded.copy()
        setpoint = None
        if event[0] == "enable":
            refused = safety.enable(now, np.array(event[1]), now - np.array(event[2]))
            assert bool(refused) or safety.state in (HOLDING, MOVING)
        elif event[0] == "disable":
            safety.disable("not_enabled", "by hand")
            setpoint = safety.take_halt()
            assert safety.state == DISARMED
        elif event[0] == "reset":
            safety.anchor(np.array(event[1]))
            if safety.state != MOVING:
                continue  # a robot at rest is where it is: its pose is taken for the commanded one
        elif event[0] == "forget":
            safety.forget()
            continue
        else:
            _, measured, age, wish, velocities, good_goal = event
            now += PERIOD
            measured = np.array(measured)
            goal = None if good_goal else ("goal_stale", "old")
            armed, moving = safety.state != DISARMED, safety.state == MOVING
            if safety.admit(now, measured, now - np.array(age), goal):
                assert armed and good_goal and np.isfinite(measured).all()
                before = safety.commanded.copy()
                assert moving or (np.abs(before - measured) <= LIMITS.start_gap).all(), "it started across a gap"
                setpoint = safety.limit(np.array(wish), np.array(velocities), measured)
            if setpoint is None:
                assert safety.state != MOVING
                setpoint = safety.take_halt()
                assert setpoint is None or moving
        if setpoint is None:
            assert safety.commanded is None or before is None or np.array_equal(before, safety.commanded)
            continue
        for positions in (setpoint.positions, setpoint.halt):
            assert np.isfinite(positions).all()
            assert (positions >= LIMITS.lower).all() and (positions <= LIMITS.upper).all()
        assert (np.abs(setpoint.velocities) <= LIMITS.velocity).all()
        assert (np.abs(setpoint.positions - before) <= LIMITS.step + ROUNDING).all()
        assert (np.abs(setpoint.halt - setpoint.positions) <= LIMITS.step / 2 + ROUNDING).all()
    assert set(safety.refusals) <= set(REFUSALS), "a refusal that the documentation does not name"


def test_a_wish_within_the_limits_is_commanded_as_it_is():
    """A contract that answered with zeros would pass the property above."""
    safety = Safety(LIMITS, 0.2)
    at = np.array([0.0, 5.0, 0.1])
    assert safety.enable(0.0, at, NOW) == ""
    assert safety.admit(0.0, at, NOW, None)
    wish = at + np.array([0.1, -0.05, 0.01])
    setpoint = safety.limit(wish, (wish - at) / PERIOD, at)
    np.testing.assert_array_equal(setpoint.positions, wish)
    np.testing.assert_allclose(setpoint.velocities, [2.0, -1.0, 0.2])
    np.testing.assert_allclose(setpoint.halt, wish + np.array([0.05, -0.025, 0.005]))
    assert not safety.refusals and safety.state == MOVING


def test_braking_ends_at_the_limit_and_not_behind_it():
    safety = Safety(LIMITS, 0.2)
    at = np.array([1.45, 0.0, 0.1])
    safety.enable(0.0, at, NOW)
    assert safety.admit(0.0, at, NOW, None)
    setpoint = safety.limit(np.array([1.49, 0.0, 0.1]), NOW, at)
    assert setpoint.halt[0] == pytest.approx(1.5) and setpoint.velocities[0] == pytest.approx(2 * 0.01 / PERIOD)


def test_a_robot_outside_its_limits_is_not_started():
    safety = Safety(LIMITS, 0.2)
    assert "move it within its limits" in safety.enable(0.0, np.array([1.9, 0.0, 0.1]), NOW)
    assert safety.state == DISARMED and safety.refusals["start_gap"] == 1


def test_limits_are_the_tightest_of_urdf_and_parameters():
    robot = Robot(parse(urdf()), None, "tool")
    loose, none = Bound(100.0, 100.0), Bound(0.0, 0.0)
    limits = limits_of(robot, 20.0, loose, none, loose, loose)
    np.testing.assert_allclose(limits.velocity, [3, 3, 3, 0.4])
    np.testing.assert_allclose(limits.step, np.array([3, 3, 3, 0.4]) / 20)
    limits = limits_of(robot, 20.0, Bound(1.0, 0.5), Bound(0.2, 0.01), loose, loose, velocity_share=0.5)
    np.testing.assert_allclose(limits.velocity, [1, 1, 1, 0.2])
    np.testing.assert_allclose(limits.step, [0.05, 0.05, 0.05, 0.01])
    assert limits.names == JOINTS and (limits.lower == LOWER).all() and (limits.upper == UPPER).all()
    with pytest.raises(RobotError, match="max_gap is nan"):
        limits_of(robot, 20.0, loose, none, loose, Bound(math.nan, 1.0))


def test_a_joint_without_a_velocity_limit_gets_the_parameters():
    robot = Robot(parse(urdf()), None, None, ["spin"])
    limits = limits_of(robot, 20.0, Bound(1.0, 0.5), Bound(0, 0), Bound(0.1, 0.1), Bound(1, 1))
    assert limits.velocity == [1.0] and limits.step == [0.05] and np.isinf(limits.lower).all()


def test_readings_are_merged_by_name_each_with_its_own_time():
    readings = JointReadings(("a", "b"))
    assert readings.add(["b", "other"], [1.0, 9.0], 5.0, 5.1)
    assert np.isnan(readings.positions[0]) and np.isnan(readings.when[0])
    assert readings.add(["a"], [2.0], 0.0, 6.0), "without a stamp it counts from its arrival"
    np.testing.assert_array_equal(readings.positions, [2.0, 1.0])
    np.testing.assert_array_equal(readings.when, [6.0, 5.0])
    readings.add(["b"], [7.0], 4.0, 6.0)
    assert readings.positions[1] == 1.0 and readings.backward == 1, "an older message overwrote a newer one"
    readings.add(["b"], [3.0], 1e9, 7.0)
    assert readings.when[1] == 7.0, "a stamp from the future keeps a joint fresh for ever"
    assert not readings.add(["a", "b"], [1.0], 8.0, 8.0) and readings.bad == 1
    assert list(readings.others) == ["other"]


def test_goals_age():
    goal = Goal(np.zeros(3), 10.0)
    assert goal.refusal(10.9, 1.0) is None
    assert goal.refusal(11.1, 1.0)[0] == "goal_stale"
    assert Goal().refusal(0.0, 1.0)[0] == "goal_missing"


def test_late_steps_are_counted_and_missed_ones_too():
    beat = Beat(0.1)
    for now in (0.02, 0.1, 0.2, 0.301, 0.38):  # the first came 20 ms late, which is no reason to call the others early
        beat.step(now)
    assert beat.late == 0
    beat.step(0.56)  # due at 0.48: a timer never fires early, so the earliest step shows the grid
    assert beat.late == 1 and beat.worst == pytest.approx(0.08)
    beat.step(0.6)
    beat.step(1.0)  # 0.7, 0.8, and 0.9 never ran
    assert (beat.steps, beat.late) == (8, 4)
    beat.step(1.1)
    assert beat.late == 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return engines.load(reach_model(folder / "tiny.onnx"), "onnxruntime", cache_dir=folder, threads=1)


def loop_of(engine, **options):
    robot = Robot(parse(urdf()), None, "tool")
    limits = limits_of(robot, 20.0, Bound(2.0, 0.5), Bound(0, 0), Bound(0.1, 0.02), Bound(0.5, 0.1))
    return ControlLoop(robot, policy_of(engine, robot, "tool", 20.0), limits, 0.2, 1.0)


def test_a_policy_that_raises_holds_with_the_reason_and_goes_on_when_it_works_again(engine):
    loop = loop_of(engine)
    at = np.array([0.3, 0.2, 0.4, 0.05])
    goal = loop.robot.forward_kinematics(at - [0.3, 0.4, 0.3, 0], ["tool"])[0, :3, 3]
    loop.readings.add(JOINTS, at, 0.0, 0.0)
    loop.goal = Goal(goal, 0.0)
    assert loop.enable(0.0) == ""
    assert loop.step(0.0).velocities.any() and loop.safety.state == MOVING
    act = loop.policy.act
    loop.policy.act = lambda *_: 1 / 0
    halt = loop.step(0.05)
    assert not halt.velocities.any(), "it did not come to rest"
    loop.readings.add(JOINTS, halt.positions, 0.05, 0.05)
    assert loop.safety.reason == "the policy failed: ZeroDivisionError: division by zero"
    assert loop.step(0.1) is None and loop.safety.refusals["policy_failed"] == 2
    loop.policy.act = act
    assert loop.step(0.15).velocities.any()


def test_policies_that_do_not_fit_the_robot_are_refused_in_one_line(engine):
    robot = Robot(parse(urdf()), None, "tool")
    with pytest.raises(PerceptionError, match="by the parameter tip"):
        policy_of(engine, robot, "", 20.0)
    with pytest.raises(PerceptionError, match="the model takes 6"):
        policy_of(engine, Robot(parse(hand(4))), "l7", 20.0)
