# SPDX-License-Identifier: Apache-2.0
"""`deeprob sim render|record`: training frames and bags from the simulated table top."""

from pathlib import Path
from typing import Annotated

import typer

from deeprob_perception.cli import app
from deeprob_perception.cli.sizes import sides

group = typer.Typer(no_args_is_help=True, help="Simulated table top: training frames and bags (extra `sim`).")
app.add_typer(group, name="sim")


@group.command()
def render(
    frames: Annotated[int, typer.Option(help="How many frames.")],
    out: Annotated[Path, typer.Option(help="Folder to fill with images/, labels/ and classes.json.")],
    seed: Annotated[int, typer.Option(help="Equal seeds give equal frames.")] = 0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, pixels.")] = "640x480",
    views: Annotated[int, typer.Option(help="Frames per scene; fewer is more varied and a little slower.")] = 2,
    workers: Annotated[int, typer.Option(help="Processes; the frames don't depend on it.")] = 2,
) -> None:
    """Render labelled training frames, a new random scene every few frames."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from deeprob_perception.sim.dataset import render_dataset

    pixels = sides(size, "--size", "WIDTHxHEIGHT")
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("render", total=frames)
        render_dataset(out, frames, seed, pixels, views, workers, lambda count: progress.advance(task, count))


@group.command()
def record(
    out: Annotated[Path, typer.Option(help="The bag to write, *.mcap.")],
    seconds: Annotated[float, typer.Option(help="Length of the recording.")] = 20.0,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 15.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal recordings.")] = 0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, pixels.")] = "640x480",
    depth_every: Annotated[int, typer.Option(help="Every n-th frame has depth, the largest part of a frame.")] = 3,
) -> None:
    """Record a bag: colour, camera info, depth, joint states and true labels of one moving scene."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from deeprob_perception.sim.record import record as write_bag

    pixels = sides(size, "--size", "WIDTHxHEIGHT")
    columns = (TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("record", total=round(seconds * fps))
        write_bag(out, seconds, fps, seed, pixels, depth_every, lambda count: progress.advance(task, count))
