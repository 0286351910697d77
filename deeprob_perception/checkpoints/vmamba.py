# SPDX-License-Identifier: Apache-2.0
"""Published VMamba checkpoints -> our tensor names, the official ones: classifiers, and mmsegmentation's with UPerNet."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeprob_perception.checkpoints import swin, variants
from deeprob_perception.checkpoints.files import State
from deeprob_perception.errors import ModelError
from deeprob_perception.nets import vmamba

# The auxiliary training head, and the classifier's last layer.
IGNORED = re.compile(r"^auxiliary_head\.|(^|\.)classifier\.head\.")


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Tell a VMamba by the four directions' matrices."""
    return any(name.endswith(".op.x_proj_weight") for name in tensors)


def check_config(config: dict[str, Any], source: Path) -> None:
    """There is no config.json with these weights: the tensors show all that the released models differ in."""


def rename(tensors: Mapping[str, Tensor], source: str) -> State:
    """Bring a foreign state_dict to our names; a classifier's final norm becomes that of the fourth map, as for Swin."""
    state: State = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if IGNORED.search(name):
            continue
        if name.startswith("decode_head."):
            name = swin.our_name(name)
        elif not name.startswith("backbone."):
            name = f"backbone.{name}"
        if name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]  # older files hold the products as 1 x 1 convolutions
        if name in state:
            raise ModelError(f"{source}: two tensors mean {name}")
        state[name] = tensor
    complete(state)
    return state


def complete(state: State) -> None:
    final = {part: state.pop(f"backbone.classifier.norm.{part}", None) for part in ("weight", "bias")}
    for i in range(4):
        like = state.get(f"backbone.layers.{i}.blocks.0.norm.weight")
        if f"backbone.outnorm{i}.weight" in state or like is None or "head.classify.weight" in state:
            continue
        weight, bias = (final["weight"], final["bias"]) if i == 3 else (None, None)
        state[f"backbone.outnorm{i}.weight"] = torch.ones_like(like) if weight is None else weight
        state[f"backbone.outnorm{i}.bias"] = torch.zeros_like(like) if bias is None else bias
    swin.complete(state)  # the counters of UPerNet's batch normalisation


def infer_recipe(state: State, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Find the variant by its tensors' shapes."""
    name = variants.find(state, vmamba.VARIANTS, lambda name: vmamba.VMamba(**vmamba.VARIANTS[name]), "a VMamba", source)
    recipe: dict[str, Any] = {"task": "backbone", "backbone": name}
    if "head.classify.weight" in state:
        recipe.update(task="segmentation", head="upernet", head_channels=state["head.classify.weight"].shape[1])
    return recipe
