# SPDX-License-Identifier: Apache-2.0
"""The demo's report: one HTML file that holds its pictures, video and plot, and asks no other machine for anything."""

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np

from deeprob_perception.demo.recording import Figures, Labels
from deeprob_perception.demo.tracks import Tracking

# Larger videos stay a file beside the report: browsers get slow on data URIs of many megabytes.
INLINE_LIMIT = 8_000_000
STAGES = {
    "wait": "waiting for the worker",
    "decode": "jpeg to pixels",
    "resize": "resizing in and out",
    "infer": "network, soft-max and arg-max",
    "publish": "serialising and publishing",
    "stamp_to_publish": "camera stamp to published mask",
    "overhead": "the same without the network",
}
INK, MUTED, ACCENT = "#1d2733", "#6b7785", "#2563eb"


def write(
    path: Path, summary: dict[str, Any], figures: Figures, labels: Labels, video: Path, metadata: dict[str, str],
    found: Tracking | None = None,
) -> None:
    """Write the report.

    :param summary: as in `summary.json`. :param video: the overlay video, taken in while it is below INLINE_LIMIT.
    :param metadata: the model file's own description. :param found: of the tracking node.
    """
    html = template("report.html").render(
        summary=summary,
        video=film(video),
        tracks_video=film(found.video) if found else "",
        tracks_poster=picture(found.poster) if found else "",
        poster=picture(figures.pictures["poster"]),
        sheet=picture(figures.pictures["sheet"]),
        plot=data_uri(latency_plot(figures).encode(), "image/svg+xml"),
        classes=classes(labels, summary["score"]),
        stages=[(name, STAGES.get(name, ""), row) for name, row in summary["stages"].items()],
        card=card(summary["model"], metadata),
        files=sorted((file.name, file.stat().st_size) for file in path.parent.iterdir() if file.is_file()),
    )
    path.write_text(html)


def template(name: str) -> jinja2.Template:
    """Return a page of this folder, ready to be filled in; what is left out is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deeprob_perception.demo", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name)


def data_uri(content: bytes, kind: str) -> str:
    """Return bytes as a data URI of the media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def film(video: Path) -> str:
    """Return a video as a data URI while it is below INLINE_LIMIT, else the name of the file beside the report."""
    return data_uri(video.read_bytes(), "video/mp4") if video.stat().st_size <= INLINE_LIMIT else video.name


def picture(bgr: np.ndarray) -> str:
    """Return a picture, uint8 `[H, W, 3]` BGR, as a jpeg data URI."""
    done, stream = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])
    assert done
    return data_uri(stream.tobytes(), "image/jpeg")


def classes(labels: Labels, score: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return name, CSS colour and IoU (None where there is none) of each class."""
    iou = score["iou"] if score else {}
    return [{"name": name, "colour": "rgb({}, {}, {})".format(*colour), "iou": iou.get(name)}
            for name, colour in zip(labels.names, labels.palette.tolist(), strict=True)]


def card(model: dict[str, str], metadata: dict[str, str]) -> list[tuple[str, str]]:
    """Return what the model file says of itself and how it ran, as (what, value)."""
    rows = [
        ("model", model["name"]), ("sha256", model["sha256"]), ("input", model["input"]),
        ("back end", f"{model['backend']}, {model['precision']}"), ("device", model["device"]),
        ("licence", model["licence"]), ("training data", model["training_data"]),
    ]
    try:
        metrics = json.loads(metadata.get("metrics", "") or "{}")
    except ValueError:
        metrics = {}
    if isinstance(metrics, dict):
        rows += [(f"metric: {name}", f"{value:.4g}" if isinstance(value, float) else str(value))
                 for name, value in metrics.items() if isinstance(value, (int, float, str))]
    return [(what, value) for what, value in rows if value]


def latency_plot(figures: Figures) -> str:
    """Return an SVG: latency of each mask over the time of its frame, with the median and the 95th percentile."""
    seconds, latency = np.array(figures.series).T
    with plot(9.6, 2.9) as (axes, drawn):
        axes.plot(seconds, latency, ".-", color=ACCENT, linewidth=0.8, markersize=3.5)
        for value, name in zip(np.percentile(latency, (50, 95)), ("median", "95 %"), strict=True):
            axes.axhline(value, color=MUTED, linewidth=0.8, linestyle="--")
            axes.annotate(f"{name} {value:.0f} ms", (1.005, value), xycoords=("axes fraction", "data"), va="center",
                          color=MUTED, fontsize=9)
        axes.set(xlabel="time of the frame (s)", ylabel="latency (ms)", ylim=(0, None))
    return drawn[0]


@contextmanager
def plot(width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Give the axes of a plot of so many inches in the report's style; its SVG is the list's one item when the block ends."""
    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": MUTED,
             "axes.edgecolor": "#d5dbe3", "xtick.color": MUTED, "ytick.color": MUTED, "svg.fonttype": "path",
             "svg.hashsalt": "deeprob"}
    drawn: list[str] = []
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        yield axes, drawn
        axes.margins(x=0.01)
        axes.grid(axis="y", color="#eef1f5")
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    drawn.append(stream.getvalue())
