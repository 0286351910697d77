# SPDX-License-Identifier: Apache-2.0
"""Where a node's engine comes from: loaded at once, or a stand-in that serves while the wanted one is built. No ROS."""

import logging
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import monotonic

from deeprob_perception import engines
from deeprob_perception.engines import Engine
from deeprob_perception.errors import EngineError, describe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What the node's parameters ask for; the fields are those of `engines.load`."""

    path: Path
    backend: str = "auto"
    precision: str = "auto"
    cache_dir: str | None = None
    threads: int = 0

    def load(self, backend: str, precision: str) -> Engine:
        return engines.load(self.path, backend, precision, self.cache_dir, self.threads)


class EngineSource:
    """Gives a worker its engine, and a better one later where that has to be built first (minutes, on a Jetson).

    A build runs in a process of its own: it may take all memory or be killed, and the node goes on with what it has.
    The thread beside the worker only waits for that process and loads what it left; the worker takes the new engine
    between two frames, by `newer()`.
    """

    def __init__(self) -> None:
        self._newer: Engine | None = None
        self._thread: Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._coming, self._stand_in, self._since = "", "", 0.0
        self._closed = False
        self.failure = ""

    def open(self, wish: Wish, serve_while_building: bool = True) -> Engine:
        """Return an engine to start with.

        :param serve_while_building: when the wanted engine is not built yet, return that of another back end and build
            the wanted one meanwhile; False builds it first.
        :raises ModelError, EngineError: as `engines.load` does.
        """
        backend = wish.backend
        if backend == "auto":
            names, _ = engines.choose()
            backend = names[0] if len(names) == 1 else backend  # of several the fastest is measured: they load at once
        if not serve_while_building or engines.ready(wish.path, backend, wish.precision, wish.cache_dir):
            return wish.load(wish.backend, wish.precision)
        stand_in = engines.stand_in(wish.path, backend, wish.cache_dir)
        if stand_in is None:
            log.info("%s: no other back end can serve while %s is built", wish.path.name, backend)
            return wish.load(wish.backend, wish.precision)
        engine = wish.load(stand_in, "auto")
        self._coming = backend if wish.precision == "auto" else f"{backend} {wish.precision}"
        self._stand_in, self._since = f"{engine.backend} {engine.precision}", monotonic()
        log.warning("%s: %s is being built; %s serves until then", wish.path.name, self._coming, self._stand_in)
        # A daemon: a node that is told to stop does not wait for a build.
        self._thread = Thread(target=self._make, args=(wish, backend), name="engine build", daemon=True)
        self._thread.start()
        return engine

    def newer(self) -> Engine | None:
        """Return the wanted engine once, when it has become ready; else None. Called by the worker between frames."""
        engine, self._newer = self._newer, None
        if engine is not None:
            self._coming = ""
        return engine

    @property
    def building(self) -> str:
        """What is being built and what serves meanwhile, in one sentence; "" when nothing is."""
        if not self._coming or self.failure:
            return ""
        return f"{self._coming} is being built, {monotonic() - self._since:.0f} s so far; {self._stand_in} serves until then"

    def close(self) -> None:
        """Forget the wish and end the build's process, whose finished parts stay in the cache."""
        self._closed = True
        if self._process is not None:
            self._process.terminate()

    def _make(self, wish: Wish, backend: str) -> None:
        try:
            self._build(wish)
            engine = wish.load(backend, wish.precision)
            self._warm_up(engine)
        except Exception as error:  # whatever a builder throws: the stand-in goes on
            reason = describe(error)
            self.failure = f"{self._coming} could not be built ({reason}); {self._stand_in} goes on"
            if not self._closed:
                log.error("%s: %s", wish.path.name, self.failure)
            return
        if not self._closed:
            log.warning("%s: %s is ready after %.0f s and takes over from %s", wish.path.name, engine,
                        monotonic() - self._since, self._stand_in)
            self._newer = engine

    def _build(self, wish: Wish) -> None:
        """Run `deeprob build`; its lines go to the log."""
        with subprocess.Popen(build_command(wish), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            self._process = process
            if self._closed:
                process.terminate()
            assert process.stdout is not None
            last: deque[str] = deque(maxlen=1)
            for line in process.stdout:
                if line.strip():
                    last.append(line.strip())
                    log.info("%s", line.rstrip())
        if process.returncode:
            raise EngineError(f"`deeprob build` ended with status {process.returncode}: {' '.join(last) or 'no output'}")

    @staticmethod
    def _warm_up(engine: Engine) -> None:
        """Run once, so that the takeover costs no frame the back end's first inference."""
        import numpy as np

        inputs = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in engine.inputs}
        engine.run(inputs, [spec.name for spec in engine.outputs])


def build_command(wish: Wish) -> list[str]:
    """Return the command that leaves the engine of a wish in the cache."""
    command = [sys.executable, "-m", "deeprob_perception", "build", str(wish.path), "--precision", wish.precision]
    return [*command, "--cache-dir", wish.cache_dir] if wish.cache_dir else command
