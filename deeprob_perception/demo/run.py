# SPDX-License-Identifier: Apache-2.0
"""Start the demo's processes, show how they do, end them, and hand the recording on to the report."""

import json
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deeprob_perception import machine, zoo
from deeprob_perception.bags import Topic, open_bag
from deeprob_perception.demo import recording, report, tracks
from deeprob_perception.demo.folder import make_room
from deeprob_perception.demo.processes import LOOK, Diagnostics, Group
from deeprob_perception.doctor.ros import require_ros
from deeprob_perception.engines import model_file
from deeprob_perception.errors import PerceptionError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE
from deeprob_perception.replay import truth_topic
from deeprob_perception.replay_tasks import LABEL_INFO, MASK
from deeprob_perception.segmentation.classes import CLASS_SETS
from deeprob_perception.share import share_dir
from deeprob_perception.tracking.evaluate import read_mask

NODE, TRACKING = "segmentation", "tracking"
# Classes of the sample bag's ground truth whose first true mask is what somebody pointed at.
POINTED_AT = ("ball", "mug")
# Loading and compiling a model on a slow, busy machine; the first run of OpenVINO compiles without its cache.
START_LIMIT = 180.0
# After the last frame: an inference, and two readings of the diagnostics (1 Hz) that no longer differ.
SETTLE_LIMIT = 15.0


@dataclass
class Options:
    """What to show. bag: None is the sample bag that ships with the package. seconds: None plays it all.

    tracking: run the tracking node, too. seed_mask: an image with objects' ids in the first frame of `bag`; the sample bag's
    own are taken from its ground truth.
    """

    out: Path
    model: str = "tabletop"
    bag: Path | None = None
    seconds: float | None = None
    backend: str = "auto"
    tracking: bool = True
    seed_mask: Path | None = None


@dataclass
class Outcome:
    """The summary (also in `summary.json`) and where the files are."""

    summary: dict[str, Any]
    report: Path


def sample_bag() -> Path:
    """Return the bag that ships with the package."""
    return share_dir() / "bags" / "sample.mcap"


def run(options: Options, console: Console) -> Outcome:
    """Play a bag to a segmentation node, record what comes out, and write video, contact sheet, summary and report.

    Every process is gone when this returns or raises, an interrupt included.
    :raises PerceptionError: when ROS, the model or the bag is missing, a process dies, or no mask comes.
    """
    require_ros("the demo")
    bag_path = options.bag or sample_bag()
    with open_bag(bag_path) as bag:
        image = bag.image_topic()
        inputs = [topic.name for topic in bag.topics if topic.name in (image.name, camera_info_of(image.name))
                  or topic == truth_topic(bag)]
    path = zoo.resolve(options.model)
    metadata = model_file.read(path).metadata
    labels = recording.Labels(json.loads(metadata["classes"]), np.array(json.loads(metadata["palette"]), np.uint8))
    files = _Files(options.out)
    logs = make_room(files.out, *files.results)
    truth = recording.truth_of(bag_path, image.name)
    objects = plant(options, truth, files.seed) if options.tracking else {}
    outputs = [MASK, LABEL_INFO, "/diagnostics", *(tracks.WANTED if options.tracking else ())]

    nodes = [Diagnostics(name) for name in ([NODE, TRACKING] if options.tracking else [NODE])]
    with Group(logs, nodes) as group:
        demo = _Demo(group, console)
        demo.start(path, options.backend, image, [*inputs, *outputs], files.recorded)
        if objects:
            demo.seed(files.seed)
        demo.play(bag_path, 1 + len(inputs) + options.tracking, options.seconds)
        demo.settle()
        stages, counters = demo.diagnostics.percentiles(), demo.counters()
        facts = {key: demo.diagnostics.text("model", key)
                 for key in ("name", "sha256", "backend", "precision", "device", "input")}
        followed = demo.followed()
        demo.end()

    with console.status("reading the recording"):
        unfit = unfit_for_sample(options.bag, labels.names)
        try:
            figures = recording.read(files.recorded, image.name, recording.Truth() if unfit else truth, labels,
                                     files.video, files.sheet)
        except PerceptionError as error:
            raise PerceptionError(f"no mask came: {error}; {demo.hint()}") from error
        known = truth if options.bag is None and options.seed_mask is None else recording.Truth()
        found = tracks.read(files.recorded, image.name, known, objects, files.tracks)
        figures.unscored = unfit or figures.unscored
        summary = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "bag": {"name": bag_path.name, "topic": image.name, "sha256": zoo.checksum(bag_path) if bag_path.is_file() else ""},
            "model": {**facts, "licence": metadata.get("licence", ""), "training_data": metadata.get("training_data", "")},
            "frames": figures.frames,
            "masks": figures.masks,
            **counters,
            # Best effort and a queue of one: a frame may be overtaken before the node's executor takes it.
            "not_received": max(0, figures.frames - counters["received"]),
            "seconds": figures.seconds,
            "rate_in_hz": figures.rate_in,
            "rate_out_hz": figures.rate_out,
            "latency_ms": figures.latency.summary(),
            "stages": stages,
            "score": figures.score,
            "unscored": figures.unscored,
            "tracking": {**followed, **found.summary()} if found else None,
            "machine": machine.facts(),
            "versions": machine.versions(),
        }
        files.summary.write_text(json.dumps(summary, indent=2) + "\n")
        report.write(files.report, summary, figures, labels, files.video, metadata, found)
    console.print(_table(summary))
    console.print(f"report: [bold]{files.report}[/]", highlight=False)
    return Outcome(summary, files.report)


