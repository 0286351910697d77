# SPDX-License-Identifier: Apache-2.0
"""Backbones against each other, same recipe and budget: the tables and the plot of docs/backbones.md.

    python tools/compare_backbones.py models OUT            export each at 480x640 and, for the growth, at the other sizes
    python tools/compare_backbones.py time OUT              ms and memory on each CPU engine at 480x640, taking turns
    python tools/compare_backbones.py grow OUT              ms and memory from 240x320 to 1080x1920, taking turns
    python tools/compare_backbones.py train OUT --data DIR --val DIR --epochs 60 --threads 2
    python tools/compare_backbones.py page OUT              write the sections of docs/backbones.md and the plot

Every step leaves its figures in OUT and goes on where it was stopped: a file that is there is not made again (delete it for
that), and a training resumes from its last epoch. What was not run has an empty cell. Figures of `time` are of one run, those
of `grow` of one run a size: compare them within that. Time depends on the weights' values little (denormals), so that `models`
takes random ones until `train` has left better.
"""

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from deeprob_perception import machine
from deeprob_perception.bench import limits
from deeprob_perception.bench.candidates import Candidate, Runner
from deeprob_perception.bench.remote import Remote
from deeprob_perception.bench.report import cell, table, write_section
from deeprob_perception.errors import PerceptionError

BACKBONES = {
    "swin-micro": "window attention",
    "vmamba-micro": "2-D selective scan",
    "vim-micro": "selective scan, two ways",
    "mambaout-femto": "gated convolution",
    "mit-micro": "reduced attention",
    "vit-tiny": "full attention",
    "convnet-micro": "convolution",
}
SIZE = (480, 640)
GROWTH = ((240, 320), (480, 640), (720, 1280), (1080, 1920))
ENGINES = (("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32"))
PAGE = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"
VERSIONS = ("torch", "openvino", "onnxruntime")


def model_path(out: Path, name: str, size: tuple[int, int]) -> Path:
    return out / "models" / f"{name}_{size[0]}x{size[1]}.onnx"


def models(out: Path, options: argparse.Namespace) -> None:
    """Export what is missing: the trained weights of the validation split where there are some, else random ones."""
    import torch

    from deeprob_perception import zoo
    from deeprob_perception.export import export_segmentation
    from deeprob_perception.nets import segmenter
    from deeprob_perception.segmentation.classes import CLASS_SETS

    street = CLASS_SETS["street"]
    for name in options.backbones:
        for size in dict.fromkeys((SIZE, *GROWTH)):
            path = model_path(out, name, size)
            if path.is_file():
                continue
            trained = out / "train" / name / "val" / "model.safetensors"
            recipe = {
                "task": "segmentation", "backbone": name, "head": "fpn", "classes": street.names, "palette": street.palette,
                "mean": list(segmenter.IMAGENET_MEAN), "std": list(segmenter.IMAGENET_STD),
            }  # fmt: skip
            torch.manual_seed(0)
            net = segmenter.build(recipe)
            if trained.is_file():
                recipe, state = zoo.load_checkpoint(trained)
                net.load_state_dict(state)
            path.parent.mkdir(parents=True, exist_ok=True)
            export_segmentation(net.eval(), recipe, path, *size, {"name": name})
            keep(path.with_suffix(".json"), work(net, path, size))
            print(path, flush=True)


