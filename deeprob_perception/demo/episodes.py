# SPDX-License-Identifier: Apache-2.0
"""A recording of the closed loop -> a video of what the camera saw and the nodes made of it, plots, and the report's page."""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deeprob_perception.bags import open_bag
from deeprob_perception.demo import report
from deeprob_perception.errors import BagError
from deeprob_perception.messages.cdr import deserialize, stamp_ns
from deeprob_perception.messages.images import to_array, to_bgr
from deeprob_perception.robots import parse
from deeprob_perception.segmentation import overlay
from deeprob_perception.segmentation.classes import CLASS_SETS
from deeprob_perception.target import CameraMount
from deeprob_perception.timing import Samples
from deeprob_perception.video import VideoWriter

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563", "#84cc16")
_ABOVE: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}  # of the axes, where no curve is


@dataclass
class Figures:
    """What a recording shows. Times are seconds since its first frame.

    distance: of each cell (its seed), times and m from tool to object by the cell's own truth. actions: times, commanded
    positions and velocities of each joint of the first cell. latency: ms from a mask's stamp to its goal's arrival at the
    recorder. frames: pictures in the video.
    """

    distance: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    actions: list[tuple[float, list[float], list[float]]] = field(default_factory=list)
    joints: list[str] = field(default_factory=list)
    latency: Samples = field(default_factory=Samples)
    frames: int = 0
    poster: np.ndarray = field(default_factory=lambda: np.zeros((2, 2, 3), np.uint8))


def read(recorded: Path, video: Path) -> Figures:
    """Read a recording and write the video: mask, goal and distance over the camera's pictures.

    :raises BagError: when it has no picture with a mask.
    """
    figures = Figures()
    palette = np.array(CLASS_SETS["tabletop"].palette, np.uint8)
    waiting: dict[int, np.ndarray] = {}
    mount: CameraMount | None = None
    matrix = np.eye(3)
    goal: np.ndarray | None = None
    state: dict[str, Any] = {}
    first = 0
    with ExitStack() as stack:
        bag = stack.enter_context(open_bag(recorded))
        writer = stack.enter_context(VideoWriter(video, fps=10.0, quality=26))
        for message in bag.messages():
            name = message.topic.name
            if name == "/diagnostics" or name.endswith("label_info") or name == "/joint_states":
                continue
            msg = deserialize(message.raw, message.topic.msgtype)
            if name.endswith("/compressed"):
                first = first or message.log_time
                waiting[stamp_ns(msg.header)] = to_bgr(msg)
                for old in [stamp for stamp in waiting if stamp < stamp_ns(msg.header) - 2_000_000_000]:
                    del waiting[old]  # those that never got a mask
            elif name.endswith("camera_info"):
                matrix = np.array(msg.k).reshape(3, 3)
            elif name == "/robot_description":
                urdf = parse(msg.data)
                mount, goal = CameraMount(urdf, "camera_color_optical_frame"), None
            elif name == "/robot_cell/state":
                state = json.loads(msg.data)
                if first:
                    row = figures.distance.setdefault(state["seed"], [])
                    row.append(((message.log_time - first) / 1e9, state["distance"]))
            elif name == "/target/goal":
                goal = np.array([msg.point.x, msg.point.y, msg.point.z])
                figures.latency.add((message.log_time - stamp_ns(msg.header)) / 1e6)
            elif name == "/policy/joint_trajectory" and len(figures.distance) <= 1:
                point = msg.points[0]
                figures.joints = list(msg.joint_names)
                figures.actions.append(((message.log_time - first) / 1e9, list(point.positions), list(point.velocities)))
            elif name == "/segmentation/mask":
                stamp = stamp_ns(msg.header)
                bgr = waiting.pop(stamp, None)
                if bgr is None:
                    continue
                picture = overlay.draw(bgr, to_array(msg), palette, 0.35)
                _annotate(picture, mount, matrix, goal, state)
                writer.write(picture, stamp)
                figures.frames += 1
                if goal is not None and state.get("touched") is None:
                    figures.poster = picture
    if not figures.frames:
        raise BagError(f"{recorded} has no picture with a mask")
    return figures


