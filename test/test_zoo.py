# SPDX-License-Identifier: Apache-2.0
"""Names, checksums, and published checkpoints read into our networks: every layout gives the same network."""

import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="needs the extra `test`")

from safetensors.torch import load_file, save_file  # noqa: E402
from test_swin import randomize  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from deeprob_perception import checkpoints, engines, export, zoo  # noqa: E402
from deeprob_perception.cli import app, commands  # noqa: E402, F401  registers the commands
from deeprob_perception.errors import ModelError  # noqa: E402
from deeprob_perception.nets import swin  # noqa: E402
from deeprob_perception.nets.segmenter import build  # noqa: E402

SMALL = {"embed_dim": 24, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
CLASSES = ["road", "sky", "person", "car", "tree"]
WIDTH = 32
HEIGHT, WIDTH_PIXELS = 70, 101


@pytest.fixture(scope="module", autouse=True)
def small_variant():
    """A named size small enough for quick tests; test_swin.py holds the published sizes."""
    swin.VARIANTS["swin-small-for-tests"] = SMALL
    yield
    del swin.VARIANTS["swin-small-for-tests"]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test sees or changes the user's cache or the shipped models."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(zoo, "shipped_dir", lambda: tmp_path / "shipped")


def swin_config(**changes):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.SwinConfig(**{**SMALL, "window_size": 7, "out_features": stages, **changes})


@pytest.fixture(scope="module")
def hugging_face():
    config = transformers.UperNetConfig(
        backbone_config=swin_config(), hidden_size=WIDTH, id2label=dict(enumerate(CLASSES)), auxiliary_channels=8
    )
    return randomize(transformers.UperNetForSemanticSegmentation(config))


@pytest.fixture(scope="module")
def folder(hugging_face, tmp_path_factory):
    """A folder as the hub has it: `save_pretrained` writes the published, older names."""
    path = tmp_path_factory.mktemp("hub") / "upernet-swin-test"
    hugging_face.save_pretrained(path)
    assert "backbone.encoder.layers.0.blocks.0.attention.self.query.weight" in load_file(path / "model.safetensors")
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')
    (path / "README.md").write_text("---\nlicense: mit\ntags: [vision]\n---\n# A card\n")
    return path


@pytest.fixture(scope="module")
def converted(folder):
    return checkpoints.convert(folder)


def run(recipe, state, images):
    net = build(recipe)
    net.load_state_dict(state)
    with torch.inference_mode():
        return net.eval()(images)


def picture(height=HEIGHT, width=WIDTH_PIXELS):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(2))


