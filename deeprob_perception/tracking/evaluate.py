# SPDX-License-Identifier: Apache-2.0
"""Scores of mask propagation on labelled sequences, beside what it has to beat: J, F and their mean as DAVIS has them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from deeprob_perception.errors import DataError
from deeprob_perception.tracking.masks import MaskTracker, Propagation, paint
from deeprob_perception.tracking.points import Following, PointTracker
from deeprob_perception.tracking.scores import score_sequence

# Image BGR uint8 [H, W, 3] -> features float32 [h, w, C], of unit length.
Features = Callable[[np.ndarray], np.ndarray]
# Images and the masks that are given -> a mask for each image, uint8 [H, W], ids of objects.
Method = Callable[["Sequence"], list[np.ndarray]]
SUFFIXES = (".jpg", ".jpeg", ".png")
FLOW_SIDE = 480  # rows: optical flow is computed at most at this size


@dataclass(frozen=True)
class Sequence:
    """Images of one clip in order, and the masks that there are: `masks[i]` is the image's mask file, or None.

    A sequence with a mask for every image is scored; one with masks for some (objects that are introduced there) only tracked.
    """

    name: str
    images: list[Path]
    masks: list[Path | None]

    @property
    def labelled(self) -> bool:
        return all(path is not None for path in self.masks)

    def given(self, index: int) -> np.ndarray | None:
        """Return the mask that a method is shown with the image of this index: the first, and where objects are introduced."""
        path = self.masks[index]
        if path is None or (index and self.labelled):
            return None
        return fit(read_mask(path), *read_bgr(self.images[index]).shape[:2])

    def truth(self, index: int) -> np.ndarray:
        path = self.masks[index]
        assert path is not None
        return fit(read_mask(path), *read_bgr(self.images[index]).shape[:2])


def find_sequences(folder: Path) -> list[Sequence]:
    """Return the sequences of a folder: itself, or its subfolders, with images/ and masks/ (`NAME.png` for `NAME.jpg`).

    :raises DataError: when there are none, or the first image of one has no mask.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    places = [folder] if (folder / "images").is_dir() else sorted(p for p in folder.iterdir() if (p / "images").is_dir())
    found = []
    for place in (p for p in places if (p / "masks").is_dir()):
        images = sorted(p for p in (place / "images").iterdir() if p.suffix.lower() in SUFFIXES)
        masks = [path if (path := place / "masks" / f"{image.stem}.png").is_file() else None for image in images]
        if not images or masks[0] is None:
            raise DataError(f"{place}: the first image has no mask masks/{images[0].stem if images else 'NAME'}.png")
        found.append(Sequence(place.name, images, masks))
    if not found:
        raise DataError(f"{folder} holds no sequence: a folder with images/ and masks/, or several such folders")
    return found


def read_bgr(path: Path) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path} is damaged, or no image")
    return image


def read_mask(path: Path) -> np.ndarray:
    """Read ids of objects, uint8 `[H, W]`: grey values, or a palette's indices (as DAVIS has them)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in ("P", "L") else image.convert("L"), np.uint8)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{path} is no readable mask ({error}); give an image whose pixels are ids of objects") from error


def fit(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mask at an image's size. (DAVIS has masks that are a column narrower.)"""
    return mask if mask.shape == (height, width) else cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)


def evaluate(sequence: Sequence, method: Method) -> dict[str, float] | None:
    """Return `j`, `f` and `jf` of a method, means over the objects; None for a sequence that has no truth to compare with."""
    found = method(sequence)
    if not sequence.labelled:
        return None
    truth = [sequence.truth(i) for i in range(len(sequence.images))]
    scores = [
        score_sequence([mask == i for mask in found], [mask == i for mask in truth]) for i in np.unique(truth[0]) if i
    ]  # fmt: skip
    j, f = float(np.mean([s.j for s in scores])), float(np.mean([s.f for s in scores]))
    return {"j": j, "f": f, "jf": (j + f) / 2}


