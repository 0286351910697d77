# SPDX-License-Identifier: Apache-2.0
"""An object in a fresh process of its own, whose methods are called from here.

Each candidate of a benchmark lives in one: its memory is its own to measure, its threads and libraries disturb nobody
else's, and when it dies or hangs, the others go on.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from deeprob_perception.errors import EngineError, PerceptionError

PATIENCE = 120.0  # seconds for one call; loading may be given more


class Remote:
    """`make(*arguments)`, called in a spawned process; the object that it returns stays there.

    :param make: importable by name, since the process starts with nothing of this one.
    :param patience: seconds for `make`; then the process is killed.
    :raises EngineError: when `make` raises, takes too long, or its process dies. One line.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, patience: float = PATIENCE):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments))
        self._process.start()
        theirs.close()
        self._answer(patience)

    def call(self, method: str, *arguments: Any, patience: float = PATIENCE) -> Any:
        """Return what the object's method returns; raise EngineError as the constructor does."""
        with suppress(OSError):  # it died since the last call, which _answer says
            self._connection.send((method, arguments))
        return self._answer(patience)

    def close(self) -> None:
        """End the process; harmless when it has ended already."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, patience: float) -> Any:
        try:
            if not self._connection.poll(patience):
                self._process.kill()
                self.close()
                raise EngineError(f"it took more than {patience:g} s and was stopped")
            kind, content = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            raise EngineError(f"its process died ({_ending(code)}); is there memory enough?") from None
        if kind == "error":
            self.close()
            raise EngineError(content)
        return content


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"status {code}"


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The other process: answer calls until the connection closes."""
    try:
        found = make(*arguments)
        connection.send(("made", None))
        while True:
            method, arguments = connection.recv()
            connection.send(("value", getattr(found, method)(*arguments)))
    except (EOFError, KeyboardInterrupt):
        pass  # nobody asks any more
    except Exception as error:  # a back end raises anything, and what it says belongs into the report
        if not isinstance(error, (PerceptionError, ImportError)):
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        connection.send(("error", lines[0]))


def memory() -> dict[str, float | None]:
    """Return `memory_mb`, what this process holds now, and `peak_mb`, the most it ever held (resident, 10^6 bytes).

    From /proc, as `getrusage`'s peak is not this process's: on Linux it starts with what the parent held when it forked.
    None where there is no /proc.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {"memory_mb": None, "peak_mb": None}
    values = {key: int(rest.split()[0]) * 1024 / 1e6 for key, _, rest in (line.partition(":") for line in lines)
              if key in ("VmRSS", "VmHWM")}
    return {"memory_mb": values.get("VmRSS"), "peak_mb": values.get("VmHWM")}
