# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer as DINO, DINOv2 and DINOv3 have it: image in, one feature vector a patch out.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021); Caron et al., "Emerging Properties in Self-Supervised Vision
Transformers" (ICCV 2021, DINO); Oquab et al., "DINOv2" (TMLR 2024: patches of 14, layer scale); Darcet et al., "Vision
Transformers Need Registers" (ICLR 2024); Siméoni et al., "DINOv3" (2025: rotary positions, no bias on keys).

Parameters have DINO's and DINOv2's own names. Shapes in comments: B batch, C channels, h heads, d = C / h, H x W patches,
P = H * W, T = prefix + P tokens, where the prefix is the class token and the registers.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeprob_perception.nets.swin import DropPath, Mlp

# name -> hyper-parameters of the papers; `vit-micro` is our own: 3.2 M parameters, heads of 48, patches of 8 for fine features.
VARIANTS: dict[str, dict] = {
    "vit-micro": dict(patch_size=8, embed_dim=192, depth=7, num_heads=4, image_size=224),
    "vit-tiny": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3, image_size=224),
    "dino-vits16": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, image_size=224),
    "dino-vits8": dict(patch_size=8, embed_dim=384, depth=12, num_heads=6, image_size=224),
    "dino-vitb16": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, image_size=224),
    "dino-vitb8": dict(patch_size=8, embed_dim=768, depth=12, num_heads=12, image_size=224),
}
_SIZES = {
    "s": dict(embed_dim=384, depth=12, num_heads=6),
    "b": dict(embed_dim=768, depth=12, num_heads=12),
    "l": dict(embed_dim=1024, depth=24, num_heads=16),
    "g": dict(embed_dim=1536, depth=40, num_heads=24, swiglu=True),
}
for _size, _shape in _SIZES.items():
    _v2 = dict(patch_size=14, image_size=518, layer_scale=True, **_shape)
    VARIANTS[f"dinov2-vit{_size}14"] = _v2
    VARIANTS[f"dinov2-vit{_size}14-registers"] = dict(_v2, registers=4, antialias=True)
    if _size != "g":
        VARIANTS[f"dinov3-vit{_size}16"] = dict(
            patch_size=16, image_size=224, layer_scale=True, registers=4, rope=True, norm_eps=1e-5, **_shape
        )