def work(net: Any, path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Return the arithmetic of a model: products and convolutions of its graph, and the scans' by the paper's count."""
    import torch

    from deeprob_perception.nets import scan

    elements = []

    def counted(scans: Any) -> list[Any]:
        elements.extend(b.numel() for _, b, _ in scans)
        return [b for _, b, _ in scans]

    with torch.inference_mode(), mock.patch.object(scan, "recurrences", counted):
        copy.deepcopy(net.backbone).to("meta")(torch.zeros(1, 3, *size, device="meta"))  # shapes only
    return {
        "gflop": limits.count(path).gflop,
        "scan_gflop": 9 * sum(elements) / 1e9,  # as VMamba counts: 9 for each step, channel and state
        "parameters": sum(p.numel() for p in net.backbone.parameters()),
    }


def measure(specs: list[tuple[Path, str, str, tuple[int, int]]], rounds: int, options: argparse.Namespace) -> list[dict]:
    """Run each (model, back end, precision, size) in a process of its own, one frame a turn, in an order that changes."""
    generator = np.random.default_rng(0)
    runs = []
    with tempfile.TemporaryDirectory() as cache:
        for number, (path, backend, precision, size) in enumerate(specs):
            image = generator.integers(0, 256, (1, *size, 3), dtype=np.uint8)
            candidate = Candidate(path, path.stem, backend, precision, options.threads, f"{cache}/{number}")
            try:
                remote = Remote(Runner, candidate, [image], patience=600.0)
                runs.append((number, remote, remote.call("facts"), []))
            except PerceptionError as error:
                print(f"{path.stem} {backend} {precision}: {error}", flush=True)
        order = random.Random(0)
        try:
            for _ in range(rounds):
                for _, remote, _, times in order.sample(runs, len(runs)):
                    times.extend(remote.call("turn", 0, 1))
        finally:
            rows = [
                {"model": specs[i][0].stem, "backend": specs[i][1], "precision": specs[i][2], "size": list(specs[i][3]),
                 "ms": statistics.median(times), "peak_mb": remote.call("facts")["peak_mb"], "rounds": len(times)}
                for i, remote, _, times in runs if times
            ]  # fmt: skip
            for _, remote, _, _ in runs:
                remote.close()
    return rows


def time(out: Path, options: argparse.Namespace) -> None:
    specs = [
        (model_path(out, name, SIZE), backend, precision, SIZE)
        for name in options.backbones
        for backend, precision in ENGINES
        if model_path(out, name, SIZE).is_file()
    ]
    if (out / "time.json").is_file():
        print(f"{out / 'time.json'} is there; delete it to measure again")
        return
    keep(out / "time.json", measured(measure(specs, options.rounds, options), options))


def grow(out: Path, options: argparse.Namespace) -> None:
    """One size after the other, and kept after each: the processes of all of them at once would not fit into memory."""
    path = out / "grow.json"
    rows = json.loads(path.read_text())["runs"] if path.is_file() else []
    for size in GROWTH:
        if any(tuple(row["size"]) == size for row in rows):
            continue
        specs = [(model_path(out, name, size), "openvino", "fp32", size) for name in options.backbones]
        rows += measure([spec for spec in specs if spec[0].is_file()], options.rounds, options)
        keep(path, measured(rows, options))
        print(size, flush=True)


def measured(rows: list[dict], options: argparse.Namespace) -> dict[str, Any]:
    return {"threads": options.threads, "machine": machine.facts(), "versions": machine.versions(VERSIONS), "runs": rows}


def train(out: Path, options: argparse.Namespace) -> None:
    """Train each backbone twice: on the training images, scored on the validation's, and without one sequence, scored on it."""
    from deeprob_perception.segmentation.classes import class_set
    from deeprob_perception.segmentation.dataset import find_samples
    from deeprob_perception.training.data import AUGMENTATIONS, Augmentation
    from deeprob_perception.training.segmentation import Settings
    from deeprob_perception.training.segmentation import train as run

    classes = class_set(options.data, "street")
    samples = find_samples(options.data)
    held_out = [s for s in samples if s.name.startswith(tuple(options.without.split(",")))]
    splits = {
        "val": (samples, find_samples(options.val)),
        "by_sequence": ([s for s in samples if s not in held_out], held_out),
    }
    crop = Augmentation(crop=(options.crop, options.crop), scale=(0.7, 1.6), **AUGMENTATIONS["mild"])
    settings = Settings(
        head="fpn", epochs=options.epochs, batch_size=options.batch_size, drop_path=0.0, threads=options.threads,
        workers=1, augmentation=crop,
    )  # fmt: skip
    for name in options.backbones:
        for split, (learnt, scored) in splits.items():
            folder = out / "train" / name / split
            if (folder / "scores.json").is_file():
                continue
            print(f"{name}, {split}", flush=True)
            run(learnt, scored, classes, folder, replace(settings, backbone=name), resume=True)


def page(out: Path, options: argparse.Namespace) -> None:
    write_section(PAGE, "backbones", comparison(out, options))
    if (out / "grow.json").is_file():
        picture = PAGE.parent / "images" / "backbones_growth.png"
        grown = json.loads((out / "grow.json").read_text())
        draw(grown["runs"], picture)
        write_section(PAGE, "growth", growth(grown))


def comparison(out: Path, options: argparse.Namespace) -> str:
    timed = json.loads((out / "time.json").read_text()) if (out / "time.json").is_file() else {"runs": []}
    figures = {(r["model"].rsplit("_", 1)[0], r["backend"], r["precision"]): r for r in timed["runs"]}
    heads = ["backbone", "mixes by", "M parameters", "GFLOP", "of the scans"]
    heads += [f"{backend} {precision}, ms" for backend, precision in ENGINES] + ["x Swin (openvino fp32)", "peak MB"]
    heads += ["mIoU val", "mIoU by sequence"]
    base = figures.get(("swin-micro", "openvino", "fp32"))
    rows = []
    for name in options.backbones:
        path = model_path(out, name, SIZE).with_suffix(".json")
        facts = json.loads(path.read_text()) if path.is_file() else {}
        runs = [figures.get((name, *engine)) for engine in ENGINES]
        parameters = facts.get("parameters")
        rows.append([
            f"`{name}`", BACKBONES.get(name, ""), cell(parameters and parameters / 1e6, "{:.2f}"),
            cell(facts.get("gflop"), "{:.1f}"), cell(facts.get("scan_gflop") or None, "{:.2f}"),
            *(cell(r and r["ms"], "{:.0f}") for r in runs),
            cell(base and runs[0] and runs[0]["ms"] / base["ms"], "{:.2f}"), cell(runs[0] and runs[0]["peak_mb"], "{:.0f}"),
            *(cell(miou(out, name, split), "{:.3f}") for split in ("val", "by_sequence")),
        ])  # fmt: skip
    lines = table(heads, rows)
    if timed["runs"]:
        about = f"{SIZE[0]}x{SIZE[1]}, FPN head, {timed['threads']} threads, median of {timed['runs'][0]['rounds']} turns; "
        lines += ["", about + told(timed)]
    return "\n".join(lines) + "\n"


def told(measured: dict[str, Any]) -> str:
    facts = ", ".join(str(value) for value in measured["machine"].values())
    return facts + "; " + ", ".join(f"{name} {version}" for name, version in measured["versions"].items()) + "."


def miou(out: Path, name: str, split: str) -> float | None:
    path = out / "train" / name / split / "scores.json"
    return json.loads(path.read_text())["miou"] if path.is_file() else None


def growth(grown: dict[str, Any]) -> str:
    figures = {(r["model"].rsplit("_", 1)[0], tuple(r["size"])): r for r in grown["runs"]}
    names = list(dict.fromkeys(name for name, _ in figures))
    rows = []
    for name in names:
        found = [figures.get((name, size)) for size in GROWTH]
        first, last = found[0], found[-1]
        rows.append([f"`{name}`", *(cell(r and r["ms"], "{:.0f}") for r in found),
                     cell(first and last and last["ms"] / first["ms"], "{:.0f}"),
                     *(cell(r and r["peak_mb"], "{:.0f}") for r in found)])  # fmt: skip
    sizes = [f"{h}x{w}" for h, w in GROWTH]
    pixels = GROWTH[-1][0] * GROWTH[-1][1] / (GROWTH[0][0] * GROWTH[0][1])
    heads = ["backbone", *(f"{s}, ms" for s in sizes), f"last / first ({pixels:.0f} x the pixels)"]
    heads += [f"{s}, peak MB" for s in sizes]
    about = f"OpenVINO fp32, {grown['threads']} threads, median of {grown['runs'][0]['rounds']} turns; {told(grown)}"
    return "\n".join([*table(heads, rows), "", about, "", "![growth](images/backbones_growth.png)"]) + "\n"


def draw(runs: list[dict], path: Path) -> None:
    """Time and peak memory over the image's pixels, both axes logarithmic: a straight line of slope 1 is linear."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for name, mixer in BACKBONES.items():
        rows = [r for r in runs if r["model"].rsplit("_", 1)[0] == name]
        pixels = [r["size"][0] * r["size"][1] / 1e6 for r in rows]
        for axis, key in zip(axes, ("ms", "peak_mb"), strict=True):
            axis.plot(pixels, [r[key] for r in rows], "o-", label=f"{name}: {mixer}")
    for axis, title in zip(axes, ("ms a frame", "peak memory of the process, MB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="megapixels", ylabel=title)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def keep(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    steps = {"models": models, "time": time, "grow": grow, "train": train, "page": page}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=steps)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbones", type=lambda text: text.split(","), default=list(BACKBONES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--val", type=Path)
    parser.add_argument("--without", default="0006R0", help="Sequence to hold out: what its images' names begin with.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    if options.step == "train" and not (options.data and options.val):
        parser.error("train needs --data and --val: folders with images/ and labels/")
    steps[options.step](options.out, options)


if __name__ == "__main__":
    main()