def microsoft(state):
    """Our names -> those of Microsoft's segmentation repository (the inverse of the conversion, written out)."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("backbone.stages.", "backbone.layers.")
        name = re.sub(r"^backbone\.norms\.(\d)", r"backbone.norm\1", name)
        name = name.replace("head.classify.", "decode_head.conv_seg.")
        name = re.sub(r"^head\.ppm\.branches\.(\d)\.", r"decode_head.psp_modules.\1.1.", name)
        name = name.replace("head.ppm.bottleneck.", "decode_head.bottleneck.")
        name = name.replace("head.laterals.", "decode_head.lateral_convs.")
        name = name.replace("head.smooth.", "decode_head.fpn_convs.").replace("head.fuse.", "decode_head.fpn_bottleneck.")
        renamed[name] = tensor
        if name.endswith("relative_position_bias_table"):
            index = swin.relative_position_index(7)
            renamed[name.replace("bias_table", "index")] = index
        if name.endswith("blocks.1.attn.qkv.weight"):
            renamed[name.replace("attn.qkv.weight", "attn_mask")] = torch.zeros(4, 49, 49)
    renamed["auxiliary_head.conv_seg.weight"] = torch.zeros(len(CLASSES), 8, 1, 1)
    return renamed


def mmsegmentation(state):
    """Our names -> those of mmsegmentation, whose patch merging reads its input in the order of nn.Unfold."""
    renamed = {}
    for name, tensor in microsoft(state).items():
        name = name.replace("backbone.layers.", "backbone.stages.").replace(".attn.", ".attn.w_msa.")
        name = name.replace("patch_embed.proj.", "patch_embed.projection.")
        name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        if ".downsample." in name:
            quarter = tensor.shape[-1] // 4
            order = [place * quarter + channel for channel in range(quarter) for place in (0, 2, 1, 3)]
            tensor = tensor[..., order]
        renamed[name] = tensor
    return renamed


def assert_same(state, expected):
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, atol=0, rtol=0, msg=f"{name} differs")


def test_a_hub_folder_gives_the_same_masks_as_transformers(hugging_face, converted):
    recipe, state = converted
    assert (recipe["task"], recipe["backbone"], recipe["window_size"]) == ("segmentation", "swin-small-for-tests", 7)
    assert (recipe["classes"], recipe["mean"], recipe["std"]) == (CLASSES, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    with torch.inference_mode():
        expected = hugging_face(picture()).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(run(recipe, state, picture()), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["SwinForImageClassification", "SwinModel"])
def test_a_classifier_gives_a_backbone_whose_last_features_are_the_classifiers(kind, tmp_path):
    model = randomize(getattr(transformers, kind)(swin_config()))
    model.save_pretrained(tmp_path)
    recipe, state = checkpoints.convert(tmp_path)
    assert recipe["task"] == "backbone"
    backbone = swin.SwinTransformer(**SMALL, window_size=7)
    backbone.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in state.items()})
    images = picture(256, 320)  # stage 4 is 8 x 10, larger than the window: below it a classifier clamps the window
    with torch.inference_mode():
        expected = getattr(model, "swin", model)(images).last_hidden_state  # [1, 80, C]
        pyramid = backbone.eval()(images)
    torch.testing.assert_close(pyramid[3].flatten(2).transpose(1, 2), expected, atol=1e-4, rtol=0)
    assert torch.equal(state["backbone.norms.0.weight"], torch.ones(24))


def test_microsofts_classifier_gives_the_same_backbone_as_hugging_faces(tmp_path):
    model = randomize(transformers.SwinForImageClassification(swin_config()))
    model.save_pretrained(tmp_path / "hub")
    _, expected = checkpoints.convert(tmp_path / "hub")
    official = {}
    for name, tensor in microsoft(expected).items():
        name = name.removeprefix("backbone.")
        if name.startswith("norm3"):
            official[name.replace("norm3", "norm")] = tensor
        elif not re.match(r"norm\d|auxiliary", name):
            official[name] = tensor
    official |= {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    assert {"layers.0.blocks.1.attn_mask", "layers.0.blocks.0.attn.relative_position_index"} < set(official)
    torch.save({"model": official}, tmp_path / "swin.pth")
    recipe, state = checkpoints.convert(tmp_path / "swin.pth")
    assert recipe["task"] == "backbone"
    assert_same(state, expected)


@pytest.mark.parametrize("layout", [microsoft, mmsegmentation])
@pytest.mark.parametrize("meta", [{"CLASSES": tuple(CLASSES)}, {"dataset_meta": {"classes": CLASSES}}])
def test_every_segmentation_layout_gives_the_same_network(layout, meta, converted, tmp_path):
    expected_recipe, expected = converted
    torch.save({"state_dict": layout(expected), "meta": meta}, tmp_path / "upernet.pth")
    recipe, state = checkpoints.convert(tmp_path / "upernet.pth")
    assert recipe["classes"] == CLASSES
    assert_same(state, expected)
    found = run(recipe, state, picture())
    assert torch.equal(found, run(expected_recipe, expected, picture()))


def test_mmsegmentations_merging_equals_ours_after_reordering():
    """Against nn.Unfold itself, which is what mmsegmentation runs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 6, 10, generator=generator)
    weight = torch.randn(16, 32, generator=generator)
    scale, shift = torch.randn(2, 32, generator=generator)
    theirs = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # [1, 15, 32]
    theirs = torch.nn.functional.layer_norm(theirs, (32,), scale, shift) @ weight.T
    ours = swin.PatchMerging(8)
    ours.load_state_dict(
        {
            "norm.weight": checkpoints.swin.undo_unfold_order(scale),
            "norm.bias": checkpoints.swin.undo_unfold_order(shift),
            "reduction.weight": checkpoints.swin.undo_unfold_order(weight),
        }
    )
    with torch.inference_mode():
        found = ours(x.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


def test_old_frameworks_without_batch_counters_are_read(converted, tmp_path):
    _, expected = converted
    tensors = {n: t for n, t in microsoft(expected).items() if not n.endswith("num_batches_tracked")}
    torch.save(tensors, tmp_path / "old.pth")
    _, state = checkpoints.convert(tmp_path / "old.pth")
    assert sorted(state) == sorted(expected)


def without(state, word):
    return {name: tensor for name, tensor in state.items() if word not in name}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: without(s, "fpn_bottleneck.conv"), r"1 missing \(head\.fuse\.conv\.weight\)"),
        (lambda s: without(s, ".norm1.bias"), r"7 missing \(backbone\.stages\.0\.blocks\.0\.norm1\.bias, .*, \.\.\.\)"),
        (lambda s: s | {"backbone.absolute_pos_embed": torch.zeros(1, 9, 24)}, r"1 unexpected \(backbone\.absolute_pos"),
        (
            lambda s: s | {"backbone.layers.0.blocks.0.mlp.fc1.bias": torch.zeros(5)},
            r"1 mis-shaped \(backbone\.stages\.0\.blocks\.0\.mlp\.fc1\.bias \[5\] instead of \[96\]",
        ),
        (lambda s: without(s, "layers.3.blocks"), r"depths \(2, 1, 2, 0\).*none of swin-micro, swin-tiny"),
        (lambda s: s | {"backbone.layers.0.blocks.0.attn.logit_scale": torch.zeros(1)}, "Swin Transformer V2"),
        (lambda s: {"conv1.weight": torch.zeros(3)}, r"not a Swin checkpoint.*backbone\.conv1\.weight"),
        (lambda s: {"epoch": 3}, "holds no state_dict"),
    ],
)
def test_a_wrong_checkpoint_is_refused_with_the_names_that_are_wrong(change, complaint, converted, tmp_path):
    torch.save(change(microsoft(converted[1])), tmp_path / "wrong.pth")
    with pytest.raises(ModelError, match=complaint) as caught:
        checkpoints.convert(tmp_path / "wrong.pth")
    assert "wrong.pth" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "segformer"}, "model_type='segformer'"),
        ({"pool_scales": [1, 2, 4]}, r"pool_scales=\[1, 2, 4\]"),
        ({"backbone_config": {"model_type": "convnext"}}, "model_type='convnext'"),
        ({"backbone_config": {"hidden_act": "relu"}}, "hidden_act='relu'"),
        ({"backbone_config": {"out_features": ["stage2", "stage3"]}}, "out_features"),
    ],
)
def test_a_configuration_that_computes_something_else_is_refused(change, complaint, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=complaint):
        checkpoints.convert(tmp_path)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(write, tmp_path):
    write({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="running code"):
        checkpoints.convert(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "cut.onnx"])
