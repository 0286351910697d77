# SPDX-License-Identifier: Apache-2.0
"""Every back end and precision of this machine on one model, beside torch eager, in one run.

Machines are noisy, so the candidates take turns: each round runs each once, and what slows a round slows all. Ratios of
medians from one run are comparable; milliseconds of different runs are not.
"""

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception import engines, machine, zoo
from deeprob_perception.engines import model_file
from deeprob_perception.errors import EngineError, PerceptionError
from deeprob_perception.timing import Samples

EAGER = "torch eager"
PACKAGES = ("deeprob_perception", "openvino", "onnxruntime", "torch", "numpy", "onnx")
MATMUL = 1024  # side of the square matrices whose product gives the machine's rate: 2.1 GFLOP, beyond any cache
WARM_UP = 3

Run = Callable[[np.ndarray], np.ndarray]  # uint8 [1, H, W, 3] BGR -> labels uint8 [1, H, W]


@dataclass
class Candidate:
    """One way to run the model: its callable and what was measured of it."""

    name: str
    precision: str
    run: Run
    samples: Samples = field(default_factory=Samples)
    agreement: float = float("nan")
    start: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What to measure: `backends` (names; empty for all usable), threads for each, rounds, frames to turn through."""

    model: Path
    backends: tuple[str, ...] = ()
    threads: int = 2
    rounds: int = 50
    frames: int = 8
    eager: bool = True


def bench(options: Options, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure and return what `deeprob bench engine --json` writes.

    Keys: `date`, `machine`, `versions`, `threads`, `rounds`, `model` (name, sha256, input, gflop), `skipped` (what cannot
    run here, and why), `matmul_gflops` (by precision), and `runs`: for each candidate `backend`, `precision`, `p50`,
    `p95`, `p99` (ms), `speedup` (eager's median over its own), `of_limit` (its median over the FLOP limit), `agreement`
    (share of labels equal to fp32's), `first_frame_s` and `cached_first_frame_s` (from nothing loaded to the first labels),
    `memory_mb` (peak, of a process of its own). Figures that could not be measured are None.
    """
    # OpenMP's workers would spin on after each eager run and slow whoever is next.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    model = model_file.read(options.model)
    images = pictures(model.inputs[0].shape, options.frames)
    candidates, skipped = load_candidates(options, say)
    reference = candidates[0]  # fp32: eager where there is torch, else ONNX Runtime or OpenVINO
    rates = {} if reference.name != EAGER else {c.precision: Samples() for c in candidates}
    expected = [reference.run(image) for image in images]
    for candidate in candidates:
        got = [candidate.run(image) for image in images]
        candidate.agreement = float(np.mean([(a == b).mean() for a, b in zip(got, expected, strict=True)]))
        for _ in range(WARM_UP):
            candidate.run(images[0])
    gc.disable()
    try:
        for i in range(options.rounds):
            say(f"round {i + 1} of {options.rounds}")
            # Another one goes first in each round, so that nobody always follows the same neighbour.
            for candidate in candidates[i % len(candidates) :] + candidates[: i % len(candidates)]:
                start = time.perf_counter_ns()
                candidate.run(images[i % len(images)])
                candidate.samples.add((time.perf_counter_ns() - start) / 1e6)
            for precision, samples in rates.items():
                samples.add(matmul_rate(precision))
    finally:
        gc.enable()
    for candidate in candidates:
        if candidate.name != EAGER:
            say(f"first frame of {candidate.name} {candidate.precision}")
            candidate.start = first_frames(options, candidate)
    gflop = count_gflop(options.model)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "versions": machine.versions(PACKAGES),
        "threads": options.threads,
        "rounds": options.rounds,
        "model": {
            "name": model.metadata["name"],
            "sha256": zoo.checksum(options.model),
            "input": list(model.inputs[0].shape),
            "gflop": gflop,
        },
        "reference": f"{reference.name} {reference.precision}",
        "matmul_gflops": {precision: samples.summary()["p50"] for precision, samples in rates.items()},
        "skipped": skipped,
        "runs": [row(candidate, reference, rates, gflop) for candidate in candidates],
    }


