# SPDX-License-Identifier: Apache-2.0
"""UPerNet's segmentation head (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018).

Pyramid pooling (PSPNet) on the coarsest level, a feature pyramid (FPN) below it, and one 3 x 3 fusion of all levels.
The layers are those of the published Swin + UPerNet checkpoints. Shapes in comments: B batch, H x W the finest level's
size (a quarter of the image), h x w the coarsest's, s x s the bins of a pooling scale, D the head's width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UPerHead(nn.Module):
    """Pyramid `[B, C_i, H/2^i, W/2^i]`, i = 0..3 -> logits `[B, num_classes, H, W]`, at the finest level's size."""

    def __init__(
        self,
        in_channels: list[int],
        num_classes: int,
        channels: int = 512,
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        self.ppm = PyramidPooling(in_channels[-1], channels, pool_scales)
        self.laterals = nn.ModuleList(ConvBnRelu(c, channels, 1) for c in in_channels[:-1])
        self.smooth = nn.ModuleList(ConvBnRelu(channels, channels, 3) for _ in in_channels[:-1])
        self.fuse = ConvBnRelu(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        levels = [lateral(x) for lateral, x in zip(self.laterals, pyramid[:-1], strict=True)]
        levels.append(self.ppm(pyramid[-1]))  # four times [B, D, H/2^i, W/2^i]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1])
        # The pooled level is not smoothed: its bottleneck is a 3 x 3 convolution already.
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        fused = self.fuse(torch.cat([levels[0]] + [resize(x, levels[0]) for x in levels[1:]], 1))  # [B, 4D, H, W] -> D
        return self.classify(self.dropout(fused))  # [B, num_classes, H, W]


class PyramidPooling(nn.Module):
    """PSPNet's pyramid pooling module (Zhao et al., CVPR 2017): averages over s x s bins, beside the features."""

    def __init__(self, in_channels: int, channels: int, pool_scales: tuple[int, ...]):
        super().__init__()
        self.pool_scales = pool_scales
        self.branches = nn.ModuleList(ConvBnRelu(in_channels, channels, 1) for _ in pool_scales)
        self.bottleneck = ConvBnRelu(in_channels + len(pool_scales) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        branches = zip(self.branches, self.pool_scales, strict=True)
        pooled = [branch(adaptive_average_pool(x, s)) for branch, s in branches]  # each [B, D, s, s]
        return self.bottleneck(torch.cat([x] + [resize(p, x) for p in pooled], 1))  # [B, C + 4D, h, w] -> [B, D, h, w]


class ConvBnRelu(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def adaptive_average_pool(x: Tensor, bins: int) -> Tensor:
    """Average `[B, C, H, W]` over `bins` x `bins` windows: the values of `torch.nn.AdaptiveAvgPool2d(bins)`.

    As two products with constant matrices, because windows of unequal size, which any size that `bins` does not divide
    has, are beyond ONNX's pooling operators.
    """
    rows = bin_matrix(x.shape[-2], bins).to(x)  # [s, H]
    columns = bin_matrix(x.shape[-1], bins).to(x)  # [s, W]
    return rows @ x @ columns.T  # [B, C, s, s]


def bin_matrix(length: int, bins: int) -> Tensor:
    """Return float32 `[bins, length]`, each row the average over one bin: floor(i L / s) up to ceil((i + 1) L / s)."""
    rows = []
    for i in range(bins):
        start, end = i * length // bins, -(-(i + 1) * length // bins)
        rows.append([1.0 / (end - start) if start <= j < end else 0.0 for j in range(length)])
    return torch.tensor(rows)


def resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
