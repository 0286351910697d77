# SPDX-License-Identifier: Apache-2.0
"""MambaOut (Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?", CVPR 2025): Mamba's block without the scan.

Gated convolutions in a pyramid, the control experiment for every scan. Parameters have the official names. Shapes in
comments: B batch, C channels, H x W tokens of the stage.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeprob_perception.nets.swin import DropPath, normalise

# name -> hyper-parameters of the official repository; femto is the one of about 6 M parameters.
_NARROW, _WIDE = (48, 96, 192, 288), (96, 192, 384, 576)
VARIANTS: dict[str, dict] = {
    "mambaout-femto": dict(depths=(3, 3, 9, 3), dims=_NARROW),
    "mambaout-kobe": dict(depths=(3, 3, 15, 3), dims=_NARROW),
    "mambaout-tiny": dict(depths=(3, 3, 9, 3), dims=_WIDE),
    "mambaout-small": dict(depths=(3, 4, 27, 3), dims=_WIDE),
    "mambaout-base": dict(depths=(3, 4, 27, 3), dims=(128, 256, 512, 768)),
}


class MambaOut(nn.Module):
    """The backbone: image in, one feature map a stage out, at strides 4, 8, 16 and 32; any size.

    The norms of the stages' outputs are ours (Swin's way); the classifier has none, and its own after the mean.
    """

    def __init__(
        self,
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = _NARROW,
        conv_ratio: float = 1.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.channels = list(dims)
        self.downsample_layers = nn.ModuleList([Stem(dims[0])])
        self.downsample_layers.extend(Downsample(a, b) for a, b in pairwise(dims))
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList(
            nn.Sequential(*(GatedCnnBlock(dim, conv_ratio, rate) for rate in rates[sum(depths[:i]) : sum(depths[: i + 1])]))
            for i, dim in enumerate(dims)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images float `[B, 3, H, W]` to `[B, C_i, ceil(H / s), ceil(W / s)]` for the strides s = 4, 8, 16, 32."""
        maps = self.stage_outputs(images)
        return [normalise(norm, x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps, strict=True)]

    def stage_outputs(self, images: Tensor) -> list[Tensor]:
        """Return the stages' outputs `[B, H, W, C]` as the official classifier has them, without norms."""
        x = images.permute(0, 2, 3, 1)
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps


class GatedCnnBlock(nn.Module):
    """Gate times (identity beside a depthwise 7 x 7 convolution), around a residual connection (figure 1, right)."""

    def __init__(self, dim: int, conv_ratio: float = 1.0, drop_path: float = 0.0):
        super().__init__()
        hidden = int(8 / 3 * dim)
        convolved = int(conv_ratio * dim)
        self.sizes = (hidden, hidden - convolved, convolved)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = nn.Conv2d(convolved, convolved, 7, padding=3, groups=convolved)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        tokens = x.flatten(1, 2)  # [B, H*W, C]: back ends have kernels for norms and products of three axes
        normed = self.norm(tokens)
        # The weights are cut and not their product, which would copy every token (as in nets/swin.py).
        gate, kept, convolved = (
            F.linear(normed, weight, bias)
            for weight, bias in zip(self.fc1.weight.split(self.sizes), self.fc1.bias.split(self.sizes), strict=True)
        )
        convolved = self.conv(convolved.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        tokens = tokens + self.drop_path(self.fc2(F.gelu(gate) * torch.cat((kept, convolved), -1)))
        return tokens.unflatten(1, size)


class Stem(nn.Module):
    """Two strided convolutions, `[B, H, W, 3]` -> `[B, H/4, W/4, C]`."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2, eps=1e-6)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(normalise(self.norm1, convolve(self.conv1, x)))
        return normalise(self.norm2, convolve(self.conv2, x))


class Downsample(nn.Module):
    def __init__(self, dim: int, following: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, following, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(following, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.norm, convolve(self.conv, x))


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # [B, H, W, C] both


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