class VisionTransformer(nn.Module):
    """The backbone: images of any size that the patch divides.

    :param image_size: of the images that the position embedding is for, pixels: a side, or height and width; other sizes are
        interpolated.
    :param registers: tokens beside the class token that belong to no place.
    :param layer_scale: a learned factor for each channel of both residual branches (Touvron et al., 2021).
    :param swiglu: a gated MLP in place of the plain one (Shazeer, 2020), as in the giant DINOv2.
    :param rope: rotary positions (Su et al., 2021; axial, as DINOv3 has them) in place of the learned embedding.
    :param antialias: how the embedding is interpolated to smaller grids; DINOv2's models with registers have it.
    """

    def __init__(
        self,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        image_size: int | Sequence[int] = 224,
        registers: int = 0,
        layer_scale: bool = False,
        swiglu: bool = False,
        rope: bool = False,
        antialias: bool = False,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.antialias = antialias
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim)) if registers else None
        self.pos_embed: nn.Parameter | None = None
        self.rope: AxialRope | None = None
        if rope:
            self.rope = AxialRope(embed_dim // num_heads)
        else:
            height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
            self.grid = (height // patch_size, width // patch_size)
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, layer_scale, swiglu, key_bias=not rope, norm_eps=norm_eps, drop_path=rate)
            for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images float `[B, 3, H*p, W*p]` to the class token `[B, C]` and the patches `[B, H, W, C]`, both normalised."""
        x = self.patch_embed(images)  # [B, H, W, C]
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)
        cls_token = self.cls_token
        if self.pos_embed is not None:
            positions = self.positions(height, width)
            cls_token, x = cls_token + positions[:, :1], x + positions[:, 1:]
        prefix = cls_token if self.register_tokens is None else torch.cat((cls_token, self.register_tokens), 1)
        x = torch.cat((prefix.expand(batch, -1, -1), x), 1)  # [B, T, C]
        rotation = None if self.rope is None else self.rope(height, width)
        for block in self.blocks:
            x = block(x, rotation)
        x = self.norm(x)
        return x[:, 0], x[:, prefix.shape[1] :].reshape(batch, height, width, dim)

    def positions(self, height: int, width: int) -> Tensor:
        """Return the position embedding `[1, 1 + height * width, C]` of a grid of patches, interpolated bicubically."""
        assert self.pos_embed is not None
        if (height, width) == self.grid:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, *self.grid, -1).permute(0, 3, 1, 2).float()  # [1, C, h, w]
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False, antialias=self.antialias)
        grid = grid.permute(0, 2, 3, 1).reshape(1, height * width, -1)
        return torch.cat((self.pos_embed[:, :1], grid.to(self.pos_embed.dtype)), 1)

    def fix_size(self, height: int, width: int) -> None:
        """Make the position embedding one for images of `height` x `width` pixels, as an exported graph holds it."""
        if self.pos_embed is not None:
            grid = (height // self.patch_size, width // self.patch_size)
            with torch.no_grad():
                self.pos_embed = nn.Parameter(self.positions(*grid).clone())
            self.grid = grid


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)  # [B, H, W, C]


class AxialRope(nn.Module):
    """Rotary positions of a grid: half of each head's channels turn with the row, half with the column.

    Coordinates are those of the patches' centres, scaled to -1..1 along each side (DINOv3, section 3.2), so that a model keeps
    its sense of place at any resolution.
    """

    inverse_period: Tensor

    def __init__(self, head_dim: int, base: float = 100.0):
        super().__init__()
        self.register_buffer("inverse_period", base ** -torch.arange(0, 1, 4 / head_dim), persistent=False)  # [d/4]

    def forward(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine `[P, d]` for a grid of patches."""
        device = self.inverse_period.device
        rows = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
        columns = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
        centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2, 1)  # [P, 2, 1]
        angle = (2 * math.pi * centres * self.inverse_period).flatten(1).repeat(1, 2)  # [P, d]
        return angle.cos(), angle.sin()


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and around a residual connection."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        layer_scale: bool,
        swiglu: bool,
        key_bias: bool,
        norm_eps: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, key_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        hidden = int(dim * mlp_ratio)
        # The gated MLP keeps two thirds of the width, rounded up to a multiple of 8, for as many parameters.
        self.mlp = SwiGlu(dim, (int(hidden * 2 / 3) + 7) // 8 * 8) if swiglu else Mlp(dim, hidden)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), rotation)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, num_heads: int, key_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.key_bias = key_bias
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, tokens, dim = x.shape
        q_bias, k_bias, v_bias = self.qkv.bias.chunk(3)
        biases = (q_bias, k_bias if self.key_bias else None, v_bias)
        # The weights are cut and not their product, which would copy every token (as in nets/swin.py).
        q, k, v = (
            F.linear(x, weight, bias).reshape(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)
            for weight, bias in zip(self.qkv.weight.chunk(3), biases, strict=True)
        )  # [B, h, T, d]
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        scores = (q * (dim // self.num_heads) ** -0.5) @ k.transpose(-2, -1)  # [B, h, T, T]
        x = scores.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the patches' `[B, h, T, d]` pairs of channels (i, i + d/2) by their angles `[P, d]`; the prefix stays."""
    prefix, patches = x[:, :, : -len(cosine)], x[:, :, -len(cosine) :]
    first, second = patches.chunk(2, -1)
    turned = patches * cosine + torch.cat((-second, first), -1) * sine
    return torch.cat((prefix, turned), 2)


class SwiGlu(nn.Module):
    """A gated MLP; the gate comes first in `w12`, as in DINOv2."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned factor for each channel, small at first, so that young residual branches disturb little."""

    def __init__(self, dim: int, init: float = 1e-5):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
