# SPDX-License-Identifier: Apache-2.0
"""The ViTs of DINO, DINOv2 and DINOv3 against `transformers`: the same random weights, the same numbers, every layout.

`pytest -m exhaustive -s test/test_vit.py` runs every variant at full depth and prints the errors.
"""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="needs the extra `test`")

from test_swin import randomize  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from deeprob_perception import checkpoints  # noqa: E402
from deeprob_perception.checkpoints import vit as layouts  # noqa: E402
from deeprob_perception.errors import ModelError  # noqa: E402
from deeprob_perception.nets import features, vit  # noqa: E402

OFFICIAL = [name for name in vit.VARIANTS if name.startswith("dino")]
TOLERANCE = 1e-4


def hugging_face(name, depth=None):
    """Return `transformers`' model of a variant, with `depth` layers or all."""
    options = vit.VARIANTS[name]
    shape = dict(
        hidden_size=options["embed_dim"], num_attention_heads=options["num_heads"], patch_size=options["patch_size"],
        num_hidden_layers=depth or options["depth"], image_size=options["image_size"],
    )  # fmt: skip
    if name.startswith("dinov3"):
        config = transformers.DINOv3ViTConfig(**shape, intermediate_size=4 * options["embed_dim"], num_register_tokens=4)
        return transformers.DINOv3ViTModel(config)
    if name.startswith("dinov2"):
        shape |= dict(layer_norm_eps=1e-6, use_swiglu_ffn=options.get("swiglu", False))
        if "registers" in options:
            return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=4))
        return transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    config = transformers.ViTConfig(**shape, intermediate_size=4 * options["embed_dim"], layer_norm_eps=1e-6)
    return transformers.ViTModel(config, add_pooling_layer=False)


def with_weights(net):
    """Give a network of theirs random weights, but DINOv3's frequencies, which are no weights, their values."""
    frequencies = [(module, module.inv_freq.clone()) for module in net.modules() if hasattr(module, "inv_freq")]
    randomize(net)
    for module, values in frequencies:
        module.inv_freq.copy_(values)
    return net


def check_parity(name, size, depth=None):
    """Compare class token and patches at `size` (height, width) patches; `depth` shortens both networks."""
    with no_init_weights():
        theirs = with_weights(hugging_face(name, depth))
        state = layouts.rename(theirs.state_dict(), "theirs")
        ours = features.FeatureNet(vit.VisionTransformer(**{**vit.VARIANTS[name], **({"depth": depth} if depth else {})}))
    ours.load_state_dict(state)
    ours.eval()
    patch = vit.VARIANTS[name]["patch_size"]
    images = torch.randn(1, 3, *(side * patch for side in size), generator=torch.Generator().manual_seed(1))
    interpolates = {"interpolate_pos_encoding": True} if name.startswith("dino-") else {}
    with torch.inference_mode():
        expected = theirs(images, **interpolates).last_hidden_state
        token, patches = ours.backbone(images)
    prefix = 1 + vit.VARIANTS[name].get("registers", 0)
    error = max((expected[:, 0] - token).abs().max().item(), (expected[:, prefix:] - patches.flatten(1, 2)).abs().max().item())
    scale = expected.abs().max().item()
    print(f"\n| {name} | {size[0] * patch}x{size[1] * patch} | {error:.1e} | {scale:.1f} |")
    assert patches.shape == (1, *size, vit.VARIANTS[name]["embed_dim"])
    assert scale > 1  # else the tolerance would mean nothing
    assert error < TOLERANCE


def grid(name, height=480, width=640):
    patch = vit.VARIANTS[name]["patch_size"]
    return height // patch, width // patch


# Two layers hold every part of a variant; a small grid that is not square, and the native one.
@pytest.mark.parametrize("name", OFFICIAL)
def test_features_equal_those_of_transformers(name):
    side = vit.VARIANTS[name]["image_size"] // vit.VARIANTS[name]["patch_size"]
    check_parity(name, (side, side), depth=2)
    check_parity(name, (9, 13), depth=2)


def test_whole_small_networks_equal_those_of_transformers_at_camera_size():
    for name in ("dino-vits16", "dinov2-vits14-registers", "dinov3-vits16"):
        check_parity(name, grid(name))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", ["native", "480x640"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_full_parity_with_transformers(name, size):
    side = vit.VARIANTS[name]["image_size"] // vit.VARIANTS[name]["patch_size"]
    check_parity(name, (side, side) if size == "native" else grid(name))