def test_a_truncated_file_is_refused_by_name(name, converted, tmp_path):
    recipe, state = converted
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(state, path)
    elif path.suffix == ".onnx":
        path.write_bytes(b"\x08\x0a\x12\x07pytorch")
    else:
        zoo.save_checkpoint(path, state, recipe)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    read = zoo.load_checkpoint if path.suffix != ".pth" else checkpoints.convert
    with pytest.raises(ModelError, match=re.escape(name)):
        read(path)


def test_other_kinds_of_files_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"weights\.npz: not a weights file"):
        checkpoints.convert(tmp_path / "weights.npz")
    with pytest.raises(ModelError, match=r"none of model\.safetensors, pytorch_model\.bin"):
        checkpoints.convert(tmp_path)


def test_a_saved_checkpoint_is_read_back_whole(converted, tmp_path):
    recipe, state = converted
    shared = state | {"head.laterals.0.bn.bias": state["head.classify.weight"].flatten()[:WIDTH]}  # a view
    zoo.save_checkpoint(tmp_path / "a.safetensors", shared, recipe)
    read_recipe, read_state = zoo.load_checkpoint(tmp_path / "a.safetensors")
    assert read_recipe == recipe
    assert_same(read_state, shared)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.safetensors"]  # no temporary left


def test_a_checkpoint_that_is_not_its_recipes_network_is_refused(converted, tmp_path):
    recipe, state = converted
    zoo.save_checkpoint(tmp_path / "a.safetensors", state, {**recipe, "classes": CLASSES[:3]})
    with pytest.raises(ModelError, match=r"2 mis-shaped \(head\.classify\.weight \[5, 32, 1, 1\] instead of \[3, 32"):
        zoo.load_checkpoint(tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match="no recipe"):
        zoo.load_checkpoint(tmp_path / "b.safetensors")


