# SPDX-License-Identifier: Apache-2.0
"""Where an object is, from mask and depth: exact answers, holes, outliers, time, and the camera's pose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprob_perception.errors import TargetError
from deeprob_perception.robots import Robot, parse
from deeprob_perception.target import CameraMount, Intrinsics, Steady, components, locate, metres, pose_of

CAMERA = Intrinsics(fx=100.0, fy=120.0, cx=31.5, cy=23.5, width=64, height=48)


def scene(rows: slice, columns: slice, z: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    labels, depth = np.zeros((48, 64), np.uint8), np.full((48, 64), 2.0, np.float32)
    labels[rows, columns] = 3
    depth[rows, columns] = z
    return labels, depth


def test_a_flat_patch_is_found_at_the_mean_of_its_rays_exactly() -> None:
    labels, depth = scene(slice(10, 20), slice(40, 52))
    seen = locate(labels, 3, depth, CAMERA)
    assert seen.pixels == 120 and seen.box == (40, 10, 12, 10)
    np.testing.assert_allclose(seen.position, [(45.5 - 31.5) * 0.8 / 100, (14.5 - 23.5) * 0.8 / 120, 0.8], rtol=1e-6)


def test_millimetres_and_metres_give_the_same_position() -> None:
    labels, depth = scene(slice(10, 20), slice(40, 52), z=0.75)
    mm = (depth * 1000).round().astype(np.uint16)
    np.testing.assert_allclose(locate(labels, 3, mm, CAMERA).position, locate(labels, 3, depth, CAMERA).position, rtol=1e-6)


def test_a_slanted_surface_gives_the_centroid_of_its_points() -> None:
    labels, depth = scene(slice(4, 30), slice(8, 50))
    v, u = np.mgrid[0:48, 0:64]
    plane = (0.6 / (1 - 0.3 * (u - 31.5) / 100)).astype(np.float32)  # z = 0.6 + 0.3 x
    depth[labels == 3] = plane[labels == 3]
    z = plane[5:29, 9:49].astype(float)  # less the border of one pixel
    x, y = (u[5:29, 9:49] - 31.5) * z / 100, (v[5:29, 9:49] - 23.5) * z / 120
    np.testing.assert_allclose(locate(labels, 3, depth, CAMERA).position, [x.mean(), y.mean(), z.mean()], rtol=1e-6)


@pytest.mark.parametrize("hole", [0.0, -1.0, np.nan, np.inf])
def test_holes_are_left_out_and_only_move_the_centroid_to_what_was_measured(hole: float) -> None:
    labels, depth = scene(slice(10, 20), slice(40, 52))
    depth[10:20, 40:46] = hole
    seen = locate(labels, 3, depth, CAMERA, border=0)
    assert seen.measured == 60
    np.testing.assert_allclose(seen.position, [(48.5 - 31.5) * 0.8 / 100, (14.5 - 23.5) * 0.8 / 120, 0.8], rtol=1e-6)
    depth[labels == 3] = hole
    with pytest.raises(TargetError, match="0 of the mug's 120 pixels have depth"):
        locate(labels, 3, depth, CAMERA, name="mug")


def test_background_that_shines_through_the_mask_does_not_move_the_position() -> None:
    labels, depth = scene(slice(10, 20), slice(40, 52))
    clean = locate(labels, 3, depth, CAMERA, border=0).position
    rng = np.random.default_rng(3)
    wrong = rng.choice(120, 20, replace=False)
    depth[10 + wrong // 12, 40 + wrong % 12] = 2.0
    seen = locate(labels, 3, depth, CAMERA, border=0)
    assert seen.measured == 100 and seen.position[2] == pytest.approx(0.8, abs=1e-6)
    assert np.linalg.norm(seen.position - clean) < 0.006  # one pixel is 8 mm


def test_the_largest_of_several_objects_is_taken_and_diagonal_pixels_belong_together() -> None:
    labels, _ = scene(slice(2, 6), slice(2, 8))
    labels[30:40, 30:40] = 3
    labels[40:42, 40:42] = 3
    (box, mask, pixels), (_, _, less) = components(labels, 3)
    assert pixels == 104 == mask.sum() and box == (30, 30, 12, 12) and less == 24
    assert not list(components(labels, 5))


def test_what_is_refused_gives_way_to_the_next_largest_and_the_reason_is_the_largest_ones() -> None:
    labels, depth = scene(slice(30, 40), slice(30, 42), z=1.5)
    labels[4:12, 4:12] = 3  # smaller, and nearer
    depth[4:12, 4:12] = 0.5
    labels[0:2, 60:62] = 3  # too small to count
    near = locate(labels, 3, depth, CAMERA, refusal=lambda place: "is too far" if place[2] > 1 else "")
    assert near.box == (4, 4, 8, 8) and near.position[2] == pytest.approx(0.5)
    assert locate(labels, 3, depth, CAMERA).box == (30, 30, 12, 10)
    with pytest.raises(TargetError, match=r"^the mug in view is at 1\.5$"):
        locate(labels, 3, depth, CAMERA, name="mug", refusal=lambda place: f"is at {place[2]:.1f}")
    depth[30:40, 30:42] = 0  # the largest without depth: the next one
    assert locate(labels, 3, depth, CAMERA).box == (4, 4, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(class_id=5), "no class 5 in view"),
        (dict(minimum_pixels=200), "has 120 pixels; minimum_pixels is 200"),
        (dict(depth=np.ones((24, 32), np.float32)), "the sizes differ: mask 64x48, depth 32x24"),
        (dict(depth=np.ones((48, 64), np.float64)), "16UC1"),
    ],
)
def test_what_gives_no_position_is_said(change: dict, message: str) -> None:
    labels, depth = scene(slice(10, 20), slice(40, 52))
    with pytest.raises(TargetError, match=message):
        locate(**(dict(labels=labels, class_id=3, depth=depth, intrinsics=CAMERA) | change))


def test_an_uncalibrated_camera_is_refused() -> None:
    with pytest.raises(TargetError, match="no calibration"):
        Intrinsics.of(np.zeros(9), 64, 48)
    assert Intrinsics.of(np.array([100, 0, 31.5, 0, 120, 23.5, 0, 0, 1]), 64, 48) == CAMERA


@settings(max_examples=60, deadline=None)
@given(
    position=st.tuples(st.floats(-0.2, 0.2), st.floats(-0.15, 0.15), st.floats(0.4, 1.5)),
    holes=st.floats(0, 0.6), in_mm=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_ball_is_found_on_its_visible_surface_wherever_it_is(position, holes: float, in_mm: bool, seed: int) -> None:
    """Whatever is missing of the depth, the answer lies within the ball, in front of its centre."""
    camera, centre, radius = Intrinsics(300.0, 300.0, 159.5, 119.5, 320, 240), np.array(position), 0.05
    v, u = np.mgrid[0:240, 0:320]
    rays = np.stack(((u - 159.5) / 300, (v - 119.5) / 300, np.ones(u.shape)), -1)
    a, b, c = (rays**2).sum(-1), rays @ centre, centre @ centre - radius**2
    hit = b**2 > a * c
    near = np.where(hit, (b - np.sqrt(np.maximum(b**2 - a * c, 0))) / a, 3.0).astype(np.float32)
    depth = np.where(np.random.default_rng(seed).random(near.shape) < holes, np.float32(np.nan), near)
    if in_mm:
        depth = (np.nan_to_num(depth) * 1000).round().astype(np.uint16)
    labels = hit.astype(np.uint8) * 4
    if hit.sum() * (1 - holes) < 60:
        return
    seen = locate(labels, 4, depth, camera)
    assert np.linalg.norm(seen.position - centre) < radius + 1e-3
    assert np.linalg.norm(seen.position) < np.linalg.norm(centre)


@settings(max_examples=100, deadline=None)
@given(
    labels=st.integers(0, 2**32 - 1).map(lambda s: np.random.default_rng(s).integers(0, 4, (12, 16)).astype(np.uint8)),
    values=st.lists(st.sampled_from([0.0, np.nan, np.inf, -np.inf, -2.0, 0.5, 1.0, 1e30]), min_size=192, max_size=192),
)
def test_any_depth_gives_finite_positions_or_a_reason(labels: np.ndarray, values: list[float]) -> None:
    camera = Intrinsics(20.0, 20.0, 7.5, 5.5, 16, 12)
    depth = np.array(values, np.float32).reshape(12, 16)
    try:
        assert np.isfinite(locate(labels, 2, depth, camera, minimum_pixels=3).position).all()
    except TargetError as error:
        assert "\n" not in str(error)


def test_holes_of_both_encodings_become_nan() -> None:
    np.testing.assert_array_equal(metres(np.array([[0, 1500]], np.uint16)), np.array([[np.nan, 1.5]], np.float32))
    np.testing.assert_array_equal(
        metres(np.array([[0, np.nan, np.inf, -1, 0.25]], np.float32)), np.array([[np.nan] * 4 + [0.25]], np.float32)
    )


# Over time ------------------------------------------------------------------------------------------------------------


def test_one_wrong_frame_does_not_move_the_goal() -> None:
    steady, right, wrong = Steady(frames=5, seconds=10), np.array([0.4, 0.1, 0.2]), np.array([1.0, -0.5, 0.2])
    for i in range(4):
        steady.add(i * 10**8, right)
    np.testing.assert_array_equal(steady.add(5 * 10**8, wrong), right)


def test_old_positions_are_forgotten_and_a_looping_bag_begins_anew() -> None:
    steady, first, second = Steady(frames=9, seconds=1.0), np.zeros(3), np.ones(3)
    for i in range(5):
        steady.add(i * 10**8, first)
    np.testing.assert_array_equal(steady.add(3 * 10**9, second), second)
    np.testing.assert_array_equal(steady.add(10**8, first), first)


# The camera's pose ----------------------------------------------------------------------------------------------------

URDF = """<robot name="tower"><link name="base"/><link name="mast"/><link name="head"/><link name="eye"/><link name="arm"/>
  <joint name="lift" type="prismatic"><parent link="base"/><child link="mast"/><axis xyz="0 0 1"/>
    <origin xyz="0.1 0 0.5"/><limit lower="0" upper="1" velocity="1"/></joint>
  <joint name="pan" type="continuous"><parent link="mast"/><child link="head"/><axis xyz="0 0 1"/>
    <origin xyz="0 0 0.2" rpy="0 0.1 0"/></joint>
  <joint name="optical" type="fixed"><parent link="head"/><child link="eye"/>
    <origin xyz="0.05 0 0" rpy="-1.57 0 -1.57"/></joint>
  <joint name="swing" type="revolute"><parent link="base"/><child link="arm"/><axis xyz="0 1 0"/><mimic joint="pan"
    multiplier="0.5" offset="0.1"/><origin xyz="0.3 0 0.1"/><limit lower="-2" upper="2" velocity="1"/></joint></robot>"""


@given(lift=st.floats(0, 1), pan=st.floats(-3, 3))
def test_the_cameras_pose_is_the_robots_forward_kinematics(lift: float, pan: float) -> None:
    urdf = parse(URDF)
    poses = Robot(urdf).forward_kinematics(np.array([lift, pan]), ["eye", "arm"])
    values = {"lift": lift, "pan": pan, "elsewhere": np.nan}
    np.testing.assert_allclose(CameraMount(urdf, "eye").pose(values), poses[0], atol=1e-12)
    relative = CameraMount(urdf, "eye", base="arm")
    np.testing.assert_allclose(relative.pose(values), np.linalg.inv(poses[1]) @ poses[0], atol=1e-12)
    assert set(relative.joint_names) == {"lift", "pan"}


def test_a_camera_that_stands_still_needs_no_joint_states() -> None:
    mount = CameraMount(parse(URDF), "eye", base="head")
    assert mount.joint_names == ()
    np.testing.assert_allclose(mount.pose({})[:3, 3], [0.05, 0, 0])


@pytest.mark.parametrize("positions", [{"lift": 0.1}, {"lift": 0.1, "pan": np.nan}])
def test_a_missing_or_broken_joint_state_is_named(positions: dict) -> None:
    with pytest.raises(TargetError, match="joint_states lacks pan"):
        CameraMount(parse(URDF), "eye").pose(positions)


def test_unknown_frames_are_named() -> None:
    with pytest.raises(TargetError, match="'tower' has no link 'camera_optical' to be the camera frame"):
        CameraMount(parse(URDF), "camera_optical")
    with pytest.raises(TargetError, match="no link 'world' to be the base_frame"):
        CameraMount(parse(URDF), "eye", base="world")


def test_a_pose_given_as_numbers_is_urdfs_xyz_rpy() -> None:
    np.testing.assert_allclose(pose_of(np.array([1, 2, 3, 0, 0, np.pi / 2])) @ [1, 0, 0, 1], [1, 3, 3, 1], atol=1e-12)
    with pytest.raises(TargetError, match="camera_pose"):
        pose_of(np.array([1, 2, 3]))