def plant(options: Options, truth: recording.Truth, path: Path) -> dict[int, str]:
    """Write the mask of what is to be tracked, a PNG of ids; return the objects, id -> name. {} writes none."""
    mask: np.ndarray | None
    if options.seed_mask is not None:
        mask = read_mask(options.seed_mask)
        objects = {int(i): f"object {i}" for i in np.unique(mask) if i}
    elif options.bag is None:
        objects = {i: name for i, name in enumerate(CLASS_SETS["tabletop"].names) if name in POINTED_AT}
        mask = tracks.seed_from(truth, objects)
    else:
        return {}
    if mask is None:
        return {}
    if not cv2.imwrite(str(path), mask):
        raise PerceptionError(f"cannot write {path}; name another folder with --out")
    return objects


def camera_info_of(image_topic: str) -> str:
    """Return the topic of the calibration beside an image topic, by image_transport's convention."""
    return image_topic.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"


@dataclass
class _Files:
    """The names of what the demo leaves in its folder."""

    out: Path

    def __post_init__(self) -> None:
        self.recorded, self.video = self.out / "demo.mcap", self.out / "overlay.mp4"
        self.tracks, self.seed = self.out / "tracking.mp4", self.out / "seed_mask.png"
        self.sheet, self.summary = self.out / "contact_sheet.png", self.out / "summary.json"
        self.report = self.out / "report.html"
        self.results = (self.recorded, self.video, self.tracks, self.seed, self.sheet, self.summary, self.report)


class _Demo:
    """Recorder, nodes and player while they run, and what is known of them."""

    def __init__(self, group: Group, console: Console):
        self._group, self._console = group, console
        self.diagnostics = group.nodes[0]
        self.tracking = group.nodes[1] if len(group.nodes) > 1 else None

    def start(self, model: Path, backend: str, image: Topic, topics: list[str], recorded: Path) -> None:
        """Start all but the player and return when the nodes are active and the recorder hears them."""
        self._recorder = self._group.record(recorded, topics)
        compressed = image.msgtype == COMPRESSED_IMAGE
        camera = ("-r", f"image:={image.name.removesuffix('/compressed') if compressed else image.name}",
                  "-p", f"image_transport:={'compressed' if compressed else 'raw'}", "-p", f"backend:={backend}")
        self._group.begin(NODE, "deeprob_perception.nodes.segmentation", "--ros-args", *camera, "-p", f"model:={model}")
        if self.tracking:
            self._group.begin(TRACKING, "deeprob_perception.nodes.tracking", "--ros-args", *camera)
        with self._console.status(f"starting recorder and node, loading {model.name}"):
            self._until_heard(self.diagnostics, {"mask"})
            if self.tracking:
                self._until_heard(self.tracking, {"tracks", "features_rgb"})

    def _until_heard(self, node: Diagnostics, outputs: set[str]) -> None:
        self._group.wait(lambda: outputs <= set(node.text("output", "listened_to").split()), START_LIMIT,
                         lambda: f"the {node.node} node did not get ready within {START_LIMIT:g} s; {self.hint()}")

    def seed(self, mask: Path) -> None:
        """Tell the tracking node what to track from the first frame on."""
        seeding = self._group.begin("seed", "deeprob_perception", "seed", "--mask", str(mask), "--timeout", "60", may_end=True)
        if seeding.popen.wait() != 0:
            raise PerceptionError(f"the objects could not be given to the tracking node: {seeding.last_words()}")

    def play(self, bag: Path, listeners: int, seconds: float | None) -> None:
        """Play the bag as soon as it has so many subscriptions; show how the node does until it or `seconds` are over."""
        player = self._group.begin("player", "deeprob_perception", "play", str(bag), "--restamp", "--wait-for-subscribers",
                                   str(listeners), "--wait-timeout", str(START_LIMIT), may_end=True)
        started: float | None = None
        shown = 0.0
        with Live(console=self._console, refresh_per_second=4, transient=not self._console.is_terminal) as live:
            while player.status is None:
                self._group.check()
                now = time.monotonic()
                if started is None and self.diagnostics.number("input", "received"):
                    started = now
                elapsed = now - started if started is not None else 0.0
                line = self._line(elapsed)
                live.update(line)
                if not self._console.is_terminal and now - shown >= 2 and started is not None:
                    shown = now
                    self._console.print(line, soft_wrap=True)
                if seconds is not None and elapsed >= seconds:
                    player.stop()
                    break
                time.sleep(LOOK)
        if player.status != 0 and seconds is None:
            raise PerceptionError(f"the player ended with status {player.status}: {player.last_words()}")

    def settle(self) -> None:
        """Return when the nodes have worked off what they received, by two equal readings, or after SETTLE_LIMIT."""
        deadline = time.monotonic() + SETTLE_LIMIT
        before, counts = [-1.0], [node.count for node in self._group.nodes]
        while time.monotonic() < deadline:
            self._group.check()
            if all(node.count > count for node, count in zip(self._group.nodes, counts, strict=True)):
                counts = [node.count for node in self._group.nodes]
                now = [node.number("output", "published") for node in self._group.nodes]
                if now == before:
                    return
                before = now
            time.sleep(LOOK)

    def counters(self) -> dict[str, int]:
        """Return the node's own counts of frames."""
        named = {name: ("input", name) for name in ("received", "dropped", "lost_in_transport", "failed")}
        named["unheard"] = ("output", "unheard")
        return {name: int(self.diagnostics.number(*place)) for name, place in named.items()}

    def followed(self) -> dict[str, Any]:
        """Return what the tracking node says of itself; {} without one."""
        node = self.tracking
        if node is None:
            return {}
        return {"stages": node.percentiles(), **{key: node.text("model", key) for key in ("backend", "precision")},
                "model": node.text("model", "name"), "dropped": int(node.number("input", "dropped"))}

    def end(self) -> None:
        """End the recorder first, so that it does not record the end of the others; its file is whole after this."""
        with self._console.status("writing the recording"):
            self._group.finish(self._recorder)

    def hint(self) -> str:
        """Return what the node itself says about why there is no output, and where its log is."""
        because = (self.diagnostics.text("input", "last_failure") or self.diagnostics.failure()
                   or self.diagnostics.text("output", "no_output_because"))
        return f"the node says: {because or 'nothing'} (logs in {self._group.logs})"

    def _line(self, elapsed: float) -> Text:
        number = self.diagnostics.number
        dropped, received = number("input", "dropped"), number("input", "received")
        share = f" ({dropped / received:.0%})" if received else ""
        return Text.assemble(
            (f"{elapsed:5.1f} s", "bold"), f"  in {number('input', 'rate_hz'):4.1f} Hz",
            "  masks ", (f"{number('output', 'rate_hz'):4.1f} Hz", "bold green"),
            "  latency p50 ", (f"{number('output', 'stamp_to_publish_p50_ms'):4.0f} ms", "bold"),
            f"  p95 {number('output', 'stamp_to_publish_p95_ms'):4.0f} ms",
            f"  dropped {dropped:.0f}{share}",
        )