@pytest.fixture(scope="module")
def model(converted, tmp_path_factory):
    """A model file of the small network, made from weights of ours by the command line."""
    recipe, state = converted
    weights = zoo.save_checkpoint(tmp_path_factory.mktemp("model") / "weights.safetensors", state, recipe)
    path = weights.with_name("test-model.onnx")
    deeprob("models", "convert", weights, "--export", path, "--height", HEIGHT, "--width", WIDTH_PIXELS)
    return path


def test_a_shipped_model_can_be_fine_tuned_its_weights_are_read_back(model, converted):
    recipe, state = converted
    read_recipe, read_state = zoo.load_checkpoint(model)
    assert read_recipe == recipe
    floats = {name for name, tensor in state.items() if tensor.is_floating_point()}
    rounded = export.round_weights(state)
    assert_same({n: read_state[n] for n in floats}, {n: rounded[n] for n in floats})
    bgr = np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH_PIXELS, 3), np.uint8)
    labels = engines.load(model, "onnxruntime", "fp32")(image=bgr, outputs=("labels",))["labels"]
    images = torch.from_numpy(bgr[0, :, :, ::-1].copy()).permute(2, 0, 1)[None] / 255.0
    mean, std = (torch.tensor(recipe[key]).reshape(1, 3, 1, 1) for key in ("mean", "std"))
    expected = run(read_recipe, read_state, (images - mean) / std).argmax(1).numpy()
    assert len(np.unique(expected)) > 1
    assert (labels == expected).mean() >= 0.999


def ship(model, folder, name="street"):
    path = folder / f"{name}.onnx"
    path.write_bytes(model.read_bytes())
    path.with_suffix(".md").write_text("# card\n")
    zoo.write_manifest(folder)
    return path


