# SPDX-License-Identifier: Apache-2.0
"""The tracking node, live: a process of its own, fed, seeded and heard over DDS."""

import time

import cv2
import numpy as np
import pytest
from geometry_msgs.msg import PointStamped
from ros_harness import PATIENCE, Probe, Process, isolated_ros
from sensor_msgs.msg import PointCloud2
from std_srvs.srv import SetBool, Trigger

from deeprob_perception.messages.cdr import make_header, serialize, stamp_ns
from deeprob_perception.messages.clouds import read_tracks
from deeprob_perception.messages.images import make_image, to_array

torch = pytest.importorskip("torch", reason="the test model is made by torch's exporter (extra `train`)")

pytestmark = pytest.mark.ros
HEIGHT, WIDTH = 96, 136


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from deeprob_perception import zoo
    from deeprob_perception.nets import features

    recipe = {"task": "features", "backbone": "vit-micro", "image_size": 112, "mean": [0.5] * 3, "std": [0.25] * 3}
    torch.manual_seed(3)
    return zoo.export(recipe, features.build(recipe).state_dict(), tmp_path_factory.mktemp("vit") / "vit.onnx", HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def node(model, tmp_path_factory):
    arguments = ["--ros-args", "-p", f"model:={model}", "-p", "precision:=fp32", "-p", "threads:=1", "-p", "points:=30"]
    process = Process(tmp_path_factory.mktemp("node") / "log", "deeprob_perception.nodes.tracking", *arguments)
    yield process
    assert process.alive, process.output
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output, process.output


@pytest.fixture
def probe(node):
    probe = Probe(node, "/tracking")
    yield probe
    probe.close()


def picture(x: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a ground with a square of another pattern at x, uint8 `[96, 136, 3]`, and the square's mask (255)."""
    rng = np.random.default_rng(1)
    ground = cv2.resize(rng.integers(0, 160, (12, 17, 3), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    ground[32:72, x : x + 40] = cv2.resize(rng.integers(90, 255, (6, 6, 3), np.uint8), (40, 40))
    mask[32:72, x : x + 40] = 255
    return ground, mask


class Camera:
    """Publishes pictures with stamps that go on, until an output of the same stamp is heard."""

    def __init__(self, probe: Probe):
        self.probe, self.publisher = probe, probe.publisher("/image")

    def show(self, bgr: np.ndarray, heard: list, stamp: int | None = None):
        """Show one picture, with ever later stamps until one gets through; return the output of its stamp."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            now = time.time_ns() if stamp is None else stamp
            self.publisher.publish(serialize(make_image(bgr, "bgr8", make_header(now, "camera")), "sensor_msgs/msg/Image"))
            again = time.monotonic() + 1.0
            while time.monotonic() < again:
                self.probe._executor.spin_once(timeout_sec=0.05)
                for message in heard:
                    at = stamp_ns(message.header) if hasattr(message.header.stamp, "nanosec") else 0
                    if at == now:
                        return message
        pytest.fail(f"no output of the picture's stamp\n{self.probe.watched.output}")


def test_tracks_mask_and_features_carry_the_cameras_stamp_and_hold_what_was_seeded(probe):
    clouds, masks = probe.listen("/tracking/tracks", PointCloud2), probe.listen("/tracking/object_mask")
    features = probe.listen("/tracking/features")
    camera = Camera(probe)
    bgr, mask = picture(30)
    first = camera.show(bgr, clouds)
    rows = read_tracks(first)
    assert first.header.frame_id == "camera" and 5 < len(rows) <= 30 and rows["visible"].all()
    assert not masks, "there is no mask before an object is given"
    seed = probe.publisher("/tracking/seed_mask")
    seed.publish(serialize(make_image(mask, "mono8", make_header(0, "")), "sensor_msgs/msg/Image"))
    time_of_mask = probe.until(lambda: masks or (camera.show(bgr, clouds) and masks), "a mask")[-1]
    found = to_array(time_of_mask)
    assert time_of_mask.encoding == "mono8" and found.shape == (HEIGHT, WIDTH) and set(np.unique(found)) == {0, 255}
    for step in range(1, 5):
        bgr, mask = picture(30 + 4 * step)
        found = to_array(camera.show(bgr, masks))
    assert np.count_nonzero((found > 0) & (mask > 0)) > 0.6 * np.count_nonzero((found > 0) | (mask > 0))
    dense = probe.until(lambda: features and features[-1], "features")
    array = to_array(dense)
    assert dense.encoding == "32FC192" and array.shape == (12, 17, 192)
    np.testing.assert_allclose(np.linalg.norm(array, axis=-1), 1, atol=1e-4)
    later = read_tracks(camera.show(bgr, clouds))
    kept = np.isin(rows["id"], later["id"][later["visible"] > 0])
    assert kept.mean() > 0.5 and later["age"].max() >= 5


def test_services_forget_and_pause_and_bad_seeds_are_told_in_diagnostics(probe):
    clouds = probe.listen("/tracking/tracks", PointCloud2)
    camera = Camera(probe)
    bgr, _ = picture(30)
    before = read_tracks(camera.show(bgr, clouds))
    assert probe.call(Trigger, "reset", Trigger.Request()).success
    after = read_tracks(camera.show(bgr, clouds))
    assert not set(after["id"].tolist()) & set(before["id"].tolist())
    point = probe.node.create_publisher(PointStamped, "/tracking/seed_point", 10)
    probe.until(point.get_subscription_count, "a subscriber of seed_point")
    outside = PointStamped()
    outside.point.x, outside.point.y = 500.0, 20.0
    point.publish(outside)
    inside = PointStamped()
    inside.point.x, inside.point.y = 60.0, 50.0
    point.publish(inside)
    def given() -> bool:
        rows = read_tracks(camera.show(bgr, clouds))
        near = np.hypot(rows["u"] - 60, rows["v"] - 50) < 1
        return bool((near & (rows["visible"] > 0)).any())

    probe.until(given, "the point that was given")
    probe.until(lambda: "outside the image" in probe.values("input").get("last_failure", ""), "the bad seed in diagnostics")
    assert probe.call(SetBool, "enable", SetBool.Request(data=False)).success
    heard = len(clouds)
    for _ in range(3):
        camera.publisher.publish(
            serialize(make_image(bgr, "bgr8", make_header(time.time_ns(), "camera")), "sensor_msgs/msg/Image")
        )
    probe.fresh_diagnostics()
    assert len(clouds) == heard and probe.values("model")["enabled"] == "false"
    assert probe.call(SetBool, "enable", SetBool.Request(data=True)).success
    assert camera.show(bgr, clouds)


def test_a_bag_that_begins_anew_and_another_resolution_start_afresh(probe):
    clouds = probe.listen("/tracking/tracks", PointCloud2)
    camera = Camera(probe)
    bgr, _ = picture(30)
    late = read_tracks(camera.show(bgr, clouds))
    early = read_tracks(camera.show(bgr, clouds, stamp=5_000_000_000))
    assert not set(early["id"].tolist()) & set(late["id"].tolist()) and (early["age"] == 0).all()
    large = read_tracks(camera.show(cv2.resize(bgr, (2 * WIDTH, 2 * HEIGHT)), clouds, stamp=6_000_000_000))
    assert not set(large["id"].tolist()) & set(early["id"].tolist()) and large["u"].max() > WIDTH
