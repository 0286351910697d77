# SPDX-License-Identifier: Apache-2.0
"""`deeprob quantize`"""

from pathlib import Path
from typing import Annotated

import typer
from rich import print as show

from deeprob_perception.cli import app


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A fp32 model's name or .onnx file.")],
    out: Annotated[Path, typer.Option(help="The .onnx to write.")],
    data: Annotated[Path, typer.Option(help="Frames to calibrate on: a folder of images (or with images/ in it), or a bag.")],
    frames: Annotated[int, typer.Option(min=1, help="How many of them, evenly spread.")] = 64,
    topic: Annotated[str | None, typer.Option(help="The bag's image topic, where it has several.")] = None,
) -> None:
    """Write an int8 version of a model, which CPUs with VNNI or AMX and TensorRT run faster (needs the extra `quantize`).

    Calibrate on frames like those that the robot will see, and compare the two files by `deeprob eval` on labelled ones.
    """
    from rich.console import Console

    from deeprob_perception import zoo
    from deeprob_perception.engines import model_file
    from deeprob_perception.quantize import calibration_frames
    from deeprob_perception.quantize import quantize as run

    path = zoo.resolve(model)
    shape = model_file.image_shape(model_file.read(path))
    with Console().status(f"quantising {path.name}; this takes a minute or some"):
        run(path, calibration_frames(data, shape, frames, topic), out, data.name)
    before, after = (file.stat().st_size / 1e6 for file in (path, out))
    show(f"{out}: {after:.1f} MB (fp32: {before:.1f} MB), calibrated on frames of {data}")
