# SPDX-License-Identifier: Apache-2.0
"""`deeprob models ...`: what there is, fetching, converting, checksums."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deeprob_perception.cli import app

if TYPE_CHECKING:
    from deeprob_perception.zoo import Entry

models = typer.Typer(name="models", help="List, fetch, convert and inspect models.", no_args_is_help=True)
app.add_typer(models)

Height = Annotated[int, typer.Option(min=32, help="Height of the exported model's input, pixels.")]
Width = Annotated[int, typer.Option(min=32, help="Width of the exported model's input, pixels.")]


@models.command("list")
def list_models() -> None:
    """Show the models that have a name: shipped, and fetched into the cache."""
    from rich.console import Console
    from rich.table import Table

    from deeprob_perception import zoo

    table = Table("name", "from", "task", "input", "MB", "metrics", "licence", "sha256", title=None)
    entries = zoo.catalogue()
    for name in sorted(entries):
        table.add_row(*row(entries[name]))
    weights = {name: path for name, path in zoo.fetched_weights().items() if name not in entries}
    for name, path in weights.items():
        table.add_row(name, "cache", "weights only", "", f"{path.stat().st_size / 1e6:.1f}", "", "", "")
    console = Console()
    if table.row_count:
        console.print(table)
    else:
        console.print(f"No models in {zoo.shipped_dir()} or {zoo.cache_dir()}.", soft_wrap=True)
    missing = [name for name in zoo.OFFICIAL if name not in entries and name not in weights]
    console.print(f"To fetch (deeprob models fetch NAME): {', '.join(missing)}", style="dim", soft_wrap=True)


def row(entry: "Entry") -> list[str]:
    """Return the cells of a model's line; a damaged file shows as such instead of stopping the list."""
    from deeprob_perception.engines import model_file
    from deeprob_perception.errors import ModelError

    first = [entry.name, "package" if entry.shipped else "cache", entry.task]
    if not entry.path.is_file():
        return [*first, "", "", "", "", "[red]file missing[/]"]
    size = f"{entry.path.stat().st_size / 1e6:.1f}"
    if not entry.intact():
        return [*first, "", size, "", "", "[red]differs[/]"]
    try:
        model = model_file.read(entry.path)
    except ModelError:
        return [*first, "", size, "", "", "[red]unreadable[/]"]
    shape = model.inputs[0].shape
    takes = f"{shape[2]}x{shape[1]}" if model.inputs[0].name == "image" else f"{shape[1]} joints"
    metrics = metrics_line(model.metadata.get("metrics", "{}"))
    return [*first, takes, size, metrics, model.metadata.get("licence", ""), "[green]ok[/]"]


def metrics_line(text: str) -> str:
    """Return the plain numbers of a model's metrics (JSON) in one line."""
    import json

    try:
        metrics = json.loads(text)
    except ValueError:
        return text
    if not isinstance(metrics, dict):
        return text
    shown = {key: value for key, value in metrics.items() if isinstance(value, (int, float, str))}
    return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())


@models.command()
def fetch(
    source: Annotated[str, typer.Argument(help="A name from `models list`, ORG/REPO on the hub, or a folder.")],
    name: Annotated[str | None, typer.Option(help="Name to keep it under; by default the source's.")] = None,
    height: Height = 480,
    width: Width = 640,
    export: Annotated[bool, typer.Option(help="Also export the model, so that nodes can run it by its name.")] = True,
) -> None:
    """Get a published Swin or DINO checkpoint, convert it, and keep it in the cache."""
    from rich.console import Console

    from deeprob_perception import zoo

    console = Console()
    with console.status(f"fetching and converting {source} ..."):
        weights, model = zoo.fetch(source, name, (height, width) if export else None)
    console.print(f"weights: {weights}", soft_wrap=True)
    if model is not None:
        console.print(f"model:   {model}  (--model {model.stem})", soft_wrap=True)
    elif export:
        console.print("These are weights without a segmentation head: there are no masks to export.")


