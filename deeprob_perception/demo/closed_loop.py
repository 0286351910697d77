# SPDX-License-Identifier: Apache-2.0
"""The closed loop: camera -> segmentation -> target -> policy -> joints, over real DDS, until the arm touches the named object.

`episodes` runs and judges; `run` is the demo, which records them and makes a report.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deeprob_perception import machine, zoo
from deeprob_perception.demo import episodes as recorded_episodes
from deeprob_perception.demo.folder import make_room
from deeprob_perception.demo.processes import Diagnostics, Group
from deeprob_perception.doctor.ros import require_ros
from deeprob_perception.errors import PerceptionError

START_LIMIT = 180.0  # seconds for all nodes to be ready; OpenVINO's first run compiles without its cache
KINDS = ("ball", "mug", "box", "cylinder")
CAMERA, INFO, DEPTH = "/camera/image_raw", "/camera/camera_info", "/camera/depth/image_raw"
MASK, LABELS, GOAL = "/segmentation/mask", "/segmentation/label_info", "/target/goal"
COMMANDS, STATE, DESCRIPTION = "/policy/joint_trajectory", "/robot_cell/state", "/robot_description"
RECORDED = (f"{CAMERA}/compressed", INFO, MASK, LABELS, GOAL, "/joint_states", COMMANDS, STATE, DESCRIPTION, "/diagnostics")
# Half the velocity limits: a controller's cubic spline between two points runs up to 5/3 of their velocity.
POLICY = {"velocity_share": "0.5", "goal_max_age": "3.0", "approach_height": "0.15"}


@dataclass
class Options:
    """What to run. robot: capsule_arm, scara, or a URDF file, whose link `tip` is then the tool.

    kinds: the classes to touch, in turn. seconds: that the arm has for one episode. seed: of the first cell; the others follow.
    """

    out: Path
    episodes: int = 4
    robot: str = "capsule_arm"
    tip: str = ""
    kinds: tuple[str, ...] = KINDS
    seconds: float = 20.0
    seed: int = 0
    model: str = "tabletop"
    policy: str = "reach"
    backend: str = "auto"
    policy_options: dict[str, str] = field(default_factory=lambda: dict(POLICY))


def episodes(options: Options, console: Console, record: Path | None = None) -> Iterator[dict[str, Any]]:
    """Start the nodes, yield what the cell says at the end of each episode, and end the nodes.

    :param record: a bag to write. :raises PerceptionError: when something is missing or a process dies.
    """
    require_ros("the closed loop")
    if find_spec("mujoco") is None:
        raise PerceptionError("the closed loop needs mujoco: pip install 'deeprob_perception[sim]'")
    model, policy = zoo.resolve(options.model), zoo.resolve(options.policy)
    logs = make_room(options.out)
    nodes = {name: Diagnostics(name) for name in ("robot_cell", "segmentation", "target", "policy")}
    # Mesa's threads would take the nodes' cores.
    with Group(logs, list(nodes.values()), LP_NUM_THREADS="1") as group:
        recorder = None if record is None else group.record(record, RECORDED)
        begin = group.begin
        begin("robot_cell", "deeprob_perception.nodes.robot_cell", *ros(
            {"robot": options.robot, "tip": options.tip, "seed": str(options.seed), "target_class": options.kinds[0]},
            {"joint_trajectory": COMMANDS}))  # fmt: skip
        begin("segmentation", "deeprob_perception.nodes.segmentation", *ros(
            {"model": str(model), "backend": options.backend, "image_transport": "compressed"}, {"image": CAMERA}))
        begin("target", "deeprob_perception.nodes.target", *ros(
            {"bounds": "[-1.2, -1.2, -0.05, 1.2, 1.2, 0.6]",  # on the table, not on the floor behind it
             f"qos_overrides.{DEPTH}.subscription.reliability": "reliable"},  # the cell's is, and no depth image may get lost
            {"mask": MASK, "label_info": LABELS, "depth": DEPTH, "camera_info": INFO}))  # fmt: skip
        begin("policy", "deeprob_perception.nodes.policy", *ros(
            {"model": str(policy), "tip": options.tip or "tool", **options.policy_options}, {"goal": GOAL}))

        def ready() -> bool:
            masks, seen = nodes["segmentation"].number("output", "published"), nodes["target"].number("input", "masks")
            return bool(masks and seen and nodes["policy"].text("input", "robot"))

        with console.status("starting the robot cell and the nodes"):
            group.wait(ready, START_LIMIT, lambda: f"the nodes were not ready within {START_LIMIT:g} s (logs in {logs})")
        judge = begin("episodes", "deeprob_perception.nodes.episodes", "--episodes", str(options.episodes), "--seconds",
                      str(options.seconds), "--kinds", ",".join(options.kinds), piped=True, may_end=True)  # fmt: skip
        assert judge.popen.stdout is not None
        done = 0
        for line in judge.popen.stdout:
            group.check()
            done += 1
            yield json.loads(line)
        if done < options.episodes:
            judge.popen.wait()
            group.check()
            raise PerceptionError(f"after {done} of {options.episodes} episodes: {judge.last_words()} (logs in {logs})")
        if recorder is not None:
            group.finish(recorder)


def ros(parameters: dict[str, str], remaps: dict[str, str]) -> list[str]:
    """Return a node's arguments; an empty parameter keeps its default."""
    words = ["--ros-args"]
    for name, value in parameters.items():
        words += ["-p", f"{name}:={value}"] if value else []
    for name, topic in remaps.items():
        words += ["-r", f"{name}:={topic}"]
    return words


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all episodes come to, ready for JSON."""
    times = sorted(e["seconds"] for e in found if e["success"])
    lowest = [e["lowest"] for e in found if e["lowest"] is not None]
    return {
        "episodes": len(found),
        "touched": sum(e["success"] for e in found),
        "seconds_median": times[len(times) // 2] if times else None,
        "trajectories": sum(e["trajectories"] for e in found),
        "refused": sum(e["refused"] for e in found),
        "beyond_position": sum(e["beyond_position"] for e in found),
        "beyond_velocity": sum(e["beyond_velocity"] for e in found),
        "lowest_m": min(lowest) if lowest else None,
        "robots": sorted({e["robot"] for e in found}),
        "kinds": {kind: {"episodes": len(rows), "touched": sum(e["success"] for e in rows)}
                  for kind in sorted({e["kind"] for e in found}) if (rows := [e for e in found if e["kind"] == kind])},
    }  # fmt: skip


def show(episode: dict[str, Any], console: Console) -> None:
    """Print one episode in a line."""
    told = f"touched after {episode['seconds']:.1f} s" if episode["success"] else f"not touched: {episode['why']}"
    style = "green" if episode["success"] else "red"
    console.print(f"cell {episode['seed']:3d}  {episode['robot']}  {episode['kind']:8s}  [{style}]{told}[/]", soft_wrap=True,
                  highlight=False)  # fmt: skip


def table(figures: dict[str, Any]) -> Table:
    """Return what all episodes come to as a table."""
    result = Table(title="closed loop", show_header=False, title_justify="left")
    result.add_row("touched", f"[bold]{figures['touched']} of {figures['episodes']}[/]")
    for kind, row in figures["kinds"].items():
        result.add_row(f"  {kind}", f"{row['touched']} of {row['episodes']}")
    if figures["seconds_median"] is not None:
        result.add_row("seconds to the touch, median", f"{figures['seconds_median']:.1f}")
    result.add_row("trajectories followed, refused", f"{figures['trajectories']}, {figures['refused']}")
    beyond = f"{figures['beyond_position']}, {figures['beyond_velocity']}"
    result.add_row("beyond a limit of position, of velocity", beyond)
    if figures["lowest_m"] is not None:
        result.add_row("lowest that the arm came, over the table", f"{figures['lowest_m'] * 1e3:.0f} mm")
    return result


def run(options: Options, console: Console) -> dict[str, Any]:
    """Run the demo: episodes, a recording, a video, plots and a report in `options.out`; return the summary.

    :raises PerceptionError: when something is missing, a process dies, or the recording has no pictures.
    """
    bag, video = options.out / "closed_loop.mcap", options.out / "closed_loop.mp4"
    report, written = options.out / "report.html", options.out / "summary.json"
    make_room(options.out, bag, video, report, written)
    found = []
    for episode in episodes(options, console, bag):
        show(episode, console)
        found.append(episode)
    with console.status("reading the recording"):
        figures = recorded_episodes.read(bag, video)
        result = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"), **summary(found),
            "model": options.model, "policy": options.policy, "results": found, "latency_ms": figures.latency.summary(),
            "machine": machine.facts(), "versions": machine.versions(),
        }  # fmt: skip
        written.write_text(json.dumps(result, indent=1) + "\n")
        recorded_episodes.write(report, result, figures, video)
    console.print(table(result))
    console.print(f"report: [bold]{report}[/]", highlight=False)
    return result
