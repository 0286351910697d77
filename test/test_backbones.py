# SPDX-License-Identifier: Apache-2.0
"""Every backbone by one name in the recipe: the same pyramid, and the same labels from every engine."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")

from deeprob_perception import engines, export  # noqa: E402
from deeprob_perception.engines import builder, lowering, model_file, tensorrt_library  # noqa: E402
from deeprob_perception.errors import ModelError  # noqa: E402
from deeprob_perception.nets import backbones, segmenter  # noqa: E402
from deeprob_perception.nets.image_graph import ImageGraph  # noqa: E402
from deeprob_perception.nets.plain_pyramid import cubic_matrix, resize_positions  # noqa: E402

# The variant of about 6 M parameters of each, and what shortens it: a stage of one block holds every part.
SMALL = {
    "swin-micro": {"depths": (2, 1, 1, 1)},
    "vmamba-micro": {"depths": (1, 1, 1, 1)},
    "vim-micro": {"depth": 4},
    "mambaout-femto": {"depths": (1, 1, 1, 1)},
    "mit-micro": {"depths": (1, 1, 1, 1)},
    "vit-tiny": {"depth": 4},
    "convnet-micro": {"depths": (1, 1, 1, 1)},
}
SIZE = (75, 130)  # divided by neither stride, window, patch nor block
CLASSES = 5
WHOLE = {name: (build, dict(variants[name])) for variants, build in backbones.ARCHITECTURES for name in variants}
RTX = [library for library in tensorrt_library.libraries()[0] if library.builds_anywhere]


@pytest.fixture(scope="module")
def short():
    """Short networks under the variants' own names."""
    with pytest.MonkeyPatch.context() as patch:
        for variants, _ in backbones.ARCHITECTURES:
            for name in variants.keys() & SMALL.keys():
                patch.setitem(variants, name, {**variants[name], **SMALL[name]})
        yield


def balanced(recipe, seed=7):
    """Return a network with random weights whose labels vary over the picture: logits balanced on it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = segmenter.build(recipe).eval()
    with torch.no_grad():
        logits = ImageGraph(net, recipe)(torch.from_numpy(blobs()))
        mean, std = logits.mean((0, 2, 3)), logits.std((0, 2, 3))
        net.head.classify.weight /= std[:, None, None, None] / 3
        net.head.classify.bias.copy_((net.head.classify.bias - mean) / std * 3)
    return net


def recipe_of(name, head="fpn"):
    return {
        "task": "segmentation", "backbone": name, "head": head, "head_channels": 32, "classes": list("abcde"),
        "palette": [[i, i, i] for i in range(CLASSES)], "mean": list(segmenter.IMAGENET_MEAN),
        "std": list(segmenter.IMAGENET_STD),
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(request, short, tmp_path_factory):
    """One backbone exported, and torch's labels of a picture from the weights as the file holds them."""
    recipe = recipe_of(request.param)
    net = balanced(recipe)
    path = tmp_path_factory.mktemp("model") / f"{request.param}.onnx"
    export.export_segmentation(net, recipe, path, *SIZE, {})
    net.load_state_dict(export.round_weights(net.state_dict()))
    image = blobs()
    with torch.inference_mode():
        labels = export.SegmentationGraph(net, recipe)(torch.from_numpy(image))[0].numpy()
    return path, image, labels


def blobs():
    import cv2

    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)[None]


every = pytest.mark.parametrize("model", SMALL, indirect=True)


# By decorators of one parameter each, so that pytest makes each model once.
@every
class TestExported:
    @pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
    def test_engines_give_torchs_labels(self, model, backend, tmp_path):
        if reason := engines.unavailable(backend):
            pytest.skip(reason)
        path, image, expected = model
        shares = np.bincount(expected.ravel(), minlength=CLASSES) / expected.size
        assert (shares > 0.01).sum() >= 3  # else agreement would mean nothing
        found = engines.load(path, backend, "fp32", tmp_path, threads=1)(image=image, outputs=["labels"])["labels"]
        assert (found == expected).mean() >= 0.999

    def test_the_graph_has_standard_operators_and_static_shapes(self, model):
        import onnx

        graph = onnx.shape_inference.infer_shapes(onnx.load(model[0])).graph
        assert {node.domain for node in graph.node} == {""}
        assert not {"Loop", "Scan", "If", "CumSum", "Einsum"} & {node.op_type for node in graph.node}
        for value in graph.value_info:
            assert all(d.HasField("dim_value") for d in value.type.tensor_type.shape.dim), value.name

    @pytest.mark.skipif(not RTX, reason=f"needs TensorRT for RTX: {tensorrt_library.libraries()[1]}")
    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_tensorrt_builds_it_without_a_gpu(self, model, precision):
        path = model[0]
        proto = lowering.lower(model_file.parse(path), precision)
        plan = builder.serialise(proto, builder.Target("sm_86", "", RTX[0], False), path.name)
        assert len(plan) > path.stat().st_size * (0.9 if precision == "fp16" else 1.8)  # the weights are in it

    def test_rounding_to_fp16_where_tensorrt_does_changes_few_labels(self, model):
        import onnxruntime

        path, image, expected = model
        proto = lowering.lower(model_file.parse(path), "fp16", emulate=True)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        assert (session.run(["labels"], {"image": image})[0] == expected).mean() >= 0.98

    def test_weights_read_back_from_the_file(self, model):
        from deeprob_perception import zoo

        recipe, state = zoo.load_checkpoint(model[0])
        net = segmenter.build(recipe).eval()
        net.load_state_dict(state)
        with torch.inference_mode():
            labels = export.SegmentationGraph(net, recipe)(torch.from_numpy(model[1]))[0].numpy()
        np.testing.assert_array_equal(labels, model[2])


