# SPDX-License-Identifier: Apache-2.0
"""One picture that shows a run at a glance: frames in a grid, each with its caption, and a legend of the classes."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 12
_CAPTION = 22
_PAPER = (250, 250, 250)
_INK = (30, 30, 30)


def evenly(total: int, wanted: int) -> list[int]:
    """Return the indices of at most `wanted` frames spread evenly over `total`, first and last included."""
    if total <= 0:
        return []
    return sorted({round(i) for i in np.linspace(0, total - 1, min(total, max(1, wanted)))})


def draw(
    cells: Sequence[tuple[str, Sequence[np.ndarray]]],
    title: str,
    names: Sequence[str] = (),
    palette: np.ndarray | None = None,
    columns: int = 3,
    picture_width: int = 300,
) -> np.ndarray:
    """Return the sheet, uint8 `[H, W, 3]` BGR.

    :param cells: caption and pictures (uint8 `[h, w, 3]` BGR, laid side by side) of each frame.
    :param names: the legend's class names, with `palette` uint8 `[K, 3]` RGB.
    """
    rows: list[np.ndarray] = []
    widest = max((len(pictures) for _, pictures in cells), default=1)
    cell_width = widest * picture_width
    width = columns * (cell_width + _MARGIN) + _MARGIN
    for start in range(0, len(cells), columns):
        row = [_cell(caption, pictures, picture_width) for caption, pictures in cells[start : start + columns]]
        height = max(cell.shape[0] for cell in row)
        band = np.full((height + _MARGIN, width, 3), _PAPER, np.uint8)
        for i, cell in enumerate(row):
            left = _MARGIN + i * (cell_width + _MARGIN)
            band[: cell.shape[0], left : left + cell.shape[1]] = cell
        rows.append(band)
    head = _text_band(width, [(title, None)], 20)
    colours = np.zeros((len(names), 3), np.uint8) if palette is None else palette
    legend = [(name, tuple(int(v) for v in colours[i])) for i, name in enumerate(names)]
    foot = [_text_band(width, legend, 15)] if legend else []
    return np.concatenate([head, *rows, *foot])


def _cell(caption: str, pictures: Sequence[np.ndarray], width: int) -> np.ndarray:
    scaled = []
    for picture in pictures:
        height = max(1, round(picture.shape[0] * width / picture.shape[1]))
        scaled.append(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))
    height = max(picture.shape[0] for picture in scaled)
    cell = np.full((height + _CAPTION, width * len(scaled), 3), _PAPER, np.uint8)
    for i, picture in enumerate(scaled):
        cell[: picture.shape[0], i * width : (i + 1) * width] = picture
    strip = Image.new("RGB", (cell.shape[1], _CAPTION), _PAPER)
    ImageDraw.Draw(strip).text((2, 3), caption, _INK, font=ImageFont.load_default(13))
    cell[height:] = np.asarray(strip)[..., ::-1]
    return cell


def _text_band(width: int, items: Sequence[tuple[str, tuple[int, ...] | None]], size: int) -> np.ndarray:
    """Return a band with the items one after another, each after a patch of its colour, broken into lines."""
    font = ImageFont.load_default(size)
    line = size + 12
    places = []
    x, y = _MARGIN, _MARGIN // 2
    for text, colour in items:
        patch = 0 if colour is None else size + 6
        needed = patch + round(font.getlength(text)) + 2 * _MARGIN
        if x > _MARGIN and x + needed > width:
            x, y = _MARGIN, y + line
        places.append((x, y, patch, text, colour))
        x += needed
    band = Image.new("RGB", (width, y + line), _PAPER)
    pen = ImageDraw.Draw(band)
    for x, y, patch, text, colour in places:
        if colour is not None:
            pen.rectangle((x, y + 2, x + size, y + size + 2), fill=tuple(colour), outline=_INK)
        pen.text((x + patch, y), text, _INK, font=font)
    return np.asarray(band)[..., ::-1]