def row(candidate: Candidate, reference: Candidate, rates: dict[str, Samples], gflop: float) -> dict[str, Any]:
    """Return the figures of one candidate, with its ratios to eager and to the FLOP limit."""
    found = candidate.samples.summary()
    limit = gflop / rates[candidate.precision].summary()["p50"] * 1e3 if candidate.precision in rates else None
    eager = reference.samples.summary()["p50"] if reference.name == EAGER else None
    return {
        "backend": candidate.name,
        "precision": candidate.precision,
        **{key: found[key] for key in ("p50", "p95", "p99")},
        "speedup": eager / found["p50"] if eager else None,
        "of_limit": found["p50"] / limit if limit else None,
        "agreement": candidate.agreement,
        "first_frame_s": candidate.start.get("first_frame_s"),
        "cached_first_frame_s": candidate.start.get("cached_first_frame_s"),
        "memory_mb": candidate.start.get("memory_mb"),
    }


def load_candidates(options: Options, say: Callable[[str], None]) -> tuple[list[Candidate], dict[str, str]]:
    """Return what can run here, an fp32 one first, and why the others cannot."""
    candidates, skipped = [], {}
    if options.eager:
        try:
            say("torch")
            candidates.append(Candidate(EAGER, "fp32", eager(options.model, options.threads)))
        except (ImportError, PerceptionError) as error:
            skipped[EAGER] = str(error)
    for backend in options.backends or engines.BACKENDS:
        for precision in engines.PRECISIONS[1:]:
            name = f"{backend} {precision}"
            say(name)
            try:
                engine = engines.load(options.model, backend, precision, threads=options.threads)
            except EngineError as error:
                skipped[name] = str(error)
                continue
            if engine.precision != precision:
                skipped[name] = f"this CPU computes it in {engine.precision}"
                continue
            candidates.append(Candidate(backend, precision, partial(labels_of, engine)))
    if not candidates:
        raise EngineError(f"nothing can run {options.model} here: " + "; ".join(f"{k}: {v}" for k, v in skipped.items()))
    return candidates, skipped


def labels_of(engine: engines.Engine, image: np.ndarray) -> np.ndarray:
    return engine(image=image, outputs=("labels",))["labels"]


def eager(model: Path, threads: int) -> Run:
    """Return the model's network in plain torch, weights read from the file, from 8-bit image to 8-bit labels as well."""
    import torch

    from deeprob_perception.nets.segmenter import build

    if threads:
        torch.set_num_threads(threads)
    recipe, state = zoo.load_checkpoint(model)
    net = build(recipe)
    net.load_state_dict(state)
    net.eval()
    mean, std = (torch.tensor(recipe[key])[:, None, None] * 255 for key in ("mean", "std"))

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rgb = torch.from_numpy(image).flip(-1).permute(0, 3, 1, 2).float()
            labels: np.ndarray = net((rgb - mean) / std).argmax(1).to(torch.uint8).numpy()
        return labels

    return run


def matmul_rate(precision: str) -> float:
    """Return GFLOP/s of one large matrix product by torch, with as many threads as eager has."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a = torch.ones(MATMUL, MATMUL, dtype=dtype)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(2):  # the first of the two also wakes the threads
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
    return 2 * MATMUL**3 / best / 1e9


def count_gflop(path: Path) -> float:
    """Return the model's matrix products and convolutions in GFLOP a frame (a multiply-add counts as two)."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            size = int(np.prod(shapes[node.output[0]]))
            inner = shapes[node.input[1]][1:] if node.op_type == "Conv" else shapes[node.input[0]][-1:]
            total += 2 * size * int(np.prod(inner))
    return total / 1e9


