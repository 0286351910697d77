# SPDX-License-Identifier: Apache-2.0
"""`deeprob doctor` in broken surroundings: each is named, with advice, and none takes the others down."""

import functools
import json
import sys

import pytest
from typer.testing import CliRunner

from deeprob_perception import engines, zoo
from deeprob_perception.cli import app, commands  # noqa: F401
from deeprob_perception.doctor import models, ros, system
from deeprob_perception.doctor.check import FAIL, OFF, OK, WARN, redacted, run
from deeprob_perception.errors import PerceptionError
from deeprob_perception.nodes import dds

FAST = ("rmw_fastrtps_cpp", "")


def test_constants_are_those_of_the_nodes():
    assert ros.PROFILES == dds.VARIABLES
    assert system.ROOM_FOR_LARGE == dds.ROOM_FOR_LARGE


@pytest.mark.parametrize(("environ", "installed", "level", "word"), [
    ({}, set(), WARN, "none"),
    ({}, {"jazzy"}, OK, "PyPI"),
    ({"ROS_DISTRO": "humble", "AMENT_PREFIX_PATH": "/ws/install/x:/opt/ros/humble"}, set(), OK, "overlay /ws/install/x"),
    ({"AMENT_PREFIX_PATH": "/opt/ros/humble"}, {"jazzy"}, FAIL, "mixed"),
    ({}, {"jazzy", "kilted"}, FAIL, "mixed"),
])
def test_distribution(environ, installed, level, word):
    check = ros.distribution(environ, installed)
    assert check.level == level and word in check.text
    assert bool(check.advice) == (level != OK)


@pytest.mark.parametrize(("environ", "level"), [
    ({}, OK), ({"ROS_DOMAIN_ID": "x"}, FAIL), ({"ROS_DOMAIN_ID": "300"}, FAIL), ({"ROS_DOMAIN_ID": "150"}, WARN),
    ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "NEAR"}, FAIL), ({"ROS_AUTOMATIC_DISCOVERY_RANGE": "OFF"}, WARN),
    ({"ROS_LOCALHOST_ONLY": "1"}, OK), ({"ROS_LOCALHOST_ONLY": "1", "ROS_DOMAIN_ID": "150"}, WARN),
])
def test_discovery(environ, level):
    assert ros.discovery(environ).level == level


def test_middleware_names_the_image_size_trap(tmp_path):
    profile, rmem = tmp_path / "mine.xml", tmp_path / "rmem_max"
    assert ros.middleware({}, FAST).level == WARN
    assert ros.middleware({ros.PROFILES[0]: str(profile)}, FAST).level == FAIL
    profile.write_text("<dds/>")
    assert ros.middleware({ros.PROFILES[0]: str(profile)}, FAST).level == OK
    rmem.write_text("212992\n")
    small = ros.middleware({}, ("rmw_cyclonedds_cpp", ""), rmem)
    assert small.level == WARN and "sysctl" in small.advice
    assert ros.middleware({}, (None, "no such library")).level == FAIL
    assert ros.middleware({}, (None, "rclpy is not installed")).level == OFF


@pytest.mark.parametrize(("environ", "loads", "words"), [
    ({}, "absent", r"the demo needs ROS 2: source its setup\.bash, or pip install"),
    ({}, "broken", r"the demo needs ROS 2, and jazzy .*does not load: .*rclpy"),
    ({"ROS_DISTRO": "humble"}, "here", r"the demo needs one ROS 2, and there are mixed distributions: .*humble ROS_DISTRO"),
])  # fmt: skip
def test_what_needs_ros_says_what_is_wrong_with_it(monkeypatch, environ, loads, words):
    monkeypatch.setattr(ros, "distribution", functools.partial(ros.distribution, environ, {"jazzy"}))
    monkeypatch.setattr(ros.importlib.util, "find_spec", lambda name: None if loads == "absent" else object())
    monkeypatch.setitem(sys.modules, "rclpy", None)  # an import of it raises ImportError
    with pytest.raises(PerceptionError, match=words):
        ros.require_ros("the demo")


def test_processor_and_board(tmp_path):
    cpuinfo, release = tmp_path / "cpuinfo", tmp_path / "release"
    cpuinfo.write_text("flags : fpu avx2 avx512_bf16\n")
    assert system.precisions(cpuinfo).text.endswith("natively fp32, bf16")
    assert system.jetson(release).level == OFF
    release.write_text("# R36 (release), REVISION: 4.0, GCID: 1\n")
    assert "36.4.0 (JetPack 6)" in system.jetson(release).text
    release.write_text("# R32 (release), REVISION: 7.1\n")
    assert system.jetson(release).level == WARN
    assert system.shared_memory(tmp_path / "absent").level == WARN


def test_a_gpu_whose_driver_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert system.gpu().level in (OFF, WARN)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho cannot talk to the driver >&2\nexit 9\n")
    tool.chmod(0o755)
    check = system.gpu()
    assert check.level == WARN and "cannot talk to the driver" in check.text and check.advice


def test_back_ends_models_and_cache(tmp_path, monkeypatch):
    assert models.models().level == OK
    entry = zoo.Entry("bad", tmp_path / "bad.onnx", "0" * 64, "segmentation", None, shipped=True)
    monkeypatch.setattr(zoo, "catalogue", lambda: {"bad": entry})
    assert models.models().level == FAIL and "bad.onnx" in models.models().text
    monkeypatch.setattr(engines, "unavailable", lambda name: "it is broken")
    assert models.backends().level == FAIL
    (tmp_path / "file").write_text("")
    assert models.cache(tmp_path / "file" / "cache").level == WARN
    monkeypatch.setattr(models, "LITTLE", 0)
    assert models.cache(tmp_path / "new").level == OK
    assert not (tmp_path / "new").exists(), "looking must leave nothing behind"


def test_a_check_that_raises_is_red_and_the_rest_go_on():
    def broken():
        raise OSError("no disk")

    found = run([broken, lambda: ros.discovery({})])
    assert [check.level for check in found] == [FAIL, OK]
    assert "no disk" in found[0].text and found[0].advice


def test_exit_status_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr(ros, "middleware", lambda: ros.Check("middleware", OK, "/home/somebody/x"))
    out = tmp_path / "doctor.json"
    assert CliRunner().invoke(app, ["doctor", "--json", str(out)]).exit_code == 0
    assert "somebody" not in out.read_text()
    assert {"name", "level", "text", "advice"} == set(json.loads(out.read_text())["checks"][0])
    monkeypatch.setenv("ROS_DOMAIN_ID", "many")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1
    assert redacted("/home/anna/ws") == "/home/USER/ws"


def test_a_folder_of_the_same_name_is_no_installed_module(tmp_path, monkeypatch):
    (tmp_path / "some_ros_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not ros.installed("some_ros_package")
    assert ros.installed("json")
    assert not ros.installed("no_such_module")


def test_rendering_that_fails_is_told_with_the_package_to_install(monkeypatch):
    if system.rendering().level == OFF:
        pytest.skip("MuJoCo is not installed (extra `sim`)")
    monkeypatch.setenv("MUJOCO_GL", "no_such_library")
    check = system.rendering()
    assert check.level == WARN
    assert "libegl1" in check.advice
