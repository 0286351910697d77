# SPDX-License-Identifier: Apache-2.0
"""The segmentation node, live: a process of its own, fed and heard over DDS."""

import json
import shutil
import signal
import time

import cv2
import numpy as np
import pytest
from ros_harness import BEST_EFFORT, LATCHED, PATIENCE, Probe, isolated_ros, segmentation_node
from std_msgs.msg import String

from deeprob_perception import engines
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, make_header, message, serialize, stamp_ns
from deeprob_perception.messages.images import make_compressed, make_image, to_array, to_bgr
from deeprob_perception.nodes.labels import LABEL_TYPES, names_of
from deeprob_perception.segmentation import Segmenter
from deeprob_perception.segmentation.overlay import draw

pytestmark = pytest.mark.ros
CLASSES = ["background", "table", "box", "ball", "cylinder", "mug", "robot"]


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


@pytest.fixture(scope="module")
def segmenter(tiny_model):
    return Segmenter(engines.load(tiny_model, precision="fp32", threads=1))


@pytest.fixture(scope="module")
def node(tiny_model, tmp_path_factory):
    process = segmentation_node(tmp_path_factory.mktemp("node") / "log", model=tiny_model, precision="fp32", threads=1)
    yield process
    assert process.alive, process.output
    assert process.stop() == 0, process.output
    assert "Traceback" not in process.output, process.output


@pytest.fixture
def probe(node):
    probe = Probe(node)
    yield probe
    probe.close()


