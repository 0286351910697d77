# SPDX-License-Identifier: Apache-2.0
"""The simulated table top: labels and depth against ray casting, determinism, the command line, the sample bag."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from deeprob_perception.bags import open_bag
from deeprob_perception.cli import app, commands  # noqa: F401
from deeprob_perception.errors import DataError, PerceptionError
from deeprob_perception.messages.cdr import deserialize, stamp_ns
from deeprob_perception.share import share_dir

try:
    import mujoco

    from deeprob_perception.sim import SimulationError, record
    from deeprob_perception.sim.arm import LOWER, UPPER, Trajectory
    from deeprob_perception.sim.dataset import render_dataset
    from deeprob_perception.sim.objects import mug_mesh
    from deeprob_perception.sim.render import SceneRenderer
    from deeprob_perception.sim.scene import CLASSES, Scene
    from deeprob_perception.sim.sensor import Sensor
    WHY_NOT = ""
except (ImportError, PerceptionError) as error:
    WHY_NOT = str(error)

SMALL = (160, 120)
SAMPLE = share_dir() / "bags" / "sample.mcap"
needs_simulator = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def renderer():
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with SceneRenderer() as made:
        try:
            made.colour(scene := Scene(0, size=SMALL, duration=1.0), scene.random_camera(np.random.default_rng(0), SMALL))
        except SimulationError as error:
            pytest.skip(str(error))
        yield made


# Ground truth


@pytest.mark.parametrize("seed", range(4))
def test_labels_and_depth_agree_with_rays_cast_through_the_pixels(renderer, seed):
    scene = Scene((40, seed), size=(640, 480), duration=1.0)
    camera = scene.random_camera(np.random.default_rng(seed))
    frame = renderer.frame(scene, camera)
    rng = np.random.default_rng(seed + 1)
    pixels = np.stack([rng.integers(1, 639, 1500), rng.integers(1, 479, 1500)], axis=1)
    groups = np.array([1, 1, 1, 0, 1, 1], np.uint8)  # the collision shapes of group 3 are not seen
    inside, edges, edges_right = 0, 0, 0
    for u, v in pixels:
        local = np.linalg.inv(camera.matrix) @ (u, v, 1.0)
        hit = np.zeros(1, np.int32)
        # The ray's z is 1, so its length in such rays is the depth in metres.
        distance = mujoco.mj_ray(scene.model, scene.data, camera.pose[:3, 3], camera.pose[:3, :3] @ local, groups, 1, -1, hit)
        geom, drawn = scene.model.geom(int(hit[0])), frame.geoms[v, u]
        patch = frame.geoms[v - 1:v + 2, u - 1:u + 2]
        if (patch != drawn).any():
            edges += 1
            edges_right += drawn == geom.id
            continue
        inside += 1
        assert drawn == geom.id
        assert frame.labels[v, u] == CLASSES.index(geom.name.partition(":")[0])
        # Boxes are drawn as they are, round things with facets: up to 3 % of the radius is lost, more at a grazing angle.
        flat = geom.type[0] == mujoco.mjtGeom.mjGEOM_BOX
        assert frame.depth[v, u] == pytest.approx(distance, abs=0.0001 if flat else 0.06 * scene.model.geom_rbound[geom.id])
    assert inside > 1000
    assert edges_right >= 0.93 * edges  # half a pixel of offset leaves 73 to 88 % of them right


def test_a_ball_is_seen_where_its_centre_projects(renderer):
    scene = Scene(5, duration=1.0, kinds=("ball",), size=(640, 480))
    ball = scene.data.body(scene.object_names[0]).xpos
    radius = next(scene.model.geom(g).size[0] for g in range(scene.model.ngeom) if scene.model.geom(g).name == "ball:0")
    for attempt in range(20):  # a camera from which the arm does not hide it
        camera = scene.random_camera(np.random.default_rng(attempt))
        frame = renderer.frame(scene, camera)
        (pixel,), (depth,) = camera.project(ball[None])
        mask = frame.labels == CLASSES.index("ball")
        expected = np.pi * (radius * camera.matrix[0, 0] / depth) ** 2
        inside = (pixel > 60).all() and pixel[0] < 580 and pixel[1] < 420
        if inside and mask.sum() > 0.95 * expected:
            break
    else:
        pytest.fail("no camera saw the whole ball")
    v, u = np.nonzero(mask)
    assert (u.mean(), v.mean()) == pytest.approx(tuple(pixel), abs=0.7)
    near = frame.depth[round(pixel[1]), round(pixel[0])]
    reach = np.linalg.norm(ball - camera.pose[:3, 3])  # the ray to the centre enters one radius before it
    assert near == pytest.approx(depth * (1 - radius / reach), abs=0.05 * radius)


def test_every_class_is_drawn_and_nothing_else():
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    scene = Scene(1, duration=1.0, kinds=("box", "ball", "cylinder", "mug"))
    assert set(scene.geom_class.tolist()) == set(range(len(CLASSES)))


# Determinism


def test_equal_seeds_give_equal_frames_and_others_do_not(renderer):
    def picture(seed: int):
        scene = Scene(seed, size=SMALL, duration=1.0)
        scene.advance(0.3)
        frame = renderer.frame(scene, scene.random_camera(np.random.default_rng(seed), SMALL))
        return frame.colour, frame.depth, frame.labels

    first, again, other = picture(11), picture(11), picture(12)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_a_kept_context_draws_what_a_new_one_draws(renderer):
    """Textures and meshes of the scene before must not shine through."""
    scene = Scene(21, size=SMALL, duration=1.0, kinds=("mug",) * 6)
    camera = scene.random_camera(np.random.default_rng(2), SMALL)
    before = Scene(20, size=SMALL, duration=1.0, kinds=("mug",) * 6)
    renderer.colour(before, camera)
    kept = renderer.frame(scene, camera)
    with SceneRenderer() as fresh:
        new = fresh.frame(scene, camera)
    assert np.array_equal(kept.colour, new.colour)
    assert np.array_equal(kept.geoms, new.geoms)


@pytest.mark.slow
def test_a_data_set_does_not_depend_on_the_number_of_workers(renderer, tmp_path):
    for workers in (1, 2):
        render_dataset(tmp_path / str(workers), frames=3, seed=3, size=SMALL, workers=workers)
    names = sorted(str(p.relative_to(tmp_path / "1")) for p in (tmp_path / "1").rglob("*.*"))
    assert len(names) == 7  # three pictures, three label images, classes.json
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


# The parts


@needs_simulator
def test_velocities_are_the_derivative_of_positions():
    path = Trajectory(np.array([[0.0, 1.0], [0.5, -1.0], [0.2, 0.3]]), np.array([0.0, 1.0, 2.5]))
    for time in np.linspace(0.01, 2.49, 57):
        step = 1e-6
        slope = (path.at(time + step)[0] - path.at(time - step)[0]) / (2 * step)
        assert path.at(time)[1] == pytest.approx(slope, abs=1e-5)
    assert path.at(9.0)[0] == pytest.approx([0.2, 0.3])
    assert path.at(9.0)[1] == pytest.approx([0.0, 0.0])


@needs_simulator
def test_the_arm_keeps_its_joint_limits_and_off_the_table():
    scene = Scene(8, duration=4.0)
    arm = [g for g in range(scene.model.ngeom) if scene.model.geom(g).name.startswith("robot:")][1:]
    for time in np.arange(0.1, 4.0, 0.2):
        scene.advance(float(time))
        positions, _ = scene.joint_state()
        assert (positions >= LOWER - 1e-9).all() and (positions <= UPPER + 1e-9).all()
        size, turn = scene.model.geom_size[arm], scene.data.geom_xmat[arm].reshape(-1, 3, 3)
        lowest = scene.data.geom_xpos[arm, 2] - np.abs(turn[:, 2, 2]) * size[:, 1] - size[:, 0]
        assert lowest.min() > scene.room.table_top


@needs_simulator
def test_the_mugs_surface_is_closed_and_faces_outwards():
    vertices, faces = mug_mesh(0.04, 0.1, 1.2, 0.004)
    shell = faces[(faces < 31 * 40).all(axis=1)]  # without the handle, whose ends are open inside the wall
    edges = Counter((int(a), int(b)) for face in shell for a, b in zip(face, np.roll(face, -1), strict=True))
    ends = {*range(40), *range(30 * 40, 31 * 40)}  # rings of radius zero on the axis
    assert all(edges[b, a] == 1 for a, b in edges if not (a in ends and b in ends))
    a, b, c = (vertices[shell[:, k]] for k in range(3))
    volume = np.einsum("ij,ij->", a, np.cross(b, c)) / 6
    wall = np.pi * 0.044 * 2 * 0.1 * 0.004  # mean circumference, height, thickness
    assert 0.8 * wall < volume < 1.6 * wall


@needs_simulator
def test_a_sensor_without_faults_changes_nothing_and_exposure_brightens():
    picture = np.random.default_rng(0).integers(0, 120, (48, 64, 3), np.uint8)
    assert np.array_equal(Sensor().apply(picture, np.random.default_rng(1)), picture)
    bright = Sensor(target=100.0).apply(picture, np.random.default_rng(1))
    assert bright.mean() == pytest.approx(100.0, abs=2.0)


# Command line


def test_render_command_fills_a_folder_once(renderer, tmp_path):
    arguments = ["sim", "render", "--frames", "3", "--out", str(tmp_path), "--seed", "4", "--size", "160x120", "--workers", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    pictures, labels = (sorted((tmp_path / folder).iterdir()) for folder in ("images", "labels"))
    assert [p.stem for p in pictures] == [p.stem for p in labels] == ["4_000000", "4_000001", "4_000002"]
    for picture, label in zip(pictures, labels, strict=True):
        ids = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
        assert ids.dtype == np.uint8 and ids.shape == (120, 160) and ids.max() < len(CLASSES)
        assert len(np.unique(ids)) >= 3
        assert cv2.imread(str(picture)).shape == (120, 160, 3)
    classes = json.loads((tmp_path / "classes.json").read_text())
    assert tuple(classes["names"]) == CLASSES and len(classes["palette"]) == len(CLASSES)
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, DataError) and str(tmp_path) in str(again.exception)


@needs_simulator
@pytest.mark.parametrize(("frames", "seed", "size", "views", "named"), [
    (0, 1, SMALL, 2, "frames is 0"), (1, -1, SMALL, 2, "seed is -1"), (1, 1, (8, 8), 2, "8x8"), (1, 1, SMALL, 0, "views is 0")])
def test_values_out_of_range_are_named(tmp_path, frames, seed, size, views, named):
    with pytest.raises(DataError, match=named):
        render_dataset(tmp_path, frames, seed, size, views)


_WITHOUT_EGL = """
import ctypes, ctypes.util
load, find = ctypes.CDLL.__init__, ctypes.util.find_library
def refuse(self, name=None, *a, **k):
    if name and "EGL" in str(name):
        raise OSError("libEGL.so: cannot open shared object file")
    return load(self, name, *a, **k)
