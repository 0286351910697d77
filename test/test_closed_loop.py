# SPDX-License-Identifier: Apache-2.0
"""The closed loop as a user runs it: five nodes over DDS, a simulated arm that touches what its camera sees, a report."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from deeprob_perception.bags import open_bag
from deeprob_perception.demo import closed_loop, episodes
from deeprob_perception.demo.folder import make_room
from deeprob_perception.errors import PerceptionError
from deeprob_perception.messages.cdr import deserialize
from deeprob_perception.robots import Robot, parse
from deeprob_perception.video import read_frames

try:
    from deeprob_perception.sim.arms import ARMS, TOOL
    from deeprob_perception.sim.cell import Cell, Wish
    from deeprob_perception.sim.render import SceneRenderer

    with SceneRenderer() as renderer:
        Cell(Wish(0, ARMS["scara"](np.random.default_rng(0)), TOOL), renderer)
    WHY_NOT = "" if find_spec("rclpy") else "needs ROS 2 (extra `ros`)"
except (ImportError, PerceptionError) as error:
    WHY_NOT = str(error)

pytestmark = [
    pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]


def deeprob(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "deeprob_perception", *arguments], capture_output=True, text=True, timeout=500,
                          env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """What a demo of three cells leaves."""
    out = tmp_path_factory.mktemp("loop")
    done = deeprob("demo", "--closed-loop", "--episodes", "3", "--robot", "scara", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report:" in done.stdout
    return out


def test_the_arm_touches_the_named_objects_and_no_command_is_beyond_a_limit(shown):
    summary = json.loads((shown / "summary.json").read_text())
    assert summary["episodes"] == len(summary["results"]) == 3
    assert [row["kind"] for row in summary["results"]] == ["ball", "mug", "box"]
    assert [row["seed"] for row in summary["results"]] == [0, 1, 2]
    # 2, not 3: the machine that runs the tests may be so busy that the camera gives a frame a second.
    assert summary["touched"] == sum(row["success"] for row in summary["results"]) >= 2, summary["results"]
    for row in summary["results"]:
        assert row["success"] == (row["touched"] is not None) and row["trajectories"] > 0
        assert row["beyond_position"] == row["beyond_velocity"] == row["refused"] == 0


def test_the_recording_bears_that_out(shown):
    """Every trajectory on the wire is within the limits of the description that was published before it."""
    robot, checked, goals = None, 0, 0
    with open_bag(shown / "closed_loop.mcap") as bag:
        for message in bag.messages(["/robot_description", "/policy/joint_trajectory", "/target/goal"]):
            msg = deserialize(message.raw, message.topic.msgtype)
            if message.topic.name == "/robot_description":
                robot = Robot(parse(msg.data), tip=TOOL)
            elif message.topic.name == "/target/goal":
                goals += 1
                assert msg.header.frame_id == "base_link"
            elif robot is not None:
                for point in msg.points:
                    positions = np.array(point.positions)
                    # The last command to the robot before may come after the next one's description.
                    checked += bool((positions >= robot.lower - 1e-6).all() and (positions <= robot.upper + 1e-6).all())
                    assert (np.abs(point.velocities) <= 0.5 * robot.velocity + 1e-6).all()
                assert not np.any(msg.points[-1].velocities)
    assert goals > 3 and checked > 20


def test_the_report_shows_video_distance_and_actions_and_asks_nobody(shown):
    html = (shown / "report.html").read_text()
    assert len(re.findall(r'src="data:image/svg\+xml;base64,', html)) == 3
    assert 'src="data:video/mp4;base64,' in html and not re.search(r'(src|href)="(?!data:)', html)
    frames = [frame for _, frame in read_frames(shown / "closed_loop.mp4")]
    assert len(frames) > 5 and frames[0].shape == (480, 640, 3)
    figures = episodes.read(shown / "closed_loop.mcap", shown / "again.mp4")
    assert sorted(figures.distance) == [0, 1, 2] and len(figures.joints) == 4 and figures.actions
    touched = [row["seed"] for row in json.loads((shown / "summary.json").read_text())["results"] if row["success"]]
    for seed in touched:
        assert min(metres for _, metres in figures.distance[seed]) < 0.1


def test_what_is_missing_is_said_in_a_line(tmp_path):
    done = deeprob("eval", "closed-loop", "--episodes", "1", "--robot", str(tmp_path / "none.urdf"), "--out", str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "robot_cell" in done.stderr and "none.urdf" in done.stderr


def test_what_an_earlier_run_left_goes_first_and_a_folder_that_cannot_be_is_named(tmp_path):
    out = tmp_path / "out"
    (out / "logs").mkdir(parents=True)
    for name in ("logs/policy.log", "report.html", "mine.txt"):
        (out / name).write_text("old")
    make_room(out, out / "report.html", out / "summary.json")
    assert sorted(path.name for path in out.rglob("*")) == ["logs", "mine.txt"]
    (tmp_path / "file").touch()
    done = deeprob("demo", "--closed-loop", "--out", str(tmp_path / "file" / "x"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"cannot write to .*file/x: Not a directory; name another folder", done.stderr.replace("\n", " "))


def test_a_summary_of_episodes_counts_by_class_and_takes_the_median_of_those_that_touched():
    base = {"robot": "scara", "trajectories": 5, "refused": 0, "beyond_position": 0, "beyond_velocity": 1}
    rows = (("ball", True, 2.0, 0.1), ("mug", False, None, None), ("ball", True, 4.0, -0.01))
    found = [{**base, "kind": kind, "success": ok, "seconds": seconds, "lowest": low} for kind, ok, seconds, low in rows]
    summary = closed_loop.summary(found)
    assert summary["touched"] == 2 and summary["seconds_median"] == 4.0 and summary["lowest_m"] == -0.01
    assert summary["kinds"] == {"ball": {"episodes": 2, "touched": 2}, "mug": {"episodes": 1, "touched": 0}}
    assert summary["beyond_velocity"] == 3 and summary["trajectories"] == 15
