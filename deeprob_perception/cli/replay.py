# SPDX-License-Identifier: Apache-2.0
"""`deeprob replay`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deeprob_perception.cli import app

if TYPE_CHECKING:
    from rich.console import Console

    from deeprob_perception.expectation import Difference

_SHOWN = 20  # rows of the table of differences; the count is always given


@app.command()
def replay(
    bag: Annotated[Path, typer.Argument(metavar="BAG", help="A bag file or folder (ROS 2 mcap, sqlite3; ROS 1).")],
    out: Annotated[Path, typer.Option(help="The bag to write (.mcap); a contact sheet .png appears beside it.")],
    topic: Annotated[str | None, typer.Option(help="Image topic; by default a colour camera's.")] = None,
    task: Annotated[str, typer.Option(help="segmentation or tracking.")] = "segmentation",
    model: Annotated[str | None, typer.Option(help="A name, or an .onnx file; default: tabletop, or dino to track.")] = None,
    seed_mask: Annotated[Path | None, typer.Option(help="Track the objects of this mask of the first frame (ids).")] = None,
    seed_point: Annotated[list[str] | None, typer.Option(help="Track this point of the first frame, X,Y; repeatable.")] = None,
    seed_class: Annotated[list[int] | None, typer.Option(help="Track this class of the first true mask; repeatable.")] = None,
    backend: Annotated[str, typer.Option(help="auto (the fastest here), tensorrt, openvino, onnxruntime or torch.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, or int8 of a quantised model.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads for one inference; 0 for all cores.")] = 0,
    confidence: Annotated[bool, typer.Option("--confidence", help="Write the confidence images too.")] = False,
    overlay: Annotated[Path | None, typer.Option(help="Write the overlay as a video (.mp4).")] = None,
    ground_truth: Annotated[str | None, typer.Option(help="Topic of true masks; by default one so named.")] = None,
    expect: Annotated[
        Path | None, typer.Option(help="Compare with an earlier run (its --json or --out); exit status 1 if it differs.")
    ] = None,
    min_iou: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --expect: accept other masks of at least this mean IoU.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the summary here.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
) -> None:
    """Run segmentation or tracking on every frame of a bag, deterministically; masks and overlay go into a new bag."""
    import json as json_module

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from deeprob_perception.errors import BagError
    from deeprob_perception.expectation import compare
    from deeprob_perception.replay import Options
    from deeprob_perception.replay import replay as run
    from deeprob_perception.replay_tasks import Seeds

    if min_iou is not None and expect is None:
        raise typer.BadParameter("--min-iou needs --expect")
    if expect is not None and not expect.is_file():
        raise BagError(f"{expect}: no such file to compare with; an earlier run writes it by --json {expect}")
    if expect is not None and expect.resolve() == out.resolve():
        raise BagError(f"--out {out} would overwrite what --expect compares with; give another file")
    if task not in ("segmentation", "tracking"):
        raise typer.BadParameter(f"--task {task}: want segmentation or tracking")
    if task == "tracking" and (expect is not None and min_iou is not None):
        raise typer.BadParameter("--min-iou compares masks of segmentation; tracking is compared by --expect alone")
    seeds = Seeds(seed_mask, [place("--seed-point", text) for text in seed_point or ()], seed_class or ())
    model = model or ("dino" if task == "tracking" else "tabletop")
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(bag.name, total=None)
        options = Options(bag, out, model, topic, backend, precision, threads, confidence, overlay, ground_truth, max_frames,
                          task=task, seeds=seeds)  # fmt: skip
        result = run(
            options,
            on_frame=lambda done, total: progress.update(bar, completed=done, total=total),
            warn=lambda text: progress.console.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True),
        )
    summary = result.summary
    differences = None if expect is None else compare(summary, expect, min_iou)
    if differences is not None:
        summary["expected"] = {
            "file": str(expect),
            "differing": len(differences),
            "refused": sum(not d.accepted for d in differences),
        }
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps(summary, indent=1) + "\n")
    _report(Console(), summary, result.contact_sheet)
    if differences is not None and not _verdict(Console(), differences, summary["frames"]):
        raise typer.Exit(1)


def place(option: str, text: str) -> tuple[float, float]:
    """Return x, y of an option's `X,Y`."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: want X,Y in pixels, such as 320,240") from None
    return x, y


def _report(console: "Console", summary: dict[str, Any], sheet: Path) -> None:
    from rich.table import Table

    table = Table("stage", title=f"{summary['topic']}: {summary['frames']} frames, {summary['backend']} {summary['precision']}")
    for heading in ("p50 ms", "p95 ms", "p99 ms"):
        table.add_column(heading, justify="right")
    for name, stage in summary["stages"].items():
        table.add_row(name, *(f"{stage[key]:.2f}" for key in ("p50", "p95", "p99")))
    console.print(table)
    for skip in summary["skipped"][:_SHOWN]:
        console.print(f"[yellow]skipped frame {skip['frame']}:[/] {skip['reason']}", highlight=False, soft_wrap=True)
    if len(summary["skipped"]) > _SHOWN:
        console.print(f"[yellow]and {len(summary['skipped']) - _SHOWN} more skipped frames (see --json)[/]")
    truth = summary.get("ground_truth")
    if truth and truth["frames"]:
        console.print(
            f"against {truth['topic']}: mIoU {truth['miou']:.4f}, pixel accuracy {truth['pixel_accuracy']:.4f} "
            f"over {truth['frames']} frames",
            highlight=False,
        )
    elif truth:
        reason = truth["problems"][0] if truth["problems"] else "no stamp is equal to a camera frame's"
        console.print(f"[yellow]{truth['topic']} could not be compared:[/] {reason}", highlight=False)
    console.print(f"written: {summary['out']}, {sheet}", highlight=False, soft_wrap=True)


def _verdict(console: "Console", differences: "list[Difference]", frames: int) -> bool:
    """Show what differs, and return whether the run is accepted."""
    from rich.table import Table

    refused = [d for d in differences if not d.accepted]
    if not differences:
        console.print(f"[green]as expected:[/] all {frames} masks are equal")
        return True
    table = Table("frame", "stamp, s", "what", "mIoU", "pixels equal", "verdict", title=f"{len(differences)} frames differ")
    for d in (refused + [d for d in differences if d.accepted])[:_SHOWN]:
        table.add_row(
            str(d.frame),
            "-" if d.stamp is None else f"{d.stamp / 1e9:.3f}",
            d.reason,
            "-" if d.miou is None else f"{d.miou:.4f}",
            "-" if d.agreement is None else f"{d.agreement:.4f}",
            "[green]accepted" if d.accepted else "[red]differs",
        )
    console.print(table)
    if refused:
        console.print(f"[red]not as expected:[/] {len(refused)} of {frames} frames", highlight=False)
    return not refused
