# SPDX-License-Identifier: Apache-2.0
"""Whether a control loop keeps its time. Plain counters; the times come in as seconds."""

LATE = 0.5  # of a period: a step that starts later than this after it was due is late


class Beat:
    """Counts steps, and those that came late or not at all.

    A timer that skips what it has missed keeps its grid, so steps are due on a grid too: it is that of the earliest step, as a
    first step that came late would make all others early.
    """

    def __init__(self, period: float):
        self._period = period
        self._due: float | None = None
        self.steps = self.late = 0
        self.worst = 0.0  # seconds after it was due

    def step(self, now: float) -> None:
        """Note a step that starts now."""
        self.steps += 1
        if self._due is None:
            self._due = now
        behind = now - self._due
        if behind < 0:
            self._due = now
        elif behind > LATE * self._period:
            missed = int(behind / self._period)  # whole periods in which nothing ran
            self.late += max(1, missed)
            self._due += missed * self._period
            self.worst = max(self.worst, behind)
        self._due += self._period

    def restart(self) -> None:
        """Begin a new grid, as after a clock that went back."""
        self._due = None
