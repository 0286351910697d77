# SPDX-License-Identifier: Apache-2.0
"""Vision Mamba (Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
ICML 2024): ViT's patches, and in place of attention and MLP one Mamba block that scans them forwards and backwards.

Parameters have the official names. Shapes in comments: B batch, C channels, D inner channels, H x W patches, L tokens.
"""

import math

import torch
from torch import Tensor, nn

from deeprob_perception.nets.mamba import Mamba, initial_a_log, initialise_steps, mix
from deeprob_perception.nets.plain_pyramid import PlainNeck, pad_to_patch, resize_positions, taps
from deeprob_perception.nets.swin import DropPath

# name -> hyper-parameters of the paper; `micro` is our own: tiny's width and three quarters of its depth.
VARIANTS: dict[str, dict] = {
    "vim-micro": dict(embed_dim=192, depth=18),
    "vim-tiny": dict(embed_dim=192, depth=24),
    "vim-small": dict(embed_dim=384, depth=24),
    "vim-base": dict(embed_dim=768, depth=24),
}


class VisionMamba(nn.Module):
    """The classifier of the paper: images of one size in, logits out.

    :param image_size: of the images, pixels: a side, or height and width. :param stride: of the patches; less than their size
        for the published models of finer grain.
    :param class_token: a token in the middle of the sequence, which is classified; without it, the tokens' mean.
    :param rms_norm: RMSNorm, or else LayerNorm. :param halve: divide the sum of the two directions by two.
    """

    def __init__(
        self,
        embed_dim: int = 192,
        depth: int = 24,
        patch_size: int = 16,
        stride: int = 16,
        image_size: int | tuple[int, int] = 224,
        class_token: bool = True,
        num_classes: int = 1000,
        rms_norm: bool = True,
        halve: bool = True,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = ((height - patch_size) // stride + 1, (width - patch_size) // stride + 1)
        patches = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, stride=stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + class_token, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(Block(embed_dim, rms_norm, halve, rate) for rate in rates)
        self.norm_f: nn.Module | None = norm(embed_dim, rms_norm)
        self.head: nn.Module | None = nn.Linear(embed_dim, num_classes) if num_classes else None
        self.initialise()

    def initialise(self) -> None:
        weight = self.patch_embed.proj.weight
        nn.init.trunc_normal_(weight, std=weight[0].numel() ** -0.5)
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for layer in self.layers:
            with torch.no_grad():  # each adds to the residual stream, which has as many terms as there are layers
                layer.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        assert self.head is not None
        return self.head(tokens.mean(1) if self.cls_token is None else tokens[:, (tokens.shape[1] - 1) // 2])

    def tokens(self, images: Tensor) -> Tensor:
        """Return all tokens after the last norm, `[B, L, C]`; the index of the class token is (L - 1) // 2."""
        hidden = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # [B, H*W, C]
        if self.cls_token is not None:
            middle = hidden.shape[1] // 2
            token = self.cls_token.expand(len(hidden), -1, -1)
            hidden = torch.cat((hidden[:, :middle], token, hidden[:, middle:]), 1)
        hidden = hidden + self.pos_embed
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        assert self.norm_f is not None and residual is not None
        return self.norm_f(residual + hidden)


class VimPyramid(VisionMamba):
    """The backbone: images of any size in, maps at strides 4, 8, 16 and 32 out, all of one width.

    As the official code for segmentation has it: no class token, the four maps are what the mixers at the ends of the
    quarters add to the stream, and the neck is `PlainNeck`. Unlike it, the image need not be square.
    """

    def __init__(self, embed_dim: int = 192, depth: int = 24, image_size: int = 224, drop_path_rate: float = 0.0):
        super().__init__(
            embed_dim, depth, image_size=image_size, class_token=False, num_classes=0, drop_path_rate=drop_path_rate
        )
        self.norm_f = None
        self.patch = 16
        self.channels = [embed_dim] * 4
        self.neck = PlainNeck(embed_dim, self.patch)

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        x = self.patch_embed.proj(pad_to_patch(images, self.patch))  # [B, C, H, W]
        size = (x.shape[2], x.shape[3])
        hidden = x.flatten(2).transpose(1, 2) + resize_positions(self.pos_embed, self.grid, size)  # [B, L, C]
        residual: Tensor | None = None
        maps, wanted = [], taps(len(self.layers))
        for i, layer in enumerate(self.layers):
            hidden, residual = layer(hidden, residual)
            if i in wanted:
                maps.append(hidden.transpose(1, 2).unflatten(2, size))
        return self.neck(maps, *images.shape[2:])


class Block(nn.Module):
    """Add, norm, mix: what a block returns is not yet in the stream."""

    def __init__(self, dim: int, rms_norm: bool, halve: bool, drop_path: float):
        super().__init__()
        self.norm = norm(dim, rms_norm)
        self.mixer = BidirectionalMamba(dim, halve)
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map the last mixer's result and the stream, `[B, L, C]` each (no stream before the first block), to the next two."""
        residual = hidden if residual is None else residual + self.drop_path(hidden)
        return self.mixer(self.norm(residual)), residual


class BidirectionalMamba(Mamba):
    """Two inner branches of Mamba between shared projections, the second of which runs backwards."""

    def __init__(self, dim: int, halve: bool = True):
        super().__init__(dim)
        self.halve = halve
        inner, d_state = self.A_log.shape
        self.conv1d_b = nn.Conv1d(inner, inner, 4, groups=inner)
        self.x_proj_b = nn.Linear(inner, self.x_proj.out_features, bias=False)
        self.dt_proj_b = nn.Linear(self.dt_proj.in_features, inner)
        self.A_b_log = nn.Parameter(initial_a_log(inner, d_state))
        self.D_b = nn.Parameter(torch.ones(inner))
        initialise_steps(self.dt_proj_b.weight, self.dt_proj_b.bias)

    def branch(self, x: Tensor, z: Tensor) -> Tensor:
        forwards = super().branch(x, z)
        backwards = mix(x, z, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        return (forwards + backwards) / 2 if self.halve else forwards + backwards


class RmsNorm(nn.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # squares overflow half precision
        return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def norm(dim: int, rms_norm: bool) -> nn.Module:
    return RmsNorm(dim) if rms_norm else nn.LayerNorm(dim)