def _annotate(
    picture: np.ndarray, mount: CameraMount | None, matrix: np.ndarray, goal: np.ndarray | None, state: dict[str, Any]
) -> None:
    """Draw the goal as a ring and say how far the tool is from the object, into the picture."""
    if mount is not None and goal is not None and not mount.joint_names:
        x, y, z = (np.linalg.inv(mount.pose({})) @ [*goal, 1.0])[:3]
        if z > 0.05:
            u, v = (round(float(matrix[i, i] * (x, y)[i] / z + matrix[i, 2])) for i in range(2))
            for radius, colour in ((12, (0, 0, 0)), (11, (255, 255, 255)), (3, (0, 0, 255))):
                cv2.circle(picture, (u, v), radius, colour, -1 if radius == 3 else 2, cv2.LINE_AA)
    if state:
        text = f"{state['robot']}  {state['target'].rstrip('0123456789')}  "
        text += "touched" if state["touched"] is not None else f"{state['distance'] * 100:.0f} cm"
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.6, 1)
        cv2.rectangle(picture, (0, 0), (width + 20, height + 18), (40, 30, 25), -1)
        cv2.putText(picture, text, (10, height + 8), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (255, 255, 255), 1, cv2.LINE_AA)


def write(path: Path, summary: dict[str, Any], figures: Figures, video: Path) -> None:
    """Write the report, one HTML file."""
    html = report.template("closed_loop.html").render(
        summary=summary, video=report.film(video), poster=report.picture(figures.poster), frames=figures.frames,
        distance=report.data_uri(distance_plot(figures).encode(), "image/svg+xml"),
        positions=report.data_uri(action_plot(figures, 1, "position (rad or m)").encode(), "image/svg+xml"),
        velocities=report.data_uri(action_plot(figures, 2, "velocity (per s)").encode(), "image/svg+xml"),
        files=sorted((file.name, file.stat().st_size) for file in path.parent.iterdir() if file.is_file()),
    )  # fmt: skip
    path.write_text(html)


def distance_plot(figures: Figures) -> str:
    """Return an SVG: the distance from tool to object over time, a line a cell, and where a touch begins."""
    with report.plot(9.6, 2.9) as (axes, drawn):
        for number, (seed, rows) in enumerate(figures.distance.items()):
            seconds, metres = np.array(rows).T
            axes.plot(seconds, metres * 100, color=_COLOURS[number % len(_COLOURS)], linewidth=1.4, label=f"cell {seed}")
        axes.axhline(2.0, color=report.MUTED, linewidth=0.8, linestyle="--")
        axes.annotate("touch", (1.005, 2.0), xycoords=("axes fraction", "data"), va="center", color=report.MUTED, fontsize=9)
        axes.set(xlabel="time (s)", ylabel="tool to surface (cm)", ylim=(-2, None))
        if len(figures.distance) <= 8:
            axes.legend(frameon=False, ncols=8, fontsize=8, **_ABOVE)
    return drawn[0]


def action_plot(figures: Figures, column: int, label: str) -> str:
    """Return an SVG of what was commanded to each joint of the first cell, positions (column 1) or velocities (2)."""
    with report.plot(4.6, 2.9) as (axes, drawn):
        seconds = [row[0] for row in figures.actions]
        values = np.array([row[column] for row in figures.actions])  # [steps, joints]
        for joint, name in enumerate(figures.joints):
            axes.plot(seconds, values[:, joint], ".-", markersize=2.5,
                      color=_COLOURS[joint % len(_COLOURS)], linewidth=1.2, label=name)  # fmt: skip
        axes.set(xlabel="time (s)", ylabel=label)
        if figures.joints:
            axes.legend(frameon=False, fontsize=7, ncols=4, columnspacing=1.0, **_ABOVE)
    return drawn[0]
