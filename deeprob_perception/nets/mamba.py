# SPDX-License-Identifier: Apache-2.0
"""The Mamba block (Gu and Dao, 2023): a short causal convolution, the selective scan, and a gate.

Parameters have the official names. Shapes in comments: B batch, L steps, C channels, D = expand * C inner channels, N states,
R rank of the step sizes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeprob_perception.nets.scan import selective_scan


class Mamba(nn.Module):
    """The block: `[B, L, C]` -> `[B, L, C]`, each step from itself and those before it."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        inner = expand * d_model
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        self.initialise()

    def initialise(self) -> None:
        initialise_steps(self.dt_proj.weight, self.dt_proj.bias)
        with torch.no_grad():
            self.A_log.copy_(initial_a_log(*self.A_log.shape))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, 1)  # [B, D, L]
        return self.out_proj(self.branch(x, z).transpose(1, 2))

    def branch(self, x: Tensor, z: Tensor) -> Tensor:
        """The inner branch: `[B, D, L]`, gated by z of the same shape."""
        return mix(x, z, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)


def mix(
    x: Tensor,
    z: Tensor,
    conv1d: nn.Conv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    a_log: Tensor,
    d: Tensor,
    reverse: bool = False,
) -> Tensor:
    """Convolution, SiLU, selective scan and gate of `[B, D, L]`; with `reverse` time runs from the last step to the first."""
    x = F.silu(causal_convolution(x, conv1d, reverse))
    rank, d_state = dt_proj.in_features, a_log.shape[1]
    step, b, c = x_proj(x.transpose(1, 2)).split((rank, d_state, d_state), -1)  # [B, L, R or N]
    step = F.linear(step, dt_proj.weight)  # the bias comes in the scan, before the soft-plus
    y, _ = selective_scan(
        x, step.transpose(1, 2), -a_log.float().exp(), b.transpose(1, 2), c.transpose(1, 2), d, z, dt_proj.bias, True, reverse
    )
    return y.to(x.dtype)  # states are float32 whatever the rest is in


def causal_convolution(x: Tensor, conv1d: nn.Conv1d, reverse: bool = False) -> Tensor:
    """Convolve each channel of `[B, D, L]` with its kernel over the steps before, or with `reverse` behind.

    As a 2-D convolution, because older TensorRT has no other.
    """
    reach = conv1d.kernel_size[0] - 1
    weight = conv1d.weight.flip(-1) if reverse else conv1d.weight
    x = F.pad(x, (0, reach) if reverse else (reach, 0))
    return F.conv2d(x[:, :, None], weight[:, :, None], conv1d.bias, groups=conv1d.groups)[:, :, 0]


def initial_a_log(channels: int, d_state: int) -> Tensor:
    """Return log(1..N) for every channel: A = -1, ..., -N (S4D-real, section 3.6 of the paper)."""
    return torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(channels, 1)


def initialise_steps(weight: Tensor, bias: Tensor, least: float = 0.001, most: float = 0.1, floor: float = 1e-4) -> None:
    """Set a `dt_proj` so that the soft-plus gives step sizes spread evenly, in the logarithm, from `least` to `most`."""
    with torch.no_grad():
        nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        steps = torch.exp(torch.rand_like(bias) * (math.log(most) - math.log(least)) + math.log(least)).clamp(min=floor)
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of the soft-plus
