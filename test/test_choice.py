# SPDX-License-Identifier: Apache-2.0
"""`auto` measures once, keeps what it found, and changes no precision."""

import json
import logging
import sys
import time

import numpy as np
import pytest

from deeprob_perception import engines
from deeprob_perception.engines import choice, model_file
from deeprob_perception.engines.engine import Engine
from deeprob_perception.errors import EngineError, ModelError


class Sleeper(Engine):
    """An engine that takes a known time."""

    device = "bed"
    precision = "fp32"

    def __init__(self, model, backend, seconds):
        super().__init__(model, "auto")
        self.backend, self.seconds, self.frames = backend, seconds, 0

    def run(self, inputs, outputs):
        self.frames += 1
        time.sleep(self.seconds)
        return {name: np.zeros(1, np.uint8) for name in outputs}


@pytest.fixture
def model(tiny_model):
    return model_file.read(tiny_model)


@pytest.fixture
def started():
    return []


@pytest.fixture
def loaders(model, started):
    def load(name, seconds):
        started.append(Sleeper(model, name, seconds))
        return started[-1]

    return {"slow": lambda: load("slow", 0.03), "quick": lambda: load("quick", 0.001)}


def kept(folder):
    return list((folder / "choice").glob("*.json"))


def test_the_faster_one_is_taken_and_only_it_is_started_next_time(model, loaders, started, tmp_path):
    engine, why = choice.fastest(model, loaders, "auto", tmp_path, 1)
    assert engine.backend == "quick"
    assert "quick" in why.split(" ms")[0]
    assert "measured now" in why
    assert len(started) == 2
    again, why = choice.fastest(model, loaders, "auto", tmp_path, 1)
    assert again.backend == "quick"
    assert "when they were measured" in why
    assert [e.backend for e in started[2:]] == ["quick"]
    assert started[2].frames == 0
    facts = json.loads(kept(tmp_path)[0].read_text())
    assert facts["model"] == "tiny.onnx"
    assert facts["milliseconds"]["slow"] > facts["milliseconds"]["quick"] > 0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"milliseconds": {"slow": 1.0}}', '{"milliseconds": {"slow": "1", "quick": 2.0}}']
)
def test_a_damaged_measurement_is_made_anew(content, model, loaders, started, tmp_path, caplog):
    choice.fastest(model, loaders, "auto", tmp_path, 1)
    kept(tmp_path)[0].write_text(content)
    with caplog.at_level(logging.WARNING):
        engine, why = choice.fastest(model, loaders, "auto", tmp_path, 1)
    assert engine.backend == "quick"
    assert "measured now" in why
    assert "measuring again" in caplog.text
    assert len(started) == 4


def test_other_threads_and_another_precision_are_measured_for_themselves(model, loaders, tmp_path):
    for precision, threads in (("auto", 1), ("auto", 2), ("fp32", 1)):
        choice.fastest(model, loaders, precision, tmp_path, threads)
    assert len(kept(tmp_path)) == 3


def test_one_that_refuses_is_left_out_unmeasured_and_all_refusing_is_the_firsts_error(model, loaders, started, tmp_path):
    def refuse():
        raise EngineError("not in that precision")

    engine, why = choice.fastest(model, {"no": refuse, "slow": loaders["slow"]}, "bf16", tmp_path, 1)
    assert engine.backend == "slow"
    assert "no refuses: not in that precision" in why
    assert started[0].frames == 0
    assert not kept(tmp_path)
    with pytest.raises(EngineError, match="not in that precision"):
        choice.fastest(model, {"no": refuse, "neither": refuse}, "bf16", tmp_path, 1)


def test_what_was_fastest_and_fails_now_is_measured_again(model, loaders, tmp_path, caplog):
    choice.fastest(model, loaders, "auto", tmp_path, 1)

    def fail():
        raise ModelError("gone")

    with caplog.at_level(logging.WARNING):
        engine, _ = choice.fastest(model, {**loaders, "quick": fail}, "auto", tmp_path, 1)
    assert engine.backend == "slow"
    assert "fails now (gone)" in caplog.text


def test_measuring_ends_in_time(model):
    engine = Sleeper(model, "slow", 1.1)
    start = time.perf_counter()
    assert choice.measure(engine) >= 1100
    assert engine.frames == choice.WARM_UP + 1
    assert time.perf_counter() - start < 5


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(model, loaders, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert choice.fastest(model, loaders, "auto", tmp_path / "file", 1)[0].backend == "quick"
    assert "no cache" in caplog.text


@pytest.mark.skipif(any(engines.unavailable(name) for name in ("openvino", "onnxruntime")), reason="needs both CPU back ends")
class TestAuto:
    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch):
        monkeypatch.setattr(engines, "has_nvidia_gpu", lambda: False)

    def test_the_figures_are_told_and_a_named_precision_stays(self, tiny_model, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "deeprob_perception.engines"):
            engine = engines.load(tiny_model, precision="fp32", cache_dir=tmp_path, threads=1)
        assert engine.precision == "fp32"
        assert engine.backend in ("openvino", "onnxruntime")
        for name in ("openvino", "onnxruntime"):
            assert f"{name} " in caplog.text.split("(auto")[1]
        assert "ms a frame" in caplog.text

    def test_a_precision_of_one_back_end_alone_takes_that_one(self, tiny_model, tmp_path):
        assert engines.load(tiny_model, precision="bf16", cache_dir=tmp_path, threads=1).backend == "openvino"

    def test_a_named_back_end_is_not_measured(self, tiny_model, tmp_path):
        assert engines.load(tiny_model, "onnxruntime", cache_dir=tmp_path, threads=1).backend == "onnxruntime"
        assert not (tmp_path / "choice").exists()

    def test_a_gpu_without_tensorrt_is_torchs(self, monkeypatch):
        import deeprob_perception.engines.torch as back_end

        monkeypatch.setattr(engines, "has_nvidia_gpu", lambda: True)
        monkeypatch.setattr(back_end, "drives_gpu", lambda: True)
        assert engines.choose()[0] == ["torch"]
        monkeypatch.setattr(back_end, "drives_gpu", lambda: False)
        assert "torch" not in engines.choose()[0]

    def test_torch_is_not_even_looked_for_without_a_gpu(self, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "deeprob_perception.engines.torch", None)
        assert engines.load(tiny_model, cache_dir=tmp_path, threads=1).backend != "torch"
