# SPDX-License-Identifier: Apache-2.0
"""What is known of a robot's joints and of the goal, and since when. Times are seconds of any one clock; no ROS."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEPT = 20  # names of other joints that are remembered, to be told when one of ours is missing


class JointReadings:
    """The newest position of each joint, by name: messages are unordered, hold other joints too, and may come in parts.

    - `positions`: float64 `[n]`, rad or m; NaN where none has come, and where NaN has
    - `when`: each was measured, float64 `[n]`, seconds; NaN for never
    - `others`: names that came and are none of ours; `bad`: messages whose positions and names do not match
    - `messages`: how many came; `backward`: positions that were older than the ones before
    """

    def __init__(self, names: Sequence[str]):
        self._index = {name: i for i, name in enumerate(names)}
        self.names = tuple(names)
        self.positions = np.full(len(names), np.nan)
        self.when = np.full(len(names), np.nan)
        self.others: dict[str, None] = {}
        self.messages = self.bad = self.backward = 0

    def add(self, names: Sequence[str], positions: Sequence[float], stamp: float, now: float) -> bool:
        """Take a message in; return False for one whose positions and names do not match.

        :param stamp: seconds, 0 for none. A joint counts as measured then, or now, whichever is earlier: a stamp from the
            future would keep it fresh for ever.
        """
        self.messages += 1
        if len(names) != len(positions):
            self.bad += 1
            return False
        when = min(stamp, now) if stamp > 0 else now
        for name, position in zip(names, positions, strict=True):
            i = self._index.get(name)
            if i is None:
                if len(self.others) < KEPT:
                    self.others[name] = None
            elif when < self.when[i]:
                self.backward += 1
            else:
                self.positions[i], self.when[i] = position, when
        return True

    def clear(self) -> None:
        """Forget all positions, as when the clock has gone back."""
        self.positions[:] = np.nan
        self.when[:] = np.nan


@dataclass
class Goal:
    """Where the tip shall be, `[3]` in the root's frame, m, since when (seconds), or what is wrong with it (name, reason)."""

    position: np.ndarray | None = None
    when: float = float("nan")
    wrong: tuple[str, str] | None = None

    def refusal(self, now: float, max_age: float) -> tuple[str, str] | None:
        """Return why this goal cannot be followed now, as (name, reason), or None."""
        if self.wrong is not None:
            return self.wrong
        if self.position is None:
            return "goal_missing", "no goal has come on the topic goal"
        if not now - self.when <= max_age:
            return "goal_stale", f"the goal is {now - self.when:.2f} s old (goal_max_age is {max_age:g} s)"
        return None
