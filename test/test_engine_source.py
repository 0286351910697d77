# SPDX-License-Identifier: Apache-2.0
"""A node whose engine takes minutes to build: it serves on another back end and changes over, or says why it doesn't."""

import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from ros_harness import Probe, Process, isolated_ros

from deeprob_perception import engines
from deeprob_perception.messages.cdr import make_header
from deeprob_perception.messages.images import make_image, to_array
from deeprob_perception.segmentation import Segmenter

pytestmark = pytest.mark.ros
HERE = Path(__file__).parent


class ScriptProcess(Process):
    """slow_backend_node.py with the node's parameters."""

    def __init__(self, log: Path, verdict: Path, **parameters: object):
        options = [item for name, value in parameters.items() for item in ("-p", f"{name}:={value}")]
        super().__init__(log, "slow_backend_node", str(verdict), "--ros-args", *options)


@pytest.fixture(scope="module", autouse=True)
def ros():
    with isolated_ros(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        yield


@pytest.fixture
def start(tmp_path, tiny_model):
    """Return a function that starts the node with the slow back end; processes and probes end with the test."""
    running = []

    def started(**parameters):
        node = ScriptProcess(tmp_path / "log", tmp_path / "verdict", model=tiny_model, backend="slow", precision="fp32",
                             threads=1, **parameters)
        probe = Probe(node)
        running.append((node, probe))
        return node, probe

    yield started
    for node, probe in running:
        probe.close()
        assert node.stop() == 0, node.output
        assert "Traceback" not in node.output, node.output


def picture() -> np.ndarray:
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)


def mask(probe: Probe, camera, masks) -> np.ndarray:
    return to_array(probe.mask_of(camera, make_image(picture(), "bgr8", make_header(time.time_ns(), "c")), masks))


def test_serves_on_another_back_end_and_changes_over_when_the_build_is_done(start, tmp_path, tiny_model):
    node, probe = start()
    masks, camera = probe.listen("/segmentation/mask"), probe.publisher("/image")
    expected = Segmenter(engines.load(tiny_model, "onnxruntime", "fp32", threads=1))(picture()).labels
    assert (mask(probe, camera, masks) == expected).mean() > 0.98  # bf16 perhaps, but it serves
    probe.fresh_diagnostics()
    before = probe.values("model")
    assert before["backend"] in engines.BACKENDS
    assert "slow fp32 is being built" in before["building"] and before["backend"] in before["building"]
    assert probe.status["model"].message == before["building"]

    (tmp_path / "verdict").write_text("good")
    deadline = time.monotonic() + 40
    while probe.values("model")["backend"] != "slow":
        np.testing.assert_equal(mask(probe, camera, masks).shape, expected.shape)
        probe.fresh_diagnostics()
        assert time.monotonic() < deadline, node.output
    np.testing.assert_array_equal(mask(probe, camera, masks), expected)
    assert probe.values("model")["precision"] == "fp32"
    assert probe.values("model")["building"] == ""
    assert "built by a process of its own" in node.output


def test_a_build_that_fails_is_told_and_the_stand_in_goes_on(start, tmp_path):
    _node, probe = start()
    masks, camera = probe.listen("/segmentation/mask"), probe.publisher("/image")
    mask(probe, camera, masks)
    (tmp_path / "verdict").write_text("bad")
    status = probe.says("model", "slow fp32 could not be built")
    assert status.level == b"\x01"
    assert "goes on" in status.message
    mask(probe, camera, masks)


def test_without_serve_while_building_the_missing_engine_fails_the_transition(start):
    _node, probe = start(serve_while_building=False)
    probe.says("model", "not configured: the slow engine is not built")
    assert probe.state() == "unconfigured"


def test_stopping_does_not_wait_for_the_build(start):
    node, probe = start()
    probe.until(lambda: "is being built" in probe.values("model").get("building", ""), "a build")
    started = time.monotonic()
    assert node.stop() == 0, node.output
    assert time.monotonic() - started < 20


def test_build_only_loads_and_ends(tmp_path, tiny_model):
    node = Process(tmp_path / "log", "deeprob_perception.nodes.segmentation", "--ros-args", "-p", f"model:={tiny_model}",
                   "-p", "build_only:=true", "-p", f"cache_dir:={tmp_path / 'cache'}", "-p", "backend:=openvino")
    assert node.wait() == 0, node.output
    assert any(path.is_file() for path in (tmp_path / "cache" / "openvino").iterdir()), "nothing was compiled into the cache"
    broken = Process(tmp_path / "log2", "deeprob_perception.nodes.segmentation", "--ros-args", "-p", "model:=nonsense",
                     "-p", "build_only:=true")
    assert broken.wait() == 1, broken.output
    assert "no model named 'nonsense'" in broken.output


