# SPDX-License-Identifier: Apache-2.0
"""The place where a camera's newest frame waits for the worker, and the pace at which it is fetched. Imports no ROS."""

from dataclasses import dataclass
from threading import Condition


@dataclass(frozen=True)
class Frame:
    """A serialised image message as it came from DDS, and when.

    raw: CDR bytes of a sensor_msgs/Image or CompressedImage.
    arrived: monotonic clock, seconds.
    """

    raw: bytes
    arrived: float


class FrameSlot:
    """Holds one frame: a new one overwrites an unread one, which then counts as dropped.

    A queue would make every mask as old as the queue is long; a robot wants the newest one. Two properties are
    load-bearing: `put` never waits for the reader, and every frame is counted exactly once, so that
    `received == taken + dropped + waiting` holds at any time.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._frame: Frame | None = None
        self._awake = True
        self.received = 0
        self.taken = 0
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Return 1 while a frame lies unread, else 0."""
        return int(self._frame is not None)

    def put(self, frame: Frame) -> None:
        """Leave `frame` for the reader, in place of an older one."""
        with self._changed:
            self.received += 1
            self.dropped += self.waiting
            self._frame = frame
            self._changed.notify()

    def take(self, timeout: float | None = 0.0) -> Frame | None:
        """Return the newest frame and empty the slot; None if there is none within `timeout` seconds (None: for ever)
        or after `wake`."""
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or not self._awake, timeout)
            frame = self._frame if self._awake else None
            if frame is not None:
                self._frame = None
                self.taken += 1
            return frame

    def wake(self) -> None:
        """Make a waiting `take`, and every later one, return None at once, until `open`."""
        with self._changed:
            self._awake = False
            self._changed.notify_all()

    def open(self) -> None:
        """Undo `wake`; a frame left over from before counts as dropped, since it is old news."""
        with self._changed:
            self._awake = True
            self.dropped += self.waiting
            self._frame = None


class Pace:
    """Says how long to wait so that work starts at most `max_rate` times a second (0: no limit)."""

    def __init__(self, max_rate: float = 0.0):
        self.max_rate = max_rate
        self._last: float | None = None

    def delay(self, now: float) -> float:
        """Return the seconds to wait at time `now` (seconds, any clock) before the next start."""
        if self._last is None or self.max_rate <= 0:
            return 0.0
        return max(0.0, self._last + 1.0 / self.max_rate - now)

    def started(self, now: float) -> None:
        """Note that work started at `now`."""
        self._last = now