ctypes.CDLL.__init__ = refuse
ctypes.util.find_library = lambda name: None if name == "EGL" else find(name)
"""


@pytest.mark.parametrize(("breakage", "advice"), [
    ("sys.modules['mujoco'] = None", "pip install 'deeprob_perception[sim]'"),
    pytest.param(_WITHOUT_EGL, "apt install libegl1 libgl1-mesa-dri", marks=needs_simulator)])
def test_what_is_missing_is_one_line_that_says_what_to_install(tmp_path, breakage, advice):
    code = f"import sys\n{breakage}\nsys.argv[1:] = ['sim', 'render', '--frames', '1', '--out', {str(tmp_path)!r}]\n"
    code += "from deeprob_perception.cli import main\nmain()\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert advice in run.stderr and "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


# Bags


def _read(path: Path) -> dict[str, list]:
    found: dict[str, list] = {}
    with open_bag(path) as bag:
        for message in bag.messages():
            found.setdefault(message.topic.name, []).append(
                (message.log_time, deserialize(bytes(message.raw), message.topic.msgtype)))
    return found


def _picture(message) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_two_recordings_with_one_seed_hold_equal_messages(renderer, tmp_path):
    bags = []
    for name in ("a.mcap", "b.mcap"):
        assert record.record(tmp_path / name, seconds=0.3, fps=10, seed=5, size=SMALL) == 3
        with open_bag(tmp_path / name) as bag:
            bags.append([(m.topic.name, m.log_time, bytes(m.raw)) for m in bag.messages()])
    assert bags[0] == bags[1]
    assert Counter(topic for topic, *_ in bags[0]) == {
        record.COLOUR: 3, record.INFO: 3, record.MASK: 3, record.DEPTH: 1, record.JOINTS: 12}


@needs_simulator
def test_a_recording_of_no_frames_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least one frame"):
        record.record(tmp_path / "a.mcap", seconds=0.0, fps=15, seed=1)
    assert not list(tmp_path.iterdir())


# The sample bag needs no simulator: what is expected of it stands here in full.

COLOUR, INFO, DEPTH, MASK, JOINTS = (
    "/camera/image_raw/compressed", "/camera/camera_info", "/camera/depth/image_raw/compressed",
    "/ground_truth/mask/compressed", "/joint_states")


@pytest.fixture(scope="module")
def sample() -> dict[str, list]:
    return _read(SAMPLE)


def test_sample_bag_is_at_most_ten_megabytes():
    assert SAMPLE.stat().st_size <= 10_000_000


def test_sample_bag_has_every_topic_and_stamp(sample):
    assert {topic: len(messages) for topic, messages in sample.items()} == {
        COLOUR: 300, INFO: 300, MASK: 300, DEPTH: 100, JOINTS: 1200}
    stamps = {topic: [stamp_ns(m.header) for _, m in messages] for topic, messages in sample.items()}
    assert stamps[COLOUR] == stamps[INFO] == stamps[MASK]
    assert stamps[DEPTH] == stamps[COLOUR][::3]
    assert stamps[JOINTS][::4] == stamps[COLOUR]
    assert np.diff(stamps[COLOUR]) == pytest.approx(1e9 / 15, abs=1)
    for topic, messages in sample.items():
        assert [log for log, _ in messages] == stamps[topic], topic
        if topic != JOINTS:
            assert {m.header.frame_id for _, m in messages} == {"camera_color_optical_frame"}, topic


def test_sample_bag_pictures_decode_and_show_every_class(sample):
    seen = np.zeros(256, np.int64)
    for _, message in sample[MASK]:
        labels = _picture(message)
        assert message.format == "mono8; png compressed" and labels.dtype == np.uint8 and labels.shape == (480, 640)
        seen += np.bincount(labels.ravel(), minlength=256)
    assert (seen[:7] > 0.001 * seen.sum()).all() and seen[7:].sum() == 0
    for _, message in sample[COLOUR][::15]:
        colour = _picture(message)
        assert "jpeg" in message.format and colour.shape == (480, 640, 3) and 40 < colour.mean() < 200
    for _, message in sample[DEPTH][::10]:
        depth = _picture(message)
        assert message.format == "16UC1; png compressed" and depth.dtype == np.uint16 and depth.shape == (480, 640)
        assert depth.min() > 200 and depth.max() < 8000  # mm, inside a room


def test_sample_bag_depth_fits_the_camera_info(sample):
    """The table is flat: with the right intrinsics its points lie in one plane."""
    info = sample[INFO][0][1]
    k = np.asarray(info.k).reshape(3, 3)
    assert (info.width, info.height, info.distortion_model) == (640, 480, "plumb_bob")
    assert k[0, 2] == 319.5 and k[1, 2] == 239.5
    assert np.array_equal(np.asarray(info.p).reshape(3, 4)[:, :3], k)
    labels, depth = _picture(sample[MASK][0][1]), _picture(sample[DEPTH][0][1]).astype(np.float64)
    v, u = np.nonzero(labels == 1)
    points = np.linalg.inv(k) @ np.stack([u, v, np.ones_like(u)]) * depth[v, u]
    # The top is the plane through three of its points that most others lie in (RANSAC): legs and sheets stay out.
    random = np.random.default_rng(0)

    def apart(plane):
        origin, normal = plane
        return np.abs(normal @ (points - origin[:, None]))

    def through(three):
        normal = np.cross(three[:, 1] - three[:, 0], three[:, 2] - three[:, 0])
        return three[:, 0], normal / np.linalg.norm(normal)

    planes = [through(points[:, random.choice(points.shape[1], 3, replace=False)]) for _ in range(100)]
    top = points[:, apart(max(planes, key=lambda plane: np.count_nonzero(apart(plane) < 3.0))) < 3.0]
    normal = np.linalg.svd(np.cov(top))[0][:, 2]
    assert top.shape[1] > 0.5 * len(u)
    assert np.sqrt(np.mean((normal @ (top - top.mean(axis=1, keepdims=True))) ** 2)) < 1.5  # mm


def test_sample_bag_joint_velocities_belong_to_its_positions(sample):
    names = {tuple(m.name) for _, m in sample[JOINTS]}
    assert len(names) == 1 and len(next(iter(names))) == 8
    position = np.array([m.position for _, m in sample[JOINTS]])
    velocity = np.array([m.velocity for _, m in sample[JOINTS]])
    slope = (position[2:] - position[:-2]) / (2 / 60)
    assert np.abs(velocity).max() > 0.5  # it moves
    assert np.abs(slope - velocity[1:-1]).max() < 0.1


def test_sample_bag_is_what_its_recipe_makes(renderer, sample):
    """A change to scenes or recording must come with a new sample bag: bags/README.md has the command."""
    made: dict[str, list] = {topic: [] for topic in sample}
    for topic, stamp, message in record.messages(300, 15.0, seed=4, size=(640, 480)):
        made[topic].append((stamp, message))
        if len(made[MASK]) == 2:
            break
    for (stamp, message), (log, shipped) in zip(made[JOINTS], sample[JOINTS], strict=False):
        assert stamp == log
        assert message.position == pytest.approx(shipped.position, abs=1e-9)
    for topic, least in ((MASK, 0.999), (COLOUR, 0.9)):  # OpenGL drivers differ at edges and in the last bit
        for (_, message), (_, shipped) in zip(made[topic], sample[topic], strict=False):
            new, old = _picture(message).astype(int), _picture(shipped).astype(int)
            assert np.mean(np.abs(new - old) <= (0 if topic == MASK else 12)) >= least


def test_an_opencv_that_lets_no_filter_be_chosen_writes_the_same_pictures(renderer, monkeypatch):
    """As OpenCV 4's, which goes with numpy 1 and so with a sourced ROS 2."""
    def first() -> dict[str, np.ndarray]:
        found = {}
        for topic, _, message in record.messages(2, 15.0, seed=4, size=(320, 240)):
            if topic in (DEPTH, MASK):
                found.setdefault(topic, _picture(message))
        return found

    expected = first()
    for name in [name for name in vars(cv2) if name.startswith("IMWRITE_PNG_FILTER")]:
        monkeypatch.delattr(cv2, name)
    again = first()
    assert set(again) == {DEPTH, MASK}
    for topic, picture in again.items():
        np.testing.assert_array_equal(picture, expected[topic])


def test_an_unstable_simulation_is_logged_and_leaves_no_file(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><body><freejoint/><geom size='1'/></body></worldbody></mujoco>")
    data = mujoco.MjData(model)
    data.qvel[0] = np.inf
    mujoco.mj_step(model, data)
    assert "QVEL" in caplog.text and not list(tmp_path.iterdir())
