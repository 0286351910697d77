# SPDX-License-Identifier: Apache-2.0
"""Swin Transformer v1 (Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021).

The backbone as a four-stage pyramid for dense prediction. Shapes in comments: B batch, C channels, H x W tokens of the
stage, M window size, N = M * M tokens of a window, nW windows of an image, h heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name -> hyper-parameters of the paper (section 3.3); `micro` is our own, for CPUs and small robots: about 6 M parameters, a
# window of 8, heads twice as wide as the paper's (half as many soft-maxes) and a convolutional stem ("Early Convolutions
# Help Transformers See Better", Xiao et al., NeurIPS 2021: it trains far better from scratch on a few hundred images).
VARIANTS: dict[str, dict] = {
    "swin-micro": dict(embed_dim=48, depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), window_size=8, conv_stem=True),
    "swin-tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin-small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin-base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "swin-large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


class SwinTransformer(nn.Module):
    """The backbone: image in, one feature map a stage out, at strides 4, 8, 16 and 32.

    Sizes that the window or the stride does not divide are padded at the bottom right, as the official code does.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        patch_size: int = 4,
        in_channels: int = 3,
        conv_stem: bool = False,
    ):
        super().__init__()
        self.channels = [embed_dim * 2**i for i in range(len(depths))]
        self.patch_embed: nn.Module
        if conv_stem:
            self.patch_embed = ConvStem(in_channels, embed_dim)
        else:
            self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        # Stochastic depth grows with depth (section 4.1). The device is named so that a net can be laid out on `meta`.
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList()
        for i, depth in enumerate(depths):
            dim = self.channels[i]
            first = sum(depths[:i])
            self.stages.append(
                Stage(
                    dim,
                    num_heads[i],
                    window_size,
                    mlp_ratio,
                    qkv_bias,
                    drop_path=rates[first : first + depth],
                    downsample=i + 1 < len(depths),
                )
            )
        # One LayerNorm on each stage's output, as the official code for detection and segmentation has it.
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.channels)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images float `[B, 3, H, W]` to `[B, C_i, ceil(H / s), ceil(W / s)]` for the strides s = 4, 8, 16, 32."""
        x = self.patch_embed(images)  # [B, H, W, C]
        pyramid = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            features, x = stage(x)
            pyramid.append(normalise(norm, features).permute(0, 3, 1, 2))  # [B, C, H, W]
        return pyramid


class PatchEmbed(nn.Module):
    """Cut the image into patches of 4 x 4 pixels and project each (section 3.1)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = self.patch_size
        images = F.pad(images, (0, -width % size, 0, -height % size))
        return normalise(self.norm, self.proj(images).permute(0, 2, 3, 1))  # [B, H/4, W/4, C]


class ConvStem(nn.Module):
    """Two strided 3 x 3 convolutions and one more in place of the 4 x 4 patches; the same stride of 4."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % 4, 0, -height % 4))
        x = F.relu(self.bn1(self.conv1(images)))  # [B, C/2, H/2, W/2]
        x = F.relu(self.bn2(self.conv2(x)))  # [B, C, H/4, W/4]
        return normalise(self.norm, self.conv3(x).permute(0, 2, 3, 1))  # [B, H/4, W/4, C]


class Stage(nn.Module):
    """`depth` blocks at one resolution, windows shifted in every second one, then patch merging to the next."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: list[float],
        downsample: bool,
    ):
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, window_size, 0 if i % 2 == 0 else window_size // 2, mlp_ratio, qkv_bias, rate)
            for i, rate in enumerate(drop_path)
        )
        self.downsample = PatchMerging(dim) if downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stage's output `[B, H, W, C]` and the next stage's input `[B, H/2, W/2, 2C]`."""
        height, width = x.shape[1:3]
        size = self.window_size
        mask = shifted_window_mask(height + -height % size, width + -width % size, size, size // 2, x.device, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return x, x if self.downsample is None else self.downsample(x)


class Block(nn.Module):
    """Window attention and an MLP, each behind a LayerNorm and around a residual connection (equation 3)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
    ):
        super().__init__()
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        size, shift = self.window_size, self.shift_size
        shortcut = x
        x = normalise(self.norm1, x)
        # Padding comes after the norm: padded tokens are zeros, as in the official code for dense prediction.
        x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
        padded_height, padded_width = x.shape[1:3]
        if shift:
            x = torch.roll(x, (-shift, -shift), dims=(1, 2))
        windows = window_partition(x, size)  # [B*nW, N, C]
        windows = self.attn(windows, mask if shift else None)
        x = window_reverse(windows, size, padded_height, padded_width)  # [B, H', W', C]
        if shift:
            x = torch.roll(x, (shift, shift), dims=(1, 2))
        x = shortcut + self.drop_path(x[:, :height, :width])
        # As [B, H*W, C]: OpenVINO's int8 products take the bias and the GELU into their kernel for three axes only.
        x = x.flatten(1, 2)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.unflatten(1, (height, width))  # [B, H, W, C]


