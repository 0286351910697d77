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
Docs = Annotated[bool, typer.Option("--write-docs", help="Put table and plot into docs/benchmarks.md of the checkout.")]
BagOption = Annotated[Path | None, typer.Option("--bag", help="Bag with the pictures; default: the sample bag.")]


@bench_app.command()
def engine(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model's name or an .onnx file; again for its int8 file, the fp32 one first. Default: tabletop."),
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this back end; may be given again. Default: all.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads for one inference; 0: the back end's choice.")] = 2,
    rounds: Annotated[int, typer.Option(min=2, help="How often each candidate has its turn.")] = 20,
    burst: Annotated[int, typer.Option(min=1, help="Frames a turn.")] = 3,
    peers: Annotated[
        bool, typer.Option(help="Measure what users would run instead, too: torch, transformers, plain ONNX Runtime.")
    ] = True,
    skip: Annotated[list[str] | None, typer.Option(help="Leave out this peer, such as torch.compile.")] = None,
    peer_seconds: Annotated[float, typer.Option(min=1, help="For a peer's first frame, compilation within it.")] = 180.0,
    bag: BagOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the plot here, .png or .svg.")] = None,
    json_out: Json = None,
    write_docs: Docs = False,
) -> None:
    """Run a model by every back end and precision of this machine, beside what users would run instead, and compare."""
    from rich.console import Console
    from rich.markdown import Markdown

    from deeprob_perception import engines, zoo
    from deeprob_perception.bench.engine import Options, bench
    from deeprob_perception.bench.peers import PEERS
    from deeprob_perception.bench.report import engine_section, write_section
    from deeprob_perception.errors import EngineError

    for name in backend or ():
        if name not in engines.BACKENDS:
            raise EngineError(f"unknown back end {name!r}; there are: {', '.join(engines.BACKENDS)}")
    for name in skip or ():
        if name not in PEERS:
            raise EngineError(f"unknown peer {name!r}; there are: {', '.join(PEERS)}")
    options = Options(
        models=tuple(zoo.resolve(name) for name in model or ["tabletop"]),
        backends=tuple(backend) if backend else None,
        peers=tuple(name for name in PEERS if name not in (skip or ())) if peers else (),
        threads=threads, rounds=rounds, burst=burst, bag=bag, peer_seconds=peer_seconds,
    )  # fmt: skip
    console = Console()
    with console.status("loading") as status:
        report = bench(options, lambda text: status.update(f"bench: {text}"))
    section = engine_section(report)
    console.print(Markdown(section) if console.is_terminal else section, soft_wrap=True)
    keep(report, json_out)
    if plot is not None:
        from deeprob_perception.bench.plot import draw

        console.print(f"plot: {draw(report, plot)}", soft_wrap=True)
    if write_docs:
        from deeprob_perception.bench.plot import draw

        name = report["models"][0]["name"]
        draw(report, docs_page().parent / "images" / f"bench_{name}.png")
        write_section(docs_page(), f"engine {name}", engine_section(report, f"images/bench_{name}.png"))


@bench_app.command()
def node(
    model: Annotated[str, typer.Option(help="A model's name or an .onnx file.")] = "tabletop",
    rates: Annotated[str, typer.Option(help="Frames a second that the camera publishes; several: 10,30,60.")] = "10",
    seconds: Annotated[float, typer.Option(min=1, help="How long at each rate.")] = 60.0,
    search: Annotated[
        bool, typer.Option("--search", help="Find the highest rate with less than 5 % loss as well, by bisection.")
    ] = False,
    search_seconds: Annotated[float, typer.Option(min=1, help="How long each step of the search is.")] = 5.0,
    backend: Annotated[str, typer.Option(help="Back end of the node.")] = "auto",
    precision: Annotated[str, typer.Option(help="Precision of the node.")] = "auto",
    threads: Annotated[int, typer.Option(min=0)] = 0,
    width: Annotated[int, typer.Option(min=1)] = 640,
    height: Annotated[int, typer.Option(min=1)] = 480,
    transport: Annotated[str, typer.Option(help="raw or compressed.")] = "raw",
    bag: BagOption = None,
    json_out: Json = None,
    write_docs: Docs = False,
) -> None:
    """Measure the segmentation node from outside, camera and node in processes of their own (needs ROS 2)."""
    from rich.console import Console
    from rich.markdown import Markdown

    from deeprob_perception.bench.node import Plan, bench
    from deeprob_perception.bench.report import node_section, write_section
    from deeprob_perception.doctor.ros import require_ros
    from deeprob_perception.errors import BagError
    from deeprob_perception.share import share_dir

    plan = Plan(parse_rates(rates), seconds, search, search_seconds)
    if transport not in ("raw", "compressed"):
        raise typer.BadParameter(f"--transport {transport}: want raw or compressed")
    pictures = bag or share_dir() / "bags" / "sample.mcap"
    if not pictures.exists():
        raise BagError(f"there is no bag {pictures}")
    require_ros("`deeprob bench node`")
    from deeprob_perception.nodes.measure import Setting, measure, session

    setting = Setting(model, backend, precision, threads, width, height, transport, pictures)
    console = Console()
    with console.status("starting") as status:
        report = bench(
            plan, lambda rate, length: measure(setting, rate, length), lambda: session(setting), pictures, threads,
            lambda text: status.update(f"bench: {text}"),
        )  # fmt: skip
    section = node_section(report)
    console.print(Markdown(section) if console.is_terminal else section, soft_wrap=True)
    keep(report, json_out)
    if write_docs:
        write_section(docs_page(), f"node {report['model']['name']}", section)


def parse_rates(text: str) -> list[float]:
    """Return the rates in Hz of `10,30,60`; raise typer.BadParameter for anything else."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [0.0]
    if not all(0.1 <= rate <= 1000 for rate in rates):
        raise typer.BadParameter(f"--rates {text}: give frames a second as 10 or 10,30,60, each 0.1 to 1000")
    return rates


def docs_page() -> Path:
    """Return the page of a checkout; raise PerceptionError where there is none to write."""
    from deeprob_perception.errors import PerceptionError
    from deeprob_perception.share import share_dir

    folder = share_dir() / "docs"
    if not folder.is_dir():
        raise PerceptionError(f"--write-docs writes into a checkout, and there is no {folder}; take --json instead")
    return folder / "benchmarks.md"


def keep(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
