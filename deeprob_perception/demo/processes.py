# SPDX-License-Identifier: Apache-2.0
"""Child processes with a log each, which never outlive the demo, and the stream of diagnostics that one of them prints."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from deeprob_perception.errors import PerceptionError
from deeprob_perception.isolation import isolated

# Seconds that a process has to end after a signal; the recorder still writes its index then.
PATIENCE = 20.0
LOOK = 0.1  # seconds between two looks at what is waited for


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
        try:
            if self.status is None:
                self._signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    self.popen.wait(patience)
        finally:  # a second interrupt cuts the patience short
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


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block is done, so that none comes between a process's start and its keeping.

    Their handlers are replaced instead of the signals being blocked: children would inherit the block.
    """
    come: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: come.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if come:
            signal.raise_signal(come[0])


class Group:
    """Child processes in a DDS domain of their own, with a log each in `logs`, which all end when the block does.

    SIGTERM ends it like an interrupt. One that ends on its own is an error at the next `check`, unless it was begun with
    `may_end`; so is a node that reports that it has failed.
    """

    def __init__(self, logs: Path, nodes: Sequence[Diagnostics], **environment: str):
        self.logs, self.nodes = logs, nodes
        self._environment = os.environ | isolated() | {"PYTHONUNBUFFERED": "1"} | environment
        self._running: list[tuple[Process, bool]] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Group":
        try:
            self._stack.enter_context(termination_as_interrupt())
            self._follow(self.begin("watch", "deeprob_perception.nodes.watch", piped=True))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def begin(self, name: str, *command: str, piped: bool = False, may_end: bool = False) -> Process:
        """Start `python -m COMMAND ...`; `piped`: its stdout is for the caller to read."""
        with interrupts_deferred():
            process = self._stack.enter_context(
                Process(name, self.logs / f"{name}.log", self._environment, *command, piped=piped))
            self._running.append((process, may_end))
        return process

    def record(self, bag: Path, topics: Sequence[str]) -> Process:
        """Start a recorder of these topics."""
        return self.begin("recorder", "deeprob_perception", "record", str(bag),
                          *(word for topic in topics for word in ("--topics", topic)))

    def finish(self, process: Process) -> None:
        """Interrupt a process and wait for it; what it writes is whole then. :raises PerceptionError: for its status."""
        if (status := process.stop()) != 0:
            raise PerceptionError(f"the {process.name} ended with status {status}: {process.last_words()}")

    def check(self) -> None:
        """:raises PerceptionError: when a process has ended, or a node cannot load its model."""
        for node in self.nodes:
            if failure := node.failure():
                raise PerceptionError(f"the {node.node} node is {failure}")
        for process, may_end in self._running:
            if not may_end and process.status is not None:
                raise PerceptionError(f"the process {process.name} ended with status {process.status}: "
                                      f"{process.last_words()} (log: {process.log})")

    def wait(self, ready: Callable[[], bool], limit: float, otherwise: Callable[[], str]) -> None:
        """Return when `ready`. :raises PerceptionError: as `check`, or with what `otherwise` returns after `limit` seconds."""
        deadline = time.monotonic() + limit
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise PerceptionError(otherwise())
            time.sleep(LOOK)

    def _follow(self, watch: Process) -> None:
        """Keep the nodes' diagnostics new, from what the process `nodes.watch` prints, in a thread of its own."""
        lines = watch.popen.stdout
        assert lines is not None

        def read() -> None:
            with suppress(ValueError):  # the pipe is closed under us at the end
                for line in lines:
                    statuses = json.loads(line)
                    for node in self.nodes:
                        node.take(statuses)

        Thread(target=read, daemon=True).start()
