# SPDX-License-Identifier: Apache-2.0
"""What stands in an exported file: the contract, the weights, the same answers as torch."""

import json

import numpy as np
import onnx
import pytest

from deeprob_perception.engines import model_file
from deeprob_perception.errors import ModelError, PerceptionError

torch = pytest.importorskip("torch", reason="export needs the extra `train`")

from deeprob_perception import export  # noqa: E402


@pytest.fixture(scope="module")
def proto(tiny_model):
    return onnx.load(tiny_model)


def test_the_file_says_what_it_is(tiny_model, tiny_recipe):
    model = model_file.read(tiny_model)
    assert [str(s) for s in model.inputs] == ["image uint8 [1, 96, 128, 3]"]
    assert [str(s) for s in model.outputs] == ["labels uint8 [1, 96, 128]", "confidence uint8 [1, 96, 128]"]
    assert model.metadata["contract"] == "1"
    assert model.metadata["task"] == "segmentation"
    assert model.metadata["name"] == "tiny"
    assert model.metadata["licence"] == "Apache-2.0"
    assert model.metadata["training_data"] == "unknown"
    assert json.loads(model.metadata["metrics"]) == {}
    assert json.loads(model.metadata["classes"]) == tiny_recipe["classes"]
    assert json.loads(model.metadata["palette"]) == tiny_recipe["palette"]
    assert json.loads(model.metadata["recipe"]) == tiny_recipe


def test_the_image_is_cast_before_it_is_transposed(proto):
    """TensorRT refuses a uint8 transpose."""
    readers = [node.op_type for node in proto.graph.node if "image" in node.input]
    assert readers == ["Cast"]


def test_every_operator_is_of_the_standard_set(proto):
    assert {node.domain for node in proto.graph.node} == {""}
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", export.OPSET)]


def test_weights_read_back_under_torch_names_with_their_values(proto, tiny_net):
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    expected = export.round_weights(tiny_net.state_dict())
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):  # read by training alone; no node of the graph does
            assert name not in stored
            continue
        np.testing.assert_array_equal(stored[name].astype(np.float32), value.numpy(), err_msg=name)


def test_matrices_take_two_bytes_a_weight(tiny_model, tiny_net):
    weights = sum(p.numel() for p in tiny_net.parameters())
    assert tiny_model.stat().st_size < 2.2 * weights


def test_values_beyond_float16_stay_float32():
    state = {
        "large.weight": torch.tensor([[1e5, 1.0]]),
        "small.weight": torch.tensor([[1.0001, 2.0]]),
        "running_var": torch.tensor([1.0001]),
    }
    rounded = export.round_weights(state)
    assert torch.equal(rounded["large.weight"], state["large.weight"])
    assert torch.equal(rounded["running_var"], state["running_var"])
    assert rounded["small.weight"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("change", "height", "message"),
    [
        ({"palette": [[0, 0, 0]]}, 96, "7 classes but 1 palette"),
        ({"classes": [], "palette": []}, 96, "0 classes"),
        ({"classes": ["x"] * 256, "palette": [[0, 0, 0]] * 256}, 96, "256 classes"),
        ({}, 16, "16x128"),
    ],
)
def test_what_the_contract_cannot_hold_is_refused(tiny_net, tiny_recipe, tmp_path, change, height, message):
    with pytest.raises(ModelError, match=message):
        export.export_segmentation(tiny_net, {**tiny_recipe, **change}, tmp_path / "m.onnx", height, 128, {})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ModelError, match=r"m\.onnx: No space left"):
        export.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write .*file"):
        export.write(tmp_path / "file" / "m.onnx", b"new")


@pytest.mark.slow
def test_the_command_exports_again_from_an_exported_file(tiny_model, tmp_path):
    """`.onnx` -> weights -> `.onnx` of another size, with the metadata that was asked for."""
    from typer.testing import CliRunner

    from deeprob_perception.cli import app, commands  # noqa: F401

    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"miou": 0.5}')
    out = tmp_path / "other.onnx"
    options = ["--size", "64x100", "--licence", "CC0-1.0", "--training-data", "none", "--metrics", str(metrics)]
    result = CliRunner().invoke(app, ["export", str(tiny_model), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    model = model_file.read(out)
    assert model.inputs[0].shape == (1, 64, 100, 3)
    assert model.metadata["name"] == "other"
    assert model.metadata["licence"] == "CC0-1.0"
    assert model.metadata["training_data"] == "none"
    assert json.loads(model.metadata["metrics"]) == {"miou": 0.5}
    before = {t.name: t.raw_data for t in onnx.load(tiny_model).graph.initializer}
    after = {t.name: t.raw_data for t in onnx.load(out).graph.initializer}
    assert all(after[name] == before[name] for name in before if name.startswith(("backbone.", "head.")))


@pytest.mark.parametrize("size", ["480", "480x", "x640", "480,640"])
def test_the_command_refuses_a_size_it_cannot_read(size, tiny_model, tmp_path):
    from deeprob_perception.cli.export import export as command

    with pytest.raises(PerceptionError, match="such as 480x640"):
        command(str(tiny_model), tmp_path / "m.onnx", size)


@pytest.mark.slow
def test_swin_tiny_with_upernet_exports_and_agrees(tiny_recipe, tmp_path):
    """The official shape (4 x 4 patches, window 7, pyramid pooling), at a size that neither window nor stride divides."""
    from deeprob_perception import engines
    from deeprob_perception.nets import segmenter

    recipe = {**tiny_recipe, "backbone": "swin-tiny", "head": "upernet", "head_channels": 32}
    torch.manual_seed(1)
    net = segmenter.build(recipe).eval()
    path = export.export_segmentation(net, recipe, tmp_path / "upernet.onnx", 75, 130, {})
    image = np.random.default_rng(0).integers(0, 256, (1, 75, 130, 3), dtype=np.uint8)
    net.load_state_dict(export.round_weights(net.state_dict()))
    with torch.no_grad():
        expected = export.SegmentationGraph(net, recipe)(torch.from_numpy(image))[0].numpy()
    assert len(np.unique(expected)) > 1
    for backend in engines.BACKENDS:
        if engines.unavailable(backend) is None:
            engine = engines.load(path, backend, "fp32", tmp_path, threads=1)
            assert (engine(image=image, outputs=["labels"])["labels"] == expected).mean() >= 0.999, backend
