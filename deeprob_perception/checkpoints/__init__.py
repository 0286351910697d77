# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints -> ours: one file an architecture, chosen by the tensors' names.

What is inferred from the tensors (sizes, depths, heads, window, number of classes) is never guessed from a file's name.
Torch is imported here, so nothing that runs on a robot may import this package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deeprob_perception.checkpoints import get, mambaout, segformer, swin, vim, vit, vmamba
from deeprob_perception.checkpoints.files import WEIGHT_FILES, State, read_json, read_tensors
from deeprob_perception.errors import ModelError
from deeprob_perception.nets import features, reacher, segmenter
from deeprob_perception.nets.get import build as build_get

__all__ = ["build", "check_state", "convert"]

# Asked in this order whether a file is theirs; a Vim has a ViT's class token, and what is nobody's is Swin's to refuse.
LAYOUTS = (vmamba, vim, mambaout, segformer, vit)


def convert(source: Path) -> tuple[dict[str, Any], State]:
    """Read an official checkpoint and return `(recipe, state)` under our names, float32.

    :param source: a folder from the Hugging Face hub (config.json beside the weights), or a .safetensors, .bin, .pth,
        .pt or .ckpt file. A pickle is read with `weights_only=True`: no code in it runs.
    :return: a recipe with `task` `features` (a DINO ViT), `segmentation` (Swin or VMamba + UPerNet, SegFormer),
        `leap_rotation` (GET-Zero), or `backbone`
        where there is no head: then the norms of stages 1 to 3, which a classifier doesn't have, are the identity, the fourth
        is its final one. A Vim's neck is left out, too: it is trained with a head.
    :raises ModelError: for another architecture, or missing, unexpected or mis-shaped tensors (the first few names).
    """
    source = Path(source)
    weights = source
    if source.is_dir():
        found = [source / name for name in WEIGHT_FILES if (source / name).is_file()]
        if not found:
            raise ModelError(f"{source}: none of {', '.join(WEIGHT_FILES)} in this folder")
        weights = found[0]
    tensors, beside = read_tensors(weights)
    if get.recognises(tensors, beside):  # a policy sees no images, and carries its configuration
        recipe, state = get.convert(tensors, beside, str(weights))
    else:
        recipe, state = convert_image_network(tensors, beside, weights)
    check_state(recipe, state, str(weights))
    return recipe, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def convert_image_network(tensors: State, beside: dict[str, Any], weights: Path) -> tuple[dict[str, Any], State]:
    """Return recipe and state of a network that sees images; its neighbours in the folder say what the tensors don't."""
    config = read_json(weights.parent / "config.json")
    layout: Any = next((layout for layout in LAYOUTS if layout.recognises(tensors)), swin)
    layout.check_config(config, weights)
    state = layout.rename(tensors, str(weights))
    recipe = layout.infer_recipe(state, config, str(weights))
    preprocessor = read_json(weights.parent / "preprocessor_config.json")
    recipe["mean"] = list(preprocessor.get("image_mean", segmenter.IMAGENET_MEAN))
    recipe["std"] = list(preprocessor.get("image_std", segmenter.IMAGENET_STD))
    if recipe["task"] == "segmentation":
        count = state["head.classify.weight"].shape[0]
        recipe["classes"] = swin.class_names(config, beside, count)
        recipe["palette"] = swin.color_map(count)
    return recipe, state


def build(recipe: dict[str, Any]) -> nn.Module:
    """Build the network of a recipe of any task, with random weights."""
    if recipe.get("task") == "reach":
        return reacher.build(recipe)
    if recipe.get("task") == "leap_rotation":
        return build_get(recipe)
    return features.build(recipe) if recipe.get("task") == "features" else segmenter.build(recipe)


def check_state(recipe: dict[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Compare the tensors with the network that the recipe describes, before anything is loaded.

    :raises ModelError: listing the first few missing, unexpected and mis-shaped names.
    """
    with torch.device("meta"):  # shapes only, no memory
        if recipe.get("task") == "backbone":
            net = segmenter.build({**recipe, "head": "fpn", "classes": ["any"]})
            whole = {name: t for name, t in net.state_dict().items() if name.startswith("backbone.")}
            # A plain encoder's neck belongs to the head that it was trained with.
            expected = {name: t for name, t in whole.items() if not name.startswith("backbone.neck.")}
        else:
            expected = build(recipe).state_dict()
    wrong = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "mis-shaped": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in wrong.items()
            if names
        ]
        raise ModelError(f"{source}: its tensors are not those of {recipe['backbone']}: {'; '.join(parts)}")
