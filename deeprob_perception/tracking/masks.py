# SPDX-License-Identifier: Apache-2.0
"""Masks of objects, carried from frame to frame by features: the video protocol of DINO, without training.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021), section 4.2.2, after Jabri et al.,
"Space-Time Correspondence as a Contrastive Random Walk" (NeurIPS 2020): every patch of a new frame takes the labels of the
patches most like it, in the frames where the objects were given and in the last few, near the same place.

Shapes in comments: h x w patches, C channels, K objects, T frames of context.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

import cv2
import numpy as np

from deeprob_perception.engines.host import cores
from deeprob_perception.tracking.blas import one_thread

# Patches, in all: an object that holds less is out of sight.
GONE = 0.5
# Rows and columns of patches whose likeness is computed at once. Larger ones have more in reach that only some of their patches
# may look at; smaller ones make products that are slow. Measured at 480x848 and 240x424: tools/time_tracker.py.
TILE = (4, 4)
ROOM = 1 << 19  # likenesses at once, in one thread: 2 MB, beyond which they leave the cache
FAR = np.float32(-4)  # below any cosine
MOST_THREADS = 4  # more would mostly wait for the interpreter, which they share


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

    def __init__(self, settings: Propagation | None = None, threads: int = 0):
        """:param threads: of propagation; 0 for one a core, up to `MOST_THREADS`."""
        self.settings = settings or Propagation()
        self._threads = threads or min(MOST_THREADS, cores())
        # This thread takes a part of the work, too.
        self._pool = ThreadPoolExecutor(self._threads - 1, "masks") if self._threads > 1 else None
        self._rooms = [np.empty(0, np.float32)] * self._threads  # of each, for likenesses: new memory is slow to touch
        self.reset()

    def reset(self) -> None:
        """Forget all objects and frames."""
        self.ids: list[int] = []
        self._given: list[tuple[np.ndarray, np.ndarray]] = []  # features [h, w, C], shares [h, w, K + 1]; background first
        self._owners: list[set[int]] = []  # of each frame in `_given`, the objects that were given there last
        self._shares: np.ndarray | None = None  # of the last frame
        self._context: Context | None = None

    @property
    def lost(self) -> list[int]:
        shares = self._shares
        return [] if shares is None else [self.ids[k - 1] for k in range(1, shares.shape[-1]) if shares[..., k].sum() < GONE]

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
        if keep and self._shares is not None:
            now = self._shares
            new = [i for i in ids if i not in self.ids]
            self.ids = [*self.ids, *new]
            self._given = [(f, np.pad(s, ((0, 0), (0, 0), (0, len(new))))) for f, s in self._given]
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
        self._shares = shares
        self._context = Context(self._given, self.settings.context)

    def update(self, features: np.ndarray) -> np.ndarray:
        """Carry the objects into the next frame; return their shares float32 `[h, w, K + 1]`, the background's first.

        :param features: float32 `[h, w, C]`, of unit length, as in the frames before.
        """
        assert self._context is not None, "seed() comes first"
        with one_thread():
            shares = self._spread(features, self._context)
        for k in [k for k in range(1, shares.shape[-1]) if shares[..., k].sum() < GONE]:
            self._find_again(features, shares, k)
        self._context.add(features, shares)
        self._shares = shares
        return shares

    def _spread(self, features: np.ndarray, context: "Context") -> np.ndarray:
        """Return the shares `[h, w, K + 1]` by the votes of the most similar patches nearby."""
        height, width, _ = features.shape
        radius = max(1, round(self.settings.radius * min(height, width)))
        shares = np.zeros((height, width, 1 + len(self.ids)), np.float32)
        shares[..., 0] = 1
        # Where every patch in reach is background in all of the context, so is this one: leave it out.
        held = context.votes[..., 1:].max((2, 3)) > 0
        reach = 2 * radius + 1
        near = cv2.dilate(held.astype(np.uint8), np.ones((reach, reach), np.uint8))
        high, wide = TILE
        tile = (high + 2 * radius) * (wide + 2 * radius) * len(context.empty) * high * wide  # likenesses
        at_once = max(1, ROOM // tile)
        if self._rooms[0].size < at_once * tile:
            self._rooms = [np.empty(at_once * tile, np.float32) for _ in self._rooms]
        batches = []
        for top in range(0, height, high):
            lefts = [left for left in range(0, width, wide) if near[top : top + high, left : left + wide].any()]
            batches += [(top, lefts[i : i + at_once]) for i in range(0, len(lefts), at_once)]
        parts = [batches[i :: self._threads] for i in range(min(self._threads, len(batches)))]

        def work(n: int) -> None:
            spread_tiles(features, context, parts[n], radius, self.settings, self._rooms[n], shares)

        others = [self._pool.submit(work, n) for n in range(1, len(parts))] if self._pool is not None else []
        if parts:
            work(0)
        for other in others:
            other.result()
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


class Context:
    """The frames that vote: those in which objects were given, and the last few.

    A frame's features are copied once, when it comes, to where all frames' patches of one place lie side by side. What a tile
    of patches can reach is then blocks of memory, row by row, that matrix products read without a copy.

    - `keys`: features, float32 `[h, w, T, C]`; `votes`: shares, float32 `[h, w, T, K + 1]`
    - `empty`: bool `[T]`, places for frames that have not come yet
    """

    def __init__(self, given: list[tuple[np.ndarray, np.ndarray]], recent: int):
        """:param given: features and shares of the frames that stay. :param recent: how many others to keep."""
        (height, width, channels), frames = given[0][0].shape, len(given) + recent
        self.keys = np.zeros((height, width, frames, channels), np.float32)
        self.votes = np.zeros((height, width, frames, given[0][1].shape[-1]), np.float32)
        self.empty = np.arange(frames) >= len(given)
        for t, (features, shares) in enumerate(given):
            self.keys[:, :, t], self.votes[:, :, t] = features, shares
        self._turns = cycle(range(len(given), frames)) if recent else None

    def add(self, features: np.ndarray, shares: np.ndarray) -> None:
        """Take the newest frame, in the place of the oldest of the recent ones."""
        if self._turns is not None:
            t = next(self._turns)
            self.keys[:, :, t], self.votes[:, :, t], self.empty[t] = features, shares, False


def spread_tiles(
    features: np.ndarray, context: Context, batches: list[tuple[int, list[int]]], radius: int, settings: Propagation,
    room: np.ndarray, shares: np.ndarray,
) -> None:  # fmt: skip
    """Write the shares of some tiles of a frame's patches.

    :param features: of the frame, float32 `[h, w, C]`. :param batches: first row of some tiles, and the first column of each.
    :param room: float32, to work in: at least the likenesses of the longest batch.
    :param shares: float32 `[h, w, K + 1]`, to write to.
    """
    height, width, channels = features.shape
    frames = len(context.empty)
    high, wide = TILE
    across = wide + 2 * radius  # columns in reach of a tile
    patches, found, likeness = [], [], []
    for top, lefts in batches:
        bottom, first = min(height, top + high), np.array(lefts)
        start, end = max(0, top - radius), min(height, bottom + radius)
        size = (bottom - top) * wide
        shape = (len(lefts), end - start, across * frames, size)
        alike = room[: math.prod(shape)].reshape(shape)  # [tiles, rows, columns * T, n]
        query = np.zeros((len(lefts), channels, bottom - top, wide), np.float32)
        for i, left in enumerate(lefts):
            tile = features[top:bottom, left : left + wide]
            query[i, ..., : tile.shape[1]] = tile.transpose(2, 0, 1)
            low, up = max(0, left - radius), min(width, left + wide + radius)
            keys = context.keys[start:end, low:up].reshape(end - start, -1, channels)  # [rows, columns * T, C], no copy
            inside = slice((low - left + radius) * frames, (up - left + radius) * frames)
            np.matmul(keys, query[i].reshape(channels, size), out=alike[i, :, inside])
            alike[i, :, : inside.start] = alike[i, :, inside.stop :] = FAR  # outside of the image
        # Out of reach: a row of keys for some rows of the tile; a column of keys, and an empty frame, for all rows alike.
        for row in (*range(start, bottom - radius), *range(top + radius + 1, end)):
            alike[:, row - start, :, : max(0, row - radius - top) * wide] = FAR
            alike[:, row - start, :, (row + radius + 1 - top) * wide :] = FAR
        apart = np.abs(np.arange(across)[:, None] - radius - np.arange(wide)) > radius  # [columns, wide]
        lacking = np.tile(apart[:, None] | context.empty[:, None], bottom - top)  # [columns, T, n]
        less = np.where(lacking, FAR, np.float32(0)).reshape(-1, size)
        where, best = top_of_groups(alike, less, settings.top_k)
        rows, rest = np.divmod(where, across * frames)
        corner = (start * width + first - radius) * frames  # of what is in reach, in [h, w, T]
        column = first[:, None] + np.arange(wide)
        whole = np.broadcast_to(column[:, None] < width, (len(lefts), bottom - top, wide)).ravel()  # tiles may stick out
        found.append((rows * (width * frames) + rest + corner.repeat(size)[:, None])[whole])
        likeness.append(best[whole])
        patches.append((np.arange(top, bottom)[:, None] * width + column[:, None]).ravel()[whole])
    weights = np.concatenate(likeness)  # [patches, top_k]
    weights = np.exp((weights - weights[:, :1]) / settings.temperature)
    weights /= weights.sum(1, keepdims=True)
    # What is out of reach has no weight left; it may lie outside, where there is no patch.
    places = np.concatenate(found).clip(0, height * width * frames - 1)
    chosen = context.votes.reshape(-1, shares.shape[-1])[places]  # [patches, top_k, K + 1]
    shares.reshape(-1, shares.shape[-1])[np.concatenate(patches)] = np.einsum("nk,nkc->nc", weights, chosen)


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


def top_of_groups(values: np.ndarray, less: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where in `[S * G]` the largest of `[B, S, G, n]` + `[G, n]` are, and these, best first: `[B * n, count]`.

    The `count` largest values lie in the `count` groups with the largest maxima, which are few to search.
    """
    batch, size, groups, columns = values.shape
    kept = min(count, groups)
    highest = (values.max(1) + less).transpose(0, 2, 1).reshape(-1, groups)
    chosen, _ = take_largest(highest, kept)  # [B * n, kept]
    tile, column = np.divmod(np.arange(batch * columns), columns)
    places = chosen * columns + column[:, None]  # in [G, n]
    members = (tile[:, None] * size + np.arange(size)) * (groups * columns)  # [B * n, S]
    found = values.reshape(-1).take(members[:, :, None] + places[:, None])  # [B * n, S, kept]
    found += less.reshape(-1).take(places)[:, None]
    best, largest = take_largest(found.reshape(len(chosen), -1), min(count, size * kept))
    member, group = np.divmod(best, kept)
    return member * groups + np.take_along_axis(chosen, group, 1), largest


