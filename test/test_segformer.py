# SPDX-License-Identifier: Apache-2.0
"""SegFormer against `transformers`: the same random weights, the same numbers, both layouts of the names."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")
transformers = pytest.importorskip("transformers", reason="needs the extra `test`")

from test_swin import picture, randomize  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from deeprob_perception import checkpoints  # noqa: E402
from deeprob_perception.errors import ModelError  # noqa: E402
from deeprob_perception.nets import segformer  # noqa: E402
from deeprob_perception.nets.segmenter import build  # noqa: E402

CLASSES = 19
TOLERANCE = 1e-4


def hugging_face(name, width):
    options = segformer.VARIANTS[name]
    config = transformers.SegformerConfig(
        hidden_sizes=list(options["dims"]), depths=list(options["depths"]), num_labels=CLASSES, decoder_hidden_size=width
    )
    with no_init_weights():
        return randomize(transformers.SegformerForSemanticSegmentation(config))


@pytest.mark.parametrize(
    ("name", "size"), [("mit-b0", (224, 224)), ("mit-b0", (75, 131)), ("mit-b1", (96, 160)), ("mit-b2", (64, 96))]
)
def test_logits_equal_those_of_transformers(name, size):
    theirs = hugging_face(name, 64)
    state = checkpoints.segformer.rename(theirs.state_dict(), "theirs")
    recipe = {**checkpoints.segformer.infer_recipe(state, {}, "theirs"), "classes": ["any"] * CLASSES}
    assert (recipe["backbone"], recipe["head"], recipe["head_channels"]) == (name, "segformer", 64)
    ours = build(recipe).eval()
    ours.load_state_dict(state)
    images = picture(size)
    with torch.inference_mode():
        expected = theirs(images).logits
        found = ours.head(ours.backbone(images))
    assert found.shape == expected.shape and expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_folder_from_the_hub_converts_to_the_same_network(tmp_path):
    theirs = hugging_face("mit-b0", 256)
    theirs.save_pretrained(tmp_path)  # writes the published names, older than those in memory
    recipe, state = checkpoints.convert(tmp_path)
    assert (recipe["task"], recipe["backbone"], len(recipe["classes"])) == ("segmentation", "mit-b0", CLASSES)
    net = build(recipe).eval()
    net.load_state_dict(state)
    images = picture((64, 96))
    with torch.inference_mode():
        torch.testing.assert_close(net.head(net.backbone(images)), theirs(images).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("sr_ratios", [4, 2, 1, 1])])
def test_a_configuration_that_computes_something_else_is_refused(key, value, tmp_path):
    with pytest.raises(ModelError, match=f"{key}="):
        checkpoints.segformer.check_config({"model_type": "segformer", key: value}, tmp_path)
