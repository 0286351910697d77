# SPDX-License-Identifier: Apache-2.0
"""`deeprob bag info | from-images`."""

from pathlib import Path
from typing import Annotated

import typer

from deeprob_perception.cli import app

bag = typer.Typer(help="Look into bags, and make them from pictures.", no_args_is_help=True)
app.add_typer(bag, name="bag")


@bag.command()
def info(path: Annotated[Path, typer.Argument(metavar="BAG", help="A bag file or folder.")]) -> None:
    """Show a bag's topics, their rates, and what is damaged; ROS 1 and ROS 2, without ROS."""
    from rich.console import Console
    from rich.table import Table

    from deeprob_perception.bags import open_bag

    console = Console()
    with open_bag(path, warn=lambda text: console.print(f"[yellow]warning:[/] {text}", highlight=False)) as opened:
        spans: dict[tuple[str, str], tuple[int, int, int, int]] = {}
        for topic, log_time, raw in opened.messages():
            key = topic.name, topic.msgtype
            count, first, last, size = spans.get(key, (0, log_time, log_time, 0))
            spans[key] = count + 1, min(first, log_time), max(last, log_time), size + len(raw)
        table = Table(title=f"{path}: {len(opened.files)} file{'s' * (len(opened.files) != 1)}")
        for heading in ("topic", "type"):
            table.add_column(heading, overflow="fold")
        for heading in ("messages", "Hz", "MB"):
            table.add_column(heading, justify="right")
        for topic in opened.topics:
            count, first, last, size = spans.get((topic.name, topic.msgtype), (0, 0, 0, 0))
            rate = f"{(count - 1) * 1e9 / (last - first):.1f}" if last > first else "-"
            table.add_row(topic.name, topic.msgtype, str(count), rate, f"{size / 1e6:.2f}")
        console.print(table)
        if spans:
            start, end = min(s[1] for s in spans.values()), max(s[2] for s in spans.values())
            console.print(f"{(end - start) / 1e9:.2f} s, from {start / 1e9:.3f} to {end / 1e9:.3f}")


@bag.command("from-images")
def from_images(
    source: Annotated[Path, typer.Argument(metavar="DIR|VIDEO", help="A folder of images, or a video file.")],
    out: Annotated[Path, typer.Option(help="The bag to write (.mcap).")],
    fps: Annotated[float | None, typer.Option(help="Frames a second; without it a video keeps its own stamps.")] = None,
    topic: Annotated[str, typer.Option(help="Topic; compressed images go to TOPIC/compressed.")] = "/camera/image_raw",
    compressed: Annotated[bool, typer.Option("--compressed/--raw", help="CompressedImage or Image.")] = True,
    frame_id: Annotated[str, typer.Option(help="frame_id of the headers.")] = "camera",
    labels: Annotated[Path | None, typer.Option(help="Folder of label images, for a ground-truth topic.")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
) -> None:
    """Make a bag from the images of a folder, or from a video file."""
    from rich.console import Console

    from deeprob_perception.bags.from_images import write_bag

    console = Console()
    with console.status("writing ...") as status:
        count = write_bag(
            source,
            out,
            fps,
            topic,
            compressed,
            frame_id,
            labels,
            max_frames,
            on_frame=lambda n: status.update(f"writing frame {n}"),
        )
    console.print(f"{out}: {count} frames, {out.stat().st_size / 1e6:.1f} MB", highlight=False)