def propagate(features: Features, settings: Propagation | None = None) -> Method:
    """Return the method that carries masks by features."""

    def run(sequence: Sequence) -> list[np.ndarray]:
        tracker, found = MaskTracker(settings), []
        for i, (image, now) in enumerate(frames_of(sequence)):
            seen = features(image)
            given = now
            mask = paint(tracker.update(seen), tracker.ids, *image.shape[:2]) if i else np.zeros(image.shape[:2], np.uint8)
            if given is not None:
                tracker.seed(seen, given, keep=True)
                mask = np.where(given > 0, given, mask)
            found.append(mask)
        return found

    return run


def still(sequence: Sequence) -> list[np.ndarray]:
    """The masks that were given, kept where they are."""
    found: list[np.ndarray] = []
    for image, given in frames_of(sequence):
        last = found[-1] if found else np.zeros(image.shape[:2], np.uint8)
        found.append(last if given is None else np.where(given > 0, given, last))
    return found


def warped(sequence: Sequence) -> list[np.ndarray]:
    """The masks moved from frame to frame by dense optical flow (OpenCV's DIS, preset medium)."""
    flow_of = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    found: list[np.ndarray] = []
    last: np.ndarray | None = None
    for image, given in frames_of(sequence):
        height, width = image.shape[:2]
        scale = min(1.0, FLOW_SIDE / height)
        grey = cv2.cvtColor(cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
        mask: np.ndarray = np.zeros((height, width), np.uint8)
        if last is not None:
            # From the new frame back to the old one: where each pixel comes from.
            flow = flow_of.calc(grey, last, None)  # type: ignore[call-overload]
            flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) / np.float32(scale)
            columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
            mask = cv2.remap(found[-1], columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_NEAREST)
        found.append(mask if given is None else np.where(given > 0, given, mask))
        last = grey
    return found


def rgb_patches(height: int, width: int, patch: int) -> Features:
    """Return the features that need no network: each patch's own pixels, less the middle grey, of unit length."""

    def features(image: np.ndarray) -> np.ndarray:
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) - 127.5
        grid = small.reshape(height // patch, patch, width // patch, patch, 3).transpose(0, 2, 1, 3, 4)
        flat = grid.reshape(height // patch, width // patch, -1)
        return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)

    return features


def there_and_back(features: Features, sequence: Sequence, frames: int = 60) -> dict[str, float]:
    """Follow points through a clip and back again; return how far from their start they arrive.

    Says something of clips without any truth (Kalal et al., "Forward-Backward Error", ICPR 2010), though not all: an error
    that is the same both ways goes unseen.

    :return: `points` chosen in the first frame, `there` (share in sight in the last one), `back` (share in sight in the first
        one again), `median` and `p90` of the latter's distance from the start, pixels, `within_2`: share of them within 2 px.
    """
    images = [read_bgr(path) for path in sequence.images[:frames]]
    greys, seen = [cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in images], [features(image) for image in images]
    forward, backward = PointTracker(), PointTracker(Following(count=0))
    forward.update(greys[0], seen[0])
    start = dict(zip(forward.ids.tolist(), forward.places.copy(), strict=True))
    for grey, found in zip(greys[1:], seen[1:], strict=True):
        forward.update(grey, found)
    there = [i for i, number in enumerate(forward.ids.tolist()) if forward.visible[i] and number in start]
    backward.update(greys[-1], seen[-1])
    distances: list[float] = []
    if there:
        origin = dict(zip(backward.seed(forward.places[there]).tolist(), forward.ids[there].tolist(), strict=True))
        for grey, found in zip(greys[-2::-1], seen[-2::-1], strict=True):
            backward.update(grey, found)
        distances = [float(np.linalg.norm(place - start[origin[number]])) for number, place, visible
                     in zip(backward.ids.tolist(), backward.places, backward.visible.tolist(), strict=True) if visible]
    nothing = not distances
    return {
        "frames": len(images), "points": len(start), "there": len(there) / max(1, len(start)),
        "back": len(distances) / max(1, len(start)),
        "median": float("nan") if nothing else float(np.median(distances)),
        "p90": float("nan") if nothing else float(np.percentile(distances, 90)),
        "within_2": float("nan") if nothing else float(np.mean(np.array(distances) <= 2)),
    }  # fmt: skip


def frames_of(sequence: Sequence) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield each image, and the mask that a method is shown with it, or None."""
    for i, path in enumerate(sequence.images):
        yield read_bgr(path), sequence.given(i)
