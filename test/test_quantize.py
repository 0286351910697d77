# SPDX-License-Identifier: Apache-2.0
"""int8 model files: of the contract, symmetric as TensorRT wants them, and really int8 where they run."""

import json

import cv2
import numpy as np
import onnx
import pytest
from test_engines import BACKENDS, pictures

from deeprob_perception import engines, zoo
from deeprob_perception.engines import model_file
from deeprob_perception.errors import BagError, DataError, EngineError, ModelError
from deeprob_perception.quantize import calibration_frames, fold_weights, make_signed, spread

CPU = [param for param in BACKENDS if param.values[0] in ("openvino", "onnxruntime")]


@pytest.fixture(scope="module")
def frames_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    for i, image in enumerate(pictures(6, seed=1)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
    return folder


@pytest.fixture(scope="module")
def int8_model(tiny_model, frames_folder, tmp_path_factory):
    pytest.importorskip("nncf", reason="quantising needs nncf (extra `quantize`)")
    from typer.testing import CliRunner

    from deeprob_perception.cli import app, commands  # noqa: F401

    out = tmp_path_factory.mktemp("int8") / "tiny8.onnx"
    command = ["quantize", str(tiny_model), "--out", str(out), "--data", str(frames_folder), "--frames", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return out


def test_the_file_says_that_it_is_int8_and_keeps_the_rest(int8_model, tiny_model, frames_folder):
    before, after = model_file.read(tiny_model), model_file.read(int8_model)
    assert after.precision == "int8"
    assert after.inputs == before.inputs
    assert after.outputs == before.outputs
    assert after.metadata["name"] == "tiny-int8"
    calibration = json.loads(after.metadata["calibration"])
    assert calibration["frames"] == 4
    assert calibration["source"] == frames_folder.name
    assert calibration["model_sha256"] == zoo.checksum(tiny_model)
    changed = {"name", "precision", "calibration"}
    assert {k: v for k, v in after.metadata.items() if k not in changed} == {
        k: v for k, v in before.metadata.items() if k not in changed
    }
    assert int8_model.stat().st_size < 0.65 * tiny_model.stat().st_size


def test_every_scale_is_symmetric_and_signed_as_tensorrt_wants_it(int8_model):
    graph = onnx.load(int8_model).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    quantisers = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(quantisers) > 100
    for node in quantisers:
        zero = constants[node.input[2]]
        assert zero.dtype == np.int8, node.name
        assert not zero.any(), node.name
        assert constants[node.input[1]].min() > 0, node.name


def test_products_of_weights_are_quantised_and_attention_is_not(int8_model):
    """Both inputs of a product come from a DequantizeLinear, or neither does."""
    graph = onnx.load(int8_model).graph
    maker = {name: node.op_type for node in graph.node for name in node.output}
    kinds = [tuple(maker.get(name) == "DequantizeLinear" for name in n.input[:2]) for n in graph.node if n.op_type == "MatMul"]
    convolutions = [tuple(maker.get(n) == "DequantizeLinear" for n in node.input[:2]) for node in graph.node
                    if node.op_type == "Conv"]
    assert set(kinds) == {(True, True), (False, False)}
    assert kinds.count((False, False)) == 20  # two a block
    assert set(convolutions) == {(True, True)}


@pytest.mark.parametrize("backend", CPU)
def test_it_runs_as_int8_and_its_labels_are_nearly_those_of_fp32(backend, int8_model, tiny_model, tmp_path):
    fast = engines.load(int8_model, backend, cache_dir=tmp_path, threads=1)
    exact = engines.load(tiny_model, backend, "fp32", tmp_path, threads=1)
    assert (fast.precision, fast.requested_precision) == ("int8", "auto")
    assert engines.load(int8_model, backend, "int8", tmp_path, threads=1).precision == "int8"
    same = [(fast(image=i[None])["labels"] == exact(image=i[None])["labels"]).mean() for i in pictures(6)]
    print(backend, np.mean(same))
    assert np.mean(same) >= 0.9  # random weights: every other pixel lies near a border between classes
    assert np.mean(same) < 1  # the same file twice would agree for nothing


def test_openvino_computes_its_products_in_int8(int8_model):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    if "INT8" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no int8 in OpenVINO")
    compiled = core.compile_model(core.read_model(int8_model), "CPU")
    found = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    types = [row["primitiveType"].astype(str) for row in found if row["layerType"].astype(str) == "FullyConnected"]
    assert len(types) == 63
    assert all(t.lower().endswith("i8") for t in types), types


@pytest.mark.parametrize("backend", CPU)
def test_another_precision_of_an_int8_file_is_refused(backend, int8_model):
    with pytest.raises(EngineError, match=r"tiny8\.onnx is a model file in int8 and cannot run in fp32; take the fp32 file"):
        engines.load(int8_model, backend, "fp32")


def test_torch_refuses_a_quantised_file(int8_model):
    pytest.importorskip("torch")
    with pytest.raises(EngineError, match=r"tiny8\.onnx is a model file in int8; torch takes the fp32 file"):
        engines.load(int8_model, "torch")


def test_weights_are_not_read_back_from_a_quantised_file(int8_model):
    with pytest.raises(ModelError, match=r"tiny8\.onnx is a model file in int8, whose weights cannot be read back"):
        zoo.load_checkpoint(int8_model)


def test_a_quantised_file_is_not_quantised_again(int8_model, tmp_path):
    from deeprob_perception.quantize import quantize

    with pytest.raises(ModelError, match="is in int8 already"):
        quantize(int8_model, [], tmp_path / "x.onnx")


def test_frames_that_do_not_fit_are_refused_before_nncf_starts(tiny_model, tmp_path):
    from deeprob_perception.quantize import quantize

    with pytest.raises(DataError, match=r"uint8 \[1, 95, 128, 3\]; tiny\.onnx takes image uint8 \[1, 96, 128, 3\]"):
        quantize(tiny_model, [np.zeros((1, 95, 128, 3), np.uint8)], tmp_path / "x.onnx")
    with pytest.raises(DataError, match="no frames"):
        quantize(tiny_model, [], tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_without_nncf_it_says_what_to_install(tiny_model, tmp_path, monkeypatch):
    import sys

    from deeprob_perception.quantize import quantize

    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ModelError, match=r"pip install 'deeprob_perception\[quantize\]'"):
        quantize(tiny_model, pictures(1)[:, None], tmp_path / "x.onnx")


def test_folded_weights_compute_the_same(tiny_model, tmp_path):
    proto = onnx.load(tiny_model)
    products = sum(node.op_type == "MatMul" for node in proto.graph.node)
    weights = fold_weights(proto)
    read = [node for node in proto.graph.node if node.op_type == "MatMul" and weights & set(node.input)]
    assert len(read) == products - 20
    onnx.save(proto, tmp_path / "folded.onnx")
    before, after = (engines.load(p, "onnxruntime", cache_dir=tmp_path) for p in (tiny_model, tmp_path / "folded.onnx"))
    for image in pictures(2)[:, None]:
        np.testing.assert_array_equal(before(image=image)["labels"], after(image=image)["labels"])


def test_an_unsigned_scale_becomes_a_signed_one_that_reaches_as_far():
    make = onnx.numpy_helper.from_array
    nodes = [onnx.helper.make_node(kind, [name, "scale", "zero"], [name + "'"])
             for kind, name in (("QuantizeLinear", "x"), ("DequantizeLinear", "x'"))]
    constants = [make(np.float32(0.5), "scale"), make(np.uint8(0), "zero")]
    proto = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], constants))
    make_signed(proto)
    scale, zero = (onnx.numpy_helper.to_array(t) for t in proto.graph.initializer)
    assert (zero.dtype, int(zero)) == (np.int8, 0)
    assert float(scale) * 127 == pytest.approx(0.5 * 255)  # both nodes share it: changed once


