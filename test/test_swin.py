# SPDX-License-Identifier: Apache-2.0
"""Swin and UPerNet against `transformers`: the same random weights, the same numbers.

`pytest -m exhaustive -s test/test_swin.py` runs every size, window and input of the claim at full width and prints the errors.
"""

import functools
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="needs the extra `test`")

from transformers.initialization import no_init_weights  # noqa: E402

from deeprob_perception import checkpoints  # noqa: E402
from deeprob_perception.nets import swin  # noqa: E402
from deeprob_perception.nets.segmenter import SegmentationNet, build  # noqa: E402
from deeprob_perception.nets.upernet import UPerHead, adaptive_average_pool  # noqa: E402

VARIANTS = ("swin-tiny", "swin-small", "swin-base")
WINDOWS = (7, 12)
SIZES = ((224, 224), (512, 512), (480, 640), (375, 1242))  # height, width
CLASSES = 19
OFFICIAL_WIDTH = 512  # channels of the published UPerNet heads
TOLERANCE = 1e-4  # largest absolute difference; features reach 4 to 6 and logits 2 to 4 with these weights


def randomize(module, seed=0):
    """Give every parameter and running statistic a value that changes the output, at the scale of a trained network.

    The initial ones would hide errors: zero biases, tables and running means, unit norms.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
            if not value.is_floating_point():
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif "relative_position_bias_table" in name:
                value.normal_(0, 1, generator=generator)
            elif value.ndim >= 2:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(0, 0.2, generator=generator)
            else:
                value.normal_(1, 0.2, generator=generator)
    return module.eval()


def hugging_face(variant, window, width):
    """Return `transformers`' UPerNet on a Swin of the named size, with a head of `width` channels."""
    options = swin.VARIANTS[variant]
    backbone = transformers.SwinConfig(
        embed_dim=options["embed_dim"],
        depths=options["depths"],
        num_heads=options["num_heads"],
        window_size=window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.UperNetConfig(backbone_config=backbone, num_labels=CLASSES, hidden_size=width)
    return transformers.UperNetForSemanticSegmentation(config)


@functools.lru_cache(maxsize=1)
def pair(variant, window, width):
    """Return theirs, randomised, and ours with their weights converted."""
    with no_init_weights():  # every value is set below; the initialisation takes longer than the test
        theirs = randomize(hugging_face(variant, window, width))
        state = checkpoints.swin.rename(theirs.state_dict(), "theirs")
        recipe = {**checkpoints.swin.infer_recipe(state, {}, "theirs"), "classes": ["any"] * CLASSES}
        assert (recipe["backbone"], recipe["window_size"], recipe["head_channels"]) == (variant, window, width)
        ours = build(recipe)
    ours.load_state_dict(state)
    return theirs, ours.eval()


def picture(size, seed=1):
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def errors(theirs, ours, images):
    """Return the largest difference and the largest value, of the features and of the logits."""
    features = []
    hooks = [net.backbone.register_forward_hook(lambda _m, _i, out: features.append(out)) for net in (theirs, ours)]
    with torch.inference_mode():
        expected, found = theirs(images).logits, ours(images)
    for hook in hooks:
        hook.remove()
    maps = list(zip(features[0].feature_maps, features[1], strict=True))
    assert [f.shape for _, f in maps] == [e.shape for e, _ in maps]
    assert found.shape == expected.shape == (1, CLASSES, *images.shape[-2:])
    return (
        max((e - f).abs().max().item() for e, f in maps),
        max(e.abs().max().item() for e, _ in maps),
        (expected - found).abs().max().item(),
        expected.abs().max().item(),
    )


def check_parity(variant, window, size, width):
    feature_error, feature_scale, logit_error, logit_scale = errors(*pair(variant, window, width), picture(size))
    print(
        f"\n| {variant} | {window} | {size[0]}x{size[1]} | {feature_error:.1e} | {feature_scale:.1f} "
        f"| {logit_error:.1e} | {logit_scale:.1f} |"
    )
    assert min(feature_scale, logit_scale) > 1  # else the tolerance would mean nothing
    assert max(feature_error, logit_error) < TOLERANCE


# Every size and window once at 224, every input once with the smallest; the head is narrow (the official one is nine tenths
# of the arithmetic) but in one case. The full product is the next test's.
@pytest.mark.parametrize(
    ("variant", "window", "size", "width"),
    [("swin-tiny", 7, (224, 224), OFFICIAL_WIDTH)]
    + [(v, w, (224, 224), 64) for v in VARIANTS[1:] for w in WINDOWS]
    + [("swin-tiny", 12, size, 64) for size in SIZES]
    + [("swin-tiny", 7, size, 64) for size in SIZES[1:]],
)
def test_features_and_logits_equal_those_of_transformers(variant, window, size, width):
    check_parity(variant, window, size, width)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("variant", "window", "size"), list(itertools.product(VARIANTS, WINDOWS, SIZES)))
def test_full_parity_with_transformers(variant, window, size):
    check_parity(variant, window, size, OFFICIAL_WIDTH)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(7, 7), (16, 16), (15, 20), (12, 39), (13, 5), (3, 4), (1, 1)])
def test_pooling_equals_adaptive_average_pooling_for_sizes_the_bins_do_not_divide(size, bins):
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adaptive_average_pool(x, bins), torch.nn.AdaptiveAvgPool2d(bins)(x), atol=1e-6, rtol=0)


def test_a_swin_with_upernet_exports_and_onnx_runtime_agrees(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone = swin.SwinTransformer(24, (2, 1, 1, 1), (1, 2, 4, 8), window_size=7)
    net = randomize(SegmentationNet(backbone, UPerHead(backbone.channels, 5, channels=16)))
    images = picture((90, 122))  # divided by neither stride, window nor bins
    path = tmp_path / "net.onnx"
    program = torch.onnx.export(net, (images,), dynamo=True, input_names=["image"], verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": images.numpy()})[0]
    with torch.inference_mode():
        expected = net(images).numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("size", [(24, 24), (16, 12), (15, 22)])
def test_a_shifted_block_keeps_apart_what_only_the_shift_made_neighbours(size):
    """The last rows must not change the first, which the cyclic shift puts into one window with them."""
    block = randomize(swin.Block(8, 2, window_size=4, shift_size=2, mlp_ratio=2.0, qkv_bias=True, drop_path=0.0))
    height, width = size
    mask = swin.shifted_window_mask(height + -height % 4, width + -width % 4, 4, 2)
    x = torch.randn(1, height, width, 8, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, -2:] = other[:, -2:].flip(-1)  # not scaled: the norm would undo that

    def change_of_first_rows(mask):
        with torch.inference_mode():
            return (block(x, mask) - block(other, mask))[:, :2].abs().max().item()

    assert change_of_first_rows(mask * 0) > 1e-3  # without the mask they are mixed
    assert change_of_first_rows(mask) < 1e-6


def test_a_variants_window_can_be_set_by_the_recipe():
    recipe = {"backbone": "swin-tiny", "window_size": 12, "head": "fpn", "classes": ["a", "b"]}
    assert build(recipe).backbone.stages[0].window_size == 12


def test_stochastic_depth_drops_in_training_only():
    torch.manual_seed(0)
    drop = swin.DropPath(0.5)
    x = torch.ones(64, 2, 2, 3)
    assert torch.equal(drop.eval()(x), x)
    kept = drop.train()(x)[:, 0, 0, 0]
    assert set(kept.tolist()) == {0.0, 2.0}
