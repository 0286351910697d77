# SPDX-License-Identifier: Apache-2.0
"""What the reaching policy is told of each joint: a token of its geometry, its state and the goal, without units.

Lengths are in units of the robot's reach (`RobotBatch.reach`), directions in the joint's own frame and in the root's, so that
a finger and an arm look alike. The network's answer is in the same units, for one reach of distance to the goal: near the
goal it need not become small, so a small error of the network stays a small share of what is left of the way.
"""

from dataclasses import dataclass

import numpy as np

from deeprob_perception.policy.expert import room, speed_weights, to_middle
from deeprob_perception.robots.batch import RobotBatch

LAYOUT = "reach-1"  # of the tokens; a model says which one it was trained with
TOKEN = 37  # floats
SCALE = 3.0  # the network's action times this is `expert.direction`: of order one
ROOM = 1.5  # rad, or of reach: limits farther off are all the same


@dataclass(frozen=True)
class State:
    """What was computed on the way to the tokens: `tips` and `offset` to the goal `[R, S, 3]`, `jacobian` `[R, S, n, 3]`, m;
    `places` of the joints' frames in the root's, `[R, S, n, 3]`, m."""

    tips: np.ndarray
    offset: np.ndarray
    jacobian: np.ndarray
    places: np.ndarray


def fixed(robots: RobotBatch) -> np.ndarray:
    """Return the part of the tokens that stays the same, float32 `[R, n, 17]`."""
    reach = robots.reach[:, None, None]
    turns = robots.origins[..., :3, :2].swapaxes(-1, -2).reshape(*robots.axes.shape[:2], 6)  # two columns of the rotation
    return np.concatenate(
        (
            robots.axes, robots.prismatic[..., None], robots.origins[..., :3, 3] / reach, turns,
            speed_weights(robots)[..., None], robots.carries[..., None], (robots.parent < 0)[..., None],
            robots.limited[..., None],
        ),
        -1,
    ).astype(np.float32)  # fmt: skip


def tokens(
    robots: RobotBatch, constant: np.ndarray, positions: np.ndarray, goals: np.ndarray
) -> tuple[np.ndarray, State]:
    """Return tokens float32 `[R, S, n, TOKEN]` and what was computed for them.

    :param constant: of `fixed`. :param positions: float32 `[R, S, n]`. :param goals: in the roots' frames, float32 `[R, S, 3]`.
    """
    rotations, places = robots.poses(positions)
    tips = robots.tips(rotations, places)
    jacobian = robots.jacobian(rotations, places, tips)
    offset = goals - tips
    reach = robots.reach[:, None, None]
    distance = np.linalg.norm(offset, axis=-1, keepdims=True)
    ahead = offset / np.maximum(distance, 1e-9)
    distance = distance / reach  # [R, S, 1]
    sliding = robots.prismatic[:, None]
    column = np.where(sliding[..., None], jacobian, jacobian / reach[..., None])
    own = rotations.swapaxes(-1, -2)  # from the root's frame to the joint's
    to_tip = (own @ ((tips[:, :, None] - places) / reach[..., None])[..., None])[..., 0]
    ahead_own = (own @ ahead[:, :, None, :, None])[..., 0]
    limits = room(robots, positions)
    up, down = (np.clip(r, -0.1, ROOM) for r in limits)
    shape = positions.shape
    logarithm = np.log10(np.clip(distance, 1e-4, 1.0)) / 2 + 1
    parts = (
        np.broadcast_to(constant[:, None], (*shape, constant.shape[-1])),
        np.where(sliding, 0, np.sin(positions))[..., None],
        np.where(sliding, positions / reach, np.cos(positions))[..., None],
        to_tip,
        ahead_own,
        column,
        np.broadcast_to(ahead[:, :, None], (*shape, 3)),
        (column * ahead[:, :, None]).sum(-1)[..., None],
        np.broadcast_to(logarithm[:, :, None], (*shape, 1)),
        np.broadcast_to(np.minimum(distance, 1)[:, :, None], (*shape, 1)),
        up[..., None],
        down[..., None],
        np.clip(to_middle(robots, *limits), -1.1, 1.1)[..., None],
    )
    found = np.concatenate(parts, -1, dtype=np.float32)
    found[np.broadcast_to(robots.padding[:, None], shape)] = 0
    return found, State(tips, offset, jacobian, places)
