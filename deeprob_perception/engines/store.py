# SPDX-License-Identifier: Apache-2.0
"""What back ends keep for a quicker start: files named by all that they depend on, written whole or not at all.

Each ends in the sha256 of what stands before it, so that a damaged one is told from a whole one before a library with no
such check reads it; a damaged one counts as absent and is made anew. The folder may be deleted at any time.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

from deeprob_perception.files import write_whole
from deeprob_perception.share import PACKAGE

DIGEST = 32  # bytes of a sha256
log = logging.getLogger(__name__)


def folder(cache_dir: Path | None, name: str) -> Path | None:
    """Return the folder `name` of the cache, made if need be; None, with a warning, when it cannot be written.

    :param cache_dir: the one that was asked for; None for the user's own (XDG).
    """
    import platformdirs

    path = (cache_dir or platformdirs.user_cache_path(PACKAGE)) / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        log.warning("no cache of compiled models: %s: %s; every start compiles anew", path, error.strerror)
        return None
    return path


def key(name: str, **facts: object) -> str:
    """Return a file name for what depends on `facts`: the model's name, for people, and a digest of them all."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return f"{name}-{digest[:24]}"


def get(path: Path | None) -> bytes | None:
    """Return the content of a kept file; None when there is none, or when it is damaged, which the log tells."""
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be read (%s); it is made anew", path, error.strerror)
        return None
    if len(content) < DIGEST or hashlib.sha256(memoryview(content)[:-DIGEST]).digest() != content[-DIGEST:]:
        log.warning("%s: damaged (%d bytes); it is made anew", path, len(content))
        return None
    return content[:-DIGEST]


def put(path: Path | None, content: bytes) -> None:
    """Keep `content`; a folder that cannot be written, or a full disk, costs only the keeping and a warning."""
    write(path, content + hashlib.sha256(content).digest())


def write(path: Path | None, content: bytes) -> None:
    """Keep a file as it is; a failure is told as a warning."""
    if path is None:
        return
    try:
        write_whole(path, content)
    except OSError as error:
        log.warning("%s cannot be kept: %s; the next start makes it anew", path, error.strerror)