def first_frames(options: Options, candidate: Candidate) -> dict[str, float]:
    """Start the engine twice, each time in a process of its own with one cache folder, empty at first."""
    with tempfile.TemporaryDirectory() as cache:
        cold, cached = (
            alone(_first_frame, options.model, candidate.name, candidate.precision, options.threads, cache) for _ in range(2)
        )
    return {
        "first_frame_s": cold["seconds"],
        "cached_first_frame_s": cached["seconds"],
        "memory_mb": max(cold["memory_mb"], cached["memory_mb"]),
    }


def alone(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Call in a fresh process and return its answer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise EngineError(f"the process that ran {arguments} died; is there memory enough?") from None


def _first_frame(model: Path, backend: str, precision: str, threads: int, cache: str) -> dict[str, float]:
    import resource

    start = time.perf_counter()
    engine = engines.load(model, backend, precision, cache, threads)
    labels_of(engine, np.zeros(engine.inputs[0].shape, np.uint8))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def pictures(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    """Return `count` frames of the sample bag, evenly spread, at the model's size: uint8 `[1, H, W, 3]` BGR."""
    import cv2

    from deeprob_perception.bags import open_bag
    from deeprob_perception.messages.cdr import deserialize
    from deeprob_perception.messages.images import to_bgr
    from deeprob_perception.share import share_dir

    with open_bag(share_dir() / "bags" / "sample.mcap") as bag:
        topic = bag.image_topic()
        step = max(1, topic.count // count)
        chosen = [m for i, m in enumerate(bag.messages([topic.name])) if i % step == 0][:count]
        frames = [to_bgr(deserialize(m.raw, m.topic.msgtype)) for m in chosen]
    _, height, width, _ = shape
    return [np.ascontiguousarray(cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA))[None] for f in frames]


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a Markdown section: what it was measured on, and a table."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    model, facts = report["model"], report["machine"]
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in report["matmul_gflops"].items())
    lines = [
        f"### {model['name']}, {model['input'][1]}x{model['input'][2]}, {report['threads'] or 'all'} threads",
        "",
        f"{report['date']}, {', '.join(facts.values())}. " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + ".",
        f"Model sha256 {model['sha256'][:16]}, {model['gflop']:.1f} GFLOP a frame"
        + (f"; torch's large matrix products reach {rates}." if rates else "."),
        f"{report['rounds']} rounds, the candidates taking turns; agreement is with {report['reference']}.",
        "",
        "| engine | precision | p50 ms | p95 | p99 | x eager | of FLOP limit | agreement | first frame s | cached | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in report["runs"]:
        cells = [run["backend"], run["precision"]]
        cells += [cell(run[key], "{:.1f}") for key in ("p50", "p95", "p99")]
        cells += [cell(run["speedup"], "{:.2f}"), cell(run["of_limit"], "{:.2f} x"), cell(run["agreement"], "{:.3%}")]
        cells += [cell(run["first_frame_s"], "{:.2f}"), cell(run["cached_first_frame_s"], "{:.2f}")]
        cells += [cell(run["memory_mb"], "{:.0f}")]
        lines.append("| " + " | ".join(cells) + " |")
    if report["skipped"]:
        lines += ["", "Not run: " + "; ".join(f"{name} ({why})" for name, why in report["skipped"].items()) + "."]
    return "\n".join(lines) + "\n"


def write_section(path: Path, name: str, section: str) -> None:
    """Put a section between its markers in a Markdown file, in place of its last version."""
    begin, end = f"<!-- deeprob bench: {name} -->", f"<!-- end: {name} -->"
    block = f"{begin}\n{section}{end}\n"
    text = path.read_text() if path.is_file() else "# Benchmarks\n\nWritten by `deeprob bench ... --write-docs`.\n"
    if begin in text and end in text:
        head, _, rest = text.partition(begin)
        text = head + block + rest.partition(end)[2].lstrip("\n")
    else:
        text = text.rstrip("\n") + "\n\n" + block
    path.write_text(text)
