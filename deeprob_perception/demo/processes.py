# SPDX-License-Identifier: Apache-2.0
"""Child processes with a log each, which never outlive the demo, and the stream of diagnostics that one of them prints."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

# Seconds that a process has to end after a signal; the recorder still writes its index then.
PATIENCE = 20.0


def isolated_environment() -> dict[str, str]:
    """Return the environment with DDS on loopback and in a domain of this process's own, as no robot nearby should see it.

    Domains up to 101 leave room for their ports on every system (ROS 2, "The ROS_DOMAIN_ID").
    """
    return os.environ | {
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_DOMAIN_ID": str(1 + os.getpid() % 101),
        "PYTHONUNBUFFERED": "1",
    }


class Process:
    """`python -m MODULE ...` in a process group of its own, its stderr (and stdout, unless `piped`) in a log file."""

    def __init__(self, name: str, log: Path, environment: dict[str, str], *command: str, piped: bool = False):
        self.name = name
        self.log = log
        with log.open("w") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else stream,
                stderr=stream,
                env=environment,
                start_new_session=True,
                text=True,
            )

    @property
    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.popen.poll()

    def last_words(self, lines: int = 4) -> str:
        """Return the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").rstrip().splitlines()[-lines:])

    def stop(self, patience: float = PATIENCE) -> int:
        """Interrupt the whole group, kill what is left after `patience` seconds, and return the exit status."""
        if self.status is None:
            self._signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(patience)
        self._signal(signal.SIGKILL)
        return self.popen.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
        if self.popen.stdout is not None:
            self.popen.stdout.close()


class Diagnostics:
    """The newest diagnostics of one node. `count` says how many there have been."""

    def __init__(self, node: str):
        self.node = node
        self._items: dict[str, dict[str, Any]] = {}
        self.count = 0

    def take(self, statuses: dict[str, dict[str, Any]]) -> None:
        """Take what is this node's of one diagnostic array, `{status name: {"level", "message", "values"}}`."""
        prefix = f"{self.node}: "
        items = {name.removeprefix(prefix): status for name, status in statuses.items() if name.startswith(prefix)}
        if items:
            self._items = items
            self.count += 1

    def text(self, item: str, key: str) -> str:
        """Return a value of the status `item` (`input`, `output`, `model`); "" before it is known."""
        return self._items.get(item, {}).get("values", {}).get(key, "")

    def number(self, item: str, key: str) -> float:
        """Return a value as a number; 0.0 before it is known."""
        try:
            return float(self.text(item, key))
        except ValueError:
            return 0.0

    def failure(self) -> str:
        """Return why the model could not be loaded, or ""."""
        model = self._items.get("model", {})
        return model.get("message", "") if model.get("level", 0) >= 2 else ""

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Return p50, p95 and p99 in ms of each stage, in the order in which the node tells them."""
        stages: dict[str, dict[str, float]] = {}
        for key, value in self._items.get("output", {}).get("values", {}).items():
            if key.endswith("_ms"):
                stage, percentile = key.removesuffix("_ms").rsplit("_", 1)
                stages.setdefault(stage, {})[percentile] = float(value)
        return stages


def follow(watch: Process, nodes: Sequence[Diagnostics]) -> None:
    """Keep the diagnostics of nodes new, from what the process `nodes.watch` prints, in a thread of its own."""
    lines = watch.popen.stdout
    assert lines is not None

    def read() -> None:
        with suppress(ValueError):  # the pipe is closed under us at the end
            for line in lines:
                statuses = json.loads(line)
                for node in nodes:
                    node.take(statuses)

    Thread(target=read, daemon=True).start()


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt within the block, so that the processes are cleaned up then too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
