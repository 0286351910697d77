# SPDX-License-Identifier: Apache-2.0
"""`deeprob eval ...`: score the model file that runs on the robot, by the engine that runs it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from deeprob_perception.cli import app

eval_app = typer.Typer(no_args_is_help=True, help="Score a model on labelled data.")
app.add_typer(eval_app, name="eval")


@eval_app.command()
def segmentation(
    data: Annotated[Path, typer.Option(help="Folder with images/ and labels/ (8-bit, pixel = class id; other ids are void).")],
    model: Annotated[str, typer.Option(help="Model name or .onnx file.")],
    backend: Annotated[str, typer.Option(help="Engine: auto, tensorrt, openvino, onnxruntime, torch.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, or int8 of a quantised model.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: the engine's choice.")] = 0,
    only: Annotated[str | None, typer.Option(help="Score the images whose names begin so (comma-separated).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
) -> None:
    """Report IoU per class, mean IoU and pixel accuracy, at the data's own resolution."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from deeprob_perception import engines, zoo
    from deeprob_perception.errors import DataError
    from deeprob_perception.segmentation.dataset import find_samples, read_image, read_label
    from deeprob_perception.segmentation.scores import Confusion
    from deeprob_perception.segmentation.segmenter import Segmenter

    samples = find_samples(data)
    if only:
        samples = [s for s in samples if s.name.startswith(tuple(only.split(",")))]
        if not samples:
            raise DataError(f"{data}: no image's name begins with {only!r}")
    path = zoo.resolve(model)
    engine = engines.load(path, backend=backend, precision=precision, threads=threads)
    segmenter = Segmenter(engine)
    names = segmenter.class_names
    confusion = Confusion(len(names))
    console = Console()
    for sample in track(samples, f"{path.name} on {engine.backend} {engine.precision}", console=console):
        confusion.add(segmenter(read_image(sample.image)).labels, read_label(sample.label, len(names)))
    report = confusion.report(names)
    table = Table("class", "IoU", title=f"{path.name} on {len(samples)} images of {data}")
    for name, value in report["iou"].items():
        table.add_row(name, "not present" if value is None else f"{value:.4f}")
    table.add_section()
    table.add_row("mean", f"{report['miou']:.4f}")
    table.add_row("pixel accuracy", f"{report['pixel_accuracy']:.4f}")
    console.print(table)
    if json_file:
        report |= {
            "images": len(samples), "model": path.name, "backend": engine.backend, "precision": engine.precision,
        }  # fmt: skip
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


@eval_app.command(name="get-fk")
def get_fk(
    robots: Annotated[Path, typer.Option(help="Folder with the hands, NAME.urdf.")],
    models: Annotated[Path, typer.Option(help="Folder of `deeprob train get-fk`.")] = Path("runs/get_fk"),
    hands: Annotated[str, typer.Option(help="Hands to score on (comma-separated); default: the 10 validation hands.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the errors to this file.")] = None,
) -> None:
    """Report by how many mm GET and its baselines miss the joints of hands that they were not trained on."""
    from rich.console import Console
    from rich.table import Table

    from deeprob_perception.errors import DataError
    from deeprob_perception.training.get_fk import TRAIN, VALIDATION, VARIANTS, load, load_hands
    from deeprob_perception.training.get_fk import evaluate as errors_of

    names = hands.split(",") if hands else VALIDATION
    if seen := sorted(set(names) & set(TRAIN)):
        raise DataError(f"the hands {', '.join(seen)} were trained on; score on others")
    chosen = load_hands(robots, names)
    there = [variant for variant in VARIANTS if (models / f"{variant}.safetensors").is_file()]
    report = {variant: errors_of(load(models, variant), chosen) for variant in there}
    if not report:
        raise DataError(f"{models} holds no weights; `deeprob train get-fk --robots {robots} --out {models}` makes them")
    table = Table("hand", *report, title="mean error of joint positions, mm")
    for name in names:
        table.add_row(name, *(f"{scores['robots'][name]:.3f}" for scores in report.values()))
    table.add_section()
    table.add_row("mean", *(f"{scores['mean_mm']:.3f}" for scores in report.values()))
    Console().print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


@eval_app.command()
def tracking(
    data: Annotated[Path, typer.Option(help="Folders with images/ and masks/ (ids of objects), or one such.")],
    model: Annotated[str, typer.Option(help="Model name or .onnx file, of features.")] = "dino",
    backend: Annotated[str, typer.Option(help="Engine: auto, tensorrt, openvino, onnxruntime, torch.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, or int8 of a quantised model.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: the engine's choice.")] = 0,
    baselines: Annotated[bool, typer.Option(help="Score what needs no trained features, too, in the same run.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
) -> None:
    """Score mask propagation as DAVIS does (J, F), the first mask given, beside baselines."""
    import tempfile

    import numpy as np
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from deeprob_perception import engines, zoo
    from deeprob_perception.tracking import evaluate as scoring
    from deeprob_perception.tracking.tracker import features_of

    sequences = scoring.find_sequences(data)
    path = zoo.resolve(model)

    def load(file: Path) -> engines.Engine:
        return engines.load(file, backend=backend, precision=precision, threads=threads)

    console = Console()
    engine = load(path)
    _, height, width, _ = engine.inputs[0].shape
    with tempfile.TemporaryDirectory() as folder:
        methods = {path.stem: scoring.propagate(features_of(engine))}
        if baselines:
            methods["still"], methods["flow"] = scoring.still, scoring.warped
            patch = int(engine.metadata["patch_size"])
            methods["rgb"] = scoring.propagate(scoring.rgb_patches(height, width, patch))
            if untrained := zoo.untrained(path, Path(folder)):
                methods["random"] = scoring.propagate(features_of(load(untrained)))
        found: dict[str, dict[str, dict[str, float] | None]] = {name: {} for name in methods}
        runs = [(name, sequence) for sequence in sequences for name in methods]
        for name, sequence in track(runs, f"{path.name} on {engine.backend} {engine.precision}", console=console):
            found[name][sequence.name] = scoring.evaluate(sequence, methods[name])

    def mean(scores: dict[str, dict[str, float] | None]) -> dict[str, float]:
        scored = [s for s in scores.values() if s is not None]
        return {key: float(np.mean([s[key] for s in scored])) if scored else float("nan") for key in ("j", "f", "jf")}

    table = Table("J&F", *methods, title=f"{path.name}, {height}x{width}, on {len(sequences)} sequences of {data}")
    for sequence in sequences:
        row = [found[name][sequence.name] for name in methods]
        table.add_row(sequence.name, *("tracked, not scored" if s is None else f"{s['jf']:.3f}" for s in row))
    table.add_section()
    means = {name: mean(scores) for name, scores in found.items()}
    for key, title in (("j", "mean J"), ("f", "mean F"), ("jf", "mean J&F")):
        table.add_row(title, *(f"{means[name][key]:.3f}" for name in methods))
    console.print(table)
    if json_file:
        report = {
            **means[path.stem], "sequences": found[path.stem],
            "baselines": {name: {**means[name], "sequences": found[name]} for name in methods if name != path.stem},
            "model": path.name, "backend": engine.backend, "precision": engine.precision, "input": [height, width],
        }  # fmt: skip
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