@pytest.mark.parametrize("name", ["dino-vits16", "dinov2-vits14", "dinov2-vits14-registers", "dinov3-vits16"])
def test_a_folder_from_the_hub_converts_to_the_variant_by_its_tensors(name, tmp_path):
    theirs = with_weights(hugging_face(name))
    theirs.save_pretrained(tmp_path)  # writes the published names, older than those in memory
    recipe, state = checkpoints.convert(tmp_path)
    assert (recipe["task"], recipe["backbone"]) == ("features", name)
    net = features.build(recipe).eval()
    net.load_state_dict(state)
    patch = vit.VARIANTS[name]["patch_size"]
    images = torch.randn(1, 3, 5 * patch, 4 * patch, generator=torch.Generator().manual_seed(2))
    interpolates = {"interpolate_pos_encoding": True} if name == "dino-vits16" else {}
    with torch.inference_mode():
        expected = theirs(images, **interpolates).last_hidden_state[:, -20:]
        torch.testing.assert_close(net(images).flatten(1, 2), expected, atol=TOLERANCE, rtol=0)


def metas_own_layout(name, state):
    """Return the tensors under the names of Meta's own files, with what else stands in them."""
    tensors = {key.removeprefix("backbone."): value for key, value in state.items()}
    if name.startswith("dinov3"):
        tensors["storage_tokens"] = tensors.pop("register_tokens")
        tensors["rope_embed.periods"] = torch.ones(16)
        for key in [key for key in tensors if key.endswith("qkv.bias")]:
            tensors[f"{key}_mask"] = torch.ones_like(tensors[key])
    if name.startswith("dino-"):
        return {"student": {}, "teacher": {f"module.backbone.{k}": v for k, v in tensors.items()} | {
            "module.head.mlp.0.weight": torch.ones(2, 2)}}
    return {**tensors, "mask_token": torch.zeros(1, vit.VARIANTS[name]["embed_dim"])}


@pytest.mark.parametrize("name", ["dino-vits16", "dinov2-vits14-registers", "dinov3-vits16"])
def test_metas_own_files_convert_to_the_same_network(name, tmp_path):
    net = randomize(features.build({"backbone": name}))
    torch.save(metas_own_layout(name, net.state_dict()), tmp_path / "weights.pth")
    recipe, state = checkpoints.convert(tmp_path / "weights.pth")
    assert recipe["backbone"] == name
    assert state.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(state[key], value, atol=0, rtol=0)


def test_a_vit_of_no_known_shape_is_refused_by_its_measures(tmp_path):
    net = vit.VisionTransformer(patch_size=16, embed_dim=96, depth=3, num_heads=3)
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(ModelError, match=re.escape("embed_dim 96, depth 3")):
        checkpoints.convert(tmp_path / "mine.pth")


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ModelError, match="dino-vits16"):
        features.build({"backbone": "dino-vits17"})


@pytest.mark.parametrize("name", ["dino-vits16", "dinov2-vits14-registers", "dinov3-vits16"])
def test_exports_at_a_fixed_size_and_onnx_runtime_agrees(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone = randomize(vit.VisionTransformer(**{**vit.VARIANTS[name], "depth": 1}))
    patch = backbone.patch_size
    images = torch.randn(1, 3, 6 * patch, 9 * patch, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = backbone(images)[1].numpy()
    backbone.fix_size(6 * patch, 9 * patch)
    net = features.FeatureNet(backbone)
    program = torch.onnx.export(net, (images,), dynamo=True, input_names=["image"], verbose=False)
    program.save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(session.run(None, {"image": images.numpy()})[0], expected, atol=TOLERANCE, rtol=0)


def test_rotary_positions_leave_the_prefix_alone_and_depend_on_distance_only():
    rope = vit.AxialRope(16)
    cosine, sine = rope(4, 4)
    x = torch.ones(1, 1, 5 + 16, 16)
    turned = vit.rotate(x, cosine, sine)
    assert torch.equal(turned[:, :, :5], x[:, :, :5])
    patches = turned[0, 0, 5:].reshape(4, 4, 16)
    right = (patches[:, 1:] * patches[:, :-1]).sum(-1)
    torch.testing.assert_close(right, right[:1, :1].expand_as(right), atol=1e-4, rtol=0)
