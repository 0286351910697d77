# SPDX-License-Identifier: Apache-2.0
"""`deeprob build`: TensorRT engines ahead of their first use."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deeprob_perception.cli import app

if TYPE_CHECKING:
    from deeprob_perception.engines.builder import Quantiser
    from deeprob_perception.engines.model_file import ModelFile

CALIBRATION_FRAMES = 128


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A model's name or an .onnx file.")],
    precision: Annotated[str, typer.Option(help="auto (fp16), fp32, fp16, bf16 or int8.")] = "auto",
    target: Annotated[
        list[str] | None,
        typer.Option(help="Compute capability, such as sm_86; may be given again. Default: the GPU of this machine."),
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where to keep it; default: the user's cache folder.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of images or bag: int8 is calibrated on it, every precision compared on it.")
    ] = None,
    rebuild: Annotated[bool, typer.Option(help="Build even if the engine is in the cache.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was built to this file.")] = None,
) -> None:
    """Build a model's TensorRT engine, compare it with fp32, and keep it where nodes look for it."""
    from rich.console import Console

    from deeprob_perception import engines, zoo
    from deeprob_perception.engines import builder, model_file
    from deeprob_perception.errors import EngineError
    from deeprob_perception.samples import read_samples

    if precision not in engines.PRECISIONS:
        raise EngineError(f"unknown precision {precision!r}; there are: {', '.join(engines.PRECISIONS)}")
    file = model_file.read(zoo.resolve(model))
    targets = [builder.find_target(sm) for sm in target or (None,)]
    show_progress()
    console = Console()
    samples = read_samples(file, calibration)
    quantise = quantiser(file, calibration)
    made: list[dict[str, Any]] = []
    for goal in targets:
        entry = builder.build(file, precision, goal, cache_dir, samples, quantise, rebuild)
        if entry.path is None:
            raise EngineError("the engine was built and could not be kept (see above); give --cache-dir a folder with room")
        made.append({**entry.facts, "path": str(entry.path), "built_now": entry.built})
        for line in lines(made[-1]):
            console.print(line, soft_wrap=True, highlight=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(made, indent=2) + "\n")


def show_progress() -> None:
    """Let the builder's log lines through to stderr: a build takes minutes."""
    import logging

    logger = logging.getLogger("deeprob_perception.engines")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def quantiser(model: "ModelFile", calibration: Path | None) -> "Quantiser":
    """Return what makes the int8 file where one is asked for."""

    def quantise(source: Path, out: Path) -> Path:
        from deeprob_perception.errors import EngineError
        from deeprob_perception.samples import read_samples

        if calibration is None:
            raise EngineError("int8 is calibrated on frames: give --calibration FOLDER_OR_BAG, with pictures of your camera")
        try:
            from deeprob_perception.quantize import quantize  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise EngineError(f"int8 needs the quantiser, which cannot be imported ({error})") from error
        frames = read_samples(model, calibration, CALIBRATION_FRAMES).images
        made: Path = quantize(source, iter(frames), out)
        return made

    return quantise


def lines(facts: dict[str, Any]) -> list[str]:
    """Return an engine's facts for people; `deeprob models info` shows the same."""
    from deeprob_perception.engines.parity import Parity

    key = facts["key"]
    goal = f"{key['gpu']} ({key['target']})" if key["gpu"] else key["target"]
    asked = "" if facts["precision"] == facts["requested_precision"] else f" (asked for: {facts['requested_precision']})"
    size = f"{facts['bytes'] / 1e6:.1f} MB"
    found = [f"{facts['precision']}{asked} for {goal}, {facts['library']}, {size}, built in {facts['seconds']} s"]
    found.append(f"  {facts['path']}")
    found += [f"  not in {fallback}" for fallback in facts["fallbacks"]]
    found.append(f"  {Parity(**facts['parity']).line()}" if facts["parity"] else "  not compared with fp32")
    if facts["shortfall"]:
        found.append(f"  not to be trusted: {facts['shortfall']}")
    return found
