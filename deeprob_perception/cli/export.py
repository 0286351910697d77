# SPDX-License-Identifier: Apache-2.0
"""`deeprob export`"""

from pathlib import Path
from typing import Annotated

import typer
from rich import print as show

from deeprob_perception.cli import app
from deeprob_perception.cli.sizes import sides
from deeprob_perception.errors import ModelError


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Weights: a .safetensors or .onnx of ours, or a model's name.")],
    out: Annotated[Path, typer.Option(help="The .onnx to write.")],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the input, pixels; the camera's own is best.")] = "480x640",
    name: Annotated[str | None, typer.Option(help="The model's name; default: that of the file.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the weights (SPDX).")] = None,
    training_data: Annotated[str | None, typer.Option(help="What the weights were trained on.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="JSON of `deeprob eval`, to travel with the model.")] = None,
) -> None:
    """Write a self-describing ONNX that every engine reads (needs the extra `train`)."""
    height, width = sides(size, "--size", "HEIGHTxWIDTH")
    about = {"name": name or out.stem}
    if licence:
        about["licence"] = licence
    if training_data:
        about["training_data"] = training_data
    if metrics:
        about["metrics"] = read_metrics(metrics)

    from deeprob_perception import zoo

    try:
        recipe, state = zoo.load_checkpoint(checkpoint)
        path = zoo.export(recipe, state, out, height, width, about)
    except ImportError as error:
        raise ModelError(f"export needs torch and onnxscript ({error}): pip install 'deeprob_perception[train]'") from error
    kind = f"{len(recipe['classes'])} classes" if "classes" in recipe else recipe["backbone"]
    takes = f"{recipe['slots']} joints" if "slots" in recipe else size
    show(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {takes}, {kind}")


def read_metrics(path: Path) -> str:
    """Return the file's JSON on one line; raise ModelError when there is none in it."""
    import json

    try:
        return json.dumps(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ModelError(f"--metrics {path}: {error}; give a JSON file, as `deeprob eval --json` writes it") from error