def test_frames_are_spread_evenly_and_brought_to_the_models_size(frames_folder, tmp_path):
    assert sorted(spread(10, 4)) == [0, 2, 5, 7]
    assert sorted(spread(3, 4)) == [0, 1, 2]
    frames = list(calibration_frames(frames_folder, (1, 48, 64, 3), 4))
    assert [f.shape for f in frames] == [(1, 48, 64, 3)] * 4
    inner = tmp_path / "data" / "images"
    inner.mkdir(parents=True)
    cv2.imwrite(str(inner / "a.png"), pictures(1)[0])
    np.testing.assert_array_equal(next(calibration_frames(tmp_path / "data", (1, 96, 128, 3)))[0], pictures(1)[0])


def test_frames_come_from_a_bag_as_well():
    from deeprob_perception.share import share_dir

    frames = list(calibration_frames(share_dir() / "bags" / "sample.mcap", (1, 96, 128, 3), 3))
    assert [f.shape for f in frames] == [(1, 96, 128, 3)] * 3
    assert all(f.dtype == np.uint8 and f.std() > 5 for f in frames)
    assert not np.array_equal(frames[0], frames[2])


def test_what_holds_no_frames_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder or bag"):
        list(calibration_frames(tmp_path / "absent", (1, 96, 128, 3)))
    (tmp_path / "empty").mkdir()
    with pytest.raises((BagError, DataError), match="empty"):
        list(calibration_frames(tmp_path / "empty", (1, 96, 128, 3)))
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(DataError, match=r"bad\.png: not a readable image"):
        list(calibration_frames(tmp_path, (1, 96, 128, 3)))
