# SPDX-License-Identifier: Apache-2.0
"""The back end `torch`: kept programs hold no code, half precision, and a CUDA graph where there is a GPU."""

import io
import pickle
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the back end torch needs torch (extra `train`)")

from test_engines import pictures  # noqa: E402

from deeprob_perception import engines, program, zoo  # noqa: E402
from deeprob_perception.engines import store  # noqa: E402
from deeprob_perception.errors import EngineError  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")


@pytest.fixture(scope="module")
def content(tiny_model):
    return program.make(tiny_model, (1, 96, 128, 3), "fp32", "cpu")


def with_member(content: bytes, name: str, data: bytes) -> bytes:
    """Return the archive with a member replaced or added, under the archive's own folder."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as new:
        root = old.namelist()[0].split("/")[0]
        for member in old.namelist():
            if member != f"{root}/{name}":
                new.writestr(member, old.read(member))
        new.writestr(f"{root}/{name}", data)
    return changed.getvalue()


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize("name", ["data/constants/opaque_obj_0", "data/constants/custom_obj_0", "data/sample_inputs/model.pt"])
def test_a_program_with_a_pickled_object_is_refused_unread(content, name):
    with pytest.raises(EngineError, match=r"pickled object|not a program"):
        program.read(with_member(content, name, pickle.dumps(Exploit())))


def test_a_program_with_pickled_tensors_is_refused_unread(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        root = archive.namelist()[0].split("/")[0]
        name = next(n for n in archive.namelist() if n.endswith("weights_config.json"))
        config = archive.read(name).replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    assert b'"use_pickle": true' in config
    with pytest.raises(EngineError, match="pickled tensors"):
        program.read(with_member(content, name.removeprefix(f"{root}/"), config))


@pytest.mark.parametrize("damage", [b"", b"PK", b"garbage" * 100])
def test_what_is_no_program_is_refused(damage):
    with pytest.raises(EngineError, match="not a program of torch"):
        program.read(damage)


def test_a_harmful_program_in_the_cache_is_made_anew(tiny_model, tmp_path, caplog):
    engines.load(tiny_model, "torch", "fp32", tmp_path, threads=1)
    path = next((tmp_path / "torch").iterdir())
    harmful = with_member(store.get(path), "data/constants/opaque_obj_0", pickle.dumps(Exploit()))
    store.put(path, harmful)
    engine = engines.load(tiny_model, "torch", "fp32", tmp_path, threads=1)
    assert "pickled object" in caplog.text
    assert engine(image=pictures(1))["labels"].shape == (1, 96, 128)
    assert store.get(path) != harmful


def test_half_precision_agrees_with_full(tiny_model, tmp_path):
    half, full = (engines.load(tiny_model, "torch", p, tmp_path, threads=1) for p in ("bf16", "fp32"))
    assert (half.precision, full.precision) == ("bf16", "fp32")
    same = [(half(image=i[None])["labels"] == full(image=i[None])["labels"]).mean() for i in pictures(4)]
    assert 0.95 <= np.mean(same) < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="about torch on a CPU")
def test_auto_on_a_cpu_is_fp32_and_fp16_is_refused(tiny_model, tmp_path):
    assert engines.load(tiny_model, "torch", "auto", tmp_path, threads=1).precision == "fp32"
    with pytest.raises(EngineError, match="torch computes in fp32, bf16, not in fp16"):
        engines.load(tiny_model, "torch", "fp16", tmp_path)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpus_labels_are_those_of_onnxruntime(tiny_model, tmp_path, precision, caplog):
    fast = engines.load(tiny_model, "torch", precision, tmp_path)
    exact = engines.load(tiny_model, "onnxruntime", "fp32", tmp_path)
    frames = pictures(6)[:, None]
    kept = [fast(image=i)["labels"] for i in frames]
    same = [(a == exact(image=i)["labels"]).mean() for a, i in zip(kept, frames, strict=True)]
    assert np.mean(same) >= {"fp32": 0.999, "fp16": 0.99, "bf16": 0.95}[precision]
    assert "no CUDA graph" not in caplog.text


@pytest.mark.gpu
@gpu
def test_a_refused_capture_is_said_and_operators_run_one_by_one(tiny_model, tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    engine = engines.load(tiny_model, "torch", "fp32", tmp_path)
    assert engine(image=pictures(1))["labels"].shape == (1, 96, 128)
    assert "no CUDA graph (operation not permitted" in caplog.text


def test_a_policy_is_refused_by_what_it_takes():
    with pytest.raises(EngineError, match=r"reach\.onnx takes tokens, .*: the torch back end runs networks on images"):
        engines.load(zoo.resolve("reach"), backend="torch")
