# SPDX-License-Identifier: Apache-2.0
"""One finding about this machine, and running many of them so that none takes the others down."""

import getpass
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

OK, OFF, WARN, FAIL = "ok", "off", "warn", "fail"  # off: not here, and not needed


@dataclass(frozen=True)
class Check:
    """A finding: `level` is OK, OFF, WARN or FAIL; `advice` says what to do, and every WARN and FAIL has one."""

    name: str
    level: str
    text: str
    advice: str = ""


def run(functions: Iterable[Callable[[], Check]]) -> list[Check]:
    """Call each; one that raises becomes a FAIL with its name, never a traceback."""
    found = []
    for function in functions:
        try:
            found.append(function())
        except Exception as error:  # whatever is broken here is what we were asked about
            text = (str(error).strip().splitlines() or [""])[0]
            found.append(Check(function.__name__, FAIL, f"the check itself failed: {type(error).__name__}: {text}",
                               "please report this with the output of `deeprob doctor --json`"))
    return found


def redacted(text: str) -> str:
    """Return the text without home folders and the user's name, for bug reports."""
    text = text.replace(str(Path.home()), "~") if str(Path.home()) != "/" else text
    text = re.sub(r"/(home|Users)/[^/\s:]+", r"/\1/USER", text)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return text
    return re.sub(rf"(?<![\w]){re.escape(user)}(?![\w])", "USER", text) if user != "root" else text
