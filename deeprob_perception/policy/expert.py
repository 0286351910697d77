# SPDX-License-Identifier: Apache-2.0
"""The teacher of the reaching policy: damped least squares that respects limits, for many robots at once.

Wampler, "Manipulator Inverse Kinematic Solutions Based on Vector Formulations and Damped Least-Squares Methods" (1986); a
joint near a limit weighs less when it moves towards it, after Chan and Dubey (1995); what freedom is left goes to the middle
of the joints' ranges (Liégeois, 1977).

Joints are counted in their robot's own units here: radians, and metres over the robot's reach for those that slide.
"""

import numpy as np

from deeprob_perception.robots.batch import RobotBatch

DAMPING = 0.05  # of the Jacobian in units of reach
NEAR_LIMIT = 0.12  # rad, or of reach: from here on a joint that moves towards its limit weighs less
CENTRING = 0.15  # how strongly spare freedom seeks the middle of the ranges
FARTHEST = 0.2  # of reach: goals farther off are approached like one at this distance
GAIN = 0.5  # share of the distance to the goal that one step takes, limits allowing


def direction(robots: RobotBatch, jacobian: np.ndarray, offset: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return how the joints move for a unit of distance (a reach) towards the goal, float32 `[R, S, n]`.

    :param jacobian: `[R, S, n, 3]`, metres, of `RobotBatch.jacobian`. :param offset: from tip to goal, `[R, S, 3]`, metres.
    :param positions: `[R, S, n]`.
    """
    reach = robots.reach[:, None, None]
    sliding = robots.prismatic[:, None]
    unit = np.where(sliding, 1.0, 1 / reach)  # a sliding joint's unit is a reach, and so is the offset's
    columns = jacobian * unit[..., None]  # [R, S, n, 3]
    ahead = offset / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-9)
    to_upper, to_lower = room(robots, positions)
    middle = to_middle(robots, to_upper, to_lower)
    weight = np.broadcast_to(speed_weights(robots)[:, None], positions.shape)
    spare = CENTRING * middle * weight
    found = solve(columns, weight, ahead, spare)
    for _ in range(2):
        left = np.where(found > 0, to_upper, to_lower)
        weighted = weight * np.clip(left / NEAR_LIMIT, 0, 1)
        found = solve(columns, weighted, ahead, spare * (weighted > 0))
    left = np.where(found > 0, to_upper, to_lower)
    return (found * (left > 0)).astype(np.float32)


def solve(columns: np.ndarray, weight: np.ndarray, ahead: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Return `[R, S, n]`: weighted damped least squares, plus of `spare` what does not move the tip."""
    weighted = columns * weight[..., None]
    square = weighted.swapaxes(-1, -2) @ columns + DAMPING**2 * np.eye(3)  # [R, S, 3, 3]
    rest = ahead - (columns * spare[..., None]).sum(-2)
    answer = np.linalg.solve(square, rest[..., None])[..., 0]  # [R, S, 3]
    return (weighted @ answer[..., None])[..., 0] + spare


def room(robots: RobotBatch, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each joint may go up and down, `[R, S, n]`, rad or of reach; infinite without limits."""
    scale = np.where(robots.prismatic, robots.reach[:, None], 1)[:, None]
    return (robots.upper[:, None] - positions) / scale, (positions - robots.lower[:, None]) / scale


def to_middle(robots: RobotBatch, to_upper: np.ndarray, to_lower: np.ndarray) -> np.ndarray:
    """Return where the middle of each joint's range is, `[R, S, n]`: 1 at its lower limit, -1 at its upper; 0 without."""
    limited = robots.limited[:, None]
    up, down = np.where(limited, to_upper, 1), np.where(limited, to_lower, 1)
    return (up - down) / np.maximum(up + down, 1e-6)


def speed_weights(robots: RobotBatch) -> np.ndarray:
    """Return how much each joint takes part by how fast it is, `[R, n]`, 0.2 to 1; 0 where it does not move the tip."""
    speed = np.where(robots.prismatic, robots.velocity / robots.reach[:, None], robots.velocity)
    speed = np.minimum(np.where(np.isfinite(speed), speed, np.inf), 1e6)
    fastest = np.where(robots.carries, speed, 0).max(1, keepdims=True)
    return np.sqrt(np.clip(speed / np.maximum(fastest, 1e-9), 0.04, 1)) * robots.carries


def step(robots: RobotBatch, found: np.ndarray, offset: np.ndarray, positions: np.ndarray, period: float) -> np.ndarray:
    """Return the next positions float32 `[R, S, n]`: `direction`'s (or a network's) answer within all limits.

    :param period: of control, seconds.
    """
    reach = robots.reach[:, None, None]
    distance = np.minimum(np.linalg.norm(offset, axis=-1, keepdims=True) / reach, FARTHEST)  # [R, S, 1]
    change = found * distance * GAIN * np.where(robots.prismatic[:, None], reach, 1)
    most = (robots.velocity * period)[:, None]
    over = np.where(most > 0, np.abs(change) / np.maximum(most, 1e-12), 0).max(-1, keepdims=True)
    change = change / np.maximum(over, 1)  # all slower alike, so that the tip stays on its way
    lower, upper = robots.lower[:, None], robots.upper[:, None]
    return np.clip(positions + change, np.minimum(positions, lower), np.maximum(positions, upper))