def take_largest(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each row's largest are, and these, best first: int64, float32 `[n, count]`; `values` loses them.

    For the handful that vote, one search after another is several times as fast as a partition of the row.
    """
    rows = np.arange(len(values))
    where = np.empty((len(values), count), np.int64)
    found = np.empty((len(values), count), values.dtype)
    for i in range(count):
        where[:, i] = values.argmax(1)
        found[:, i] = values[rows, where[:, i]]
        values[rows, where[:, i]] = -np.inf
    return where, found


def paint(shares: np.ndarray, ids: list[int], height: int, width: int) -> np.ndarray:
    """Return the mask uint8 `[height, width]` of shares `[h, w, K + 1]`: each pixel's object, or 0.

    Shares are interpolated bilinearly and stretched so that an object's largest is one (DINO's protocol): what a small object
    holds of its patches is never all.
    """
    if not ids:
        return np.zeros((height, width), np.uint8)
    largest = np.maximum(shares.max((0, 1)), 1e-6)

    def full(k: int) -> np.ndarray:
        share = shares[..., k] / largest[k] if shares[..., k].sum() >= GONE else np.zeros_like(shares[..., k])
        return cv2.resize(share, (width, height), interpolation=cv2.INTER_LINEAR)

    mask, most = np.zeros((height, width), np.uint8), full(0)
    for k, number in enumerate(ids, start=1):
        ours = full(k)
        mask[ours > most] = number
        np.maximum(most, ours, out=most)
    return mask