def picture(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Return smooth blobs of colour, uint8 `[height, width, 3]`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def now() -> object:
    return make_header(time.time_ns(), "camera_color_optical_frame")


def test_mask_and_confidence_are_those_of_the_segmenter_under_the_cameras_stamp_and_frame(probe, segmenter):
    masks, sure = probe.listen("/segmentation/mask"), probe.listen("/segmentation/confidence")
    camera = probe.publisher("/image")
    for seed in range(3):
        image = make_image(picture(seed), "bgr8", now())
        mask = probe.mask_of(camera, image, masks)
        expected = segmenter(picture(seed), confidence=True)
        assert len(np.unique(expected.labels)) > 1
        np.testing.assert_array_equal(to_array(mask), expected.labels)
        assert (mask.encoding, mask.height, mask.width, mask.step) == ("mono8", 120, 160, 160)
        assert stamp_ns(mask.header) == stamp_ns(image.header)
        assert mask.header.frame_id == "camera_color_optical_frame"
        certainty = probe.until(
            lambda: next((m for m in sure if stamp_ns(m.header) == stamp_ns(image.header)), None), "confidence")  # noqa: B023
        np.testing.assert_array_equal(to_array(certainty), expected.confidence)
        assert certainty.encoding == "mono8"


def test_another_encoding_gives_the_same_mask_and_the_size_may_change_in_mid_stream(probe, segmenter):
    masks = probe.listen("/segmentation/mask")
    camera = probe.publisher("/image")
    for height, width in ((120, 160), (96, 128), (50, 301)):
        bgr = picture(height, height, width)
        mask = probe.mask_of(camera, make_image(np.ascontiguousarray(bgr[..., ::-1]), "rgb8", now()), masks)
        np.testing.assert_array_equal(to_array(mask), segmenter(bgr).labels)


BAD = {
    "unknown encoding": message(IMAGE, make_header(1, "c"), 2, 2, "hsv99", 0, 6, np.zeros(12, np.uint8)),
    "truncated": message(IMAGE, make_header(2, "c"), 100, 100, "bgr8", 0, 300, np.zeros(500, np.uint8)),
    "step of at least": message(IMAGE, make_header(3, "c"), 2, 2, "bgr8", 0, 3, np.zeros(6, np.uint8)),
    "no size": message(IMAGE, make_header(4, "c"), 0, 0, "bgr8", 0, 0, np.zeros(0, np.uint8)),
    "depth or data": message(IMAGE, make_header(5, "c"), 2, 2, "16UC1", 0, 4, np.zeros(8, np.uint8)),
}


def test_bad_images_are_named_in_diagnostics_and_the_next_good_one_is_processed(probe, segmenter):
    masks = probe.listen("/segmentation/mask")
    camera = probe.publisher("/image")
    probe.mask_of(camera, make_image(picture(0), "bgr8", now()), masks)
    failed = int(probe.until(lambda: probe.values("input"), "diagnostics")["failed"])
    for reason, image in BAD.items():
        camera.publish(serialize(image, IMAGE))
        probe.says("input", reason)
        assert probe.status["input"].level == b"\x02" and probe.status["output"].level == b"\x02"
        assert reason in probe.values("output")["no_output_because"]
    assert int(probe.values("input")["failed"]) >= failed + len(BAD)
    mask = probe.mask_of(camera, make_image(picture(9), "bgr8", now()), masks)
    np.testing.assert_array_equal(to_array(mask), segmenter(picture(9)).labels)
    probe.until(lambda: probe.status["input"].level == b"\x00", "an input that is fine again")


def test_class_names_reach_a_late_subscriber(probe):
    heard = probe.listen("/segmentation/label_info", LABEL_TYPES[0], LATCHED)
    probe.until(lambda: heard, "class names")
    assert names_of(heard[0]) == list(CLASSES)
    if LABEL_TYPES[0] is String:
        assert json.loads(heard[0].data) == {str(i): name for i, name in enumerate(CLASSES)}


def test_live_parameters_change_the_overlay_and_wrong_ones_are_refused_all_together(probe, segmenter):
    overlays = probe.listen("/segmentation/overlay")
    camera = probe.publisher("/image")
    bgr = picture(4)
    labels = segmenter(bgr).labels
    before = probe.mask_of(camera, make_image(bgr, "bgr8", now()), overlays)
    np.testing.assert_array_equal(to_bgr(before), draw(bgr, labels, segmenter.palette, 0.5, None))

    shown = [CLASSES[int(np.bincount(labels.ravel()).argmax())]]
    assert probe.set_parameters(overlay_alpha=1.0, shown_classes=shown).successful
    after = probe.mask_of(camera, make_image(bgr, "bgr8", now()), overlays)
    np.testing.assert_array_equal(
        to_bgr(after), draw(bgr, labels, segmenter.palette, 1.0, {CLASSES.index(name) for name in shown}))

    refused = probe.set_parameters(overlay_alpha=0.25, shown_classes=["box", "unicorn"])
    assert not refused.successful and "unicorn" in refused.reason and "cylinder" in refused.reason
    refused = probe.set_parameters(overlay_alpha=1.5)
    assert not refused.successful and "overlay_alpha" in refused.reason
    unchanged = probe.mask_of(camera, make_image(bgr, "bgr8", now()), overlays)
    np.testing.assert_array_equal(to_bgr(unchanged), to_bgr(after))
    assert probe.set_parameters(overlay_alpha=0.5, shown_classes=["all"]).successful


@pytest.mark.parametrize(("name", "value"), [("model", "street"), ("backend", "onnxruntime"), ("threads", 2),
                                             ("image_transport", "compressed")])
def test_fixed_parameters_are_refused_while_active_with_the_way_to_set_them(probe, name, value):
    refused = probe.set_parameters(max_rate=5.0, **{name: value})
    assert not refused.successful
    assert f"{name} is fixed while the node is active" in refused.reason and "cleanup" in refused.reason


def test_a_transition_that_the_state_does_not_allow_is_refused_and_the_node_lives_on(probe):
    assert probe.state() == "active"
    assert not probe.transition("configure")
    assert probe.state() == "active"


def test_deactivating_ends_the_output_and_activating_resumes_it(probe, segmenter):
    masks = probe.listen("/segmentation/mask")
    camera = probe.publisher("/image")
    probe.mask_of(camera, make_image(picture(1), "bgr8", now()), masks)
    assert probe.transition("deactivate")
    probe.says("output", "not active but inactive")
    assert not camera.get_subscription_count()
    assert probe.transition("activate")
    probe.until(camera.get_subscription_count, "the node's subscription")
    mask = probe.mask_of(camera, make_image(picture(2), "bgr8", now()), masks)
    np.testing.assert_array_equal(to_array(mask), segmenter(picture(2)).labels)


def test_under_overload_the_newest_frame_wins_and_every_frame_is_counted_once(probe):
    masks = probe.listen("/segmentation/mask")
    camera = probe.publisher("/image")
    probe.mask_of(camera, make_image(picture(0), "bgr8", now()), masks)
    assert probe.set_parameters(max_rate=4.0).successful
    probe.fresh_diagnostics()
    before, published = probe.values("input"), int(probe.values("output")["published"])
    del masks[:]
    sent = []
    for number in range(40):
        header = now()
        sent.append(stamp_ns(header))
        camera.publish(serialize(make_image(picture(number), "bgr8", header), IMAGE))
        due = time.monotonic() + 0.02
        probe.until(lambda: time.monotonic() > due, "the next frame's time")  # noqa: B023
    probe.until(lambda: masks and stamp_ns(masks[-1].header) == sent[-1], "the mask of the newest frame")
    probe.fresh_diagnostics()
    after = probe.values("input")
    grown = {key: int(after[key]) - int(before[key]) for key in ("received", "dropped", "failed", "lost_in_transport")}
    assert grown["received"] + grown["lost_in_transport"] == len(sent)
    assert grown["failed"] == 0 and len(masks) == int(probe.values("output")["published"]) - published
    assert grown["received"] == len(masks) + grown["dropped"]
    assert grown["dropped"] >= 20
    stamps = [stamp_ns(mask.header) for mask in masks]
    assert stamps == sorted(set(stamps)) and set(stamps) <= set(sent)
    assert probe.set_parameters(max_rate=0.0).successful


def test_stamps_of_zero_of_another_clock_and_backward_are_told_and_tolerated(probe):
    masks = probe.listen("/segmentation/mask")
    camera = probe.publisher("/image")
    for stamp, words in ((0, "are 0"), (5_000_000_000, "stale stamps"), (4_000_000_000, "stale stamps")):
        probe.mask_of(camera, make_image(picture(1), "bgr8", make_header(stamp, "c")), masks)
        probe.says("input", words)
    assert int(probe.values("input")["backward_stamps"]) >= 1


def test_without_listeners_nothing_is_computed_and_without_a_publisher_that_is_said(probe):
    probe.says("input", "nobody publishes /image")
    probe.says("output", "nobody listens")
    camera = probe.publisher("/image")
    probe.fresh_diagnostics()
    received, published = int(probe.values("input")["received"]), probe.values("output")["published"]

    def arrives():
        camera.publish(serialize(make_image(picture(1), "bgr8", now()), IMAGE))
        return int(probe.values("input")["received"]) > received + 2

    probe.until(arrives, "frames that arrive")
    assert probe.values("output")["published"] == published
    assert int(probe.values("output")["unheard"]) >= 2
    assert probe.status["output"].level == b"\x00" and "nobody listens" in probe.status["output"].message


def test_compressed_input_a_model_that_is_missing_then_corrupt_then_mended_and_lazy_overlay(tmp_path, tiny_model, segmenter):
    node = segmentation_node(tmp_path / "log", "__ns:=/left", "image:=/camera/image_raw", model=tmp_path / "lost.onnx",
                             precision="fp32", threads=1, image_transport="compressed")
    probe = Probe(node, "/left/segmentation")
    try:
        probe.says("model", "lost.onnx")
        assert probe.status["model"].level == b"\x02" and probe.state() == "unconfigured"
        (tmp_path / "corrupt.onnx").write_bytes(tiny_model.read_bytes()[:5000])
        assert probe.set_parameters(model=str(tmp_path / "corrupt.onnx")).successful
        assert not probe.transition("configure")
        probe.says("output", "corrupt.onnx")
        shutil.copy(tiny_model, tmp_path / "lost.onnx")
        assert probe.set_parameters(model=str(tmp_path / "lost.onnx")).successful
        assert probe.transition("configure") and probe.state() == "inactive"
        assert probe.values("model") or probe.fresh_diagnostics() is None
        assert probe.transition("activate")

        masks = probe.listen("/left/segmentation/mask")
        camera = probe.publisher("/camera/image_raw/compressed", COMPRESSED_IMAGE)
        image = make_compressed(picture(3), now(), "jpeg", 95)
        mask = probe.mask_of(camera, image, masks, COMPRESSED_IMAGE)
        np.testing.assert_array_equal(to_array(mask), segmenter(to_bgr(image)).labels)
        assert stamp_ns(mask.header) == stamp_ns(image.header)

        image.data = image.data[: len(image.data) // 2]
        camera.publish(serialize(image, COMPRESSED_IMAGE))
        probe.says("input", "could not be processed")
        png = make_compressed(picture(5), now(), "png")
        mask = probe.mask_of(camera, png, masks, COMPRESSED_IMAGE)
        np.testing.assert_array_equal(to_array(mask), segmenter(picture(5)).labels)

        probe.fresh_diagnostics()
        assert "overlay_p50_ms" not in probe.values("output"), "drawn although nobody listened"
        assert {"decode_p50_ms", "infer_p99_ms", "stamp_to_publish_p95_ms"} <= probe.values("output").keys()
        overlays = probe.listen("/left/segmentation/overlay/compressed", COMPRESSED_IMAGE)
        overlay = probe.mask_of(camera, png, overlays, COMPRESSED_IMAGE)
        drawn = draw(picture(5), segmenter(picture(5)).labels, segmenter.palette, 0.5, None)
        assert np.abs(to_bgr(overlay).astype(int) - drawn).mean() < 8
        probe.until(lambda: "overlay_p50_ms" in probe.values("output"), "the overlay's stage")
        facts = probe.values("model")
        assert facts["name"] == "tiny" and facts["precision"] == "fp32" and len(facts["sha256"]) == 64
    finally:
        probe.close()
        assert node.stop(signal.SIGTERM) == 0, node.output
    assert "Traceback" not in node.output, node.output


def test_incompatible_qos_another_type_and_the_other_transport_are_named(tmp_path, tiny_model):
    parameters = {"qos_overrides./right/image.subscription.reliability": "reliable"}
    node = segmentation_node(tmp_path / "log", "__ns:=/right", model=tiny_model, threads=1, autostart=False, **parameters)
    probe = Probe(node, "/right/segmentation")
    try:
        probe.says("output", "not active but unconfigured")
        assert probe.transition("configure") and probe.transition("activate")
        probe.publisher("/right/image/compressed", COMPRESSED_IMAGE, wait=False)
        probe.says("input", "set image_transport to compressed")
        wrong = probe.publisher("/right/image", COMPRESSED_IMAGE, wait=False)
        probe.says("input", "/right/image is published as sensor_msgs/msg/CompressedImage")
        probe.node.destroy_publisher(wrong)
        probe.publisher("/right/image", IMAGE, BEST_EFFORT, wait=False)
        probe.says("input", "incompatible QoS on /right/image")
        assert "eliab" in probe.status["input"].message and probe.status["input"].level == b"\x02"
        probe.until(lambda: "offers incompatible QoS" in node.output, "a warning in the log")
    finally:
        probe.close()
        assert node.stop() == 0, node.output


def test_a_parameter_that_cannot_be_is_one_clear_line_and_no_traceback(tmp_path, tiny_model):
    node = segmentation_node(tmp_path / "log", model=tiny_model, image_transport="theora")
    assert node.wait(PATIENCE) == 2
    assert "theora" in node.output and "raw, compressed" in node.output and "Traceback" not in node.output
