# SPDX-License-Identifier: Apache-2.0
"""Masks of objects, carried from frame to frame by features: the video protocol of DINO, without training.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021), section 4.2.2, after Jabri et al.,
"Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020): every patch of a new frame takes the labels of the
patches most like it, in the frames where the objects were given and in the last few, near the same place.

Shapes in comments: h x w patches, C channels, K objects, T frames of context.
"""

from collections import deque
from dataclasses import dataclass

import cv2
import numpy as np

# Patches, in all: an object that holds less is out of sight.
GONE = 0.5


@dataclass(frozen=True)
class Propagation:
    """How labels spread; the defaults are DINO's, lengths in shares of the image's shorter side instead of patches.

    context: frames besides the ones where objects were given.
    radius: how far an object may move between two frames, as a share of the shorter side (DINO: 12 patches of 60).
    top_k: patches that vote. temperature: of their votes.
    """

    context: int = 7
    radius: float = 0.2
    top_k: int = 5
    temperature: float = 0.1


class MaskTracker:
    """Objects' masks through a video, on a grid of patches.

    `ids`: of the objects, as they were given; `lost`: those that are out of sight.
    """

    def __init__(self, settings: Propagation | None = None):
        self.settings = settings or Propagation()
        self.reset()

    def reset(self) -> None:
        """Forget all objects and frames."""
        self.ids: list[int] = []
        self._given: list[tuple[np.ndarray, np.ndarray]] = []  # features [h, w, C], shares [h, w, K + 1]; background first
        self._owners: list[set[int]] = []  # of each frame in `_given`, the objects that were given there last
        self._recent: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=self.settings.context)

    @property
    def lost(self) -> list[int]:
        if not self._recent and not self._given:
            return []
        shares = (self._recent or self._given)[-1][1]
        return [self.ids[k - 1] for k in range(1, shares.shape[-1]) if shares[..., k].sum() < GONE]

    def seed(self, features: np.ndarray, mask: np.ndarray, keep: bool = False) -> None:
        """Take objects from a mask of this frame.

        :param features: float32 `[h, w, C]`, of unit length.
        :param mask: uint8 `[H, W]`, 0 for background, else an object's id.
        :param keep: go on with the objects that are tracked already; the mask's win where both claim a patch. An object that
            is given again is known by its newest mask; a frame that was given for it alone is forgotten.
        """
        height, width = features.shape[:2]
        ids = [int(i) for i in np.unique(mask) if i]
        given = np.stack([
            cv2.resize((mask == i).astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) for i in ids
        ], -1)  # [h, w, K]
        if keep and self.ids:
            now = (self._recent or self._given)[-1][1]
            new = [i for i in ids if i not in self.ids]
            self._widen(len(new))
            self.ids = [*self.ids, *new]
            shares = np.zeros((height, width, 1 + len(self.ids)), np.float32)
            shares[..., : now.shape[-1]] = now
            shares *= 1 - given.sum(-1, keepdims=True).clip(0, 1)
            for k, i in enumerate(ids):
                shares[..., 1 + self.ids.index(i)] += given[..., k]
        else:
            self.reset()
            self.ids = ids
            shares = np.concatenate((1 - given.sum(-1, keepdims=True).clip(0, 1), given), -1)
        for owners in self._owners:
            owners.difference_update(ids)
        kept = [frame for frame, owners in zip(self._given, self._owners, strict=True) if owners]
        columns = [1 + self.ids.index(i) for i in ids]
        self._given = [(old, relabelled(old, known, features, given, columns)) for old, known in kept]
        self._given.append((features, shares))
        self._owners = [*(owners for owners in self._owners if owners), set(ids)]
        self._recent.clear()

    def update(self, features: np.ndarray) -> np.ndarray:
        """Carry the objects into the next frame; return their shares float32 `[h, w, K + 1]`, the background's first.

        :param features: float32 `[h, w, C]`, of unit length, as in the frames before.
        """
        context = [*self._given, *self._recent]
        shares = self._spread(features, context)
        for k in [k for k in range(1, shares.shape[-1]) if shares[..., k].sum() < GONE]:
            self._find_again(features, shares, k)
        self._recent.append((features, shares))
        return shares

    def _spread(self, features: np.ndarray, context: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Return the shares `[h, w, K + 1]` by the votes of the most similar patches nearby."""
        height, width, channels = features.shape
        settings = self.settings
        radius = max(1, round(settings.radius * min(height, width)))
        shares = np.zeros((height, width, 1 + len(self.ids)), np.float32)
        shares[..., 0] = 1
        # Where every patch in reach is background in all of the context, so is this one: leave it out.
        held = np.maximum.reduce([s[..., 1:].max(-1) for _, s in context]) > 0
        if not held.any():
            return shares
        reach = 2 * radius + 1
        near = cv2.dilate(held.astype(np.uint8), np.ones((reach, reach), np.uint8))
        high, wide = max(2, radius // 2 + 1), max(4, radius)  # of a tile: few patches out of reach, and products of some size
        for left in range(0, width, wide):
            right = min(width, left + wide)
            first, last = max(0, left - radius), min(width, right + radius)
            rows = np.flatnonzero(near[:, left:right].any(1))
            if not len(rows):
                continue
            above, below = max(0, rows[0] - radius), min(height, rows[-1] + 1 + radius)
            # [rows, T, columns, ...]: the rows in reach of a tile are one block then, without a copy for each.
            keys = np.ascontiguousarray(np.stack([f[above:below, first:last] for f, _ in context], 1))
            votes = np.stack([s[above:below, first:last] for _, s in context], 1)
            beside = np.abs(np.arange(left, right)[:, None] - np.arange(first, last)) > radius
            for top in range(rows[0], rows[-1] + 1, high):
                bottom = min(rows[-1] + 1, top + high)
                if not near[top:bottom, left:right].any():
                    continue
                start, end = max(above, top - radius), min(below, bottom + radius)
                apart = np.abs(np.arange(top, bottom)[:, None] - np.arange(start, end)) > radius
                far = apart[:, None, :, None] | beside[None, :, None, :]  # [tile, rows, columns]
                far = np.where(far, np.float32(-4), np.float32(0)).reshape(-1, end - start, 1, last - first)
                block = keys[start - above : end - above]
                query = features[top:bottom, left:right].reshape(-1, channels)
                likeness = query @ block.reshape(-1, channels).T  # [tile, rows * T * columns]
                likeness = likeness.reshape(len(query), end - start, len(context), last - first)
                likeness += far  # below any cosine
                found = vote(likeness.reshape(len(query), -1, last - first), votes[start - above : end - above], settings)
                shares[top:bottom, left:right] = found.reshape(bottom - top, right - left, -1)
        return shares

    def _find_again(self, features: np.ndarray, shares: np.ndarray, k: int) -> None:
        """Look for a lost object in the whole frame, by how it looked when it was given; write its shares if it is there.

        It never takes a patch that another object holds: two things that look alike stay two.
        """
        height, width, channels = features.shape
        frame = next(n for n, owners in enumerate(self._owners) if self.ids[k - 1] in owners)
        seen, given = self._given[frame]
        flat, old, now = given.reshape(-1, given.shape[-1]), seen.reshape(-1, channels), features.reshape(-1, channels)
        own = np.flatnonzero(flat[:, k] > 0.5)
        if not len(own):
            own = np.array([flat[:, k].argmax()])
        likeness = old[own] @ now.T  # [own, h * w]
        there = likeness.argmax(1)
        # Mutual: the patch of this frame that is most like one of the object's must be most like one of the object's, too.
        back = (now[there] @ old.T).argmax(1)
        mutual = flat[back, k] > 0.5
        if np.count_nonzero(mutual) < max(2, 0.3 * len(own)):
            return
        votes = np.zeros(height * width, np.float32)
        np.add.at(votes, there[mutual], 1)
        near = cv2.boxFilter(votes.reshape(height, width), -1, (5, 5), normalize=False)
        found = (votes.reshape(height, width) > 0) & (near >= 0.25 * near.max())
        found &= shares[..., 1:].sum(-1) < 0.5
        shares[found] = 0
        shares[found, k] = 1

    def _widen(self, count: int) -> None:
        """Give the frames of the context shares of `count` objects more: none."""
        more = ((0, 0), (0, 0), (0, count))
        self._given = [(f, np.pad(s, more)) for f, s in self._given]
        self._recent = deque(((f, np.pad(s, more)) for f, s in self._recent), self.settings.context)


def relabelled(
    old: np.ndarray, known: np.ndarray, features: np.ndarray, given: np.ndarray, columns: list[int]
) -> np.ndarray:
    """Return an older frame's shares after objects were given in a newer one.

    What is an object now was called background before anyone said so, and would go on voting for background. So background
    patches of the older frame whose likest patch of the new frame is an object's become the object's.

    :param old: features `[h, w, C]` of the older frame. :param known: its shares `[h, w, K + 1]`.
    :param features: `[h, w, C]` of the frame where the objects were given. :param given: their shares there, `[h, w, n]`.
    :param columns: where they are in `known`.
    """
    shares = known.copy()
    shares[..., 0] += shares[..., columns].sum(-1)
    shares[..., columns] = 0
    free = np.flatnonzero(shares[..., 0] > 0)
    flat, new, told = old.reshape(-1, old.shape[-1]), features.reshape(-1, features.shape[-1]), given.reshape(-1, len(columns))
    out = shares.reshape(-1, shares.shape[-1])
    for some in np.array_split(free, max(1, len(free) // 512)):  # a product of all patches at once could be large
        moved = out[some, :1] * told[(flat[some] @ new.T).argmax(1)]
        out[some[:, None], columns] = moved
        out[some, 0] -= moved.sum(1)
    return shares


def vote(likeness: np.ndarray, votes: np.ndarray, settings: Propagation) -> np.ndarray:
    """Return the shares `[n, K + 1]` of patches, by the likest of the context.

    :param likeness: `[n, G, S]`. :param votes: shares of the same patches, `[..., K + 1]`, G * S in all.
    """
    where, best = top_of_groups(likeness, settings.top_k)
    weights = np.exp((best - best[:, :1]) / settings.temperature)
    weights /= weights.sum(1, keepdims=True)
    chosen = votes.reshape(-1, votes.shape[-1])[where]  # [n, top_k, K + 1]
    return np.einsum("nk,nkc->nc", weights, chosen)


def top_of_groups(likeness: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where in `[n, G * S]` the largest values of `[n, G, S]` are, and these, best first: int64, float32 `[n, count]`.

    The `count` largest values lie in the `count` groups with the largest maxima, which are few to search.
    """
    rows, groups, size = likeness.shape
    count = min(count, groups * size)
    kept = min(count, groups)
    highest = likeness.max(2)  # [n, G]
    chosen = np.argpartition(highest, groups - kept, axis=1)[:, groups - kept :] if kept < groups else None
    if chosen is None:
        chosen = np.broadcast_to(np.arange(groups), (rows, groups))
    values = likeness[np.arange(rows)[:, None], chosen].reshape(rows, -1)  # [n, kept * S]
    total = values.shape[1]
    best = np.argpartition(values, total - count, axis=1)[:, total - count :] if count < total else None
    if best is None:
        best = np.broadcast_to(np.arange(total), (rows, total))
    found = np.take_along_axis(values, best, 1)
    order = np.argsort(-found, axis=1)
    best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
    where = np.take_along_axis(chosen, best // size, 1) * size + best % size
    return where, found


def paint(shares: np.ndarray, ids: list[int], height: int, width: int) -> np.ndarray:
    """Return the mask uint8 `[height, width]` of shares `[h, w, K + 1]`: each pixel's object, or 0.

    Shares are interpolated bilinearly and stretched so that an object's largest is one (DINO's protocol): what a small object
    holds of its patches is never all.
    """
    if not ids:
        return np.zeros((height, width), np.uint8)
    largest = np.maximum(shares.max((0, 1)), 1e-6)
    full = np.stack([
        cv2.resize(shares[..., k] / largest[k] if shares[..., k].sum() >= GONE else np.zeros_like(shares[..., k]),
                   (width, height), interpolation=cv2.INTER_LINEAR)
        for k in range(shares.shape[-1])
    ])  # fmt: skip
    return np.array([0, *ids], np.uint8)[full.argmax(0)]