class WindowAttention(nn.Module):
    """Multi-head self-attention within each window, with a learned bias for each relative position (equation 4)."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within windows `[B*nW, N, C]`; `mask` `[nW, N, N]` is added to the scores of a shifted block."""
        windows, tokens, dim = x.shape
        heads = self.num_heads
        # The weights are cut in three, which back ends do once while they load, and not the product: that would copy every
        # token (a tenth of a narrow stage's attention in OpenVINO and ONNX Runtime).
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).reshape(windows, tokens, heads, dim // heads).transpose(1, 2)  # [B*nW, h, N, d]
            for weight, bias in zip(self.qkv.weight.chunk(3), biases, strict=True)
        )
        bias = self.relative_position_bias_table[self.relative_position_index.reshape(-1)]  # [N*N, h]
        bias = bias.reshape(tokens, tokens, heads).permute(2, 0, 1)  # [h, N, N]
        if mask is not None:
            # Joined before they meet the scores: in an exported graph the sum is one constant, and matmul, add, soft-max,
            # matmul is the pattern that back ends fuse into one attention kernel.
            bias = bias + mask[:, None]  # [nW, h, N, N]
        # Written out, not scaled_dot_product_attention: that one doesn't export followed by this reshape (torch 2.13).
        scores = (q * self.scale) @ k.transpose(-2, -1)  # [B*nW, h, N, N]
        if mask is None or windows == len(mask):
            scores = scores + bias
        else:
            scores = (scores.reshape(-1, *bias.shape) + bias).reshape(scores.shape)
        x = scores.softmax(-1) @ v  # [B*nW, h, N, d]
        return self.proj(x.transpose(1, 2).reshape(windows, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PatchMerging(nn.Module):
    """Join 2 x 2 neighbouring tokens and reduce 4C channels to 2C (section 3.1), or to `following`."""

    def __init__(self, dim: int, following: int | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, following or 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # The order of the four is the official checkpoints' own: top left, bottom left, top right, bottom right.
        x = torch.cat((x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]), -1)  # [B, H/2, W/2, 4C]
        return self.reduction(normalise(self.norm, x))


def normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a LayerNorm to `[B, H, W, C]` as to `[B, H*W, C]`: OpenVINO has one kernel for it with three axes, six without."""
    return norm(x.flatten(1, 2)).reshape(x.shape)


class DropPath(nn.Module):
    """Stochastic depth: drop a sample's residual branch with probability `rate` while training (Huang et al., 2016)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)


def window_partition(x: Tensor, size: int) -> Tensor:
    """`[B, H, W, C]` -> `[B*nW, size*size, C]`; H and W are multiples of `size`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(2, 3).reshape(-1, size * size, channels)


def window_reverse(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """`[B*nW, size*size, C]` -> `[B, H, W, C]`, the inverse of `window_partition`."""
    channels = windows.shape[-1]
    x = windows.reshape(-1, height // size, width // size, size, size, channels)
    return x.transpose(2, 3).reshape(-1, height, width, channels)


def shifted_window_mask(
    height: int, width: int, size: int, shift: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the additive mask `[nW, N, N]` that keeps apart tokens which only the cyclic shift made neighbours (figure 4)."""

    def regions(length: int) -> Tensor:  # 0: far from the seam, 1: before it, 2: wrapped around
        position = torch.arange(length, device=device)
        return (position >= length - size).to(torch.int64) + (position >= length - shift).to(torch.int64)

    region = regions(height)[:, None] * 3 + regions(width)  # [H, W]
    region = window_partition(region[None, :, :, None], size).squeeze(-1)  # [nW, N]
    apart = region[:, None, :] != region[:, :, None]  # [nW, N, N]
    # -100, not -inf: the official value, harmless in half precision.
    return apart.to(dtype or torch.float32) * -100.0


def relative_position_index(size: int) -> Tensor:
    """Return for each pair of a window's tokens the row of the bias table, int64 `[N, N]`."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()  # [N]
    row_offset = rows[:, None] - rows[None, :] + size - 1
    column_offset = columns[:, None] - columns[None, :] + size - 1
    return row_offset * (2 * size - 1) + column_offset


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.bias is None:
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
