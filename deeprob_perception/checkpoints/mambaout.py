# SPDX-License-Identifier: Apache-2.0
"""Published MambaOut checkpoints -> our tensor names, which are the official ones: the classifiers, without their head."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeprob_perception.checkpoints import variants
from deeprob_perception.checkpoints.files import State
from deeprob_perception.nets import mambaout

IGNORED = re.compile(r"^(module\.)?(head|norm)\.")


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Tell a MambaOut by the names of its strided convolutions, which ConvNeXt numbers instead."""
    return any(re.search(r"(^|\.)downsample_layers\.0\.conv1\.weight$", name) for name in tensors)


def check_config(config: dict[str, Any], source: Path) -> None:
    """There is no config.json with these weights: the tensors show all that the released models differ in."""


def rename(tensors: Mapping[str, Tensor], source: str) -> State:
    """Bring a foreign state_dict to our names; the stages' norms, which a classifier hasn't, begin as plain ones."""
    state: State = {}
    for name, tensor in tensors.items():
        if not IGNORED.search(name):
            state[re.sub(r"^(module\.)?(backbone\.)?", "backbone.", name)] = tensor
    for i in range(4):
        like = state.get(f"backbone.stages.{i}.0.norm.weight")
        if like is not None:
            state.setdefault(f"backbone.norms.{i}.weight", torch.ones_like(like))
            state.setdefault(f"backbone.norms.{i}.bias", torch.zeros_like(like))
    return state


def infer_recipe(state: State, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Find the variant by its tensors' shapes."""
    name = variants.find(
        state, mambaout.VARIANTS, lambda name: mambaout.MambaOut(**mambaout.VARIANTS[name]), "a MambaOut", source
    )
    return {"task": "backbone", "backbone": name}
