# SPDX-License-Identifier: Apache-2.0
"""SegFormer (Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", NeurIPS 2021).

The encoder MiT, a pyramid whose attention is full but reads keys and values from a map that is reduced R-fold, and the
all-MLP head. Shapes in comments: B batch, C channels, h heads, H x W tokens of the stage, N = H * W, M = N / R^2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeprob_perception.nets.swin import DropPath, init_weights, normalise

# name -> hyper-parameters of the paper (table 6); `micro` is our own: b0 a quarter wider, and a block deeper, for about 6 M.
_WIDE = (64, 128, 320, 512)
VARIANTS: dict[str, dict] = {
    "mit-micro": dict(dims=(40, 80, 200, 320), depths=(2, 2, 3, 2)),
    "mit-b0": dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "mit-b1": dict(dims=_WIDE, depths=(2, 2, 2, 2)),
    "mit-b2": dict(dims=_WIDE, depths=(3, 4, 6, 3)),
    "mit-b3": dict(dims=_WIDE, depths=(3, 4, 18, 3)),
    "mit-b4": dict(dims=_WIDE, depths=(3, 8, 27, 3)),
    "mit-b5": dict(dims=_WIDE, depths=(3, 6, 40, 3)),
}
HEADS = (1, 2, 5, 8)
REDUCTIONS = (8, 4, 2, 1)


class MixTransformer(nn.Module):
    """The encoder MiT: image in, one feature map a stage out, at strides 4, 8, 16 and 32; any size from 32 pixels on."""

    def __init__(self, dims: tuple[int, ...] = _WIDE, depths: tuple[int, ...] = (2, 2, 2, 2), drop_path_rate: float = 0.0):
        super().__init__()
        self.channels = list(dims)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            stage = nn.Module()
            stage.embed = PatchEmbed(3 if i == 0 else dims[i - 1], dim, *((7, 4) if i == 0 else (3, 2)))
            stage.blocks = nn.ModuleList(
                Block(dim, HEADS[i], REDUCTIONS[i], rate) for rate in rates[sum(depths[:i]) : sum(depths[: i + 1])]
            )
            stage.norm = nn.LayerNorm(dim)
            self.stages.append(stage)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images float `[B, 3, H, W]` to `[B, C_i, ceil(H / s), ceil(W / s)]` for the strides s = 4, 8, 16, 32."""
        x, pyramid = images, []
        for stage in self.stages:
            x = stage.embed(x)  # [B, H, W, C]
            size = (x.shape[1], x.shape[2])
            x = x.flatten(1, 2)
            for block in stage.blocks:
                x = block(x, size)
            x = stage.norm(x).transpose(1, 2).unflatten(2, size)  # [B, C, H, W]
            pyramid.append(x)
        return pyramid


class PatchEmbed(nn.Module):
    """Overlapping patches (section 3.1): a strided convolution and a norm."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.norm, self.proj(x).permute(0, 2, 3, 1))  # [B, H, W, C]


class Block(nn.Module):
    """Attention and a Mix-FFN, each behind a LayerNorm and around a residual connection."""

    def __init__(self, dim: int, num_heads: int, reduction: int, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ReducedAttention(dim, num_heads, reduction)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MixMlp(dim, 4 * dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class ReducedAttention(nn.Module):
    """Every token asks, and an R-fold smaller map answers (equation 2, as a strided convolution)."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        batch, tokens, dim = x.shape
        source = x
        if self.reduce is not None and self.norm is not None:
            source = self.norm(self.reduce(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2))  # [B, M, C]
        q, k, v = (
            linear(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, h, N or M, C/h]
            for linear, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        scores = (q * (dim // self.num_heads) ** -0.5) @ k.transpose(-2, -1)  # [B, h, N, M]
        x = scores.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class MixMlp(nn.Module):
    """An MLP with a depthwise 3 x 3 convolution in it, which stands in for positions (section 3.1)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = self.dwconv(self.fc1(x).transpose(1, 2).unflatten(2, size))
        return self.fc2(F.gelu(x).flatten(2).transpose(1, 2))


class MlpHead(nn.Module):
    """Pyramid `[B, C_i, H/s, W/s]` (s = 4, 8, 16, 32) -> logits `[B, num_classes, H/4, W/4]` (section 3.2)."""

    def __init__(self, in_channels: list[int], num_classes: int, channels: int = 256, dropout: float = 0.1):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(c, channels) for c in in_channels)
        self.fuse = nn.Conv2d(len(in_channels) * channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        size = pyramid[0].shape[2:]
        levels = []
        for projection, x in zip(self.projections, pyramid, strict=True):
            x = projection(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
            levels.append(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
        x = F.relu(self.bn(self.fuse(torch.cat(levels[::-1], 1))))
        return self.classify(self.dropout(x))
