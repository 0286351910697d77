# SPDX-License-Identifier: Apache-2.0
"""A light segmentation head on a four-stage pyramid, after "Panoptic Feature Pyramid Networks" (Kirillov et al., CVPR 2019).

Top-down sums over 1 x 1 laterals, context from the whole image added to the coarsest level, and depthwise-separable
smoothing: a tenth of UPerNet's arithmetic, for CPUs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FpnHead(nn.Module):
    """Pyramid `[B, C_i, H/s, W/s]` (s = 4, 8, 16, 32) -> logits `[B, num_classes, H/4, W/4]`."""

    def __init__(self, in_channels: list[int], num_classes: int, channels: int = 96, dropout: float = 0.1):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.context = nn.Sequential(nn.Conv2d(in_channels[-1], channels, 1), nn.ReLU())
        self.smooth = nn.ModuleList(SeparableConv(channels) for _ in in_channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        # mean() rather than AdaptiveAvgPool2d(1): the same value, and one ReduceMean in ONNX.
        x = self.laterals[-1](pyramid[-1]) + self.context(pyramid[-1].mean((2, 3), keepdim=True))
        x = self.smooth[-1](x)
        for lateral, smooth, features in zip(self.laterals[-2::-1], self.smooth[-2::-1], pyramid[-2::-1], strict=True):
            x = F.interpolate(x, size=features.shape[-2:], mode="bilinear", align_corners=False)
            x = smooth(x + lateral(features))
        return self.classify(self.dropout(x))


class SeparableConv(nn.Module):
    """Depthwise 3 x 3, then pointwise, each with batch normalisation; a residual connection around both."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.depthwise(x)))
        return torch.relu(x + self.bn2(self.pointwise(y)))
