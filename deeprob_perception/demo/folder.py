# SPDX-License-Identifier: Apache-2.0
"""The folder that a demo writes to."""

from pathlib import Path

from deeprob_perception.errors import PerceptionError


def make_room(out: Path, *results: Path) -> Path:
    """Make the folder, without what an earlier run left: nothing old may pass for a result of this one.

    :param results: files that the demo will write.
    :returns: the folder for logs in it. :raises PerceptionError: where that cannot be written.
    """
    logs = out / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        for file in (*results, *logs.glob("*.log")):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise PerceptionError(f"cannot write to {out}: {error.strerror}; name another folder with --out") from error
    return logs
