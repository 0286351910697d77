# SPDX-License-Identifier: Apache-2.0
"""Built engines on disk: keyed by all that they depend on, written whole or not at all, built by one process at a time.

An entry is two files, `NAME-PRECISION-TARGET-DIGEST.engine` and a `.json` beside it that says in clear what the engine was
made from and how it compares with fp32. The JSON is written last and holds the engine's checksum: an engine without it, or
of another checksum, does not count and is built anew. The folder may be deleted at any time.
"""

import contextlib
import errno
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deeprob_perception.files import write_whole
from deeprob_perception.share import PACKAGE

WAITING = 5.0  # seconds between two lines that say that another process is building
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """All that decides what an engine is. Two keys that differ in anything have different files."""

    name: str  # of the model, for people
    model_sha256: str
    library: str  # tensorrt, tensorrt_rtx
    version: str
    gpu: str  # the GPU's name; empty where an engine runs on every GPU of its target
    target: str  # sm_86
    precision: str  # as it was asked for; what runs stands in the JSON
    shapes: str  # inputs and outputs
    rules: int  # lowering.VERSION

    @property
    def stem(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.name}-{self.precision}-{self.target}-{digest}"


@dataclass(frozen=True)
class Entry:
    """A built engine: its bytes, what its JSON says (`facts`), and its file, None where it could not be kept."""

    plan: bytes
    facts: dict[str, Any]
    path: Path | None
    built: bool = False  # now, and not read


class EngineCache:
    """A folder of engines.

    :param folder: the `cache_dir` that was asked for; None for the user's own cache folder (XDG).
    """

    def __init__(self, folder: Path | None = None):
        import platformdirs

        self.folder = (Path(folder) if folder is not None else platformdirs.user_cache_path(PACKAGE)) / "tensorrt"

    def engine_path(self, key: Key) -> Path:
        return self.folder / f"{key.stem}.engine"

    def find(self, key: Key) -> Entry | None:
        """Return the engine of a key if it is here and whole; a damaged one is told in the log and counts as absent."""
        path = self.engine_path(key)
        try:
            facts = json.loads(path.with_suffix(".json").read_text())
            plan = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be read (%s); it is built anew", path, error)
            return None
        if not isinstance(facts, dict) or facts.get("key") != asdict(key):
            log.warning("%s: its JSON is that of another engine; it is built anew", path)
            return None
        if facts.get("sha256") != hashlib.sha256(plan).hexdigest():
            log.warning("%s: damaged (%d bytes, and not those that its JSON names); it is built anew", path, len(plan))
            return None
        return Entry(plan, facts, path)

    def get(self, key: Key, make: Callable[[], tuple[bytes, dict[str, Any]]], rebuild: bool = False) -> Entry:
        """Return the engine of a key, made by `make() -> (engine, facts)` if it is not here.

        Of several processes that come at once one builds, and the others wait and take what it built. A folder that cannot
        be written costs only the keeping: the engine is built and used, with a warning, and `Entry.path` is None.

        :param rebuild: build even if it is here.
        """
        found = None if rebuild else self.find(key)
        if found:
            return found
        with contextlib.ExitStack() as stack:
            waited = self._lock(stack, key)
            # Another process may have built it while this one waited.
            found = self.find(key) if waited or not rebuild else None
            if found:
                return found
            plan, facts = make()
            facts = {"key": asdict(key), "sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan), **facts}
            return Entry(plan, facts, self._store(key, plan, facts), built=True)

    def _lock(self, stack: contextlib.ExitStack, key: Key) -> bool:
        """Hold a key's lock until `stack` closes; return whether another process held it first.

        The lock is the system's own on an open file: it ends with the process that holds it, however that ends, so that a
        lock file which was left behind holds nobody up. Where there is no locking two processes may build the same engine,
        and the later one's file stays.
        """
        from filelock import FileLock, Timeout

        began = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{key.stem}.lock")
            while True:
                try:
                    stack.enter_context(lock.acquire(timeout=WAITING if time.monotonic() - began else 0))
                    return time.monotonic() - began >= WAITING
                except Timeout:
                    seconds = time.monotonic() - began
                    log.info("another process is building %s, %.0f s so far; its engine will be taken", key.stem, seconds)
        except (OSError, NotImplementedError) as error:
            log.debug("no lock in %s: %s", self.folder, error)
            return False

    def _store(self, key: Key, plan: bytes, facts: dict[str, Any]) -> Path | None:
        """Write engine and JSON; return the engine's path, or None, with a warning, where there is no writing."""
        path = self.engine_path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What a process that was killed left of its own writing: nobody else writes this key while the lock is held.
            for partial in self.folder.glob(f".{key.stem}.*.partial"):
                partial.unlink()
            # What was compiled of an older engine is of no use to this one.
            for suffix in (".json", ".kernels"):
                path.with_suffix(suffix).unlink(missing_ok=True)
            write_whole(path, plan)
            write_whole(path.with_suffix(".json"), (json.dumps(facts, indent=2) + "\n").encode())
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            log.warning(
                "the engine %s cannot be kept in %s: %s; each start builds anew, which takes minutes", path.name, path.parent,
                reason,
            )  # fmt: skip
            return None
        return path

    def discard(self, key: Key) -> None:
        """Forget an engine that TensorRT refused."""
        for suffix in (".json", ".engine", ".kernels"):
            with contextlib.suppress(OSError):
                self.engine_path(key).with_suffix(suffix).unlink()

    def entries(self, model_sha256: str) -> list[dict[str, Any]]:
        """Return what the JSON of each engine of a model says, with its `path`."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                facts = json.loads(path.read_text())
                if facts["key"]["model_sha256"] == model_sha256 and path.with_suffix(".engine").is_file():
                    found.append({**facts, "path": str(path.with_suffix(".engine"))})
        return found
