# SPDX-License-Identifier: Apache-2.0
"""The report of `deeprob bench node`: runs at fixed rates, each with a node of its own, and the highest rate it keeps up with.

What starts camera and node is `nodes.measure`, which is given in: this package imports no ROS.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deeprob_perception import machine, zoo
from deeprob_perception.bench import rates

FORMAT = 1
MODEL = ("name", "sha256", "backend", "precision", "requested_precision", "device")  # of the node's diagnostics
PACKAGES = (*machine.PACKAGES, "ros-jazzy-rclpy", "ros-kilted-rclpy", "tensorrt", "tensorrt-rtx-cu13", "torch")


@dataclass(frozen=True)
class Plan:
    """Rates in Hz, each for `seconds`; with `search`, the highest without loss too, tried in runs of `search_seconds`."""

    rates_hz: Sequence[float]
    seconds: float
    search: bool = False
    search_seconds: float = 5.0


def bench(
    plan: Plan,
    measure: Callable[[float, float], dict[str, Any]],
    session: Callable[[], AbstractContextManager[Any]],
    bag: Path,
    threads: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure, and return what `deeprob bench node --json` writes; docs/benchmarks.md describes its keys.

    :param measure: rate in Hz, seconds -> a run by a fresh node.
    :param session: a context of something whose `run(rate, seconds)` is a run by one and the same node.
    """
    runs = []
    for rate in plan.rates_hz:
        say(f"{rate:g} Hz for {plan.seconds:g} s")
        runs.append(measure(rate, plan.seconds))
    search = None
    if plan.search:

        def tried(rate: float) -> dict[str, Any]:
            say(f"searching: {rate:.1f} Hz")
            run: dict[str, Any] = started.run(rate, plan.search_seconds)
            return run

        with session() as started:
            steps = rates.search(tried)
        best = rates.highest(steps)
        say("confirming")
        confirmed = None if best is None else rates.confirm(lambda rate: measure(rate, plan.seconds), best)
        search = {
            "allowed_loss": rates.ALLOWED_LOSS,
            "seconds": plan.search_seconds,
            "steps": [{key: step[key] for key in ("rate_hz", "sent_hz", "sent", "masks", "loss")} for step in steps],
            "highest_hz": confirmed["sent_hz"] if confirmed else None,
            "confirmed": confirmed,
        }
        runs_seen = [*runs, *([confirmed] if confirmed else []), *steps]
    else:
        runs_seen = runs
    model, first = runs_seen[0]["model"], runs_seen[0]
    return {
        "format": FORMAT,
        "kind": "node",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.facts(),
        "versions": machine.versions(PACKAGES),
        "threads": threads,
        "rmw": first["rmw"],
        "model": {key: model.get(key, "") for key in MODEL},
        "camera": {key: first[key] for key in ("width", "height", "transport")},
        "bag": {"name": bag.name, "sha256": zoo.checksum(bag)},
        "rates": runs,
        "search": search,
    }
