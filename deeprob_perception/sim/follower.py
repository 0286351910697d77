# SPDX-License-Identifier: Apache-2.0
"""What a joint_trajectory_controller makes of trajectories: cubic splines through their points, then rest. Times in seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POSITION_SLACK = 1e-6  # rad or m: of the floats that a message carries
VELOCITY_SLACK = 1e-3  # share of the limit


@dataclass(frozen=True)
class Point:
    """Positions `[n]` (rad, m) and velocities `[n]` to be at and to have `time` seconds after the trajectory's start."""

    time: float
    positions: np.ndarray
    velocities: np.ndarray


class TrajectoryFollower:
    """Follows the newest trajectory, from where the joints are when that comes.

    As ros2_controllers' joint_trajectory_controller does by default: a trajectory has all joints, rising times and ends at
    rest; between points with velocities runs a cubic spline; after the last point the joints stay. As ros2_control's command
    limits do: a joint goes no faster than its velocity limit, however the spline runs between points that came late.

    - `positions`, `velocities`: of the joints now, `[n]`
    - `taken`, `refused`, `reason`: trajectories that were followed, that were not, and why the last one was not
    - `beyond_position`, `beyond_velocity`: those that asked for more than the limits
    - `saturated`: steps in which a joint was held back to its velocity limit
    """

    def __init__(self, names: Sequence[str], lower: np.ndarray, upper: np.ndarray, velocity: np.ndarray, start: np.ndarray):
        """:param lower, upper, velocity: limits `[n]`. :param start: positions `[n]` to begin at, at rest."""
        self.names = tuple(names)
        self._lower, self._upper, self._velocity = lower, upper, velocity
        self._knots: list[Point] = [Point(0.0, np.array(start, float), np.zeros(len(start)))]  # at absolute times
        self.positions, self.velocities = self._knots[0].positions.copy(), self._knots[0].velocities.copy()
        self.taken = self.refused = self.beyond_position = self.beyond_velocity = self.saturated = 0
        self.reason = ""

    def take(self, now: float, names: Sequence[str], points: Sequence[Point], start: float | None = None) -> bool:
        """Follow a trajectory from `now` on; False for one that a controller refuses.

        :param start: when its times begin; None: now. Points that lie in the past by then are left out.
        """
        order = [list(names).index(name) if name in names else -1 for name in self.names]
        begin = now if start is None else start
        self.reason = self._fault(names, order, points)
        if not self.reason and begin + points[-1].time <= now:
            self.reason = f"it ended {now - begin - points[-1].time:.3f} s ago"
        if self.reason:
            self.refused += 1
            return False
        here = Point(now, self.positions, self.velocities)
        knots = [Point(begin + p.time, p.positions[order], p.velocities[order]) for p in points if begin + p.time > now]
        self.taken += 1
        lower, upper = self._lower - POSITION_SLACK, self._upper + POSITION_SLACK
        within = all(((p.positions >= lower) & (p.positions <= upper)).all() for p in knots)
        slow = all((np.abs(p.velocities) <= self._velocity * (1 + VELOCITY_SLACK)).all() for p in knots)
        self.beyond_position += not within
        self.beyond_velocity += not slow
        self._knots = [here, *knots]
        return True

    def step(self, now: float, period: float) -> tuple[np.ndarray, np.ndarray]:
        """Move on to `now`, `period` seconds after the last step; return positions and velocities `[n]`."""
        wish = self._wish(now)
        most = self._velocity * period
        change = np.clip(wish - self.positions, -most, most)
        self.saturated += bool((np.abs(wish - self.positions) > most * (1 + VELOCITY_SLACK) + POSITION_SLACK).any())
        self.positions, self.velocities = self.positions + change, change / period
        return self.positions, self.velocities

    def _wish(self, now: float) -> np.ndarray:
        after = next((i for i, knot in enumerate(self._knots) if knot.time > now), None)
        if after is None:
            return self._knots[-1].positions
        if after == 0:  # asked for the past
            return self._knots[0].positions
        return hermite(self._knots[after - 1], self._knots[after], now)

    def _fault(self, names: Sequence[str], order: list[int], points: Sequence[Point]) -> str:
        if -1 in order or len(set(names)) != len(names) or len(names) != len(self.names):
            return f"it is for the joints {', '.join(names)}; this controller has {', '.join(self.names)}"
        if not points:
            return "it has no points"
        before = 0.0
        for point in points:
            for values in (point.positions, point.velocities):
                if values.shape != (len(names),) or not np.isfinite(values).all():
                    return f"a point has {values.tolist()} for {len(names)} joints"
            if point.time <= before:
                return f"its times do not rise: {point.time:g} s after {before:g} s"
            before = point.time
        return "it ends in motion" if points[-1].velocities.any() else ""


def hermite(a: Point, b: Point, now: float) -> np.ndarray:
    """Return the positions `[n]` on the cubic between two points with their velocities."""
    span = b.time - a.time
    s = (now - a.time) / span
    step = b.positions - a.positions
    first, last = a.velocities * span, b.velocities * span
    return a.positions + s * (first + s * (3 * step - 2 * first - last + s * (first + last - 2 * step)))
