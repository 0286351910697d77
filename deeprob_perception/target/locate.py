# SPDX-License-Identifier: Apache-2.0
"""A label mask and a depth image -> where the largest object of a class is, in the camera's optical frame.

The point is the centroid of the surface that the camera sees: what is behind it nobody has measured. Depth images are those
of REP 118 (16UC1 in mm, 32FC1 in m, along the optical axis), the frame is REP 103's (x right, y down, z forward).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np

from deeprob_perception.errors import TargetError

# A pixel at an object's edge may show what is behind it, and a stereo camera invents values there: what lies farther from the
# component's median depth than this is left out. 3 robust standard deviations, but never less than an object's own depth.
OUTLIER = 3.0 * 1.4826
MOST = 8  # components that are looked at
SLACK = 0.06  # m; the largest thing on our table is 0.13 m deep


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera: focal lengths and principal point in pixels, the centre of the upper left pixel being (0, 0)."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    @classmethod
    def of(cls, k: np.ndarray, width: int, height: int) -> "Intrinsics":
        """Take them from a CameraInfo's `k` (9 numbers, row by row).

        :raises TargetError: for an uncalibrated camera, whose k is all zeros, or numbers that are none.
        """
        k = np.asarray(k, np.float64).ravel()
        if k.size != 9 or not np.isfinite(k).all() or k[0] <= 0 or k[4] <= 0 or width <= 0 or height <= 0:
            raise TargetError(f"camera_info is no calibration: k is {[float(v) for v in k[:9]]}, {width}x{height}; calibrate")
        return cls(float(k[0]), float(k[4]), float(k[2]), float(k[5]), int(width), int(height))


@dataclass(frozen=True)
class Sighting:
    """One object in one frame.

    - `position`: centroid of its visible surface in the camera's optical frame, float64 `[3]`, m
    - `pixels`: of its mask component; `measured`: those of them with a depth that counts
    - `box`: left, top, width, height of the component, pixels
    """

    position: np.ndarray
    pixels: int
    measured: int
    box: tuple[int, int, int, int]


def metres(depth: np.ndarray) -> np.ndarray:
    """Return depth in metres, float32 `[H, W]`, NaN where there is none (0, negative, NaN or infinite).

    :param depth: uint16 `[H, W]`, mm, or float32 `[H, W]`, m (REP 118).
    :raises TargetError: for another dtype or shape.
    """
    if depth.ndim != 2 or depth.dtype not in (np.uint16, np.float32):
        raise TargetError(f"depth is {depth.dtype} {list(depth.shape)}; publish it as 16UC1 (mm) or 32FC1 (m)")
    if depth.dtype == np.uint16:
        return np.where(depth == 0, np.float32(np.nan), depth.astype(np.float32) / np.float32(1000))
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def components(labels: np.ndarray, class_id: int) -> Iterator[tuple[tuple[int, int, int, int], np.ndarray, int]]:
    """Yield a class's 8-connected components, the largest first: bounding box, the mask within it (bool), number of pixels.

    :param labels: uint8 or uint16 `[H, W]`.
    """
    count, numbers, stats, _ = cv2.connectedComponentsWithStats((labels == class_id).view(np.uint8), connectivity=8)
    for index in 1 + np.argsort(-stats[1:count, cv2.CC_STAT_AREA], kind="stable"):
        left, top, width, height, area = (int(v) for v in stats[index])
        yield (left, top, width, height), numbers[top : top + height, left : left + width] == index, area


def locate(
    labels: np.ndarray, class_id: int, depth: np.ndarray, intrinsics: Intrinsics, minimum_pixels: int = 30,
    border: int = 1, name: str = "", refusal: Callable[[np.ndarray], str] | None = None,
) -> Sighting:  # fmt: skip
    """Return where the largest object of a class is, of those that are not refused.

    :param labels: uint8 or uint16 `[H, W]`. :param depth: of the same size, as in `metres`; holes are left out.
    :param minimum_pixels: of the component, and of those with depth: fewer are more likely noise than an object.
    :param border: pixels that the component is shrunk by, where enough remain: masks are least certain at their edges.
    :param name: of the class, for messages. :param refusal: why a position (`[3]`, m, camera's frame) cannot be it, or "".
    :raises TargetError: which says why there is no position: what is wrong with the largest one.
    """
    if labels.shape != depth.shape or labels.shape != (intrinsics.height, intrinsics.width):
        raise TargetError(
            f"the sizes differ: mask {labels.shape[1]}x{labels.shape[0]}, depth {depth.shape[-1]}x{depth.shape[0]}, "
            f"camera_info {intrinsics.width}x{intrinsics.height}; publish depth that is registered to the mask's camera"
        )
    what, reason = name or f"class {class_id}", ""
    for box, mask, pixels in islice(components(labels, class_id), MOST):
        if pixels < minimum_pixels:
            reason = reason or f"the largest {what} in view has {pixels} pixels; minimum_pixels is {minimum_pixels}"
            break
        seen = measure(mask, box, pixels, depth, intrinsics, minimum_pixels, border)
        wrong = f"{seen} of the {what}'s {pixels} pixels have depth; minimum_pixels is {minimum_pixels}"
        if isinstance(seen, Sighting):
            wrong = refusal(seen.position) if refusal is not None else ""
            if not wrong:
                return seen
            wrong = f"the {what} in view {wrong}"
        reason = reason or wrong
    raise TargetError(reason or f"no {what} in view")


def measure(
    mask: np.ndarray, box: tuple[int, int, int, int], pixels: int, depth: np.ndarray, intrinsics: Intrinsics,
    minimum_pixels: int, border: int,
) -> Sighting | int:  # fmt: skip
    """Return where the object is whose mask within `box` this is; or how many of its pixels have depth, if too few."""
    left, top, width, height = box
    z = metres(depth[top : top + height, left : left + width])
    if border:
        # The picture's own edge is no edge of the object: outside it, the mask goes on.
        side = 2 * border + 1
        inner = cv2.erode(mask.view(np.uint8), np.ones((side, side), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
        if np.isfinite(z[inner > 0]).sum() >= minimum_pixels:
            mask = inner > 0
    mask = mask & np.isfinite(z)
    measured = int(mask.sum())
    if measured < minimum_pixels:
        return measured
    rows, columns = np.nonzero(mask)
    values = z[rows, columns].astype(np.float64)
    off = np.abs(values - np.median(values))
    near = off <= max(SLACK, OUTLIER * float(np.median(off)))
    rows, columns, values = rows[near] + top, columns[near] + left, values[near]
    points = np.stack(
        ((columns - intrinsics.cx) * values / intrinsics.fx, (rows - intrinsics.cy) * values / intrinsics.fy, values), -1
    )
    return Sighting(points.mean(0), pixels, len(values), box)
