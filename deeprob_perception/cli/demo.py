# SPDX-License-Identifier: Apache-2.0
"""`deeprob demo`: camera frames in, masks out, through real ROS 2 processes, and a report."""

from pathlib import Path
from typing import Annotated

import typer

from deeprob_perception.cli import app


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the recording, video, contact sheet and report.")] = Path("out/demo"),
    seconds: Annotated[float | None, typer.Option(min=1, help="Play only so long (to a second).")] = None,
    model: Annotated[str, typer.Option(help="A model's name or an .onnx file.")] = "tabletop",
    bag: Annotated[Path | None, typer.Option(help="A bag of yours instead of the sample.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the model: auto, tensorrt, openvino, onnxruntime, torch.")] = "auto",
    tracking: Annotated[bool, typer.Option(help="Run the tracking node, too.")] = True,
    seed_mask: Annotated[Path | None, typer.Option(help="Objects to track: ids in an image of the bag's first frame.")] = None,
) -> None:
    """Play the sample bag to a segmentation and a tracking node, record what comes, and report speed and score."""
    from rich.console import Console

    from deeprob_perception.demo.run import Options, run

    try:
        run(Options(out, model, bag, seconds, backend, tracking, seed_mask), Console())
    except KeyboardInterrupt:
        typer.echo("interrupted; every process of the demo has ended", err=True)
        raise typer.Exit(130) from None
