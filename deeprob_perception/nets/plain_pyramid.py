# SPDX-License-Identifier: Apache-2.0
"""From a plain encoder, whose maps all have one stride, to a pyramid of four: the neck of ViTs, and positions of any size.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ECCV 2022); the layers are those that the
published segmenters on BEiT, MAE and Vim have. Shapes in comments: B batch, C channels, H x W patches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


class PlainNeck(nn.Module):
    """Four maps `[B, C, H, W]` at the stride `patch` -> maps at strides 4, 8, 16 and 32.

    :param patch: 8 or 16. Finer maps come from transposed convolutions, coarser ones from max-pooling.
    """

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.levels = nn.ModuleList(self.level(dim, patch, stride) for stride in STRIDES)

    @staticmethod
    def level(dim: int, patch: int, stride: int) -> nn.Module:
        if stride >= patch:
            ratio = stride // patch
            return nn.MaxPool2d(ratio, ratio, ceil_mode=True) if ratio > 1 else nn.Identity()
        layers: list[nn.Module] = [nn.ConvTranspose2d(dim, dim, 2, stride=2)]
        if patch == 4 * stride:
            layers += [nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, stride=2)]
        return nn.Sequential(*layers)

    def forward(self, maps: list[Tensor], height: int, width: int) -> list[Tensor]:
        """:param height: of the image, pixels: those of a padded one are cut to `ceil(height / stride)`, as is the width."""
        pyramid = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        return [x[:, :, : -(-height // s), : -(-width // s)] for x, s in zip(pyramid, STRIDES, strict=True)]


def taps(depth: int) -> list[int]:
    """Return after which of `depth` blocks the four maps are taken: the ends of the quarters."""
    return [depth * (i + 1) // 4 - 1 for i in range(4)]


def pad_to_patch(images: Tensor, patch: int) -> Tensor:
    """Pad images `[B, 3, H, W]` with zeros at the bottom right to whole patches."""
    return F.pad(images, (0, -images.shape[3] % patch, 0, -images.shape[2] % patch))


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding `[1, h * w, C]` of a grid to another: the values of bicubic `F.interpolate`.

    As two products with constant matrices, because back ends disagree on bicubic resizing, and fold these while loading.
    """
    if old == new:
        return positions
    rows, columns = (cubic_matrix(n, m).to(positions) for n, m in zip(old, new, strict=True))  # [H, h], [W, w]
    grid = positions.reshape(*old, -1)  # [h, w, C]
    grid = columns @ (rows @ grid.flatten(1)).reshape(new[0], old[1], -1)  # [H, W, C]
    return grid.flatten(0, 1)[None]


def cubic_matrix(old: int, new: int) -> Tensor:
    """Return float32 `[new, old]`: each row the cubic convolution kernel (a = -0.75) around a new centre, edges repeated."""
    rows = []
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = math.floor(centre) - 1
        row = [0.0] * old
        for j in range(first, first + 4):
            x = abs(centre - j)
            weight = (1.25 * x - 2.25) * x * x + 1 if x <= 1 else -0.75 * (((x - 5) * x + 8) * x - 4)
            row[min(max(j, 0), old - 1)] += weight
        rows.append(row)
    return torch.tensor(rows)
