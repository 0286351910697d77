# SPDX-License-Identifier: Apache-2.0
"""`deeprob play` and `deeprob record`: bags and live topics, where there is no `ros2 bag`."""

from pathlib import Path
from typing import Annotated

import typer

from deeprob_perception.cli import app
from deeprob_perception.cli.replay import place
from deeprob_perception.doctor.ros import require_ros

Topics = Annotated[list[str] | None, typer.Option(help="A topic; repeat for several. Default: all.")]


@app.command()
def play(
    bag: Annotated[Path, typer.Argument(help="A bag: .mcap, .db3, a rosbag2 folder, or a ROS 1 .bag.")],
    rate: Annotated[float, typer.Option(min=0.01, help="Factor on the bag's own speed.")] = 1.0,
    loop: Annotated[bool, typer.Option("--loop", help="Start again at the end.")] = False,
    topics: Topics = None,
    remap: Annotated[list[str] | None, typer.Option(help="FROM:=TO; repeat for several.")] = None,
    clock: Annotated[bool, typer.Option("--clock", help="Publish /clock, for nodes with use_sim_time.")] = False,
    wait_for_subscribers: Annotated[
        int, typer.Option(min=0, help="Start when the played topics have so many subscriptions in sum.")] = 0,
    wait_timeout: Annotated[float, typer.Option(help="Seconds after which to give up waiting for them.")] = 30.0,
    start_offset: Annotated[float, typer.Option(min=0, help="Seconds to skip at the start.")] = 0.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Publish compressed images decoded, on the topic without /compressed.")] = False,
    restamp: Annotated[
        bool, typer.Option("--restamp", help="Replace stamps by the time of playing, so that latency shows.")] = False,
) -> None:
    """Publish a bag on live topics with its timing: its serialised messages, reliably."""
    require_ros("`deeprob play`")
    from deeprob_perception.nodes.play import PlayOptions
    from deeprob_perception.nodes.play import play as run

    pairs = {}
    for rule in remap or ():
        source, arrow, target = rule.partition(":=")
        if not (source and arrow and target):
            raise typer.BadParameter(f"--remap {rule}: write FROM:=TO")
        pairs[source] = target
    options = PlayOptions(rate, loop, tuple(topics or ()), pairs, clock, wait_for_subscribers, wait_timeout, start_offset,
                          raw, restamp)
    report("played", bag, run(bag, options, say=say))


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help="The .mcap to write.")],
    topics: Topics = None,
    duration: Annotated[float | None, typer.Option(min=0, help="Seconds; without it, until Ctrl-C.")] = None,
) -> None:
    """Record live topics to an mcap, latched ones too."""
    require_ros("`deeprob record`")
    from deeprob_perception.nodes.record import record as run

    report("recorded", out, run(out, topics or (), duration, say=say))


@app.command()
def seed(
    mask: Annotated[Path | None, typer.Option(help="An image whose pixels are ids of objects, 0 for background.")] = None,
    point: Annotated[list[str] | None, typer.Option(help="X,Y in pixels; repeat for several.")] = None,
    node: Annotated[str, typer.Option(help="Full name of the tracking node.")] = "/tracking",
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the node.")] = 30.0,
) -> None:
    """Tell a running tracking node what to track from its next frame on."""
    require_ros("`deeprob seed`")
    from deeprob_perception.nodes.seed import seed as run
    from deeprob_perception.tracking.evaluate import read_mask

    if mask is None and not point:
        raise typer.BadParameter("give --mask or --point")
    points = [place("--point", text) for text in point or ()]
    run(node, None if mask is None else read_mask(mask), points, timeout)


def say(line: str) -> None:
    typer.echo(line, err=True)


def report(verb: str, bag: Path, counts: dict[str, int]) -> None:
    """Print how many messages of which topic went through."""
    typer.echo(f"{verb} {sum(counts.values())} messages, {bag}:")
    for topic, number in sorted(counts.items()):
        typer.echo(f"  {number:7d}  {topic}")
