# SPDX-License-Identifier: Apache-2.0
"""What `deeprob bench engine` reports."""

import json

import pytest

from deeprob_perception import bench, engines


def test_flops_are_counted_as_torch_counts_them(tiny_model, tiny_net):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_net(torch.zeros(1, 3, 96, 128))
    assert bench.count_gflop(tiny_model) == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-6)


@pytest.mark.slow
def test_every_candidate_is_measured_and_compared(tiny_model, tmp_path):
    from typer.testing import CliRunner

    from deeprob_perception.cli import app, commands  # noqa: F401

    out = tmp_path / "bench.json"
    arguments = ["bench", "engine", "--model", str(tiny_model), "--rounds", "5", "--threads", "1", "--json", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["model"]["name"] == "tiny"
    assert len(report["model"]["sha256"]) == 64
    usable = [name for name in engines.BACKENDS if engines.unavailable(name) is None]
    runs = {(run["backend"], run["precision"]): run for run in report["runs"]}
    assert {(name, "fp32") for name in usable} | {(bench.EAGER, "fp32")} <= set(runs)
    assert set(runs) | {tuple(name.rsplit(" ", 1)) for name in report["skipped"]} == {
        (bench.EAGER, "fp32"), *((name, p) for name in engines.BACKENDS for p in engines.PRECISIONS[1:]),
    }  # fmt: skip
    eager = runs[bench.EAGER, "fp32"]
    assert eager["speedup"] == 1.0
    for run in runs.values():
        assert 0 < run["p50"] <= run["p95"] <= run["p99"]
        assert run["speedup"] == pytest.approx(eager["p50"] / run["p50"])
        assert run["of_limit"] > 0
        if run["precision"] == "fp32":
            assert run["agreement"] >= 0.999
        if run is not eager:
            assert run["first_frame_s"] > 0
            assert run["memory_mb"] > 20
    for run in report["runs"]:
        assert f"| {run['backend']} | {run['precision']} | {run['p50']:.1f} |" in result.output


def test_a_section_of_the_docs_is_replaced_and_the_rest_left_alone(tmp_path):
    path = tmp_path / "benchmarks.md"
    bench.write_section(path, "a", "first\n")
    bench.write_section(path, "b", "second\n")
    bench.write_section(path, "a", "third\n")
    text = path.read_text()
    assert text.startswith("# Benchmarks\n")
    assert "first" not in text
    assert text.index("third") < text.index("second")
    assert text.count("<!--") == 4