@models.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: .safetensors, .bin, .pth, or a folder from the hub.")],
    out: Annotated[Path | None, typer.Option(help="Weights file to write, .safetensors.")] = None,
    export: Annotated[Path | None, typer.Option(help="Model file to write, .onnx.")] = None,
    height: Height = 480,
    width: Width = 640,
) -> None:
    """Convert a Hugging Face, Microsoft, mmsegmentation or GET-Zero checkpoint, or our own weights, to ours."""
    from rich.console import Console

    from deeprob_perception import checkpoints, zoo
    from deeprob_perception.errors import ModelError

    for path, suffix in ((out, ".safetensors"), (export, ".onnx")):
        if path is not None and path.suffix != suffix:
            raise ModelError(f"{path}: give a name that ends in {suffix}")
    if out is None and export is None:
        raise ModelError("give --out X.safetensors, --export X.onnx, or both")
    recipe, state = zoo.load_checkpoint(source) if is_ours(source) else checkpoints.convert(source)
    console = Console()
    console.print(recipe_line(recipe), soft_wrap=True)
    if out is not None:
        console.print(f"weights: {zoo.save_checkpoint(out, state, recipe)}", soft_wrap=True)
    if export is not None:
        console.print(f"model:   {zoo.export(recipe, state, export, height, width)}", soft_wrap=True)


def is_ours(path: Path) -> bool:
    """Tell whether a file is a checkpoint of ours, by the recipe in it."""
    if path.suffix == ".onnx":
        return True
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return "recipe" in (file.metadata() or {})
    except SafetensorError:
        return False


def recipe_line(recipe: dict) -> str:
    head = f" + {recipe['head']}, {len(recipe['classes'])} classes" if recipe.get("head") else ", backbone only"
    window = f", window {recipe['window_size']}" if recipe.get("window_size") else ""
    if recipe.get("task") == "features":
        head = ", features"
    elif "slots" in recipe:
        head = f", {recipe['task']} policy for up to {recipe['slots']} joints"
    return f"{recipe['backbone']}{window}{head}"


@models.command()
def info(
    model: Annotated[str, typer.Argument(help="A model's name, or the path of an .onnx or .safetensors file.")],
) -> None:
    """Show what a model says about itself: task, classes, training data, licence, metrics, checksum."""
    import json

    from rich.console import Console
    from rich.table import Table

    from deeprob_perception import zoo
    from deeprob_perception.engines import model_file

    table = Table(show_header=False, box=None)
    if model.endswith(".safetensors"):
        path = Path(model)
        recipe, state = zoo.load_checkpoint(path)
        facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in recipe.items()}
        facts["parameters"] = f"{sum(tensor.numel() for tensor in state.values()) / 1e6:.1f} M"
    else:
        path = zoo.resolve(model)
        read = model_file.read(path)
        facts = {"input": str(read.inputs[0]), "outputs": ", ".join(map(str, read.outputs)), **read.metadata}
    table.add_row("file", str(path))
    table.add_row("sha256", zoo.checksum(path))
    for key, value in facts.items():
        table.add_row(key, value)
    entry = zoo.catalogue().get(model)
    if entry is not None and entry.card is not None:
        table.add_row("card", str(entry.card))
    for line in engine_lines(path):
        table.add_row("engine", line)
    Console().print(table, markup=False)


def engine_lines(path: Path) -> list[str]:
    """Return what is in the user's cache of TensorRT engines of a model file, each with how it compares with fp32."""
    from deeprob_perception import zoo
    from deeprob_perception.cli.build import lines
    from deeprob_perception.engines.cache import EngineCache

    if path.suffix != ".onnx":
        return []
    return ["\n".join(lines(facts)) for facts in EngineCache().entries(zoo.checksum(path))]


@models.command()
def manifest(folder: Annotated[Path, typer.Argument(help="A folder of .onnx files.")]) -> None:
    """Write FOLDER/manifest.json: file, sha256, card and task of each model in it."""
    from rich.console import Console

    from deeprob_perception import zoo
    from deeprob_perception.errors import ModelError

    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}")
    Console().print(f"wrote {zoo.write_manifest(folder)}", soft_wrap=True)
