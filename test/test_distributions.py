# SPDX-License-Identifier: Apache-2.0
"""What the distributions of ROS 2, from Humble on, have in common and where they differ."""

import ast
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deeprob_perception import engines
from deeprob_perception.isolation import isolated
from deeprob_perception.messages.cdr import make_header
from deeprob_perception.messages.images import make_image, to_array
from deeprob_perception.segmentation import Segmenter

ROOT = Path(__file__).resolve().parents[1]
# Looked up in the sources of launch 1.0.7 and launch_ros 0.19.8, Humble's; Jazzy's substitutions that compare are not there.
HUMBLES_LAUNCH = {
    "launch": {"Action", "Condition", "LaunchContext", "LaunchDescription"},
    "launch.actions": {"DeclareLaunchArgument", "GroupAction", "OpaqueFunction"},
    "launch.conditions": {"IfCondition"},
    "launch.events.process": {"ProcessExited"},
    "launch.substitutions": {"LaunchConfiguration", "PythonExpression"},
    "launch_ros.actions": {"LifecycleNode", "SetParameter", "SetParametersFromFile"},
    "launch_ros.parameter_descriptions": {"ParameterValue"},
}


@pytest.mark.parametrize("file", [*sorted((ROOT / "launch").glob("*.py")),
                                  ROOT / "deeprob_perception" / "nodes" / "launching.py"], ids=lambda path: path.name)
def test_launch_files_take_only_what_humble_has(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("launch", "launch_ros"):
            lacking = {alias.name for alias in node.names} - HUMBLES_LAUNCH.get(node.module or "", set())
            assert not lacking, f"{node.module}: look up whether Humble has {lacking}"


@pytest.mark.parametrize("distribution, variable", [
    ("humble", "ROS_LOCALHOST_ONLY"), ("jazzy", "ROS_AUTOMATIC_DISCOVERY_RANGE"), (None, "ROS_AUTOMATIC_DISCOVERY_RANGE"),
])  # fmt: skip
def test_loopback_is_asked_for_by_the_variable_that_the_distribution_knows(distribution, variable, monkeypatch) -> None:
    monkeypatch.delenv("ROS_DISTRO", raising=False)
    if distribution:
        monkeypatch.setenv("ROS_DISTRO", distribution)
    assert set(isolated()) == {variable, "ROS_DOMAIN_ID"}
    assert 1 <= int(isolated()["ROS_DOMAIN_ID"]) <= 101


@pytest.mark.ros
def test_humbles_names_and_a_middleware_without_that_event_cost_the_count_of_losses_only(tiny_model, tmp_path) -> None:
    pytest.importorskip("rclpy", reason="needs ROS 2 (extra `ros`)")
    from ros_harness import Probe, Process, isolated_ros

    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    labels = Segmenter(engines.load(tiny_model, backend="onnxruntime", precision="fp32", threads=1))(picture).labels
    with isolated_ros():
        node = Process(tmp_path / "log", str(Path(__file__).parent / "humble_node.py"), "--ros-args",
                       "-p", f"model:={tiny_model}", "-p", "backend:=onnxruntime", "-p", "precision:=fp32", "-p", "threads:=1",
                       program=(sys.executable, "-u"))  # fmt: skip
        probe = Probe(node)
        try:
            masks = probe.listen("/segmentation/mask")
            image = make_image(picture, "bgr8", make_header(time.time_ns(), "camera"))
            np.testing.assert_array_equal(to_array(probe.mask_of(probe.publisher("/image"), image, masks)), labels)
            probe.fresh_diagnostics()
            assert probe.values("input")["lost_in_transport"] == "unknown"
            assert "lost frames are not counted: event type is not supported" in node.output
        finally:
            probe.close()
            assert node.stop() == 0, node.output
