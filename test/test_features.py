# SPDX-License-Identifier: Apache-2.0
"""Model files of features: what is exported is what torch computes, on every back end, and TensorRT builds it."""

import json
import subprocess
import sys

import numpy as np
import pytest

from deeprob_perception import engines
from deeprob_perception.engines import model_file, parity
from deeprob_perception.errors import ModelError

torch = pytest.importorskip("torch", reason="the test models are made by torch's exporter (extra `train`)")

from deeprob_perception import zoo  # noqa: E402
from deeprob_perception.export import round_weights  # noqa: E402
from deeprob_perception.nets import features  # noqa: E402

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def recipe() -> dict:
    return {"task": "features", "backbone": "vit-micro", "image_size": 112, "mean": MEAN, "std": STD}


@pytest.fixture(scope="module")
def net(recipe) -> features.FeatureNet:
    torch.manual_seed(3)
    return features.build(recipe).eval()


@pytest.fixture(scope="module")
def model(recipe, net, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "vit.onnx"
    return zoo.export(recipe, net.state_dict(), path, 96, 136)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return parity.synthetic((1, 96, 136, 3), 1).images[0]


@pytest.fixture(scope="module")
def expected(net, image) -> np.ndarray:
    rgb = torch.from_numpy(image[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255
    rounded = features.build({"backbone": "vit-micro", "image_size": 112}).eval()
    rounded.load_state_dict(round_weights(net.state_dict()))
    with torch.no_grad():
        found = rounded((rgb - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    return torch.nn.functional.normalize(found, dim=-1).numpy()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_features_of_an_exported_model_are_those_of_torch(backend, model, image, expected, tmp_path):
    engine = engines.load(model, backend=backend, precision="fp32", cache_dir=tmp_path, threads=1)
    found = engine(image=image)["features"]
    assert found.shape == (1, 12, 17, 192) and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4
    assert np.allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-5)


def test_bf16_keeps_the_direction_of_features(model, image, expected, tmp_path):
    engine = engines.load(model, backend="openvino", precision="bf16", cache_dir=tmp_path, threads=1)
    cosine = (engine(image=image)["features"] * expected).sum(-1)
    assert cosine.mean() > parity.LIKENESS["bf16"]


def test_the_choice_of_a_back_end_measures_features_too(model, image, tmp_path):
    assert engines.load(model, cache_dir=tmp_path, threads=1)(image=image)["features"].shape == (1, 12, 17, 192)


def test_weights_come_back_out_of_the_exported_file(recipe, net, model):
    read, state = zoo.load_checkpoint(model)
    assert read == {**recipe, "image_size": [96, 136]}
    again = features.build(read)
    again.load_state_dict(state)
    rounded = round_weights(net.state_dict())
    assert state.keys() == rounded.keys()
    assert all(torch.equal(state[name], rounded[name]) for name in state if name != "backbone.pos_embed")


def test_a_size_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is(recipe, net, tmp_path):
    with pytest.raises(ModelError, match="take 96x104"):
        zoo.export(recipe, net.state_dict(), tmp_path / "m.onnx", 98, 101)


@pytest.mark.parametrize(
    ("change", "said"), [({"patch_size": "16"}, "output is features"), ({"patch_size": "x"}, "patch_size is 'x'")]
)
def test_a_file_that_breaks_the_contract_is_refused(model, tmp_path, change, said):
    import onnx

    proto = onnx.load(model)
    for entry in proto.metadata_props:
        entry.value = change.get(entry.key.removeprefix("deeprob."), entry.value)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=said):
        model_file.read(tmp_path / "m.onnx")


def test_parity_of_features_is_their_cosine_and_counts_what_is_no_number(image):
    random = np.random.default_rng(0)
    truth = random.normal(size=(1, 3, 4, 8)).astype(np.float32)
    truth /= np.linalg.norm(truth, axis=-1, keepdims=True)
    samples = parity.Samples([image], "a test")
    same = parity.measure([(truth,)], lambda _: (truth,), samples, "itself")
    assert same.agreement == pytest.approx(1) and same.shortfall("fp32") is None
    broken = truth.copy()
    broken[0, 0, 0] = np.nan
    found = parity.measure([(truth,)], lambda _: (broken,), samples, "it")
    assert found.nans == 1 and "1 patches" in found.shortfall("fp16")
    turned = parity.measure([(truth,)], lambda _: (np.roll(truth, 1, -1),), samples, "it")
    assert "cosine" in turned.shortfall("int8") and "cosine" in turned.line()


def test_tensorrt_builds_a_model_of_features_in_fp16_without_a_gpu(model, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (extra `rtx`)")
    command = [
        sys.executable, "-m", "deeprob_perception", "build", str(model), "--target", "sm_86", "--precision", "fp16",
        "--cache-dir", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr + done.stdout
    facts = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json")]
    assert [fact["parity"]["of"] for fact in facts if "parity" in fact] == ["features"], (facts, done.stdout)
