# SPDX-License-Identifier: Apache-2.0
"""What `deeprob bench engine` reports."""

import json
import os
import time

import pytest

from deeprob_perception import engines
from deeprob_perception.bench import limits, rates
from deeprob_perception.bench.peers import EAGER
from deeprob_perception.bench.remote import Remote
from deeprob_perception.bench.report import write_section
from deeprob_perception.errors import EngineError


def test_flops_are_counted_as_torch_counts_them(tiny_model, tiny_net):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_net(torch.zeros(1, 3, 96, 128))
    assert limits.count(tiny_model).gflop == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-6)


@pytest.mark.slow
def test_every_candidate_is_measured_and_compared(tiny_model, tmp_path):
    from typer.testing import CliRunner

    from deeprob_perception.cli import app, commands  # noqa: F401

    out, plot = tmp_path / "bench.json", tmp_path / "plot.png"
    arguments = ["bench", "engine", "--model", str(tiny_model), "--rounds", "2", "--threads", "1", "--json", str(out),
                 "--skip", "torch.compile", "--plot", str(plot)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["models"][0]["name"] == "tiny" and len(report["models"][0]["sha256"]) == len(report["bag"]["sha256"]) == 64
    usable = [name for name in engines.BACKENDS if engines.unavailable(name) is None]
    runs = {(run["backend"], run["precision"]): run for run in report["runs"]}
    assert {(EAGER, "fp32"), ("onnxruntime defaults", "fp32")} <= set(runs)
    assert {name for name, _ in runs} >= set(usable)
    assert any(name.startswith("transformers eager") for name in report["skipped"])
    for run in runs.values():
        assert run["n"] == 6
        assert 0 < run["p50"] <= run["p95"] <= run["p99"]
        assert run["speedup"] == pytest.approx(runs[EAGER, "fp32"]["p50"] / run["p50"])
        assert run["of_byte_limit"] > 0 and run["first_frame_s"] > 0
        assert 20 < run["memory_mb"] <= run["peak_mb"] * 1.01
        if run["precision"] == "fp32":
            assert run["agreement"] >= 0.999
        assert (run["cached_first_frame_s"] is None) == run["peer"]
    assert len({round(run["peak_mb"]) for run in runs.values()}) > 1, "each one's memory is its own"
    assert plot.stat().st_size > 5000


class Died:
    def die(self):
        os._exit(3)

    def fail(self):
        raise ValueError("first line\nsecond")


def test_a_candidate_that_dies_or_fails_is_one_line():
    with pytest.raises(EngineError, match="status 3"):
        Remote(Died).call("die")
    with pytest.raises(EngineError, match=r"^first line$"):
        Remote(Died).call("fail")
    with pytest.raises(EngineError, match="more than 1 s"):
        Remote(time.sleep, 60, patience=1.0)


@pytest.mark.parametrize("capacity", [3.0, 7.0, 33.0, 64.0])
def test_the_search_finds_the_highest_rate(capacity):
    def run(rate):
        return {"rate_hz": rate, "sent_hz": rate, "loss": max(0.0, 1 - capacity / rate)}

    runs = rates.search(run)
    best = rates.highest(runs)
    if capacity < 4.7:
        assert best is None
    else:
        assert capacity / 1.01 < best < capacity / 0.95
        assert rates.confirm(run, best * 1.06)["loss"] < rates.ALLOWED_LOSS
    assert not rates.passes({"rate_hz": 100.0, "sent_hz": 60.0, "loss": 0.0}), "a camera that lags proves nothing"


def test_a_section_of_the_docs_is_replaced_and_the_rest_left_alone(tmp_path):
    path = tmp_path / "benchmarks.md"
    write_section(path, "a", "first\n")
    write_section(path, "b", "second\n")
    write_section(path, "a", "third\n")
    text = path.read_text()
    assert text.startswith("# Benchmarks\n")
    assert "first" not in text
    assert text.index("third") < text.index("second")
    assert text.count("<!--") == 4


@pytest.mark.slow
def test_transformers_on_the_same_weights_gives_the_same_labels(tmp_path, tiny_recipe, monkeypatch):
    """Else what we are compared with would be another network."""
    torch = pytest.importorskip("torch", reason="needs the extra `train`")
    pytest.importorskip("transformers", reason="needs the extra `test`")
    from test_swin import randomize

    from deeprob_perception import zoo
    from deeprob_perception.bench import peers
    from deeprob_perception.nets import segmenter, swin

    small = dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    monkeypatch.setitem(swin.VARIANTS, "swin-for-this-test", small)
    recipe = {**tiny_recipe, "backbone": "swin-for-this-test", "head": "upernet", "head_channels": 32, "window_size": 7}
    net = randomize(segmenter.build(recipe))
    model = zoo.export(recipe, net.state_dict(), tmp_path / "small.onnx", 96, 128)
    image = torch.randint(0, 256, (1, 12, 16, 3), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    (ours, _), (theirs, device) = peers.eager(model, 1), peers.hugging_face(model, 1)
    labels = ours(image)
    assert len(set(labels.ravel().tolist())) > 1
    assert (theirs(image) == labels).mean() > 0.999
    assert device in ("cpu", "cuda")
