# SPDX-License-Identifier: Apache-2.0
"""The highest rate that a node keeps up with, found as NVIDIA's ros2_benchmark does: by bisection, with 5 % loss allowed."""

from collections.abc import Callable
from typing import Any

ALLOWED_LOSS = 0.05
HELD = 0.95  # a run whose camera reached less of the asked rate says nothing about that rate
RESOLUTION = 1.05  # the search ends when the lowest rate that failed is this near to the highest that passed

Run = Callable[[float], dict[str, Any]]  # rate in Hz -> a report with `rate_hz`, `sent_hz`, `loss`


def passes(run: dict[str, Any]) -> bool:
    """Tell whether a node kept up, and its camera as well."""
    return run["loss"] < ALLOWED_LOSS and run["sent_hz"] >= HELD * run["rate_hz"]


def search(run: Run, low: float = 5.0, high: float = 640.0) -> list[dict[str, Any]]:
    """Run at doubling rates from `low` until one fails, then between that and the last that passed; return all runs.

    The highest that passed is within 5 % of one that failed, unless `low` fails or `high` passes.
    """
    runs = []
    passed = failed = None
    rate = low
    while failed is None and rate <= high:
        runs.append(run(rate))
        if passes(runs[-1]):
            passed, rate = rate, rate * 2
        else:
            failed = rate
    while passed and failed and failed / passed > RESOLUTION:
        middle = (passed * failed) ** 0.5
        runs.append(run(middle))
        if passes(runs[-1]):
            passed = middle
        else:
            failed = middle
    return runs


def highest(runs: list[dict[str, Any]]) -> float | None:
    """Return the highest rate asked that passed; None where none did."""
    return max((run["rate_hz"] for run in runs if passes(run)), default=None)


def confirm(run: Run, rate: float, attempts: int = 4) -> dict[str, Any] | None:
    """Return a (longer) run that passes, at `rate` or, where it fails there, 5 % less, and so on; None if all fail."""
    for _ in range(attempts):
        found = run(rate)
        if passes(found):
            return found
        rate /= RESOLUTION
    return None
