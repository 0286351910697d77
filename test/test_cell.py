# SPDX-License-Identifier: Apache-2.0
"""The robot cell without ROS: the follower, robots as capsules, the cell's own truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_models import urdf as small_arm

from deeprob_perception.errors import PerceptionError, RobotError
from deeprob_perception.policy.approach import SLOPE, Approach, Funnel
from deeprob_perception.robots import Robot, parse, read
from deeprob_perception.target import CameraMount, Intrinsics, locate

try:
    import mujoco

    from deeprob_perception.sim import SimulationError, skeleton
    from deeprob_perception.sim.arms import ARMS, TOOL
    from deeprob_perception.sim.camera import OPTICAL_FRAME
    from deeprob_perception.sim.cell import NEAR, TOUCH, Cell, Wish, with_camera
    from deeprob_perception.sim.follower import Point, TrajectoryFollower
    from deeprob_perception.sim.materials import Materials
    from deeprob_perception.sim.render import SceneRenderer
    from deeprob_perception.sim.scene import CLASSES, empty
except (ImportError, PerceptionError) as error:
    pytest.skip(str(error), allow_module_level=True)

STEP = 0.004  # s


@pytest.fixture(scope="module")
def renderer():
    with SceneRenderer() as made:
        try:
            Cell(wish("scara"), made)
        except SimulationError as error:
            pytest.skip(str(error))
        yield made


def wish(arm: str, seed: int = 0, kind: str = "ball", size: tuple[int, int] = (320, 240)) -> "Wish":
    return Wish(seed, ARMS[arm](np.random.default_rng(seed)), TOOL, kind, size=size)


# The follower


def follower(start=(0.0, 0.0)):
    return TrajectoryFollower(("a", "b"), np.array([-1.0, -2.0]), np.array([1.0, 2.0]), np.array([1.0, 0.5]), np.array(start))


def run(subject, until, now=0.0):
    """Step to `until`; return times, positions `[n, 2]`."""
    rows = []
    while now + STEP <= until + 1e-9:
        now += STEP
        rows.append((now, *subject.step(now, STEP)[0]))
    return np.array(rows)


def test_a_trajectory_is_followed_through_its_points_whatever_the_order_of_its_joints():
    subject = follower()
    points = [Point(0.4, np.array([0.1, 0.2]), np.zeros(2)), Point(0.8, np.array([0.0, 0.4]), np.zeros(2))]
    assert subject.take(0.0, ["b", "a"], points)
    rows = run(subject, 1.2)
    np.testing.assert_allclose(rows[99, 1:], [0.2, 0.1], atol=2e-3)  # at 0.4 s, a and b
    np.testing.assert_allclose(rows[-1, 1:], [0.4, 0.0], atol=1e-9)
    assert not subject.saturated and not subject.velocities.any()


def test_a_joint_goes_no_faster_than_its_limit_and_arrives_later():
    subject = follower()
    subject.take(0.0, ["a", "b"], [Point(0.1, np.array([0.5, 0.0]), np.zeros(2))])
    rows = run(subject, 1.0)
    assert (np.diff(rows[:, 1]) <= STEP * 1.0 + 1e-12).all() and subject.saturated
    np.testing.assert_allclose(rows[-1, 1], 0.5, atol=1e-9)
    assert not subject.beyond_velocity  # its points asked for no velocity beyond the limit


@pytest.mark.parametrize("names, points, reason", [
    (["a"], [(0.1, [0.0], [0.0])], "it is for the joints a; this controller has a, b"),
    (["a", "c"], [(0.1, [0, 0], [0, 0])], "joints a, c"),
    (["a", "b"], [], "no points"),
    (["a", "b"], [(0.1, [0, np.nan], [0, 0])], "nan"),
    (["a", "b"], [(0.1, [0], [0])], r"for 2 joints"),
    (["a", "b"], [(0.2, [0, 0], [0, 0]), (0.1, [0, 0], [0, 0])], "do not rise: 0.1 s after 0.2 s"),
    (["a", "b"], [(0.1, [0, 0], [0.1, 0])], "ends in motion"),
])  # fmt: skip
def test_what_a_controller_refuses_is_refused_and_the_joints_stay(names, points, reason):
    subject = follower((0.3, 0.4))
    made = [Point(t, np.array(p, float), np.array(v, float)) for t, p, v in points]
    assert not subject.take(0.0, names, made)
    assert reason in subject.reason and subject.refused == 1
    np.testing.assert_array_equal(run(subject, 0.2)[-1, 1:], [0.3, 0.4])


def test_a_trajectory_with_a_start_is_taken_where_it_is_by_then_or_refused_when_it_is_over():
    subject = follower()
    points = [Point(0.1, np.array([0.05, 0.0]), np.zeros(2)), Point(0.4, np.array([0.2, 0.0]), np.zeros(2))]
    assert subject.take(1.0, ["a", "b"], points, start=0.8)  # its first point lies in the past
    np.testing.assert_allclose(run(subject, 1.3, 1.0)[-1, 1], 0.2, atol=1e-9)
    assert not subject.take(1.3, ["a", "b"], points, start=0.8)
    assert "ago" in subject.reason


def test_commands_beyond_the_limits_are_counted():
    subject = follower()
    subject.take(0.0, ["a", "b"], [Point(0.1, np.array([1.01, 0.0]), np.zeros(2))])
    subject.take(0.0, ["a", "b"], [Point(0.1, np.zeros(2), np.array([0.0, 0.6])), Point(0.2, np.zeros(2), np.zeros(2))])
    subject.take(0.0, ["a", "b"], [Point(0.1, np.array([1.0, -2.0]), np.zeros(2))])
    assert (subject.taken, subject.beyond_position, subject.beyond_velocity) == (3, 1, 1)


@given(st.lists(st.tuples(st.floats(0.0, 0.3), st.floats(-1, 1), st.floats(-2, 2), st.floats(0.01, 0.2)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_however_trajectories_come_the_velocity_limits_hold(orders):
    subject, now, before = follower(), 0.0, np.zeros(2)
    for wait, a, b, span in orders:
        subject.take(now, ["a", "b"], [Point(span, np.array([a, b]), np.zeros(2))])
        for _ in range(int(wait / STEP)):
            now += STEP
            positions = subject.step(now, STEP)[0]
            assert (np.abs(positions - before) <= np.array([1.0, 0.5]) * STEP + 1e-12).all()
            before = positions.copy()


# Robots as capsules


def assert_poses_agree(description, tip: str) -> None:
    """The model's bodies are where the robot's own kinematics has the links, mimicking joints included."""
    spec = empty((64, 64), 0, 512, STEP)
    rng = np.random.default_rng(0)
    materials = Materials(spec, rng)
    finish = materials.plain()
    skeleton.add_robot(spec, description, tip, np.array([0.3, -0.2, 0.6]), 0.7, (finish, finish, finish))
    model = spec.compile()
    data = mujoco.MjData(model)
    found = skeleton.find(model, description)
    robot = found.robot
    low, high = np.maximum(robot.lower, -3), np.minimum(robot.upper, 3)
    base = np.eye(4)
    base[:2, :2] = [[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]]
    base[:3, 3] = 0.3, -0.2, 0.6
    for _ in range(5):
        positions = rng.uniform(low, high)
        found.place(data, positions, np.zeros(len(positions)))
        mujoco.mj_kinematics(model, data)
        poses = base @ robot.forward_kinematics(positions, robot.links)
        there = np.array([data.body(f"robot/{link}").xpos for link in robot.links])
        np.testing.assert_allclose(there, poses[:, :3, 3], atol=2e-6)
        turned = np.array([data.body(f"robot/{link}").xmat.reshape(3, 3) for link in robot.links])
        np.testing.assert_allclose(turned, poses[:, :3, :3], atol=1e-5)


@pytest.mark.parametrize("arm", ["capsule_arm", "scara", "small"])
def test_the_model_has_the_robots_kinematics(arm):
    description = parse(small_arm() if arm == "small" else ARMS[arm](np.random.default_rng(3)))
    assert_poses_agree(description, "tool")


@pytest.mark.parametrize("file, tip", [("franka_panda", "panda_hand_tcp"), ("ur5e", "tool0"), ("so101", "gripper_frame_link"),
                                       ("stretch_se3", "link_grasp_center")])  # fmt: skip
def test_the_model_has_real_robots_kinematics(shared, file, tip):
    assert_poses_agree(read(shared / "robots" / "real" / f"{file}.urdf"), tip)


@pytest.mark.parametrize("arm", sorted(ARMS) if "ARMS" in globals() else [])
def test_our_own_robots_differ_from_seed_to_seed_and_their_tool_hangs_on_all_their_turning_joints(arm):
    texts = {ARMS[arm](np.random.default_rng(seed)) for seed in range(5)}
    assert len(texts) == 5
    for text in texts:
        robot = Robot(parse(text), tip=TOOL)
        assert np.isfinite([robot.lower, robot.upper, robot.velocity]).all()
        assert len(robot.joint_names) == {"capsule_arm": 6, "scara": 4}[arm]


# The cell


@pytest.mark.parametrize("arm, kind", [("capsule_arm", "ball"), ("scara", "mug")])
def test_a_cell_shows_one_object_of_the_class_that_its_camera_sees_and_its_robot_is_away_from(renderer, arm, kind):
    for seed in range(3):
        cell = Cell(wish(arm, seed, kind), renderer)
        frame = renderer.frame(cell.look(), cell.camera)
        assert (frame.labels == CLASSES.index(kind)).mean() >= 5e-4
        bodies = [cell.model.body(i).name for i in range(cell.model.nbody)]
        assert sum(name.startswith(kind) for name in bodies) == 1
        assert cell.touched is None and cell.distance > 0.05 and cell.lowest > 0


def test_equal_wishes_give_equal_cells_and_others_differ(renderer):
    def picture(seed: int) -> np.ndarray:
        cell = Cell(wish("capsule_arm", seed), renderer)
        return renderer.frame(cell.look(), cell.camera).colour

    first = picture(4)
    np.testing.assert_array_equal(first, picture(4))
    assert (first != picture(5)).any()


def test_the_description_tells_where_the_camera_is(renderer):
    """Mask, depth and calibration of the cell's camera lead to the object, in the robot's root frame."""
    for seed in range(3):
        cell = Cell(wish("scara", seed), renderer)
        frame = renderer.frame(cell.look(), cell.camera)
        pose = CameraMount(parse(cell.urdf), OPTICAL_FRAME).pose({})
        intrinsics = Intrinsics.of(cell.camera.matrix.ravel(), 320, 240)
        seen = locate(frame.labels, CLASSES.index("ball"), frame.depth, intrinsics, border=0)
        radius = cell.model.geom_size[cell._surfaces[0], 0]
        middle = pose[:3, :3] @ seen.position + pose[:3, 3]
        # The visible surface's centroid lies towards the camera, within the ball.
        assert 0.1 * radius < np.linalg.norm(middle - cell.target_place) < radius


def test_distance_and_touch_are_those_of_the_tool_and_the_ball(renderer):
    cell = Cell(wish("scara", 1), renderer)
    robot = cell.robot
    radius = cell.model.geom_size[cell._surfaces[0], 0]
    random = np.random.default_rng(0)
    goal = cell.target_place + np.array([0, 0, radius + 0.01])  # above its top
    drawn = random.uniform(robot.lower, robot.upper, (20000, 4))
    tips = robot.forward_kinematics(drawn, [TOOL])[:, 0, :3, 3]
    best = drawn[np.linalg.norm(tips - goal, axis=1).argmin()]
    here = cell.follower.positions
    up = np.array([*here[:2], 0.0, here[3]])
    over = np.array([*best[:2], 0.0, best[3]])
    for positions in (up, over, best):  # up, across, down
        assert cell.follower.take(cell.time, robot.joint_names, [Point(1.5, positions, np.zeros(4))])
        cell.advance(cell.time + 4.0)
    tip = robot.forward_kinematics(cell.follower.positions, [TOOL])[0, :3, 3]
    expected = np.linalg.norm(tip - cell.target_place) - radius
    assert expected < NEAR and abs(cell.distance - expected) < 1e-3
    assert (cell.touched is not None) == (expected <= TOUCH) == True  # noqa: E712


def test_what_cannot_be_built_is_said(renderer):
    text = ARMS["scara"](np.random.default_rng(0))
    with pytest.raises(SimulationError, match="no object is a 'spoon'; there are box, ball, cylinder, mug"):
        Cell(Wish(0, text, TOOL, "spoon"), renderer)
    with pytest.raises(RobotError, match="no link 'hook' to be the tip"):
        Cell(Wish(0, text, "hook"), renderer)
    lifted = '<limit lower="-9" upper="-0.2" effort="1" velocity="1"/><limit lower="0" upper='
    high = text.replace('<limit lower="0" upper=', lifted)
    with pytest.raises(SimulationError, match="'tool' of 'scara' was never low over the table"):
        Cell(Wish(0, high, TOOL), renderer)
    once = with_camera(text, parse(text), np.eye(4))
    with pytest.raises(RobotError, match="has a link 'camera_color_optical_frame'"):
        with_camera(once, parse(once), np.eye(4))


# The approach


@given(st.tuples(*[st.floats(-2, 2)] * 3), st.tuples(*[st.floats(-2, 2)] * 3), st.floats(0, 0.5), st.floats(0, 0.2))
def test_the_funnel_lifts_goals_by_how_far_the_tip_is_beside_them_and_never_moves_them_sideways(goal, tip, height, radius):
    goal, tip = np.array(goal), np.array(tip)
    found = Funnel(Approach(height, radius), 0.05).goal(goal, tip)
    assert found is not None
    np.testing.assert_array_equal(found[:2], goal[:2])
    beside = np.hypot(*(goal - tip)[:2])
    assert -1e-12 <= found[2] - goal[2] <= height + 1e-12
    if beside <= radius:
        assert found[2] == goal[2]
    elif beside >= radius + height / SLOPE:
        assert found[2] == pytest.approx(goal[2] + height)


def test_a_funnel_that_cannot_be_followed_gets_lower_and_is_as_high_as_ever_for_another_goal():
    funnel, goal, tip = Funnel(Approach(0.16, 0.04), 0.05), np.zeros(3), np.array([0.3, 0.0, 0.0])
    answers = [funnel.goal(goal, tip) for _ in range(300)]  # the tip stays where it is
    first = next(i for i, answer in enumerate(answers) if answer is None)
    lifts = [answer[2] for answer in answers[:first]]
    assert lifts[0] == lifts[9] == 0.16 and sorted(set(lifts)) == [0.01, 0.02, 0.04, 0.08, 0.16]
    back = [i for i, answer in enumerate(answers) if answer is None]
    assert back == list(range(first, first + len(back))) and len(back) == 39, "once, for two seconds"
    assert answers[back[-1] + 1][2] == 0.16, "and then from above once more"
    coming = Funnel(Approach(0.16, 0.04), 0.05)
    assert all(coming.goal(goal, tip * (1 - 0.02 * i))[2] == 0.16 for i in range(20)), "it comes nearer"
    assert funnel.goal(np.array([0, 0.2, 0]), tip)[2] == 0.16


def test_who_is_at_the_goal_does_not_draw_back():
    funnel, goal = Funnel(Approach(0.16, 0.04), 0.05), np.zeros(3)
    assert all(funnel.goal(goal, np.array([0.01, 0.0, 0.01])) is not None for _ in range(200))
