# SPDX-License-Identifier: Apache-2.0
"""Points through a video, each with an id: as exact as the image allows, and held to what they are by features.

Two things find a point in the next frame. The image (pyramidal Lucas-Kanade; Bouguet, 2000) gives its place to a fraction of a
pixel but drifts, and follows whatever slides in front of it. Features know what the point is, but only to a part of a patch:
the soft arg-max of their likeness around it, where the best patch must find back to where it came from (mutual nearest
neighbours). So the image moves a point, features object when they know it elsewhere, and where the image loses it, features
find it again, and its last picture there says where exactly.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from deeprob_perception.errors import SeedError

WINDOW = (17, 17)  # of Lucas-Kanade, and of a point's picture, pixels
LEVELS = 3  # of its pyramid
ROWS = ("places", "_templates", "_pictures", "_speed", "_missing", "ids", "ages", "confidence", "visible", "given")
DRIFT = 0.5  # pixels a frame: a point that is slower does not leave
TERM = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 20, 0.01)


@dataclass(frozen=True)
class Following:
    """How points are followed.

    count: of points to keep up by refilling; 0 for none but those that are given. spacing: between seeds, pixels.
    there_and_back: how far Lucas-Kanade may miss the start on the way back, pixels.
    alike: the least cosine between a point's feature and its template where it is found again; doubt: by how much another
    place must be more like the template than where the image moved the point, for that to be wrong.
    picture: the least correlation of a point's picture with its last one where it is found again.
    search: how far features look for a point, patches; temperature: of their soft arg-max.
    patience: frames that a point out of sight is looked for. memory: share of the template that each frame renews.
    """

    count: int = 256
    spacing: float = 12.0
    there_and_back: float = 1.5
    alike: float = 0.6
    doubt: float = 0.8
    picture: float = 0.9
    search: int = 4
    temperature: float = 0.05
    patience: int = 60
    memory: float = 0.02


class PointTracker:
    """Points by id.

    Arrays of one row a point: `places` float32 `[n, 2]` (x, y in pixels, the centre of the first pixel at 0, 0), `ids` int64,
    `ages` int64 (frames since the seed), `confidence` float32 (cosine with the template, 0 out of sight), `visible` bool,
    `given` bool (by the user: kept while the track lives, and never counted in a refill).
    """

    def __init__(self, settings: Following | None = None):
        self.settings = settings or Following()
        self._next = 0
        self.reset()

    def reset(self) -> None:
        """Forget all points; ids are not used again."""
        self._grey: np.ndarray | None = None
        self._features: np.ndarray | None = None
        self.places = np.zeros((0, 2), np.float32)
        self._templates = np.zeros((0, 1), np.float32)
        self._pictures = np.zeros((0, *WINDOW), np.uint8)  # of points out of sight: how each looked last
        self._speed = np.zeros((0, 2), np.float32)
        self._missing = np.zeros(0, np.int64)
        self.ids, self.ages = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.confidence, self.visible, self.given = np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, bool)

    def seed(self, places: np.ndarray) -> np.ndarray:
        """Add points of the last frame; return their ids, int64 `[m]`.

        :param places: x, y in pixels, `[m, 2]`.
        :raises SeedError: before the first frame, or for a place outside the image.
        """
        if self._grey is None or self._features is None:
            raise SeedError("there has been no frame yet in which a point could be followed; send one first")
        places = np.asarray(places, np.float32).reshape(-1, 2)
        height, width = self._grey.shape
        outside = ~np.isfinite(places).all(1) | (places < 0).any(1) | (places > (width - 1, height - 1)).any(1)
        if outside.any():
            x, y = places[outside][0]
            raise SeedError(f"the point ({x:g}, {y:g}) is outside the image of {width}x{height} pixels")
        return self._add(places, given=True)

    def update(self, grey: np.ndarray, features: np.ndarray) -> None:
        """Follow all points into the next frame.

        :param grey: uint8 `[H, W]`. :param features: float32 `[h, w, C]`, of unit length, of the same image.
        """
        last, before = self._grey, self._features
        self._grey, self._features = grey, features
        if last is not None and before is not None and len(self.ids):
            self._follow(last, grey, before, features)
            self._drop()
        self.ages += 1
        if self.settings.count:
            self._refill(grey, features)

    # One frame --------------------------------------------------------------------------------------------------------

    def _follow(self, last: np.ndarray, grey: np.ndarray, before: np.ndarray, features: np.ndarray) -> None:
        settings = self.settings
        start = self.places.copy()
        # The image moves what was in sight in the frame before; what was not is for the features to find.
        moving = np.flatnonzero(self.visible)
        places, ok = start.copy(), np.zeros(len(start), bool)
        if len(moving):
            places[moving], ok[moving] = self._by_image(last, grey, start[moving], (start + self._speed)[moving])
        now = np.zeros_like(self._templates)
        now[moving] = sample(features, places[moving], grey.shape)
        confidence = (now * self._templates).sum(1)
        sure = ok & (confidence >= settings.alike)
        # What has been out of sight for a while is looked for in every third frame.
        asked = np.flatnonzero(~sure & ((self._missing < 3) | ((self._missing + self.ids) % 3 == 0)))
        if len(asked):
            found, cosine, mutual = self._by_features(asked, before, features, grey.shape)
            trusted = ok[asked] & (cosine - confidence[asked] < settings.doubt)
            sure[asked] = trusted
            again = ~trusted & mutual & (cosine >= settings.alike)
            size = patch_of(features, grey.shape)
            back: list[int] = []
            for point, place, value in zip(asked[again].tolist(), found[again].tolist(), cosine[again], strict=True):
                known = cut(last, start[point]) if self.visible[point] else self._pictures[point]
                exact = by_picture(grey, known, place, max(size), settings.picture)
                if exact is not None:
                    places[point], confidence[point], sure[point] = exact, value, True
                    back.append(point)
            now[back] = sample(features, places[back], grey.shape)
        inside = ((places >= 0) & (places <= (grey.shape[1] - 1, grey.shape[0] - 1))).all(1)
        left = self.visible & ((ok & ~inside) | (~sure & self._leaving(start, grey.shape)))
        sure &= inside
        lost = ~sure
        places[lost] = start[lost]  # out of sight: it stays where it was seen last, and is looked for around there
        for point in np.flatnonzero(self.visible & ~sure):
            self._pictures[point] = cut(last, start[point])
        self._speed = np.where((sure & self.visible)[:, None], places - start, 0).astype(np.float32)
        self.places = np.where(sure[:, None], places, start).astype(np.float32)
        self.visible = sure
        self.confidence = np.where(sure, confidence, 0).astype(np.float32)
        self._missing = np.where(sure, 0, np.where(left, settings.patience, self._missing) + 1)
        seen = np.flatnonzero(sure)
        renewed = self._templates[seen] * (1 - settings.memory) + now[seen] * settings.memory
        self._templates[seen] = renewed / np.maximum(np.linalg.norm(renewed, axis=1, keepdims=True), 1e-9)

    def _leaving(self, start: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return which points were about to leave the image, bool `[n]`, by where they were, `[n, 2]`, and how fast.

        They are not looked for: where a camera pans, what looks like them further in is something else.
        """
        edge, half = np.array([shape[1] - 1, shape[0] - 1], np.float32), WINDOW[0] // 2
        going, speed = start + self._speed, self._speed
        leaving = ((going < half) & (speed < -DRIFT)) | ((going > edge - half) & (speed > DRIFT))
        return np.any(leaving, axis=1)

    def _by_image(
        self, last: np.ndarray, grey: np.ndarray, start: np.ndarray, guess: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where Lucas-Kanade finds points `[m, 2]` of the last frame, and whether it finds back from there."""
        options = dict(winSize=WINDOW, maxLevel=LEVELS, criteria=TERM, flags=cv2.OPTFLOW_USE_INITIAL_FLOW)
        start, guess = np.ascontiguousarray(start, np.float32), np.ascontiguousarray(guess, np.float32)
        moved, there, _ = cv2.calcOpticalFlowPyrLK(last, grey, start, guess.copy(), **options)  # type: ignore[call-overload]
        again, back, _ = cv2.calcOpticalFlowPyrLK(grey, last, moved, start.copy(), **options)  # type: ignore[call-overload]
        ok = (there[:, 0] > 0) & (back[:, 0] > 0)
        return moved, ok & (np.linalg.norm(again - start, axis=1) < self.settings.there_and_back)

    def _by_features(
        self, which: np.ndarray, before: np.ndarray, features: np.ndarray, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where templates are found around points: places `[m, 2]`, cosines `[m]`, and whether the match is mutual.

        The longer a point is out of sight, the farther it is looked for.
        """
        height, width, _ = features.shape
        flat = features.reshape(height * width, -1)
        step_x, step_y = patch_of(features, shape)
        likeness = (self._templates[which] @ flat.T).reshape(-1, height, width)
        columns = (self.places[which, 0] + 0.5) / step_x - 0.5  # in patches
        rows = (self.places[which, 1] + 0.5) / step_y - 0.5
        reach = self.settings.search + np.minimum(self._missing[which], 3 * self.settings.search)
        far_x = np.abs(np.arange(width) - columns[:, None]) > reach[:, None]
        far_y = np.abs(np.arange(height) - rows[:, None]) > reach[:, None]
        far = far_x[:, None, :] | far_y[:, :, None]
        near = np.where(far, -1, likeness)
        best = near.reshape(len(which), -1).argmax(1)
        y, x = np.divmod(best, width)
        cosine = near[np.arange(len(which)), y, x]
        peaks = soft_peak(likeness, y, x, self.settings.temperature)
        places = ((peaks + 0.5) * (step_x, step_y) - 0.5).astype(np.float32)
        # Mutual: of the patches around the point in its template's eyes, is the found one's best the point's own?
        own = np.clip(np.round(rows), 0, height - 1).astype(int), np.clip(np.round(columns), 0, width - 1).astype(int)
        # What was out of sight cannot be found where it was: then its template alone must be sure.
        mutual = cosine >= 0.5 * (1 + self.settings.alike)
        seen = np.flatnonzero(self.visible[which])
        back = flat[best[seen]] @ before.reshape(height * width, -1).T
        back = np.where(far[seen].reshape(back.shape), -1, back).argmax(1)
        home_y, home_x = np.divmod(back, width)
        mutual[seen] = (np.abs(home_y - own[0][seen]) <= 1) & (np.abs(home_x - own[1][seen]) <= 1)
        return places, cosine, mutual

    def _drop(self) -> None:
        keep = self._missing <= self.settings.patience
        if not keep.all():
            for name in ROWS:
                setattr(self, name, getattr(self, name)[keep])

    def _add(self, places: np.ndarray, given: bool) -> np.ndarray:
        assert self._features is not None and self._grey is not None
        count = len(places)
        ids = np.arange(self._next, self._next + count)
        self._next += count
        templates = sample(self._features, places, self._grey.shape)
        templates /= np.maximum(np.linalg.norm(templates, axis=1, keepdims=True), 1e-9)
        rows = {
            "places": places.astype(np.float32), "_templates": templates, "_pictures": np.zeros((count, *WINDOW), np.uint8),
            "_speed": np.zeros((count, 2), np.float32), "_missing": np.zeros(count, np.int64), "ids": ids,
            "ages": np.zeros(count, np.int64), "confidence": np.ones(count, np.float32),
            "visible": np.ones(count, bool), "given": np.full(count, given),
        }  # fmt: skip
        empty = not len(self.ids)
        for name, more in rows.items():
            setattr(self, name, more if empty else np.concatenate((getattr(self, name), more)))
        return ids

    def _refill(self, grey: np.ndarray, features: np.ndarray) -> None:
        """Seed new points where none is near, until there are `count`; when only a few are missing, it can wait."""
        wanted = self.settings.count - int(np.count_nonzero(self.visible & ~self.given))
        if wanted < max(1, self.settings.count // 16):
            return
        taken = self.places[self.visible]
        places = seeds(grey, features, wanted, self.settings.spacing, taken)
        if len(places):
            self._add(places, given=False)


def cut(grey: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the picture around a place x, y, interpolated: uint8 of WINDOW's size."""
    return cv2.getRectSubPix(grey, WINDOW, (float(place[0]), float(place[1])))


def by_picture(grey: np.ndarray, picture: np.ndarray, near: list[float], radius: float, least: float) -> np.ndarray | None:
    """Return where in a radius (pixels) a picture fits best, x, y float32; None where its correlation is below `least`."""
    half = WINDOW[0] // 2
    reach = int(np.ceil(radius))
    x, y = map(round, near)
    left, top = max(0, x - reach - half), max(0, y - reach - half)
    area = grey[top : y + reach + half + 1, left : x + reach + half + 1]
    if min(area.shape) < WINDOW[0] + 2:
        return None
    fits = cv2.matchTemplate(area, picture, cv2.TM_CCOEFF_NORMED)
    row, column = divmod(int(fits.argmax()), fits.shape[1])
    if not fits[row, column] >= least:
        return None
    return np.array([left + half + vertex(fits[row], column), top + half + vertex(fits[:, column], row)], np.float32)


def patch_of(features: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return how many pixels of an image of `shape` a patch is wide and high."""
    return shape[1] / features.shape[1], shape[0] / features.shape[0]


def sample(features: np.ndarray, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return features at places x, y `[m, 2]` of an image, interpolated bilinearly, of unit length, float32 `[m, C]`."""
    height, width, _ = features.shape
    step_x, step_y = patch_of(features, shape)
    x = np.clip((places[:, 0] + 0.5) / step_x - 0.5, 0, width - 1)
    y = np.clip((places[:, 1] + 0.5) / step_y - 0.5, 0, height - 1)
    left, top = np.minimum(x.astype(int), max(0, width - 2)), np.minimum(y.astype(int), max(0, height - 2))
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    along, down = (x - left)[:, None].astype(np.float32), (y - top)[:, None].astype(np.float32)
    above = features[top, left] * (1 - along) + features[top, right] * along
    below = features[bottom, left] * (1 - along) + features[bottom, right] * along
    mixed = above * (1 - down) + below * down
    return mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-9)


def soft_peak(likeness: np.ndarray, y: np.ndarray, x: np.ndarray, temperature: float) -> np.ndarray:
    """Return the soft arg-max of `[m, h, w]` in the 3 x 3 around the patches y, x `[m]`: x, y in patches, float64 `[m, 2]`."""
    count, height, width = likeness.shape
    offsets = np.array([(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    rows, columns = y[:, None] + offsets[:, 0], x[:, None] + offsets[:, 1]
    outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
    values = likeness[np.arange(count)[:, None], rows.clip(0, height - 1), columns.clip(0, width - 1)]
    weights = np.where(outside, 0, np.exp((values - values.max(1, keepdims=True)) / temperature))
    weights /= weights.sum(1, keepdims=True)
    return np.stack(((weights * columns).sum(1), (weights * rows).sum(1)), 1)


def vertex(values: np.ndarray, peak: int) -> float:
    """Return where the parabola through a peak and its neighbours is highest."""
    if not 0 < peak < len(values) - 1:
        return float(peak)
    before, at, after = map(float, values[peak - 1 : peak + 2])
    bend = before - 2 * at + after
    return peak + 0.5 * (before - after) / bend if bend < 0 else float(peak)


def seeds(grey: np.ndarray, features: np.ndarray, count: int, spacing: float, taken: np.ndarray) -> np.ndarray:
    """Return up to `count` places to follow, x, y float32 `[m, 2]`: corners on patches that are unlike those around them.

    :param taken: places `[k, 2]` that new ones keep `spacing` pixels away from.
    """
    height, width, _ = features.shape
    # How unlike its neighbours two patches away a patch is: what looks the same there cannot be told apart.
    alike = np.full((height, width), -1.0, np.float32)
    for dy, dx in ((0, 2), (2, 0), (2, 2), (2, -2)):
        one = features[: height - dy, max(0, -dx) : width - max(0, dx)]
        two = features[dy:, max(0, dx) : width + min(0, dx)]
        cosine = np.einsum("ijc,ijc->ij", one, two)
        for area in (alike[: height - dy, max(0, -dx) : width - max(0, dx)], alike[dy:, max(0, dx) : width + min(0, dx)]):
            np.maximum(area, cosine, out=area)
    distinct = cv2.resize(1 - alike, (grey.shape[1], grey.shape[0]), interpolation=cv2.INTER_LINEAR)
    corner = cv2.cornerMinEigenVal(grey, 5, ksize=3)
    free = np.full(grey.shape, 255, np.uint8)
    for x, y in np.round(taken).astype(int).tolist():
        cv2.circle(free, (x, y), int(spacing), 0, -1)
    border = WINDOW[0] // 2
    free[:border], free[-border:], free[:, :border], free[:, -border:] = 0, 0, 0, 0
    score = np.sqrt(np.maximum(corner, 0)) * np.maximum(distinct, 0.02) * (free > 0)
    peaks = (score == cv2.dilate(score, np.ones((5, 5), np.uint8))) & (score > 0.01 * score.max(initial=0))
    rows, columns = np.nonzero(peaks)
    order = np.argsort(-score[rows, columns], kind="stable")[: 12 * count]
    chosen: list[tuple[int, int]] = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free[row, column]:
            chosen.append((column, row))
            cv2.circle(free, (column, row), int(spacing), 0, -1)
            if len(chosen) == count:
                break
    return np.array(chosen, np.float32).reshape(-1, 2)
