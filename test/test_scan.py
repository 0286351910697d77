# SPDX-License-Identifier: Apache-2.0
"""The selective scan and Mamba's block: the official code's numbers, and one result whichever way it is computed."""

import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from deeprob_perception.nets import scan  # noqa: E402
from deeprob_perception.nets.mamba import Mamba  # noqa: E402

SCANS = ("full", "no_d_no_z", "d_only", "no_softplus", "constant_bc", "grouped_bc", "length_1", "length_2", "dstate_1_196",
         "dstate_16_196", "large_delta", "long_1024")  # fmt: skip
TOLERANCE = 1e-5  # of the largest value of a tensor


def golden(shared, name):
    """Return tensors, configuration and state_dict of a reference file."""
    path = shared / "golden" / "ssm" / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata.get("config", "{}")) | {k: metadata[k] for k in ("delta_softplus",) if k in metadata}
    state = {key.removeprefix("state_dict."): value for key, value in tensors.items() if key.startswith("state_dict.")}
    return tensors, config, state


def assert_same(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def unrolled(a, b, reverse):
    return scan.unrolled([(a, b, reverse)])[0]


FORMS = {
    "stepwise": lambda a, b, reverse: scan.two_levels(a, b, reverse, scan.stepwise),
    "doubling": lambda a, b, reverse: scan.two_levels(a, b, reverse, scan.doubling),
    "unrolled": unrolled,
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """One way to compute the recurrence, in place of the machine's own choice."""
    run = FORMS[request.param]
    monkeypatch.setattr(scan, "SequentialScan", SimpleNamespace(apply=scan.scanned))
    monkeypatch.setattr(scan, "recurrences", lambda scans: [run(a.expand_as(b), b, reverse) for a, b, reverse in scans])
    return run


@pytest.mark.parametrize("name", SCANS)
def test_every_form_of_the_scan_equals_the_official_one(shared, form, name):
    check_scan(shared, name)


@pytest.mark.parametrize("name", SCANS)
def test_the_scan_step_by_step_equals_the_official_one(shared, name):
    check_scan(shared, name)


def check_scan(shared, name):
    t, config, _ = golden(shared, f"scan_{name}")
    softplus = config["delta_softplus"] == "true"
    args = (t["u"], t["delta"], t["A"], t["B"], t["C"], t.get("D"), t.get("z"), t.get("delta_bias"), softplus)
    out, last = scan.selective_scan(*args)
    assert_same(out, t["out"])
    assert_same(last, t["last_state"])


@pytest.mark.parametrize("name", ["mamba_block", "mamba_block_variant"])
def test_mamba_blocks_equal_the_official_ones(shared, name):
    t, config, state = golden(shared, name)
    block = Mamba(**config)
    block.load_state_dict(state)
    with torch.inference_mode():
        assert_same(block(t["input"]), t["output"])


def loop(a, b, reverse):
    """The definition, in float64, over `[L, ...]`."""
    a, b = a.double(), b.double()
    states = torch.empty_like(b)
    state = torch.zeros_like(b[0])
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        state = a[t] * state + b[t]
        states[t] = state
    return states


def sequence(length, stiff, seed=0, channels=3):
    """Factors and addends `[L, channels]`: slow decay, or products that underflow float32 within a few steps."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.rand(length, channels, generator=generator)
    step = step * 40 if stiff else step * 0.01
    return torch.exp(-step), torch.randn(length, channels, generator=generator) * step


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("stiff", [False, True])
@pytest.mark.parametrize(("length", "size"), [(1, 1), (7, 3), (64, 8), (65, 8), (131, 16), (4801, 8), (4801, 69)])
def test_all_forms_give_the_loops_states(form, length, size, stiff, reverse):
    a, b = sequence(length, stiff)
    found = scan.unblock(form(scan.blocks(a, size), scan.blocks(b, size), reverse), length)
    assert_same(found.double(), loop(a, b, reverse), 2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 6, 23])
def test_gradients_are_those_of_the_loop(length, reverse):
    a, b = (x.double().requires_grad_() for x in sequence(length, stiff=False))
    weight = torch.randn(length, 3, generator=torch.Generator().manual_seed(1)).double()
    size = scan.block_length(length)
    states = scan.recurrences([(scan.blocks(a, size), scan.blocks(b, size), reverse)])[0]
    found = torch.autograd.grad((scan.unblock(states, length) * weight).sum(), (a, b))
    rows, state = [None] * length, torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(length)) if reverse else range(length):
        state = rows[t] = a[t] * state + b[t]
    expected = torch.autograd.grad((torch.stack(rows) * weight).sum(), (a, b), allow_unused=True, materialize_grads=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shared_by", ["all channels", "a group", "all steps"])
def test_the_scans_gradients_are_those_of_its_definition(shared_by, reverse):
    batch, dim, states, length = 2, 6, 3, 11
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    shapes = {"all channels": (batch, states, length), "a group": (batch, 2, states, length), "all steps": (dim, states)}
    shape = shapes[shared_by]
    u, delta, a, b, c = draw(batch, dim, length), draw(batch, dim, length), draw(dim, states), draw(*shape), draw(*shape)
    y, last = scan.selective_scan(u, delta, -a.exp(), b, c, delta_softplus=True, reverse=reverse)
    assert not last.requires_grad

    step = torch.nn.functional.softplus(delta)
    full_b, full_c = (
        {"all channels": lambda x: x[:, None].expand(batch, dim, states, length),
         "a group": lambda x: x.repeat_interleave(dim // 2, 1),
         "all steps": lambda x: x[None, :, :, None].expand(batch, dim, states, length)}[shared_by](x)
        for x in (b, c)
    )  # fmt: skip
    state, rows = torch.zeros(batch, dim, states, dtype=torch.float64), [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        state = (step[:, :, t, None] * -a.exp()).exp() * state + (step * u)[:, :, t, None] * full_b[..., t]
        rows[t] = (state * full_c[..., t]).sum(-1)
    expected = torch.stack(rows, -1)
    torch.testing.assert_close(y, expected)
    weight = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    inputs = (u, delta, a, b, c)
    found, wanted = (torch.autograd.grad((x * weight).sum(), inputs) for x in (y, expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_half_precision_input_is_summed_in_float32():
    a, b = (x.bfloat16() for x in sequence(500, stiff=False))
    size = scan.block_length(500)
    states = scan.recurrences([(scan.blocks(a, size), scan.blocks(b, size), False)])[0]
    assert states.dtype == torch.float32
    assert_same(scan.unblock(states, 500).double(), loop(a, b, False), 2e-6)