def test_a_shipped_name_resolves_and_a_changed_file_is_refused(model, tmp_path):
    path = ship(model, tmp_path / "shipped")
    assert zoo.resolve("street") == path
    entry = zoo.catalogue()["street"]
    assert (entry.task, entry.card, entry.shipped) == ("segmentation", path.with_suffix(".md"), True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not entry.intact()
    with pytest.raises(ModelError, match=r"street\.onnx is damaged or was changed"):
        zoo.resolve("street")
    path.unlink()
    with pytest.raises(ModelError, match=r"street\.onnx, which is missing"):
        zoo.resolve("street")


def test_an_unknown_name_is_refused_with_the_names_that_there_are(model, tmp_path):
    ship(model, tmp_path / "shipped")
    with pytest.raises(ModelError, match="no model named 'steret'; there are: street"):
        zoo.resolve("steret")
    with pytest.raises(ModelError, match="deeprob models fetch swin-tiny-upernet"):
        zoo.resolve("swin-tiny-upernet")
    with pytest.raises(ModelError, match=r"no model file .*gone\.onnx; the named models are: street"):
        zoo.resolve(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match="holds weights only"):
        zoo.resolve("weights.safetensors")


def test_a_path_resolves_to_itself(model):
    assert zoo.resolve(model) == model
    assert zoo.resolve(str(model)) == model


def test_a_broken_manifest_is_named(tmp_path):
    (tmp_path / "shipped" / "manifest.json").write_text('{"street": {"file": "street.onnx"}}')
    with pytest.raises(ModelError, match=r"manifest\.json: not a manifest"):
        zoo.resolve("street")


def deeprob(*arguments, fails=False):
    """Run a command; return what it printed."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    if fails:
        assert isinstance(result.exception, ModelError), result.output
        return str(result.exception)
    if result.exception:
        raise result.exception
    return result.output


def test_fetch_from_a_folder_makes_a_model_that_resolves_by_its_name(folder, hugging_face):
    out = deeprob("models", "fetch", folder, "--height", 64, "--width", 96)
    path = zoo.resolve("upernet-swin-test")
    assert str(path) in out
    engine = engines.load(path, "onnxruntime", "fp32")
    assert (engine.metadata["licence"], json.loads(engine.metadata["classes"])) == ("mit", CLASSES)
    assert engine.inputs[0].shape == (1, 64, 96, 3)
    recipe, _ = zoo.load_checkpoint("upernet-swin-test")  # the float32 weights, by name
    assert recipe["source"] == "upernet-swin-test"
    listed = deeprob("models", "list")
    assert re.search(r"upernet-swin-test +│ cache +│ segmentation +│ 96x64 .* mit +│ ok", listed)
    assert CLASSES[0] in deeprob("models", "info", "upernet-swin-test")


def test_fetching_a_backbone_keeps_its_weights_for_training(tmp_path):
    randomize(transformers.SwinModel(swin_config())).save_pretrained(tmp_path / "swin-model")
    out = deeprob("models", "fetch", tmp_path / "swin-model", "--name", "mine")
    assert "without a segmentation head" in out
    recipe, state = zoo.load_checkpoint("mine")
    assert recipe["task"] == "backbone"
    assert all(name.startswith("backbone.") for name in state)
    assert re.search(r"mine +│ cache +│ weights only", deeprob("models", "list"))
    with pytest.raises(ModelError, match=r"mine\.safetensors holds its weights only"):
        zoo.resolve("mine")


def test_list_shows_a_damaged_model_instead_of_failing(model, tmp_path):
    path = ship(model, tmp_path / "shipped")
    assert re.search(r"street +│ package .*│ ok", deeprob("models", "list"))
    path.write_bytes(b"")
    assert re.search(r"street .*│ differs", deeprob("models", "list"))


def test_convert_writes_weights_that_read_back(folder, converted, tmp_path):
    weights = tmp_path / "out.safetensors"
    out = deeprob("models", "convert", folder, "--out", weights)
    assert "window 7 + upernet, 5 classes" in out
    assert_same(zoo.load_checkpoint(weights)[1], converted[1])
    assert re.search(r"parameters +[\d.]+ M", deeprob("models", "info", weights))
    assert "give --out" in deeprob("models", "convert", folder, fails=True)
    assert "ends in .safetensors" in deeprob("models", "convert", folder, "--out", tmp_path / "x.pth", fails=True)


def test_fetch_without_a_network_says_what_to_do(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", "from deeprob_perception.cli import main; main()", "models", "fetch", "swin-tiny"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "cannot fetch microsoft/swin-tiny-patch4-window7-224" in result.stderr
    assert "give the folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert "neither a folder nor ORG/REPO" in deeprob("models", "fetch", "no-such-model", fails=True)


def test_names_resolve_where_torch_is_absent():
    code = "import sys; sys.modules['torch'] = None; from deeprob_perception import zoo; zoo.catalogue()"
    subprocess.run([sys.executable, "-c", code], check=True)
