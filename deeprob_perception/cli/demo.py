# SPDX-License-Identifier: Apache-2.0
"""`deeprob demo`: camera frames in, masks out, through real ROS 2 processes, and a report."""

from pathlib import Path
from typing import Annotated

import typer

from deeprob_perception.cli import app


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for recording, video and report.", show_default="out/demo")] = None,
    closed_loop: Annotated[bool, typer.Option(help="Instead: a simulated arm touches what its camera sees.")] = False,
    episodes: Annotated[int, typer.Option(min=1, help="Of the closed loop.")] = 4,
    robot: Annotated[str, typer.Option(help="Of the closed loop: capsule_arm, scara, or a URDF file.")] = "capsule_arm",
    tip: Annotated[str, typer.Option(help="The link of a URDF file that shall touch.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="The closed loop's first cell.")] = 0,
    seconds: Annotated[float | None, typer.Option(min=1, help="Play only so long (to a second).")] = None,
    model: Annotated[str, typer.Option(help="A model's name or an .onnx file.")] = "tabletop",
    bag: Annotated[Path | None, typer.Option(help="A bag of yours instead of the sample.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the model: auto, tensorrt, openvino, onnxruntime, torch.")] = "auto",
    tracking: Annotated[bool, typer.Option(help="Run the tracking node, too.")] = True,
    seed_mask: Annotated[Path | None, typer.Option(help="Objects to track: ids in an image of the bag's first frame.")] = None,
) -> None:
    """Play the sample bag to a segmentation and a tracking node, record what comes, and report speed and score."""
    from rich.console import Console

    from deeprob_perception.demo import closed_loop as loop
    from deeprob_perception.demo.run import Options, run

    try:
        if closed_loop:
            folder = out or Path("out/closed_loop")
            loop.run(loop.Options(folder, episodes, robot, tip, seed=seed, model=model, backend=backend), Console())
        else:
            run(Options(out or Path("out/demo"), model, bag, seconds, backend, tracking, seed_mask), Console())
    except KeyboardInterrupt:
        typer.echo("interrupted; every process of the demo has ended", err=True)
        raise typer.Exit(130) from None
