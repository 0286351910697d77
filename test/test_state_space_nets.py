# SPDX-License-Identifier: Apache-2.0
"""VMamba, Vim and MambaOut against the official code's numbers, and their checkpoints in the official layouts."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")

from test_scan import assert_same, golden  # noqa: E402
from test_swin import randomize  # noqa: E402

from deeprob_perception import checkpoints  # noqa: E402
from deeprob_perception.errors import ModelError  # noqa: E402
from deeprob_perception.nets import backbones, mambaout, vim, vmamba  # noqa: E402

NETWORK = 1e-4  # of the largest value; blocks are held to test_scan's tolerance


def sizes(tensors):
    return [name.removesuffix(".input") for name in tensors if name.endswith(".input")]


@pytest.mark.parametrize("way", vmamba.DIRECTIONS)
def test_the_four_ways_through_a_map_are_the_official_ones(shared, way):
    t, _, _ = golden(shared, "vmamba_cross_scan_merge")
    size = t["x"].shape[2:]
    for k, (columns, reverse) in enumerate(vmamba.DIRECTIONS[way]):
        tokens = vmamba.unfold(t["x"], columns)  # [L, B, C]
        assert torch.equal((tokens.flip(0) if reverse else tokens).permute(1, 2, 0), t[f"{way}.scan"][:, k])
    merged = 0
    for k, (columns, reverse) in enumerate(vmamba.DIRECTIONS[way]):
        tokens = t["ys"][:, k].flatten(2).permute(2, 0, 1)
        merged = merged + vmamba.fold(tokens.flip(0) if reverse else tokens, size, columns)
    assert_same(merged.flatten(1, 2).transpose(1, 2), t[f"{way}.merge"])


@pytest.mark.parametrize("name", ["v05_noz_r1", "v05_noz_r2_chlast", "v05_gate_n4", "v0_n16"])
def test_2d_scans_equal_the_official_ones(shared, name):
    t, config, state = golden(shared, f"vmamba_ss2d_{name}")
    gate, bias = "noz" not in config["forward_type"], config.get("conv_bias", True)
    block = vmamba.SS2D(config["d_model"], config["ssm_ratio"], config["d_state"], gate, bias)
    block.load_state_dict(state)
    first = config.get("channel_first", False)
    x = t["input"].permute(0, 2, 3, 1) if first else t["input"]
    with torch.inference_mode():
        y = block(x.flatten(1, 2), *x.shape[1:3]).unflatten(1, x.shape[1:3])
    assert_same(y.permute(0, 3, 1, 2) if first else y, t["output"])


def vmamba_of(config):
    first = config["forward_type"] == "v0"
    return vmamba.VMamba(
        tuple(config["dims"]), config["depths"], config["ssm_ratio"], config["ssm_d_state"], first, config["ssm_conv_bias"],
        config["mlp_ratio"], first,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("name", ["s1", "s2", "v0"])
def test_vmambas_maps_equal_the_official_ones(shared, name):
    t, config, state = golden(shared, f"vmamba_backbone_{name}")
    net = vmamba_of(config)
    net.load_state_dict(state)
    for size in sizes(t):
        with torch.inference_mode():
            maps = net(t[f"{size}.input"])
        for i, found in enumerate(maps):
            assert_same(found, t[f"{size}.stage{i}"], NETWORK)


def test_a_vmamba_classifier_becomes_a_backbone_whose_last_norm_is_its_own(shared):
    t, config, state = golden(shared, "vmamba_classifier")
    converted = checkpoints.vmamba.rename(state, "golden")
    net = vmamba_of(config)
    net.load_state_dict({name.removeprefix("backbone."): value for name, value in converted.items()})
    with torch.inference_mode():
        pooled = net(t["input"])[3].mean((2, 3))
    logits = pooled @ state["classifier.head.weight"].T + state["classifier.head.bias"]
    assert_same(logits, t["logits"], NETWORK)


@pytest.mark.parametrize("name", ["small_model", "stride8_nonsquare", "no_cls_mean_pool", "layernorm_no_divide"])
def test_vim_equals_the_official_one(shared, name):
    t, config, state = golden(shared, f"vim_{name}")
    net = vim.VisionMamba(
        config["embed_dim"], config["depth"], config["patch_size"], config["stride"], config["img_size"],
        config["if_cls_token"], config["num_classes"], config["rms_norm"], config["if_divide_out"],
    ).eval()  # fmt: skip
    net.load_state_dict(state)
    mixed = {}
    for i, layer in enumerate(net.layers):
        layer.register_forward_hook(lambda _m, _i, out, i=i: mixed.update({i: out}))
    with torch.inference_mode():
        assert_same(net(t["input"]), t["output"], NETWORK)
        assert_same(net.tokens(t["input"]), t["final_norm_tokens"], NETWORK)
    for i, (hidden, residual) in mixed.items():
        assert_same(hidden, t[f"inter.layer{i}.hidden_states"], NETWORK)
        assert_same(residual, t[f"inter.layer{i}.residual"], NETWORK)


def test_mambaouts_block_equals_the_official_one(shared):
    t, config, state = golden(shared, "mambaout_gated_cnn_block")
    block = mambaout.GatedCnnBlock(config["dim"])
    block.load_state_dict(state)
    with torch.inference_mode():
        assert_same(block(t["input"]), t["output"])


@pytest.mark.parametrize("name", ["small_config", "partial_conv"])
def test_mambaouts_stages_equal_the_official_ones(shared, name):
    t, config, state = golden(shared, f"mambaout_{name}")
    net = mambaout.MambaOut(config["depths"], config["dims"], config.get("conv_ratio", 1.0)).eval()
    converted = checkpoints.mambaout.rename(state, "golden")
    net.load_state_dict({key.removeprefix("backbone."): value for key, value in converted.items()})
    for size in sizes(t):
        with torch.inference_mode():
            maps = net.stage_outputs(t[f"{size}.input"])
        for i, found in enumerate(maps):
            assert_same(found, t[f"{size}.stage{i}"], NETWORK)


def official(name):
    """Return a classifier's state_dict as its authors publish it, with random weights, and the network's own."""
    net = randomize(backbones.build({"backbone": name}))
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("neck.")}
    tensors = dict(state)
    width = net.channels[-1]
    if name.startswith("vmamba"):
        for part in ("weight", "bias"):
            tensors[f"classifier.norm.{part}"] = tensors.pop(f"outnorm3.{part}")
            for i in range(3):
                state[f"outnorm{i}.{part}"] = torch.ones(net.channels[i]) * (part == "weight")
                del tensors[f"outnorm{i}.{part}"]
        tensors["classifier.head.weight"] = torch.ones(1000, width)
    elif name.startswith("mambaout"):
        for key in [key for key in tensors if key.startswith("norms.")]:
            state[key] = torch.ones_like(tensors.pop(key)) * key.endswith("weight")
        tensors |= {"norm.weight": torch.ones(width), "head.fc1.weight": torch.ones(4 * width, width)}
    else:
        token = torch.full((1, 1, width), 9.0)
        positions = tensors["pos_embed"]
        middle = positions.shape[1] // 2
        tensors["pos_embed"] = torch.cat((positions[:, :middle], token, positions[:, middle:]), 1)
        tensors |= {"cls_token": token, "norm_f.weight": torch.ones(width), "head.weight": torch.ones(1000, width)}
    return tensors, state


@pytest.mark.parametrize("name", ["vmamba-tiny", "vim-tiny", "mambaout-femto"])
def test_official_files_convert_to_the_variant_by_their_tensors(name, tmp_path):
    tensors, expected = official(name)
    torch.save({"model": tensors}, tmp_path / "weights.pth")
    recipe, state = checkpoints.convert(tmp_path / "weights.pth")
    assert (recipe["task"], recipe["backbone"]) == ("backbone", name)
    assert {key.removeprefix("backbone.") for key in state} == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[f"backbone.{key}"], value, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["vmamba-micro", "vim-micro", "mambaout-femto"])
def test_a_network_of_no_known_shape_is_refused_and_what_there_is_listed(name, tmp_path):
    family = {"vmamba": vmamba, "vim": vim, "mambaout": mambaout}[name.split("-")[0]]
    options = dict(family.VARIANTS[name])
    options |= {"embed_dim": 96} if family is vim else {"depths": (1, 1, 1, 1)}
    net = next(build for variants, build in backbones.ARCHITECTURES if variants is family.VARIANTS)(**options)
    torch.save(net.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(ModelError, match=rf"mine\.pth: a .* none of .*{name}"):
        checkpoints.convert(tmp_path / "mine.pth")


def test_a_missing_tensor_is_named(tmp_path):
    tensors, _ = official("mambaout-femto")
    del tensors["stages.2.4.conv.weight"]
    torch.save(tensors, tmp_path / "part.pth")
    with pytest.raises(ModelError, match=r"mambaout-femto: 1 missing \(backbone\.stages\.2\.4\.conv\.weight\)"):
        checkpoints.convert(tmp_path / "part.pth")