@pytest.mark.parametrize("model", ["vmamba-micro"], indirect=True)
def test_replay_and_the_node_run_it_by_their_model_parameter(model, tmp_path):
    pytest.importorskip("rclpy")
    from test_replay import read, write_frames

    from deeprob_perception.messages.cdr import make_header, stamp_ns
    from deeprob_perception.messages.images import make_image, to_array
    from deeprob_perception.replay import Options, replay
    from deeprob_perception.replay_tasks import MASK

    path, image, expected = model
    bag = write_frames(tmp_path / "in.mcap", [image[0]] * 2)
    replay(Options(bag, tmp_path / "out.mcap", str(path), backend="onnxruntime", threads=1))
    for _, mask in read(tmp_path / "out.mcap", MASK):
        assert (to_array(mask) == expected[0]).mean() >= 0.999

    from ros_harness import Probe, isolated_ros, segmentation_node

    with isolated_ros():
        process = segmentation_node(tmp_path / "log", model=path, precision="fp32", threads=1)
        probe = Probe(process)
        try:
            masks = probe.listen("/segmentation/mask")
            message = make_image(image[0], "bgr8", make_header(1_000_000_000, "camera"))
            mask = probe.mask_of(probe.publisher("/image"), message, masks)
            assert stamp_ns(mask.header) == 1_000_000_000
            assert (to_array(mask) == expected[0]).mean() >= 0.999
        finally:
            probe.close()
            code = process.stop()
        assert code == 0, process.output


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("head", ["fpn", "upernet", "segformer"])
def test_every_backbone_goes_under_every_head_at_any_size(short, name, head):
    net = segmenter.build(recipe_of(name, head)).eval()
    height, width = 61, 100
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pyramid = net.backbone(images)
        assert net.head(pyramid).shape == (1, CLASSES, 16, 25)
    expected = [(1, c, -(-height // s), -(-width // s)) for c, s in zip(net.backbone.channels, (4, 8, 16, 32), strict=True)]
    assert [tuple(x.shape) for x in pyramid] == expected


@pytest.mark.parametrize("name", SMALL)
def test_the_small_variants_are_of_one_size(name):
    build, options = WHOLE[name]
    with torch.device("meta"):
        net = build(**options)
    assert 5.4e6 < sum(p.numel() for p in net.parameters()) < 6.4e6


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_weight(short, name):
    torch.manual_seed(0)
    net = segmenter.build(recipe_of(name)).train()
    net(torch.randn(2, 3, 64, 96)).square().mean().backward()
    # MambaOut's and VMamba's every parameter is used; a ViT's class token lives on in the attention.
    dead = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not dead


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "mamba"}, r"unknown backbone 'mamba'; there are: swin-micro, .*vmamba-micro, .*mit-b0, .*convnet-micro"),
        ({"backbone": "dinov2-vits14"}, r"patches of 14 .*vit-tiny"),
        ({"backbone": "vmamba-micro", "window_size": 7}, r"vmamba-micro has no window_size .*options are: none"),
        ({"backbone": "swin-micro", "image_size": 64}, r"swin-micro has no image_size .*options are: window_size"),
        ({"head": "mask2former"}, r"unknown head 'mask2former'; there are: fpn, upernet, segformer"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(change, message):
    with pytest.raises(ModelError, match=message):
        segmenter.build({**recipe_of("swin-micro"), **change})


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    from deeprob_perception import zoo

    recipe = recipe_of("convnet-micro")
    path = zoo.save_checkpoint(tmp_path / "c.safetensors", segmenter.build(recipe).state_dict(), recipe_of("mambaout-femto"))
    with pytest.raises(ModelError, match=r"not those of mambaout-femto: \d+ missing \(backbone\.downsample.*unexpected"):
        zoo.load_checkpoint(path)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (30, 40)), ((14, 14), (5, 9)), ((4, 6), (4, 11))])
def test_positions_are_resized_as_torch_resizes_pictures(old, new):
    x = torch.randn(1, old[0] * old[1], 8, generator=torch.Generator().manual_seed(0))
    grid = x.reshape(1, *old, 8).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=new, mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(resize_positions(x, old, new), expected, atol=1e-5, rtol=0)


def test_rows_of_the_resizing_sum_to_one():
    torch.testing.assert_close(cubic_matrix(14, 40).sum(1), torch.ones(40))
