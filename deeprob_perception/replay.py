# SPDX-License-Identifier: Apache-2.0
"""A bag in -> what a node does with every frame (`replay_tasks`) -> a bag, hashes, and a summary.

Nothing here depends on clocks, threads or chance: frames are taken in the order of their log times, one after another,
and none is dropped, so two replays of one bag with one model, back end and machine give the same masks.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deeprob_perception import contact_sheet, engines, machine, video, zoo
from deeprob_perception.bags import Bag, BagMessage, BagWriter, Topic, open_bag
from deeprob_perception.errors import BagError, ImageError, MessageError, OrderError, SeedError
from deeprob_perception.messages import cdr, images
from deeprob_perception.replay_tasks import Seeds, SegmentationTask, Task, TrackingTask
from deeprob_perception.segmentation.scores import Confusion
from deeprob_perception.timing import Stages

_SHEET_FRAMES = 12
# Ground truth and camera frames of one stamp may be recorded this many messages apart.
_PAIRING_WINDOW = 64


@dataclass
class Options:
    """What to replay, and how. Paths of None are not written."""

    bag: Path
    out: Path
    model: str
    topic: str | None = None
    backend: str = "auto"
    precision: str = "auto"
    threads: int = 0
    confidence: bool = False
    overlay_video: Path | None = None
    ground_truth: str | None = None  # topic; None: found by its name
    max_frames: int | None = None
    alpha: float = 0.5
    task: str = "segmentation"
    seeds: Seeds = field(default_factory=Seeds)  # of tracking


@dataclass
class Replay:
    """What came out. `summary` is ready for JSON; docs/replay.md explains its keys."""

    summary: dict[str, Any]
    contact_sheet: Path


@dataclass
class _Score:
    """Pairs masks with ground truth by their stamps, whichever comes first."""

    confusion: Confusion
    frames: int = 0
    problems: list[str] = field(default_factory=list)
    _masks: dict[int, np.ndarray] = field(default_factory=dict)
    _truths: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, stamp: int, mask: np.ndarray | None = None, truth: np.ndarray | None = None) -> None:
        if mask is None:
            mask = self._masks.pop(stamp, None)
            if mask is None and truth is not None:
                self._keep(self._truths, stamp, truth)
        else:
            truth = self._truths.pop(stamp, None)
            if truth is None:
                self._keep(self._masks, stamp, mask)
        if mask is not None and truth is not None:
            try:
                self.confusion.add(mask, truth)
                self.frames += 1
            except ValueError as error:
                self.problems.append(f"stamp {stamp}: {error}")

    @staticmethod
    def _keep(waiting: dict[int, np.ndarray], stamp: int, array: np.ndarray) -> None:
        waiting[stamp] = array
        if len(waiting) > _PAIRING_WINDOW:
            waiting.pop(next(iter(waiting)))


def replay(
    options: Options,
    on_frame: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] | None = None,
) -> Replay:
    """Replay a bag: write masks, labels, overlay (and confidence) to `options.out`, and a contact sheet PNG beside it.

    A frame that cannot be read is named in the summary and left out; the run goes on.
    :param on_frame: called after each frame with their number so far and in all.
    :raises BagError: when the bag or topic cannot be read, or holds not one good frame.
    :raises ModelError, EngineError: when the model cannot be loaded.
    """
    if options.out.resolve() == options.bag.resolve():
        raise BagError(f"--out {options.out} is the bag to replay; give another file")
    model = zoo.resolve(options.model)
    opening = open_bag(options.bag) if warn is None else open_bag(options.bag, warn)
    with opening as bag:
        topic = bag.image_topic(options.topic)
        truths = truth_topic(bag, options.ground_truth)
        engine = engines.load(model, backend=options.backend, precision=options.precision, threads=options.threads)
        task: Task
        if options.task == "tracking":
            first = first_truth(bag, truths) if truths is not None and options.seeds.classes else None
            task = TrackingTask(engine, options.seeds, options.alpha, first)
        else:
            task = SegmentationTask(engine, options.confidence, options.alpha)
        run = _Run(options, bag, topic, truths, task)
        run.go(on_frame)
        summary = {
            "bag": {"path": str(options.bag), "sha256": {f.name: zoo.checksum(f) for f in _whole(bag)}, "damage": bag.damage},
            "topic": topic.name,
            "task": options.task,
            "model": {"name": engine.metadata.get("name", model.stem), "sha256": zoo.checksum(model)},
            "backend": engine.backend,
            "precision": engine.precision,
            "device": engine.device,
            "versions": machine.versions(),
            "out": str(options.out),
            **run.summary(),
        }
    return Replay(summary, run.sheet_path)


class _Run:
    """One pass over the bag."""

    def __init__(self, options: Options, bag: Bag, topic: Topic, truth_topic: Topic | None, task: Task):
        self.options, self.bag, self.topic, self.truth_topic, self.task = options, bag, topic, truth_topic, task
        self.hashes: list[str] = []
        self.stamps: list[int] = []
        self.skipped: list[dict[str, Any]] = []
        self.sheet_path = options.out.with_suffix(".png")
        self.score = _Score(task.confusion)
        self._stages = Stages()
        self._total = topic.count if options.max_frames is None else min(topic.count, options.max_frames)
        self._on_sheet = set(contact_sheet.evenly(self._total, _SHEET_FRAMES))
        self._cells: list[tuple[str, list[np.ndarray]]] = []
        self._video: video.VideoWriter | None = None

    def go(self, on_frame: Callable[[int, int], None]) -> None:
        options = self.options
        topics = [self.topic.name] + ([self.truth_topic.name] if self.truth_topic else [])
        with ExitStack() as stack:
            out = stack.enter_context(BagWriter(options.out))
            for name, (msgtype, latched) in self.task.topics.items():
                out.add_topic(name, msgtype, latched=latched)
            if options.overlay_video is not None:
                self._video = stack.enter_context(video.VideoWriter(options.overlay_video))
            seen = 0
            for message in self.bag.messages(topics):
                if self.truth_topic is not None and message.topic == self.truth_topic:
                    self._truth(message)
                    continue
                if message.topic != self.topic or seen >= self._total:
                    continue
                try:
                    self._frame(out, message, seen)
                except (MessageError, OrderError, SeedError) as error:
                    self.skipped.append({"frame": seen, "log_time": message.log_time, "reason": str(error)})
                seen += 1
                on_frame(seen, self._total)
            if not self.hashes:
                # Leaves no bag without masks behind; replay() says why there is none.
                raise BagError(self._nothing())
        self._write_sheet()

    def _nothing(self) -> str:
        first = self.skipped[0]["reason"] if self.skipped else "it holds no frames"
        return f"{self.options.bag}: not one image of {self.topic.name} could be read: {first}"

    def _frame(self, out: BagWriter, message: BagMessage, index: int) -> None:
        stages = self._stages
        with stages.measure("total"):
            with stages.measure("decode"):
                camera = cdr.deserialize(message.raw, message.topic.msgtype)
                bgr = images.to_bgr(camera)
            stamp = cdr.stamp_ns(camera.header)
            result = self.task(bgr, cdr.make_header(stamp, camera.header.frame_id), stages)
            with stages.measure("write"):
                for name, msg in result.messages:
                    out.write(name, message.log_time, msg)
        if self._video is not None:
            self._video.write(result.drawn, stamp or message.log_time)
        if index in self._on_sheet:
            self._cells.append((f"frame {index}, {stamp / 1e9:.3f} s", [bgr.copy(), result.drawn]))
        self.score.add(stamp, mask=result.mask)
        self.hashes.append(result.digest)
        self.stamps.append(stamp)

    def _truth(self, message: BagMessage) -> None:
        try:
            truth = cdr.deserialize(message.raw, message.topic.msgtype)
            stamp = cdr.stamp_ns(truth.header)
            self.score.add(stamp, truth=self.task.truth(true_ids(truth, message.topic), stamp))
        except MessageError as error:
            self.score.problems.append(str(error))

    def _write_sheet(self) -> None:
        title = f"{self.options.bag.name}  {self.topic.name}: {len(self.hashes)} frames"
        sheet = contact_sheet.draw(self._cells, title, self.task.names, self.task.palette)
        if not cv2.imwrite(str(self.sheet_path), sheet):
            raise BagError(f"cannot write {self.sheet_path}")

    def summary(self) -> dict[str, Any]:
        stages = {**self._stages.summary(), **self.task.stages.summary()}
        order = ("decode", "resize", "infer", "points", "mask", "overlay", "write", "total")
        found: dict[str, Any] = {
            "frames": len(self.hashes),
            "skipped": self.skipped,
            "hashes": self.hashes,
            "stamps": self.stamps,
            "stages": {name: stages[name] for name in order if name in stages},
        }
        if self.truth_topic is not None:
            score = self.score.confusion.report(self.task.names) if self.score.frames else {}
            found["ground_truth"] = {
                "topic": self.truth_topic.name,
                "frames": self.score.frames,
                "problems": self.score.problems,
                **score,
            }
        return found


def true_ids(truth: Any, topic: Topic) -> np.ndarray:
    """Return a message of true labels as ids, uint8 `[H, W]`; raise ImageError for what holds none."""
    ids = images.to_array(truth)
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise ImageError(f"ground truth on {topic.name} is {ids.dtype} {list(ids.shape)}; expected mono8")
    return ids


def first_truth(bag: Bag, topic: Topic) -> tuple[int, np.ndarray] | None:
    """Return the stamp and ids of a bag's first true mask that can be read."""
    for message in bag.messages([topic.name]):
        try:
            truth = cdr.deserialize(message.raw, topic.msgtype)
            return cdr.stamp_ns(truth.header), np.array(true_ids(truth, topic))
        except MessageError:
            continue
    return None


def truth_topic(bag: Bag, name: str | None = None) -> Topic | None:
    """Return the topic of true masks: the one called `name`, or an image topic with `ground_truth` and `mask` in its name."""
    if name is not None:
        return bag.image_topic(name)
    return next((t for t in bag.image_topics() if "ground_truth" in t.name and "mask" in t.name), None)


def _whole(bag: Bag) -> list[Path]:
    """Return the bag's files as they lie on disk (a compressed one is read from a copy)."""
    return [bag.path] if bag.path.is_file() else [file for file in bag.files if file.parent == bag.path]
