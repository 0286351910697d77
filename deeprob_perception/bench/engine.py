# SPDX-License-Identifier: Apache-2.0
"""Every back end and precision of this machine on a model, beside what users would run instead, in one run.

Machines are noisy, so the candidates take turns in an order that changes each round: what slows a round slows all. Ratios
of medians from one run are comparable; milliseconds of different runs are not.
"""

import os
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from deeprob_perception import engines, machine, zoo
from deeprob_perception.bench import candidates, limits, peers
from deeprob_perception.bench.candidates import Candidate, Runner
from deeprob_perception.bench.remote import Remote
from deeprob_perception.engines import model_file
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError, PerceptionError
from deeprob_perception.share import share_dir
from deeprob_perception.timing import Samples

FORMAT = 2  # of the report; 1 had one peer, and one memory figure for all
PACKAGES = (
    "deeprob_perception", "openvino", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "tensorrt-rtx-cu12", "tensorrt-rtx-cu13", "cuda-python", "torch", "transformers", "numpy", "onnx",
)  # fmt: skip
BUILD = 1800.0  # seconds for an engine's first frame: a small Jetson builds a TensorRT engine for a quarter of an hour


@dataclass(frozen=True)
class Options:
    """What to measure.

    models: files of one input size and one list of classes, the float32 one first: the peers run its weights, and its
    fp32 labels are what agreement is measured with. backends, peers: names; None for all. threads: for each candidate.
    rounds: how often each has its turn. burst: frames a turn. frames: pictures to turn through. bag: where they are from
    (None: the sample bag). peer_seconds: for a peer's first frame, torch.compile's compilation within it.
    """

    models: tuple[Path, ...]
    backends: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    threads: int = 2
    rounds: int = 20
    burst: int = 3
    frames: int = 8
    bag: Path | None = None
    peer_seconds: float = 180.0


@dataclass
class Measured:
    """A candidate at work, and what was measured of it."""

    candidate: Candidate
    remote: Remote
    facts: dict[str, Any]
    cold_first_frame_s: float | None = None
    cold_peak_mb: float | None = None
    samples: Samples = field(default_factory=Samples)
    agreement: float = float("nan")


