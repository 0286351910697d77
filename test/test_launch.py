# SPDX-License-Identifier: Apache-2.0
"""perception.launch.py, launched for real: mask values, stamps and encodings through the arguments it offers."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest

launch_pytest = pytest.importorskip("launch_pytest", reason="needs launch_pytest, which is part of ROS 2 and not on PyPI")

from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription  # noqa: E402
from launch.launch_description_sources import PythonLaunchDescriptionSource  # noqa: E402
from launch_pytest.actions import ReadyToTest  # noqa: E402
from ros_harness import Probe, isolated_ros  # noqa: E402

from deeprob_perception import engines  # noqa: E402
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, make_header, stamp_ns  # noqa: E402
from deeprob_perception.messages.images import make_compressed, to_array, to_bgr  # noqa: E402
from deeprob_perception.segmentation import Segmenter  # noqa: E402
from launch import LaunchDescription  # noqa: E402

pytestmark = pytest.mark.ros
LAUNCH_FILE = Path(__file__).resolve().parents[1] / "launch" / "perception.launch.py"


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros():
        yield


@launch_pytest.fixture
def perception(tiny_model, tmp_path):
    """The launch file as a user includes it; `precision` comes from the parameter file, the rest from arguments."""
    parameters = tmp_path / "mine.yaml"
    parameters.write_text("/**:\n  ros__parameters:\n    precision: fp32\n    threads: 1\n    model: overridden_below\n")
    arguments = {
        "params_file": str(parameters), "namespace": "robot", "image_topic": "/front/image_raw",
        "image_transport": "compressed", "model": str(tiny_model), "backend": "onnxruntime",
    }
    source = PythonLaunchDescriptionSource(str(LAUNCH_FILE))
    return LaunchDescription([IncludeLaunchDescription(source, launch_arguments=arguments.items()), ReadyToTest()])


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


def test_every_argument_is_declared_at_top_level_with_a_description():
    from launch import LaunchContext

    description = PythonLaunchDescriptionSource(str(LAUNCH_FILE)).get_launch_description(LaunchContext())
    declared = {action.name: action for action in description.entities if isinstance(action, DeclareLaunchArgument)}
    assert set(declared) == {"params_file", "namespace", "image_topic", "image_transport", "model", "backend",
                             "use_sim_time", "log_level", "autostart", "build_only"}
    assert all(len(action.description) > 10 for action in declared.values())
    assert declared["backend"].choices == ["", "auto", *engines.BACKENDS]
