# SPDX-License-Identifier: Apache-2.0
"""Procedural surface pictures: a few parameterised kinds, mixed at random, so that no colour or pattern names a class."""

from collections.abc import Callable

import cv2
import numpy as np

Generator = np.random.Generator


def random_colour(rng: Generator) -> np.ndarray:
    """Draw an RGB colour, float32 `[3]` in 0..1: any hue, often greyish, seldom very dark."""
    hue = np.float32(rng.uniform(0.0, 360.0))
    saturation = np.float32(rng.beta(1.2, 1.6))
    value = np.float32(0.15 + 0.85 * rng.beta(2.2, 1.1))
    return cv2.cvtColor(np.array([[[hue, saturation, value]]], np.float32), cv2.COLOR_HSV2RGB)[0, 0]


def random_texture(rng: Generator, size: int, contrast: float = 1.0) -> np.ndarray:
    """Draw a texture of a random kind, uint8 RGB `[size, size, 3]`.

    :param contrast: how far its two colours may lie apart: 0 for one colour, 1 for any two.
    """
    kind = KINDS[rng.integers(len(KINDS))]
    first = random_colour(rng)
    second = first + contrast * (random_colour(rng) - first)
    blend = kind(rng, size)[..., None]
    picture = first * (1.0 - blend) + second * blend
    grain = _value_noise(rng, size, octaves=3, cells=16)[..., None]
    picture = picture * (1.0 + rng.uniform(0.0, 0.25) * (grain - 0.5))
    return np.clip(picture * 255.0, 0, 255).astype(np.uint8)


# Each kind returns a blend map, float32 [size, size] in 0..1: 0 takes the first colour, 1 the second.


def _noise(rng: Generator, size: int) -> np.ndarray:
    return _value_noise(rng, size, octaves=int(rng.integers(2, 6)), cells=int(rng.integers(2, 9)))


def _checker(rng: Generator, size: int) -> np.ndarray:
    row, column = _grid(size, rng)
    cells = rng.integers(2, 13)
    return ((np.floor(row * cells) + np.floor(column * cells)) % 2).astype(np.float32)


def _stripes(rng: Generator, size: int) -> np.ndarray:
    row, _ = _grid(size, rng)
    wave = np.sin(2 * np.pi * row * rng.integers(2, 17) + rng.uniform(0, 6.28))
    return np.clip(0.5 + wave * rng.uniform(0.5, 8.0), 0, 1).astype(np.float32)


def _wood(rng: Generator, size: int) -> np.ndarray:
    row, column = _grid(size, rng)
    bend = _value_noise(rng, size, octaves=2, cells=2)
    rings = row * rng.uniform(4, 14) + bend * rng.uniform(0.5, 3.0) + 0.2 * column
    fibre = cv2.GaussianBlur(rng.random((size, size), np.float32), (0, 0), sigmaX=size / 16, sigmaY=0.6)
    fibre = (fibre - fibre.min()) / max(float(np.ptp(fibre)), 1e-6)
    return np.clip((rings % 1.0) * 0.6 + fibre * 0.5, 0, 1).astype(np.float32)


def _gradient(rng: Generator, size: int) -> np.ndarray:
    row, _ = _grid(size, rng)
    return ((row - row.min()) / max(float(np.ptp(row)), 1e-6)).astype(np.float32)


def _speckle(rng: Generator, size: int) -> np.ndarray:
    field = cv2.GaussianBlur(rng.random((size, size), np.float32), (0, 0), rng.uniform(0.6, 3.0))
    return (field > np.quantile(field, rng.uniform(0.6, 0.97))).astype(np.float32)


def _marble(rng: Generator, size: int) -> np.ndarray:
    row, _ = _grid(size, rng)
    turbulence = _value_noise(rng, size, octaves=5, cells=3)
    return (np.abs(np.sin(np.pi * (row * rng.uniform(1, 4) + turbulence * rng.uniform(1, 5))))).astype(np.float32)


def _cells(rng: Generator, size: int) -> np.ndarray:
    seeds = rng.random((int(rng.integers(6, 25)), 2), np.float32) * size
    row, column = np.mgrid[0:size, 0:size].astype(np.float32)
    distance = (row[..., None] - seeds[:, 0]) ** 2 + (column[..., None] - seeds[:, 1]) ** 2
    shade = rng.random(len(seeds)).astype(np.float32)
    return shade[distance.argmin(axis=-1)]


def _plain(rng: Generator, size: int) -> np.ndarray:
    return np.full((size, size), rng.random(), np.float32)


KINDS: tuple[Callable[[Generator, int], np.ndarray], ...] = (
    _noise, _checker, _stripes, _wood, _gradient, _speckle, _marble, _cells, _plain,
)


def _grid(size: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column coordinates in 0..1, turned by a random angle, float32 `[size, size]` each."""
    row, column = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, np.pi)
    return row * np.cos(angle) + column * np.sin(angle), column * np.cos(angle) - row * np.sin(angle)


def _value_noise(rng: Generator, size: int, octaves: int, cells: int) -> np.ndarray:
    """Sum octaves of smoothly interpolated random grids, scaled to 0..1, float32 `[size, size]`."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        count = min(cells * 2**octave, size)
        grid = rng.random((count, count), np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
    return (total - total.min()) / max(float(np.ptp(total)), 1e-6)
