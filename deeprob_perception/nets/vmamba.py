# SPDX-License-Identifier: Apache-2.0
"""VMamba (Liu et al., "VMamba: Visual State Space Model", NeurIPS 2024): Swin's pyramid with a scan in the attention's place.

Each block reads its map as four sequences, along the rows and along the columns, forwards and backwards (SS2D), and so sees
the whole map in time linear in its pixels. Parameters have the official names. Shapes in comments: B batch, C channels of the
stage, H x W tokens, L = H * W, D inner channels, N states, R rank of the step sizes, Q and P as in nets/scan.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeprob_perception.nets import scan
from deeprob_perception.nets.mamba import initial_a_log, initialise_steps
from deeprob_perception.nets.swin import DropPath, Mlp, PatchMerging, init_weights, normalise

# name -> hyper-parameters (README and configurations of the official repository); `micro` is our own, the size of swin-micro.
VARIANTS: dict[str, dict] = {
    "vmamba-micro": dict(dim=48, depths=(2, 2, 4, 2), ssm_ratio=1.0),
    "vmamba-tiny": dict(dim=96, depths=(2, 2, 8, 2), ssm_ratio=1.0),
    "vmamba-tiny-s2": dict(dim=96, depths=(2, 2, 5, 2), ssm_ratio=2.0),
    "vmamba-small": dict(dim=96, depths=(2, 2, 15, 2), ssm_ratio=2.0),
    "vmamba-small-s1": dict(dim=96, depths=(2, 2, 20, 2), ssm_ratio=1.0),
    "vmamba-base": dict(dim=128, depths=(2, 2, 15, 2), ssm_ratio=2.0),
    "vmamba-base-s1": dict(dim=128, depths=(2, 2, 20, 2), ssm_ratio=1.0),
}
_FIRST = dict(ssm_ratio=2.0, d_state=16, gate=True, conv_bias=True, mlp_ratio=0.0, first_version=True)
for _name, _dim, _depth in (("tiny", 96, 9), ("small", 96, 27), ("base", 128, 27)):
    VARIANTS[f"vmamba-v0-{_name}"] = dict(_FIRST, dim=_dim, depths=(2, 2, _depth, 2))

# The scan's four directions in the parameters' order: along the columns or not, backwards or not. The other two are the
# official ablations (forward types v051d and v052d).
DIRECTIONS = {
    "cross2d": ((False, False), (True, False), (False, True), (True, True)),
    "unidi": ((False, False),) * 4,
    "bidi": ((False, False), (False, False), (False, True), (False, True)),
}


class VMamba(nn.Module):
    """The backbone: image in, one feature map a stage out, at strides 4, 8, 16 and 32; any size.

    :param dim: channels of the first stage, doubled from stage to stage; or those of all four.
    :param ssm_ratio: D / C. :param gate: multiply the scan's result by SiLU(z), as Mamba does and released models no longer do.
    :param mlp_ratio: 0 leaves the MLPs out. :param first_version: the patches and merging of the first paper, which are Swin's.
    """

    def __init__(
        self,
        dim: int | tuple[int, ...] = 96,
        depths: tuple[int, ...] = (2, 2, 8, 2),
        ssm_ratio: float = 1.0,
        d_state: int = 1,
        gate: bool = False,
        conv_bias: bool = False,
        mlp_ratio: float = 4.0,
        first_version: bool = False,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.channels = [dim * 2**i for i in range(len(depths))] if isinstance(dim, int) else list(dim)
        self.first_version = first_version
        self.patch_embed = patch_embed(self.channels[0], first_version)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for i in range(len(depths)):
            stage = nn.Module()
            stage.blocks = nn.ModuleList(
                Block(self.channels[i], ssm_ratio, d_state, gate, conv_bias, mlp_ratio, rate)
                for rate in rates[sum(depths[:i]) : sum(depths[: i + 1])]
            )
            following = self.channels[i + 1] if i + 1 < len(depths) else None
            stage.downsample = nn.Identity() if following is None else downsample(self.channels[i], following, first_version)
            self.layers.append(stage)
        for i, channels in enumerate(self.channels):
            self.add_module(f"outnorm{i}", nn.LayerNorm(channels))
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, SS2D):
                module.initialise()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images float `[B, 3, H, W]` to `[B, C_i, ceil(H / s), ceil(W / s)]` for the strides s = 4, 8, 16, 32."""
        if self.first_version:
            images = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))
        x = self.patch_embed(images.permute(0, 2, 3, 1))  # [B, H, W, C]
        pyramid = []
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                x = block(x)
            pyramid.append(normalise(getattr(self, f"outnorm{i}"), x).permute(0, 3, 1, 2))  # [B, C, H, W]
            x = stage.downsample(x)
        return pyramid


class Block(nn.Module):
    """A 2-D selective scan and an MLP, each behind a LayerNorm and around a residual connection (figure 3d)."""

    def __init__(
        self, dim: int, ssm_ratio: float, d_state: int, gate: bool, conv_bias: bool, mlp_ratio: float, drop_path: float
    ):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim, ssm_ratio, d_state, gate, conv_bias)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim) if mlp_ratio else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio)) if mlp_ratio else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        tokens = x.flatten(1, 2)  # [B, L, C]: back ends have kernels for norms and products of three axes
        tokens = tokens + self.drop_path(self.op(self.norm(tokens), height, width))
        if self.mlp is not None and self.norm2 is not None:
            tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.unflatten(1, (height, width))