def bench(options: Options, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure, and return what `deeprob bench engine --json` writes; docs/benchmarks.md describes its keys.

    :raises ModelError: for a model that cannot be read, or models that differ in input or classes.
    :raises EngineError: when nothing at all can run here.
    """
    # OpenMP's workers would spin between the operators and, on a machine with other work, for a neighbour's time slice.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    models = read(options.models)
    bag = options.bag or share_dir() / "bags" / "sample.mcap"
    images = pictures(bag, model_file.image_shape(models[0]), options.frames)
    wanted, skipped = candidates.of(models, options.backends or engines.BACKENDS, options.threads)
    first = models[0]
    chosen = peers.PEERS if options.peers is None else options.peers
    wanted = [Candidate(first.path, first.metadata["name"], name, "fp32", options.threads) for name in chosen] + wanted
    with ExitStack() as stack:
        runs: list[Measured] = []
        for candidate in wanted:
            say(f"starting {candidate}")
            try:
                runs.append(start(candidate, images, options, stack))
            except EngineError as error:
                skipped[label(candidate, models)] = str(error)
        if not runs:
            raise EngineError(f"nothing can run {first.path} here: " + "; ".join(f"{k}: {v}" for k, v in skipped.items()))
        reference = next((run for run in runs if run.candidate.precision == "fp32"), runs[0])
        compare(runs, reference, images, skipped, models)
        machines = start_limits(runs, options, stack, say)
        rates = take_turns(runs, machines, options, skipped, models, say)
        missing = {device: machine_.call("missing") for device, machine_ in machines.items()}
    baseline = next((run for run in runs if run.candidate.name == peers.EAGER), None) or reference
    work = limits.count(first.path)
    measured_limits = [
        limit(work, device, precision, rates)
        for device, precision in sorted({(run.facts["device"], run.candidate.precision) for run in runs})
    ]
    return {
        "format": FORMAT,
        "kind": "engine",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "versions": machine.versions(PACKAGES),
        "threads": options.threads,
        "rounds": options.rounds,
        "frames_a_turn": options.burst,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "models": [
            {
                "name": model.metadata["name"],
                "sha256": zoo.checksum(model.path),
                "precision": model.metadata.get("precision", "fp32"),
                "input": list(model.inputs[0].shape),
            }
            for model in models
        ],
        "bag": {"name": bag.name, "sha256": zoo.checksum(bag), "frames": len(images)},
        "work": {"gflop": work.gflop, "weights": work.weights, "activations": work.activations},
        "limits": measured_limits,
        "no_rate": missing,
        "agreement_of": "features" if models[0].metadata["task"] == "features" else "labels",
        "reference": label(reference.candidate, models),
        "baseline": label(baseline.candidate, models),
        "skipped": skipped,
        "runs": [row(run, baseline, measured_limits) for run in runs],
    }


def read(paths: Sequence[Path]) -> list[ModelFile]:
    """Return the models; raise ModelError unless all take one size of picture and know the same classes."""
    from deeprob_perception.errors import ModelError

    models = [model_file.read(path) for path in paths]
    for model in models[1:]:
        for what, own, first in (
            ("takes", str(model.inputs[0]), str(models[0].inputs[0])),
            ("gives", gives(model), gives(models[0])),
        ):
            if own != first:
                raise ModelError(f"{model.path} {what} {own}, {models[0].path} {first}: compare models of one kind")
    return models


def label(candidate: Candidate, models: Sequence[ModelFile]) -> str:
    """Return a candidate's name for people: without the model's where there is but one."""
    return str(candidate) if len(models) > 1 else f"{candidate.name} {candidate.precision}"


def start(candidate: Candidate, images: list[np.ndarray], options: Options, stack: ExitStack) -> Measured:
    """Start a candidate: an engine twice with one cache folder, empty at first; the second stays, as a peer's only one does."""
    folder = stack.enter_context(TemporaryDirectory(prefix="deeprob_bench_"))
    candidate = replace(candidate, cache=folder)
    patience = options.peer_seconds if candidate.is_peer else BUILD
    cold = None
    if not candidate.is_peer:
        remote = Remote(Runner, candidate, images, patience=patience)
        try:
            cold = remote.call("facts")
        finally:
            remote.close()
    remote = Remote(Runner, candidate, images, patience=patience)
    stack.callback(remote.close)
    facts = remote.call("facts")
    # A peer keeps nothing but torch.compile, whose first start here is the cold one.
    cold = cold or facts
    return Measured(candidate, remote, facts, cold["first_frame_s"], cold["peak_mb"])


def compare(
    runs: list[Measured], reference: Measured, images: list[np.ndarray], skipped: dict[str, str], models: Sequence[ModelFile]
) -> None:
    """Note how each run's answers are like the reference's (`likeness`); a run that fails is taken out."""
    expected = [reference.remote.call("answer", i) for i in range(len(images))]
    for run in list(runs):
        try:
            got = [run.remote.call("answer", i) for i in range(len(images))]
        except EngineError as error:
            give_up(run, runs, error, skipped, models)
            continue
        run.agreement = float(np.mean([likeness(a, b) for a, b in zip(got, expected, strict=True)]))


def gives(model: ModelFile) -> str:
    """Return what a model's answers mean: its classes, or that they are features."""
    return model.metadata.get("classes", model.metadata["task"])


def likeness(answer: np.ndarray, expected: np.ndarray) -> float:
    """Return the share of equal labels, or the mean cosine of features of unit length."""
    if answer.dtype == np.uint8:
        return float((answer == expected).mean())
    return float((answer * expected).sum(-1).mean())


def give_up(
    run: Measured, runs: list[Measured], error: PerceptionError, skipped: dict[str, str], models: Sequence[ModelFile]
) -> None:
    runs.remove(run)
    skipped[label(run.candidate, models)] = f"started, then {error}"


def start_limits(
    runs: list[Measured], options: Options, stack: ExitStack, say: Callable[[str], None]
) -> dict[str, Remote]:
    """Start, for each device that a candidate computes on, the process that measures what it can do."""
    found = {}
    for device in sorted({run.facts["device"] for run in runs}):
        say(f"what {device} can do")
        precisions = sorted({run.candidate.precision for run in runs if run.facts["device"] == device})
        found[device] = Remote(limits.Limits, device, options.threads, precisions)
        stack.callback(found[device].close)
    return found


def take_turns(
    runs: list[Measured], machines: dict[str, Remote], options: Options, skipped: dict[str, str],
    models: Sequence[ModelFile], say: Callable[[str], None],
) -> dict[tuple[str, str], Samples]:  # fmt: skip
    """Give each candidate its turn in every round, and return the machine's rates by (device, name)."""
    rates: dict[tuple[str, str], Samples] = {}
    order = random.Random(0)  # so that nobody always follows the same neighbour
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        for run in order.sample(runs, len(runs)):
            try:
                for milliseconds in run.remote.call("turn", number, options.burst):
                    run.samples.add(milliseconds)
            except EngineError as error:
                give_up(run, runs, error, skipped, models)
        for device, remote in machines.items():
            for name, value in remote.call("turn").items():
                rates.setdefault((device, name), Samples()).add(value)
    return rates


def limit(work: limits.Work, device: str, precision: str, rates: dict[tuple[str, str], Samples]) -> dict[str, Any]:
    """Return what a device could do at best in a precision, from the medians of its rates in this run.

    Keys: `device`, `precision`, `matmul_gflops` (GFLOP/s of a large matrix product), `gflops` (the larger of this and a
    large convolution's), `flop_ms`, `gb_per_s` (of a large copy), `megabytes`, `bytes_ms`; None where there is no rate.
    """

    def reached(name: str) -> float | None:
        samples = rates.get((device, name))
        return samples.summary()["p50"] / 1e9 if samples else None

    product, speed = reached(f"{precision} matmul"), reached("copy")
    gflops = max((x for x in (product, reached(f"{precision} convolution")) if x), default=None)
    megabytes = work.megabytes(precision)
    return {
        "device": device,
        "precision": precision,
        "matmul_gflops": product,
        "gflops": gflops,
        "flop_ms": work.gflop / gflops * 1e3 if gflops else None,
        "gb_per_s": speed,
        "megabytes": megabytes,
        "bytes_ms": megabytes / speed if speed else None,
    }


def row(run: Measured, baseline: Measured, measured_limits: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one candidate, with its ratios to the baseline and to the limits of its device and precision."""
    found = run.samples.summary()
    own = next(x for x in measured_limits if (x["device"], x["precision"]) == (run.facts["device"], run.candidate.precision))

    def over(milliseconds: float | None) -> float | None:
        return found["p50"] / milliseconds if milliseconds else None

    return {
        "model": run.candidate.model_name,
        "backend": run.candidate.name,
        "precision": run.candidate.precision,
        "device": run.facts["device"],
        "peer": run.candidate.is_peer,
        **{key: found[key] for key in ("n", "p50", "p95", "p99")},
        "speedup": baseline.samples.summary()["p50"] / found["p50"],
        "of_flop_limit": over(own["flop_ms"]),
        "of_byte_limit": over(own["bytes_ms"]),
        "agreement": run.agreement,
        "first_frame_s": run.cold_first_frame_s,
        "cached_first_frame_s": None if run.candidate.is_peer else run.facts["first_frame_s"],
        "memory_mb": run.facts["memory_mb"],
        "peak_mb": max((mb for mb in (run.cold_peak_mb, run.facts["peak_mb"]) if mb is not None), default=None),
    }


def pictures(bag: Path, shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    """Return `count` frames of a bag, evenly spread, at the model's size: uint8 `[1, H, W, 3]` BGR."""
    import cv2

    from deeprob_perception.bags import open_bag
    from deeprob_perception.messages.cdr import deserialize
    from deeprob_perception.messages.images import to_bgr

    with open_bag(bag) as opened:
        topic = opened.image_topic()
        step = max(1, topic.count // count)
        chosen = [m for i, m in enumerate(opened.messages([topic.name])) if i % step == 0][:count]
        frames = [to_bgr(deserialize(m.raw, m.topic.msgtype)) for m in chosen]
    _, height, width, _ = shape
    return [np.ascontiguousarray(cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA))[None] for f in frames]
