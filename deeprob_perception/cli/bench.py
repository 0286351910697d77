# SPDX-License-Identifier: Apache-2.0
"""`deeprob bench ...`"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deeprob_perception.cli import app

bench_app = typer.Typer(no_args_is_help=True, help="Measure engines and the node on this machine.")
app.add_typer(bench_app, name="bench")

Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here.")]
Docs = Annotated[bool, typer.Option("--write-docs", help="Put the table into docs/benchmarks.md of the checkout.")]


@bench_app.command()
def engine(
    model: Annotated[str, typer.Option(help="A model's name or an .onnx file.")] = "tabletop",
    backend: Annotated[list[str] | None, typer.Option(help="Only this back end; may be given again. Default: all.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads for one inference; 0: the back end's choice.")] = 2,
    rounds: Annotated[int, typer.Option(min=5, help="How often each candidate runs.")] = 50,
    eager: Annotated[bool, typer.Option(help="Measure torch eager fp32 as well (needs the extra `train`).")] = True,
    json_out: Json = None,
    write_docs: Docs = False,
) -> None:
    """Run a model by every back end and precision of this machine, beside torch eager, and compare."""
    from rich.console import Console
    from rich.markdown import Markdown

    from deeprob_perception import bench, engines, zoo
    from deeprob_perception.errors import EngineError

    for name in backend or ():
        if name not in engines.BACKENDS:
            raise EngineError(f"unknown back end {name!r}; there are: {', '.join(engines.BACKENDS)}")
    options = bench.Options(zoo.resolve(model), tuple(backend or ()), threads, rounds, eager=eager)
    console = Console()
    with console.status("loading") as status:
        report = bench.bench(options, lambda text: status.update(f"bench: {text}"))
    table = bench.markdown(report)
    console.print(Markdown(table) if console.is_terminal else table, soft_wrap=True)
    keep(report, json_out)
    if write_docs:
        from deeprob_perception.share import share_dir

        bench.write_section(share_dir() / "docs" / "benchmarks.md", f"engine {report['model']['name']}", table)


@bench_app.command()
def node(
    model: Annotated[str, typer.Option(help="A model's name or an .onnx file.")] = "tabletop",
    rate: Annotated[float, typer.Option(min=0.1, help="Frames a second that the camera publishes.")] = 10.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long.")] = 60.0,
    backend: Annotated[str, typer.Option(help="Back end of the node.")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision of the node.")] = "auto",
    threads: Annotated[int, typer.Option(min=0)] = 0,
    width: Annotated[int, typer.Option(min=1)] = 640,
    height: Annotated[int, typer.Option(min=1)] = 480,
    transport: Annotated[str, typer.Option(help="raw or compressed.")] = "raw",
    json_out: Json = None,
) -> None:
    """Measure the segmentation node from outside, camera and node in processes of their own (needs ROS 2)."""
    from rich.console import Console

    from deeprob_perception.errors import EngineError

    try:
        from deeprob_perception.nodes.measure import measure
    except ImportError as error:
        raise EngineError(f"`deeprob bench node` needs ROS 2 ({error}); the extra `ros` installs it from PyPI") from error
    report = measure(
        model, rate, seconds, backend=backend, precision=precision, threads=threads, width=width, height=height,
        transport=transport,
    )  # fmt: skip
    Console().print_json(json.dumps(report))
    keep(report, json_out)


def keep(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
