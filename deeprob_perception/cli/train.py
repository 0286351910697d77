# SPDX-License-Identifier: Apache-2.0
"""`deeprob train ...`"""

from pathlib import Path
from typing import Annotated

import typer
from rich import print as show

from deeprob_perception.cli import app
from deeprob_perception.cli.sizes import sides
from deeprob_perception.errors import DataError

train_app = typer.Typer(no_args_is_help=True, help="Train a network (needs the extra `train`).")
app.add_typer(train_app, name="train")


@train_app.command()
def segmentation(
    data: Annotated[Path, typer.Option(help="Folder with images/ and labels/ (8-bit, pixel = class id).")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and scores.")],
    val: Annotated[Path | None, typer.Option(help="Folder of the same form to score at the end.")] = None,
    classes: Annotated[str | None, typer.Option(help="`street`, `tabletop` or a JSON file; default DATA/classes.json.")] = None,
    only: Annotated[str | None, typer.Option(help="Train on the images whose names begin so (comma-separated).")] = None,
    without: Annotated[str | None, typer.Option(help="Leave these out, and score on them instead of --val.")] = None,
    backbone: Annotated[str, typer.Option(help="Backbone of the recipe.")] = "swin-micro",
    head: Annotated[str, typer.Option(help="Head: fpn or upernet.")] = "fpn",
    epochs: Annotated[int, typer.Option(min=1)] = 60,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 6e-4,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the backbone's matrices.")] = "adamw",
    crop: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the crops, or a side; best multiples of 32 x the window.")] = "256",
    balanced: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the crops centred on a class, rare ones more often.")
    ] = 0.5,
    min_scale: Annotated[float, typer.Option(help="Smallest zoom of a crop.")] = 0.5,
    max_scale: Annotated[float, typer.Option(help="Largest zoom of a crop.")] = 1.75,
    augmentation: Annotated[str, typer.Option(help="strong, or mild (short trainings).")] = "strong",
    drop_path: Annotated[float, typer.Option(min=0.0, max=0.9)] = 0.05,
    undo_weights: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the loss's class weights to take off the logits at the end.")
    ] = 1.0,
    precision: Annotated[str, typer.Option(help="auto (bf16 where it is native), fp32 or bf16.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and augment.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="torch's CPU threads; 0: its own choice.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    eval_every: Annotated[int, typer.Option(min=0, help="Score the validation images every N epochs; 0: at the end only.")] = 0,
    eval_size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH to score at, that of the export; default: the images' own.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Start from these weights: a model name, .safetensors or .onnx.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.pt.")] = False,
) -> None:
    """Train a segmentation network; `torchrun --nproc-per-node N $(which deeprob) train ...` uses N GPUs."""
    from deeprob_perception.segmentation.classes import class_set
    from deeprob_perception.segmentation.dataset import find_samples
    from deeprob_perception.training.data import AUGMENTATIONS, Augmentation
    from deeprob_perception.training.segmentation import Settings, train

    if precision not in ("auto", "fp32", "bf16"):
        raise DataError(f"--precision {precision}: want auto, fp32 or bf16")
    if augmentation not in AUGMENTATIONS:
        raise DataError(f"--augmentation {augmentation}: want {' or '.join(AUGMENTATIONS)}")
    if optimizer not in ("adamw", "muon"):
        raise DataError(f"--optimizer {optimizer}: want adamw or muon")
    window = sides(crop, "--crop", "HEIGHTxWIDTH", least=32, square=True)
    found = class_set(data, classes)
    samples = find_samples(data)
    val_samples = find_samples(val) if val else []
    if only:
        samples = [s for s in samples if s.name.startswith(tuple(only.split(",")))]
    if without:
        val_samples = [s for s in samples if s.name.startswith(tuple(without.split(",")))]
        samples = [s for s in samples if s not in val_samples]
    weights = None
    if init:
        from deeprob_perception import zoo

        _, weights = zoo.load_checkpoint(init)
    settings = Settings(
        backbone=backbone, head=head, epochs=epochs, batch_size=batch_size, optimizer=optimizer, learning_rate=learning_rate,
        drop_path=drop_path, undo_weights=undo_weights,
        precision=precision, workers=workers, threads=threads, seed=seed, eval_every=eval_every,
        eval_size=sides(eval_size, "--eval-size", "HEIGHTxWIDTH", least=32, square=True) if eval_size else None,
        augmentation=Augmentation(
            crop=window, scale=(min_scale, max_scale), balanced=balanced, **AUGMENTATIONS[augmentation]
        ),
    )  # fmt: skip
    scores = train(samples, val_samples, found, out, settings, resume, weights)
    if scores:
        show({name: None if v is None else round(v, 4) for name, v in scores["iou"].items()})
        show(f"mIoU {scores['miou']:.4f}, pixel accuracy {scores['pixel_accuracy']:.4f} on {len(val_samples)} images")


@train_app.command()
def dino(
    data: Annotated[list[Path], typer.Option(help="Folder of images, video file or bag; may be given again.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and logs.")],
    fps: Annotated[float, typer.Option(min=0.01, help="Frames a second to take of videos and bags.")] = 5.0,
    backbone: Annotated[str, typer.Option(help="A ViT's name.")] = "vit-micro",
    epochs: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=2)] = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="For a batch of 256; scaled to the batch.")] = 1e-3,
    global_size: Annotated[int, typer.Option(min=16, help="Side of the two global crops, pixels.")] = 112,
    local_size: Annotated[int, typer.Option(min=8, help="Side of the local crops, pixels.")] = 48,
    local_crops: Annotated[int, typer.Option(min=0)] = 6,
    outputs: Annotated[int, typer.Option(min=2, help="Of the projection head.")] = 4096,
    momentum: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the teacher, at the start.")] = 0.99,
    temperature: Annotated[float, typer.Option(min=0.001, help="Of the teacher after 30 epochs; 0.04 before.")] = 0.04,
    dense: Annotated[float, typer.Option(min=0.0, help="Weight of the loss on patches; 0: DINO as published.")] = 0.0,
    precision: Annotated[str, typer.Option(help="auto (bf16 where it is native), fp32 or bf16.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and augment.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="torch's CPU threads; 0: its own choice.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/last.pt.")] = False,
) -> None:
    """Learn features from pictures without labels (DINO), as from a robot's own bags."""
    from deeprob_perception.training.crops import MultiCrop, read_frames
    from deeprob_perception.training.dino import Settings, collapse, train

    if precision not in ("auto", "fp32", "bf16"):
        raise DataError(f"--precision {precision}: want auto, fp32 or bf16")
    frames = read_frames(data, fps)
    show(f"{len(frames)} frames")
    settings = Settings(
        backbone=backbone, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, outputs=outputs,
        teacher_momentum=momentum, teacher_temperature=(0.04, temperature), dense_weight=dense, precision=precision,
        workers=workers, threads=threads, seed=seed,
        crops=MultiCrop(global_size=global_size, local_size=local_size, local_count=local_crops),
    )  # fmt: skip
    report = train(frames, out, settings, resume)
    if report:
        told = f"{report['information']:.2f} nats of a picture in the teacher's answer; {out}/model.safetensors"
        show(collapse(report, outputs) or told)


@train_app.command(name="get-fk")
def get_fk(
    robots: Annotated[Path, typer.Option(help="Folder with the hands of GET-Zero's splits, NAME.urdf.")],
    out: Annotated[Path, typer.Option(help="Folder for weights and logs.")] = Path("runs/get_fk"),
    variant: Annotated[list[str] | None, typer.Option(help="get, et or et_dfs; may be given again. Default: all.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 12000,
    batch_size: Annotated[int, typer.Option(min=8)] = 256,
    width: Annotated[int, typer.Option(min=8)] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    threads: Annotated[int, typer.Option(min=0, help="torch's CPU threads; 0: its own choice.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train GET and its baselines to know where a hand's joints are (self-modelling alone, GET-Zero's table 3)."""
    from deeprob_perception.training.get_fk import VARIANTS, Settings, train

    chosen = variant or list(VARIANTS)
    if unknown := [name for name in chosen if name not in VARIANTS]:
        raise DataError(f"--variant {unknown[0]}: want one of {', '.join(VARIANTS)}")
    settings = Settings(width=width, layers=layers, feedforward=2 * width, steps=steps, batch_size=batch_size,
                        learning_rate=learning_rate, threads=threads, seed=seed)  # fmt: skip
    for name in chosen:
        show(f"{name}: {train(name, robots, out, settings)['mean_mm']:.3f} mm on the validation hands")


@train_app.command()
def reach(
    out: Annotated[Path, typer.Option(help="Folder for weights, checkpoints and logs.")] = Path("runs/reach"),
    variant: Annotated[list[str] | None, typer.Option(help="get, no_graph, no_self_model or mlp; may be given again.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 12000,
    robots: Annotated[int, typer.Option(min=64, help="Robots to generate and learn on.")] = 40000,
    width: Annotated[int, typer.Option(min=8)] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    precision: Annotated[str, typer.Option(help="auto (bf16 where native, the last steps in fp32), fp32 or bf16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="torch's CPU threads; 0: its own choice.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/VARIANT.pt.")] = False,
) -> None:
    """Learn to reach with any robot, on robots that are generated (no data is needed)."""
    from deeprob_perception.training.reach import Settings, train

    if precision not in ("auto", "fp32", "bf16"):
        raise DataError(f"--precision {precision}: want auto, fp32 or bf16")
    for name in variant or ["get"]:
        settings = Settings(
            variant=name, steps=steps, robots=robots, width=width, feedforward=2 * width, layers=layers,
            learning_rate=learning_rate, precision=precision, threads=threads, seed=seed,
        )  # fmt: skip
        report = train(out, settings, resume)
        if report:
            show(f"{name}: {report['success']:.1%} of the goals of robots that it was not trained on")