def unfit_for_sample(bag: Path | None, names: list[str]) -> str:
    """Return why the sample bag's true masks do not fit a model with these classes; "" if they do."""
    own = CLASS_SETS["tabletop"].names
    if bag is None and names != own:
        return f"the sample bag's true masks have the classes {', '.join(own)}; this model has others"
    return ""


def _table(summary: dict[str, Any]) -> Table:
    latency, score, model = summary["latency_ms"], summary["score"], summary["model"]
    table = Table(title="deeprob demo", show_header=False, title_justify="left")
    table.add_row("model", f"{model['name']} on {model['backend']} {model['precision']}, {model['device']}")
    table.add_row("frames in", f"{summary['frames']}, {summary['rate_in_hz']:.1f} Hz")
    table.add_row("masks out", f"{summary['masks']}, {summary['rate_out_hz']:.1f} Hz")
    table.add_row("dropped (a newer frame came)", str(summary["dropped"]))
    table.add_row("not received, failed", f"{summary['not_received']}, {summary['failed']}")
    table.add_row("camera stamp to recorded mask", " / ".join(f"{latency[p]:.0f}" for p in ("p50", "p95", "p99"))
                  + " ms (p50 / p95 / p99)")
    for stage, row in summary["stages"].items():
        table.add_row(f"  {stage}", f"{row['p50']:.1f} / {row['p95']:.1f} / {row['p99']:.1f} ms")
    if score is not None:
        table.add_row("mIoU against ground truth", f"[bold]{score['miou']:.3f}[/]  ({score['frames']} frames)")
    else:
        table.add_row("score", f"none: {summary['unscored']}")
    if tracking := summary["tracking"]:
        latency = tracking["latency_ms"]
        table.add_row("tracking", f"{tracking['model']} on {tracking['backend']} {tracking['precision']}")
        table.add_row("  frames tracked", f"{tracking['frames']}; {tracking['dropped']} dropped")
        table.add_row("  camera stamp to recorded tracks", " / ".join(f"{latency[p]:.0f}" for p in ("p50", "p95", "p99"))
                      + " ms (p50 / p95 / p99)")
        table.add_row("  points in sight, median", f"{tracking['points_visible_median']:.0f}")
        for name, value in tracking["iou"].items():
            table.add_row(f"  IoU of {name}", "none" if value is None else f"{value:.3f}")
    return table