class SS2D(nn.Module):
    """The 2-D selective scan (section 4.2): one S6 for each of four ways through the map, and their sum."""

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 1.0,
        d_state: int = 1,
        gate: bool = False,
        conv_bias: bool = False,
        directions: str = "cross2d",
    ):
        super().__init__()
        inner, rank = int(ssm_ratio * dim), math.ceil(dim / 16)
        self.inner, self.rank, self.d_state, self.gate = inner, rank, d_state, gate
        self.directions = DIRECTIONS[directions]
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        ways = len(self.directions)
        self.x_proj_weight = nn.Parameter(torch.empty(ways, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(ways, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(ways, inner))
        self.A_logs = nn.Parameter(torch.empty(ways * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(ways * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def initialise(self) -> None:
        nn.init.uniform_(self.x_proj_weight, -(self.inner**-0.5), self.inner**-0.5)
        for weight, bias in zip(self.dt_projs_weight, self.dt_projs_bias, strict=True):
            initialise_steps(weight, bias)
        with torch.no_grad():
            self.A_logs.copy_(initial_a_log(*self.A_logs.shape))
        nn.init.kaiming_uniform_(self.conv2d.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Mix the tokens `[B, L, C]` of a map, L = height * width."""
        x = self.in_proj(x)
        x, z = x.chunk(2, -1) if self.gate else (x, None)
        image = x.transpose(1, 2).unflatten(2, (height, width))  # [B, D, H, W]
        image = F.silu(self.conv2d(image))
        y = self.scan(image).to(x.dtype)  # [B, L, D]; states are float32 whatever the rest is in
        y = self.out_norm(y)
        return self.out_proj(y if z is None else y * F.silu(z))

    def scan(self, image: Tensor) -> Tensor:
        """Return the sum of the four scans of a map `[B, D, H, W]`, in the order of its rows: `[B, L, D]`."""
        size = (image.shape[2], image.shape[3])
        q = scan.block_length(size[0] * size[1])
        orders = sorted({columns for columns, _ in self.directions})
        sequences = {columns: scan.blocks(unfold(image, columns), q) for columns in orders}  # [Q, P, B, D]
        a = -self.A_logs.float().exp().unflatten(0, (-1, self.inner))  # [4, D, N]
        scans, outputs = [], []
        for k, (columns, reverse) in enumerate(self.directions):
            u = sequences[columns]
            step, b, c = F.linear(u, self.x_proj_weight[k]).split((self.rank, self.d_state, self.d_state), -1)
            step = scan.softplus(F.linear(step, self.dt_projs_weight[k], self.dt_projs_bias[k]))  # [Q, P, B, D]
            if self.d_state == 1:  # one state needs no axis
                scans.append(((step * a[k, :, 0]).exp(), step * (u * b), reverse))
            else:
                scans.append(((step[..., None] * a[k]).exp(), (step * u)[..., None] * b[..., None, :], reverse))
            outputs.append(c)
        skip = self.Ds.unflatten(0, (-1, self.inner))  # [4, D]
        maps: list[Tensor] = []
        states = scan.recurrences(scans)
        for order in orders:
            ways = [k for k, (columns, _) in enumerate(self.directions) if columns == order]
            y = sequences[order] * sum(skip[k] for k in ways)
            for k in ways:
                y = y + read_out(states[k], outputs[k], self.d_state)
            maps.append(fold(scan.unblock(y, size[0] * size[1]), size, order))
        return sum(maps[1:], maps[0]).flatten(1, 2)


def read_out(states: Tensor, c: Tensor, d_state: int) -> Tensor:
    """The sum over states of C h: `[Q, P, B, D]`."""
    return states * c if d_state == 1 else (states * c[..., None, :]).sum(-1)


def unfold(image: Tensor, columns: bool) -> Tensor:
    """A map `[B, D, H, W]` -> its tokens `[L, B, D]`, row after row or column after column."""
    return image.permute(3, 2, 0, 1).flatten(0, 1) if columns else image.permute(2, 3, 0, 1).flatten(0, 1)


def fold(tokens: Tensor, size: tuple[int, int], columns: bool) -> Tensor:
    """`[L, B, D]` -> `[B, H, W, D]`, the inverse order of `unfold`."""
    height, width = size
    if columns:
        return tokens.unflatten(0, (width, height)).permute(2, 1, 0, 3)
    return tokens.unflatten(0, (height, width)).permute(2, 0, 1, 3)


class ChannelsLast(nn.Sequential):
    """Convolutions and norms in turns, of `[B, H, W, C]`. Identities stand where the official code permutes: for the names."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                x = layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            elif isinstance(layer, nn.LayerNorm):
                x = normalise(layer, x)
            else:
                x = layer(x)
        return x


def patch_embed(dim: int, first_version: bool) -> ChannelsLast:
    """Image `[B, H, W, 3]` -> `[B, ceil(H/4), ceil(W/4), C]`: two strided convolutions, or Swin's patches."""
    if first_version:
        return ChannelsLast(nn.Conv2d(3, dim, 4, stride=4), nn.Identity(), nn.LayerNorm(dim))
    half = dim // 2
    return ChannelsLast(
        nn.Conv2d(3, half, 3, stride=2, padding=1), nn.Identity(), nn.LayerNorm(half), nn.Identity(), nn.GELU(),
        nn.Conv2d(half, dim, 3, stride=2, padding=1), nn.Identity(), nn.LayerNorm(dim),
    )  # fmt: skip


def downsample(dim: int, following: int, first_version: bool) -> nn.Module:
    if first_version:
        return PatchMerging(dim, following)
    convolution = nn.Conv2d(dim, following, 3, stride=2, padding=1)
    return ChannelsLast(nn.Identity(), convolution, nn.Identity(), nn.LayerNorm(following))
