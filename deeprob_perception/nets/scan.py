# SPDX-License-Identifier: Apache-2.0
"""The selective scan of Mamba (S6; Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023).

Its heart is the linear recurrence h[t] = a[t] h[t-1] + b[t], computed here in two levels without a division: time is cut
into P blocks of Q steps, the blocks run side by side from a state of zero, a scan over the blocks' ends gives the state that
each should have begun with, and what that adds is its product with the block's running product of a. All factors are at
most 1, so that what vanishes vanishes rightly. Three forms of it, and one without blocks, equal by test:

- on a CPU, step after step, all blocks in one operation: 2 sqrt(L) operations with Q near sqrt(L), and little memory traffic;
- on a CPU in `selective_scan`, whose steps have states enough to be worth an operation each: all L steps, one by one;
- on a GPU, associative doubling in blocks and over them: about log2(L) operations, each over everything;
- exported, blocks of 8 steps unrolled and doubling over their ends: plain ONNX operators, static shapes, few passes.

Shapes in comments: L steps, P blocks of Q steps; time comes first, as [Q, P, ...] where t = p Q + q, so that a step of all
blocks lies in one piece.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Within = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Steps of an exported block: with 16 the graph has half as many nodes again and is no faster (docs/backbones.md).
EXPORTED_BLOCK = 8
OPSET = 18  # of the Softplus, which has not changed since 1


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the selective scan (equation 2 of the paper, with exp(dt A) and the plain dt B of the official code).

    :param u: the sequence, float `[B, D, L]`. :param delta: step sizes `[B, D, L]`, before bias and soft-plus.
    :param a: negative `[D, N]`. :param b: `[D, N]` or `[B, N, L]` or `[B, G, N, L]`, where G groups of channels share it.
    :param c: likewise. :param d: the skip connection's factors `[D]`. :param z: the gate `[B, D, L]`; the result times SiLU(z).
    :param reverse: from the last step to the first.
    :return: the result `[B, D, L]`, and the last state `[B, D, N]`.
    """
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = (softplus(step) if delta_softplus else step).permute(2, 0, 1)  # [L, B, D]
    step_by_step = u.device.type == "cpu" and not torch.compiler.is_exporting()
    run = SequentialScan.apply if step_by_step else scanned
    inner = u.shape[1]
    y, last = run(u.permute(2, 0, 1), step, spread(a, inner), spread(b, inner), spread(c, inner), reverse)
    y = y.permute(1, 2, 0)  # [B, D, L]
    if d is not None:
        y = y + d[:, None] * u
    return (y if z is None else y * F.silu(z)), last


