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
        followed = {sequence.name: scoring.there_and_back(features_of(engine), sequence)
                    for sequence in track(sequences, "points, there and back", console=console)}

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
    points = Table("points", "frames", "chosen", "there", "there and back", "median, px", "90 %, px", "within 2 px",
                   title="points followed through each clip and back: distance from the start")
    for name, way in followed.items():
        points.add_row(name, f"{way['frames']}", f"{way['points']}", f"{way['there']:.0%}", f"{way['back']:.0%}",
                       f"{way['median']:.2f}", f"{way['p90']:.2f}", f"{way['within_2']:.0%}")
    console.print(points)
    if json_file:
        report = {
            **means[path.stem], "forward_backward": followed, "sequences": found[path.stem],
            "baselines": {name: {**means[name], "sequences": found[name]} for name in methods if name != path.stem},
            "model": path.name, "backend": engine.backend, "precision": engine.precision, "input": [height, width],
        }  # fmt: skip
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


@eval_app.command()
def reach(
    robots: Annotated[Path, typer.Option(help="Folder of robot descriptions, NAME.urdf.")],
    episodes: Annotated[int, typer.Option(min=1, help="For each robot and policy.")] = 100,
    model: Annotated[str, typer.Option(help="Model name or .onnx file, of reaching.")] = "reach",
    models: Annotated[Path | None, typer.Option(help="Folder with VARIANT.onnx of the ablations, scored too.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
) -> None:
    """Report how often policies reach random goals within 5 s, on robots that they were not trained on, beside the expert."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from deeprob_perception import engines, zoo
    from deeprob_perception.policy.command import Policy
    from deeprob_perception.policy.evaluate import score_expert, score_policy, subjects
    from deeprob_perception.policy.reach import ReachPolicy
    from deeprob_perception.robots import Robot

    paths = {} if models else {"get": zoo.resolve(model)}
    for name in ("get", "no_graph", "no_self_model", "mlp"):
        if models and (models / f"{name}.onnx").is_file():
            paths[name] = models / f"{name}.onnx"
    loaded = {name: engines.load(path, backend="onnxruntime", precision="fp32", threads=1) for name, path in paths.items()}
    console, report = Console(), {}
    table = Table("robot", "joints", "near, mm", "expert", *paths, title=f"success of {episodes} episodes")
    for subject in track(subjects(robots), "reaching", console=console):
        scores = {"expert": score_expert(subject, episodes, seed)}
        for name, engine in loaded.items():

            def make(robot: Robot, tip: str, rate: float, engine: engines.Engine = engine) -> Policy:
                return ReachPolicy(engine, robot, tip, rate)

            scores[name] = score_policy(subject, make, episodes, seed)
        report[subject.name] = {name: s.success for name, s in scores.items()}
        report[subject.name] |= {f"{name}_broken": s.broken for name, s in scores.items() if name != "expert"}
        joints = str(len(subject.robot.joint_names))
        table.add_row(subject.name, joints, f"{subject.near * 1e3:g}", *(f"{s.success:.2f}" for s in scores.values()))
    console.print(table)
    broken = sum(value for row in report.values() for key, value in row.items() if key.endswith("_broken"))
    console.print(f"{broken} steps beyond a limit of position or velocity")
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"episodes": episodes, "robots": report}, indent=1) + "\n")


@eval_app.command()
def probe(
    data: Annotated[Path, typer.Option(help="Labelled folder (images/, labels/) to fit the linear classifier on.")],
    val: Annotated[Path, typer.Option(help="Labelled folder to score it on.")],
    model: Annotated[str, typer.Option(help="Model name or .onnx file, of features.")] = "dino",
    classes: Annotated[str | None, typer.Option(help="`street`, `tabletop` or a JSON file; default DATA/classes.json.")] = None,
    sequences: Annotated[Path | None, typer.Option(help="Score tracking on these sequences, too (as `eval tracking`).")] = None,
    backend: Annotated[str, typer.Option(help="Engine: auto, tensorrt, openvino, onnxruntime, torch.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
) -> None:
    """Say what training gave the features: linear probe, and tracking, of the model and of its network untrained."""
    import tempfile

    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from deeprob_perception import engines, zoo
    from deeprob_perception.errors import ModelError
    from deeprob_perception.segmentation.classes import class_set
    from deeprob_perception.segmentation.dataset import find_samples
    from deeprob_perception.tracking import evaluate as scoring
    from deeprob_perception.tracking.tracker import features_of
    from deeprob_perception.training.probe import probe as fit

    names = class_set(data, classes).names
    training, validation = find_samples(data), find_samples(val)
    clips = scoring.find_sequences(sequences) if sequences else []
    path = zoo.resolve(model)
    report: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        untrained = zoo.untrained(path, Path(folder))
        if untrained is None:
            raise ModelError("the comparison with an untrained network needs torch: pip install 'deeprob_perception[train]'")
        for name, file in (("untrained", untrained), (path.stem, path)):
            features = features_of(engines.load(file, backend=backend))
            scores = fit(features, training, validation, names)
            report[name] = {"miou": scores["miou"], "pixel_accuracy": scores["pixel_accuracy"]}
            found = [scoring.evaluate(clip, scoring.propagate(features)) for clip in clips]
            if scored := [s for s in found if s is not None]:
                report[name]["jf"] = float(np.mean([s["jf"] for s in scored]))
    title = f"{path.stem}: {len(training)} images to fit, {len(validation)} to score"
    table = Table("features", *next(iter(report.values())), title=title)
    for name, scores in report.items():
        table.add_row(name, *(f"{value:.3f}" for value in scores.values()))
    Console().print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


@eval_app.command(name="closed-loop")
def closed_loop(
    episodes: Annotated[int, typer.Option(min=1, help="Cells; each is another scene, with another arm of our own.")] = 50,
    robot: Annotated[str, typer.Option(help="capsule_arm, scara, or a URDF file.")] = "capsule_arm",
    tip: Annotated[str, typer.Option(help="The link of a URDF file that shall touch.")] = "",
    kinds: Annotated[str, typer.Option(help="The classes to touch, in turn.")] = "ball,mug,box,cylinder",
    seconds: Annotated[float, typer.Option(min=1, help="That the arm has for one.")] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="The first cell.")] = 0,
    model: Annotated[str, typer.Option(help="Segmentation: a model's name or an .onnx file.")] = "tabletop",
    approach: Annotated[float, typer.Option(min=0, help="From how high above goals are come to, m; 0: straight.")] = 0.15,
    out: Annotated[Path, typer.Option(help="Folder for the nodes' logs.")] = Path("out/eval_closed_loop"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the episodes to this file.")] = None,
) -> None:
    """Count how often a simulated arm touches the named object: camera, segmentation, target and policy, over DDS."""
    from rich.console import Console

    from deeprob_perception.demo import closed_loop as loop

    console = Console()
    options = loop.Options(out, episodes, robot, tip, tuple(kinds.split(",")), seconds, seed, model)
    options.policy_options["approach_height"] = str(float(approach))
    found = []
    for episode in loop.episodes(options, console):
        loop.show(episode, console)
        found.append(episode)
    figures = loop.summary(found)
    console.print(loop.table(figures))
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**figures, "results": found}, indent=1) + "\n")
