# SPDX-License-Identifier: Apache-2.0
"""A plain convolutional pyramid, the baseline before attention: residual blocks of two 3 x 3 convolutions.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), with narrower stages and a stem of 3 x 3 convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeprob_perception.nets.swin import DropPath, init_weights

VARIANTS: dict[str, dict] = {"convnet-micro": dict(dims=(48, 96, 192, 320), depths=(2, 2, 3, 2))}


class ConvNet(nn.Module):
    """The backbone: image in, one feature map a stage out, at strides 4, 8, 16 and 32; any size."""

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...], drop_path_rate: float = 0.0):
        super().__init__()
        self.channels = list(dims)
        half = dims[0] // 2
        self.stem1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.stem2, self.bn2 = nn.Conv2d(half, dims[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(dims[0])
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            before = dims[max(i - 1, 0)]
            own = rates[sum(depths[:i]) : sum(depths[: i + 1])]
            self.stages.append(
                nn.Sequential(*(Block(dim if j else before, dim, 2 if i and not j else 1, rate) for j, rate in enumerate(own)))
            )
        self.apply(init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images float `[B, 3, H, W]` to `[B, C_i, ceil(H / s), ceil(W / s)]` for the strides s = 4, 8, 16, 32."""
        x = F.relu(self.bn1(self.stem1(images)))
        x = F.relu(self.bn2(self.stem2(x)))
        pyramid = []
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        return pyramid


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, and a shortcut, projected where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop_path)
        self.shortcut = None
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu((x if self.shortcut is None else self.shortcut(x)) + self.drop_path(y))