def scanned(u: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return y = C h `[L, B, D]` and the last h `[B, D, N]`, of u and dt `[L, B, D]`, and A, B and C as `spread` has them."""
    length = len(u)
    q = block_length(length)
    u, step, a, b, c = (blocks(x, q) for x in (u, step, a, b, c))
    states = recurrences([((step[..., None] * a).exp(), (step * u)[..., None] * b, reverse)])[0]  # [Q, P, B, D, N]
    end = 0 if reverse else length - 1  # what was padded lies behind the last step
    return unblock((states * c).sum(-1), length), states[end % q, end // q]


class SequentialScan(torch.autograd.Function):
    """`scanned` for a CPU: one step after the other, of all channels and states, which so stay in its cache.

    Only the inputs are kept for the gradient and the states computed again, as in the official kernel. The last state has
    no gradient.
    """

    @staticmethod
    def forward(context, u, step, a, b, c, reverse):  # type: ignore[no-untyped-def,override]
        context.save_for_backward(u, step, a, b, c)
        context.reverse = reverse
        u, step, a, b, c = (full(x).contiguous() for x in (u, step, a, b, c))
        y = torch.empty_like(u)
        state = u.new_zeros(*u.shape[1:], a.shape[-1])
        scratch = torch.empty_like(state)
        lanes = (timeline(x, len(u), reverse) for x in (step[..., None], (step * u)[..., None], b, c, y))
        for dt, dt_u, b_t, c_t, y_t in zip(*lanes, strict=True):
            state.mul_(torch.mul(dt, a[0], out=scratch).exp_()).addcmul_(dt_u, b_t)
            torch.sum(torch.mul(state, c_t, out=scratch), -1, out=y_t)
        context.mark_non_differentiable(state)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(context, gradient, _):  # type: ignore[no-untyped-def,override]
        inputs, reverse = context.saved_tensors, context.reverse
        u, step, a, b, c = (full(x).contiguous() for x in inputs)
        length = len(u)
        states = u.new_empty(*u.shape, a.shape[-1])
        scratch, carry, of_a = (torch.zeros_like(states[0]) for _ in range(3))
        of_dt_u, of_dt, of_b, of_c = (torch.zeros_like(x) for x in (u, step, b, c))
        gradient = full(gradient).contiguous()

        def lanes(*tensors):  # type: ignore[no-untyped-def]
            return [timeline(x, length, reverse) for x in tensors]

        times = lanes(step[..., None], (step * u)[..., None], b, gradient[..., None])
        after = timeline(states, length, reverse)
        before = (torch.zeros_like(scratch), *after[:-1])
        for dt, dt_u, b_t, out, h, earlier, to_c in zip(*times, after, before, *lanes(of_c), strict=True):
            torch.mul(torch.mul(dt, a[0], out=scratch).exp_(), earlier, out=h).addcmul_(dt_u, b_t)
            to_c.add_(torch.mul(out, h, out=scratch).sum_to_size(to_c.shape))  # a constant's adds up
        back = (lane[::-1] for lane in (*times, before, *lanes(c, of_dt_u, of_dt, of_b)))
        for dt, dt_u, b_t, out, earlier, c_t, to_dt_u, to_dt, to_b in zip(*back, strict=True):
            carry.addcmul_(out, c_t)  # the gradient of h
            to_b.add_(torch.mul(carry, dt_u, out=scratch).sum_to_size(b_t.shape))
            torch.sum(torch.mul(carry, b_t, out=scratch), -1, out=to_dt_u)
            carry.mul_(torch.mul(dt, a[0], out=scratch).exp_())
            of_exponent = torch.mul(carry, earlier, out=scratch)
            of_a.addcmul_(of_exponent, dt)
            torch.sum(of_exponent.mul_(a[0]), -1, out=to_dt)
        grads = (of_dt_u * step, of_dt_u * u + of_dt, of_a.sum(0)[None, None], of_b, of_c)
        return *(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)), None


def timeline(x: Tensor, length: int, reverse: bool) -> tuple[Tensor, ...]:
    """Return views of the steps of `[L or 1, ...]` in the order of the scan; a constant's again and again."""
    steps = x.unbind() * (length if len(x) == 1 else 1)
    return steps[::-1] if reverse else steps


def spread(x: Tensor, channels: int) -> Tensor:
    """Bring `[D, N]`, `[B, N, L]` or `[B, G, N, L]` to `[L or 1, B or 1, D or 1, N]`."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim == 3:
        return x.permute(2, 0, 1)[:, :, None]
    return x.permute(3, 0, 1, 2).repeat_interleave(channels // x.shape[1], 2)


def block_length(length: int) -> int:
    """Return Q for a sequence: a constant where a graph is traced, else near the square root, where the work is least."""
    return min(EXPORTED_BLOCK, length) if torch.compiler.is_exporting() else max(1, math.isqrt(length))


def blocks(x: Tensor, size: int) -> Tensor:
    """`[L, ...]` -> `[Q, P, ...]`, zeros behind the end; a constant `[1, ...]` -> `[1, 1, ...]`.

    Zeros are harmless: forwards they come after everything, and backwards their b is zero, so the state stays zero.
    """
    if len(x) == 1:
        return x[None]
    x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % size))
    x = x.reshape(-1, size, *x.shape[1:]).transpose(0, 1)
    # Steps must lie in one piece, or every one of them walks through memory with strides.
    return x if torch.compiler.is_exporting() else x.contiguous()


def unblock(x: Tensor, length: int) -> Tensor:
    """`[Q, P, ...]` -> `[L, ...]`, the inverse of `blocks`."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])[:length]


def recurrences(scans: Sequence[tuple[Tensor, Tensor, bool]]) -> list[Tensor]:
    """Return the states h `[Q, P, ...]` of h[t] = a[t] h[t-1] + b[t] for each (a, b, reverse) of the same shape.

    a and b are float `[Q, P, ...]`; with `reverse` time runs from the last step to the first.
    """
    if torch.compiler.is_exporting():
        return unrolled(scans)
    return [LinearRecurrence.apply(a.expand_as(b), b, reverse) for a, b, reverse in scans]


def unrolled(scans: Sequence[tuple[Tensor, Tensor, bool]]) -> list[Tensor]:
    """The exported form: the blocks' steps one by one, and one doubling over the ends of all scans together."""
    within, ends = [], []
    for a, b, reverse in scans:
        steps = list(zip(a.split(1), b.split(1), strict=True))  # each [1, P, ...]
        products: list[Tensor] = []
        states: list[Tensor] = []
        for factor, addend in steps[::-1] if reverse else steps:
            products.append(products[-1] * factor if products else factor)
            states.append(factor * states[-1] + addend if states else addend)
        within.append((products, states))
        ends.append(tuple(x[-1].reshape(-1, 1, *x[-1].shape[2:]) for x in (products, states)))  # [P, 1, ...]
        if reverse:
            ends[-1] = tuple(x.flip(0) for x in ends[-1])
    carries: list[Tensor] | None = None
    if len(ends[0][0]) > 1:
        _, after = doubling(*(torch.cat(x, 1) for x in zip(*ends, strict=True)))  # [P, K, ...] of K scans
        carries = list(before(after, 0.0, 1).split(1, 1))
    results = []
    for i, ((products, states), (_, _, reverse)) in enumerate(zip(within, scans, strict=True)):
        if carries is not None:
            carry = (carries[i].flip(0) if reverse else carries[i]).reshape(1, -1, *carries[i].shape[2:])
            states = [state + product * carry for product, state in zip(products, states, strict=True)]
        results.append(torch.cat(states[::-1] if reverse else states))
    return results


def softplus(x: Tensor) -> Tensor:
    """The soft-plus, as one operator where a graph is traced: torch's own has a threshold, and four passes more in ONNX."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.symbolic("Softplus", (x,), dtype=x.dtype, shape=x.shape, version=OPSET)
    return F.softplus(x)


class LinearRecurrence(torch.autograd.Function):
    """The recurrence for torch itself, with its gradient: another recurrence, in the other direction."""

    @staticmethod
    def forward(context, a: Tensor, b: Tensor, reverse: bool) -> Tensor:  # type: ignore[no-untyped-def,override]
        # The state adds up over thousands of steps: never in half precision, as in the official kernel.
        states = two_levels(full(a), full(b), reverse, form(a))
        context.save_for_backward(a, states)
        context.reverse = reverse
        return states

    @staticmethod
    def backward(context, gradient: Tensor):  # type: ignore[no-untyped-def,override]
        a, states = context.saved_tensors
        earlier, later = (step_after, step_before) if context.reverse else (step_before, step_after)
        grad_b = two_levels(later(full(a)), gradient, not context.reverse, form(a))
        return grad_b * earlier(states), grad_b, None


def full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def form(x: Tensor) -> Within:
    """Return what suits the device: few large operations where each is dear to launch, else little work."""
    return stepwise if x.device.type == "cpu" else doubling


def step_before(x: Tensor) -> Tensor:
    """Return x[t-1] at t for `[Q, P, ...]`; zeros at the first step."""
    return torch.cat((before(x[-1], 0.0, 1)[None], x[:-1]))


def step_after(x: Tensor) -> Tensor:
    """Return x[t+1] at t for `[Q, P, ...]`; zeros at the last step."""
    return torch.cat((x[1:], torch.cat((x[0, 1:], torch.zeros_like(x[0, :1])))[None]))


def two_levels(a: Tensor, b: Tensor, reverse: bool, within: Within) -> Tensor:
    """The recurrence over `[Q, P, ...]` for eager torch, `within` blocks and over their ends."""
    if reverse:
        a, b = a.flip(0, 1), b.flip(0, 1)
    products, states = within(a, b)
    if a.shape[1] > 1:
        _, after = within(products[-1], states[-1])
        states = torch.addcmul(states, products, before(after, 0.0, 1))
    return states.flip(0, 1) if reverse else states


def stepwise(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the running products of a, and the states, over `[T, ...]`: T steps, each over all the rest."""
    products, states = (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
    )
    products[0], states[0] = a[0], b[0]
    for t in range(1, len(a)):
        torch.mul(a[t], products[t - 1], out=products[t])
        torch.addcmul(b[t], a[t], states[t - 1], out=states[t])
    return products, states


def doubling(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same in log2 T steps: a segment of 2k steps is made of two of k (Hillis and Steele, 1986)."""
    k = 1
    while k < len(a):
        a, b = a * before(a, 1.0, k), b + a * before(b, 0.0, k)
        k *= 2
    return a, b


def before(x: Tensor, fill: float, steps: int) -> Tensor:
    """Return x[t - steps] at t for `[T, ...]`; `fill` where there is none."""
    return F.pad(x[:-steps], (0, 0) * (x.ndim - 1) + (steps, 0), value=fill)
