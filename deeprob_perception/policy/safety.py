# SPDX-License-Identifier: Apache-2.0
"""What stands between a policy's wish and a robot's joints. No clock, no ROS: times come in as seconds of any one clock.

The robot is disarmed until somebody enables it. From then on a step is refused, and the robot holds, when what is known of it
or of the goal is missing, too old or no number, or when the policy's answer is no number. A wish that goes too far is cut to
the limits instead. Both are counted by name (`REFUSALS`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deeprob_perception.errors import RobotError
from deeprob_perception.robots import Robot

ROUNDING = 1e-6  # rad or m: of a network in float32; less than this is no wish to go too far
OTHER_CLOCK = 60.0  # seconds: a stamp that is older than this is none of our clock's
DISARMED, HOLDING, MOVING = "disarmed", "holding", "moving"
# name -> what it means; the last four are wishes that were cut, not steps that were refused
REFUSALS = {
    "joint_missing": "a joint's position has never been told",
    "joint_stale": "a joint's position is older than max_age",
    "joint_not_finite": "a joint's position is NaN or infinite",
    "bad_joint_states": "a JointState has another number of positions than of names",
    "goal_missing": "no goal has come yet",
    "goal_stale": "the goal is older than goal_max_age",
    "goal_not_finite": "the goal has a NaN or an infinity",
    "goal_frame": "the goal's frame cannot be related to the robot's root",
    "goal_unreachable": "the goal lies farther away than the stretched robot",
    "start_gap": "measured and commanded pose differ by more than max_start_gap",
    "policy_failed": "the policy raised an error",
    "policy_not_finite": "the policy's answer has a NaN, an infinity, or another number of joints",
    "position_limit": "the wish lay beyond a joint's limits",
    "velocity_limit": "the wish was faster than a joint may be",
    "step_limit": "the wish was farther than a joint may go in one step",
    "gap_limit": "the wish was farther from the measured position than max_gap",
}


@dataclass(frozen=True)
class Bound:
    """A limit for joints that turn (rad, or rad/s) and for joints that slide (m, or m/s)."""

    turning: float
    sliding: float

    def of(self, prismatic: np.ndarray) -> np.ndarray:
        """Return the limit of each joint, float64 `[n]`."""
        return np.where(prismatic, self.sliding, self.turning)


@dataclass(frozen=True)
class Limits:
    """What the n joints may do, float64 `[n]` each, in the order of `names`; rad or m, and per second.

    `lower`, `upper`: infinite for a joint that has none. `velocity`, `step` (of a command from one control period to the next),
    `start_gap` and `gap` (between command and measurement, at the start and on the way) are finite.
    """

    names: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    step: np.ndarray
    start_gap: np.ndarray
    gap: np.ndarray
    period: float


def limits_of(
    robot: Robot,
    rate: float,
    velocity: Bound,
    step: Bound,
    start_gap: Bound,
    gap: Bound,
    velocity_share: float = 1.0,
) -> Limits:
    """Return a robot's limits, tightened.

    :param rate: of control, Hz. :param velocity: the most, whatever the URDF allows, and where it names no limit.
    :param step: the most in one control period; 0 for what the velocity allows. :param velocity_share: of the URDF's, 0 to 1.
    :raises RobotError: when one of them is negative or no number.
    """
    for name, bound in (("max_velocity", velocity), ("max_step", step), ("max_start_gap", start_gap), ("max_gap", gap)):
        for value in (bound.turning, bound.sliding):
            if not (np.isfinite(value) and value >= 0):
                raise RobotError(f"{name} is {value}; give a number of 0 or more (rad, then m)")
    most = np.minimum(robot.velocity * velocity_share, velocity.of(robot.prismatic))
    steps = step.of(robot.prismatic)
    far = np.where(steps > 0, np.minimum(steps, most / rate), most / rate)
    return Limits(
        robot.joint_names, robot.lower, robot.upper, np.minimum(most, far * rate), far,
        start_gap.of(robot.prismatic), gap.of(robot.prismatic), 1 / rate,
    )  # fmt: skip


@dataclass(frozen=True)
class Setpoint:
    """What may go to the joints, float64 `[n]` each, within all limits.

    `positions` are to be reached after one control period at `velocities`. If nothing follows, `halt` is where the joints come
    to rest after another period.
    """

    positions: np.ndarray
    velocities: np.ndarray
    halt: np.ndarray


class Safety:
    """The contract as a state machine: `disarmed`, `holding` or `moving`, why, and how often it refused what.

    Each control period: `admit` what is known; if it is admitted, `limit` the policy's wish. Either may end in a hold, and the
    first hold after a motion gives a `Setpoint` that brings the joints to rest (`take_halt`).
    """

    def __init__(self, limits: Limits, max_age: float):
        self.limits = limits
        self.max_age = max_age
        self.state = DISARMED
        self.cause, self.reason = "not_enabled", "not enabled: call ~/enable"
        self.refusals: Counter[str] = Counter()
        self.commanded: np.ndarray | None = None  # always within the limits
        self._halt: np.ndarray | None = None  # where the last setpoint ends if nothing follows
        self._pending: Setpoint | None = None

    # Arm and disarm ---------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Let nothing count as commanded any more; not while moving."""
        if self.state != MOVING:
            self.commanded = None

    def anchor(self, measured: np.ndarray) -> None:
        """Take the measured pose `[n]` for the commanded one; not while moving."""
        if self.state != MOVING and np.isfinite(measured).all():
            self.commanded = np.clip(measured, self.limits.lower, self.limits.upper)

    def enable(self, now: float, measured: np.ndarray, when: np.ndarray) -> str:
        """Arm, or return why not: the joints' state is not known, or too far from the commanded one.

        :param now: seconds. :param measured: `[n]`. :param when: each was measured, seconds `[n]`, NaN for never.
        """
        refused = self._joints(now, measured, when)
        if not refused:
            if self.commanded is None:
                self.anchor(measured)
            refused = self._start(measured)
        if refused:
            cause, reason = refused
            self.refusals[cause] += 1
            if self.state == DISARMED:
                self.cause, self.reason = cause, f"not enabled: {reason}"
            return reason
        if self.state == DISARMED:
            self.state, self.cause, self.reason = HOLDING, "starting", "enabled; the first step is to come"
        return ""

    def disable(self, cause: str, reason: str) -> None:
        """Disarm; a robot in motion comes to rest (`take_halt`)."""
        self._stop()
        self.state, self.cause, self.reason = DISARMED, cause, reason

    # A step -----------------------------------------------------------------------------------------------------------

    def admit(self, now: float, measured: np.ndarray, when: np.ndarray, goal: tuple[str, str] | None) -> bool:
        """Return whether the policy may act on what is known now.

        :param measured: `[n]`. :param when: seconds `[n]`. :param goal: what is wrong with the goal (name, reason), or None.
        """
        if self.state == DISARMED:
            return False
        refused = self._joints(now, measured, when) or goal
        if not refused and self.state != MOVING:
            if self.commanded is None:
                self.anchor(measured)
            refused = self._start(measured)
        if refused:
            self.hold(*refused)
        return not refused

    def limit(self, wish: np.ndarray, velocities: np.ndarray, measured: np.ndarray) -> Setpoint | None:
        """Cut a wish to the limits, which is then commanded; None, and a hold, for one that holds no numbers.

        :param wish: positions `[n]` for the end of this period. :param velocities: on the way, `[n]`. :param measured: `[n]`.
        """
        limits, before = self.limits, self.commanded
        if self.state == DISARMED or before is None:
            return None
        if not np.isfinite(measured).all():
            self.hold("joint_not_finite", "a measured position is no number")
            return None
        wish, velocities = np.asarray(wish, np.float64), np.asarray(velocities, np.float64)
        if wish.shape != before.shape or velocities.shape != before.shape:
            self.hold("policy_not_finite", f"the policy answered for {wish.size} joints, not {before.size}")
            return None
        broken = ~(np.isfinite(wish) & np.isfinite(velocities))
        if broken.any():
            self.hold("policy_not_finite", f"the policy's answer is no number for {self._named(broken)}")
            return None
        within = np.clip(wish, limits.lower, limits.upper)
        self._count("position_limit", np.abs(wish - within) > ROUNDING)
        self._count("velocity_limit", np.abs(velocities) > limits.velocity * (1 + 1e-3) + 1e-4)
        near = np.clip(within, measured - limits.gap, measured + limits.gap)
        self._count("gap_limit", np.abs(near - within) > ROUNDING)
        low = np.maximum(limits.lower, before - limits.step)
        high = np.minimum(limits.upper, before + limits.step)
        target = np.clip(near, low, high)
        self._count("step_limit", np.abs(target - near) > ROUNDING)
        pace = np.clip((target - before) / limits.period, -limits.velocity, limits.velocity)
        # So slow that half a period's way at this pace, which braking takes, ends within the limits.
        pace = np.clip(pace, 2 * (limits.lower - target) / limits.period, 2 * (limits.upper - target) / limits.period)
        halt = np.clip(target + pace * limits.period / 2, limits.lower, limits.upper)
        self.commanded, self._halt = target, halt
        self.state, self.cause, self.reason = MOVING, "", ""
        return Setpoint(target, pace, halt)

    def hold(self, cause: str, reason: str) -> None:
        """Refuse a step; a robot in motion comes to rest (`take_halt`)."""
        self.refusals[cause] += 1
        if self.state == DISARMED:
            return
        self._stop()
        self.state, self.cause, self.reason = HOLDING, cause, reason

    def take_halt(self) -> Setpoint | None:
        """Return, once after each motion, the setpoint that brings the joints to rest."""
        pending, self._pending = self._pending, None
        return pending

    # The rules --------------------------------------------------------------------------------------------------------

    def _joints(self, now: float, measured: np.ndarray, when: np.ndarray) -> tuple[str, str] | None:
        never = np.isnan(when)
        if never.any():
            return "joint_missing", f"no position of {self._named(never)} has come on joint_states"
        broken = ~np.isfinite(measured)
        if broken.any():
            return "joint_not_finite", f"joint_states says {measured[broken][0]} for {self._named(broken)}"
        old = ~(now - when <= self.max_age)
        if old.any():
            age = float((now - when)[old].max())
            other = "; is it stamped by another clock (use_sim_time)?" if age > OTHER_CLOCK else ""
            text = f"the position of {self._named(old)} is {age:.2f} s old (max_age is {self.max_age:g} s){other}"
            return "joint_stale", text
        return None

    def _start(self, measured: np.ndarray) -> tuple[str, str] | None:
        assert self.commanded is not None
        gap = np.abs(self.commanded - measured)
        far = ~(gap <= self.limits.start_gap)
        if not far.any():
            return None
        i = int(np.argmax(gap - self.limits.start_gap))
        at_limit = measured[i] < self.limits.lower[i] or measured[i] > self.limits.upper[i]
        mend = "move it within its limits" if at_limit else "call ~/reset to start from the measured pose"
        return "start_gap", (f"the joint {self.limits.names[i]} is at {measured[i]:.4g}, {gap[i]:.3g} away from where it was "
                             f"commanded (max_start_gap is {self.limits.start_gap[i]:g}): {mend}")

    def _stop(self) -> None:
        if self.state == MOVING and self._halt is not None:
            self.commanded = self._halt
            self._pending = Setpoint(self._halt, np.zeros_like(self._halt), self._halt)
        self._halt = None

    def _count(self, name: str, cut: np.ndarray) -> None:
        if cut.any():
            self.refusals[name] += 1

    def _named(self, which: np.ndarray) -> str:
        return named([name for name, there in zip(self.limits.names, which, strict=True) if there])


def named(names: Sequence[str]) -> str:
    """Return `joint a`, or `joints a, b, ...`."""
    more = ", ..." if len(names) > 6 else ""
    return f"the joint{'s' if len(names) > 1 else ''} {', '.join(names[:6])}{more}"
