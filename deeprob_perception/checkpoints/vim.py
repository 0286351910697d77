# SPDX-License-Identifier: Apache-2.0
"""Published Vim checkpoints -> our tensor names, which are the official ones: the classifiers, without their class token."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, cat

from deeprob_perception.checkpoints import variants
from deeprob_perception.checkpoints.files import State
from deeprob_perception.errors import ModelError
from deeprob_perception.nets import vim

# The pyramid has neither the class token nor what comes after the last block.
IGNORED = re.compile(r"(^|\.)(cls_token$|head\.|norm_f\.)")


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Tell a Vim by the backward branch of its mixers."""
    return any(name.endswith(".mixer.A_b_log") for name in tensors)


def check_config(config: dict[str, Any], source: Path) -> None:
    """There is no config.json with these weights: the tensors show all that the released models differ in."""


def rename(tensors: Mapping[str, Tensor], source: str) -> State:
    """Bring a foreign state_dict to our names; the class token's place, the middle, is taken out of the positions."""
    token = any(name.endswith("cls_token") for name in tensors)
    state: State = {}
    for name, tensor in tensors.items():
        if IGNORED.search(name):
            continue
        name = re.sub(r"^(module\.)?(backbone\.)?", "backbone.", name)
        if name == "backbone.pos_embed" and token:
            middle = (tensor.shape[1] - 1) // 2
            tensor = cat((tensor[:, :middle], tensor[:, middle + 1 :]), 1)
        state[name] = tensor
    return state


def infer_recipe(state: State, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Find the variant by its tensors' shapes, and the images' size by the positions."""
    positions = state.get("backbone.pos_embed")
    side = 0 if positions is None else math.isqrt(positions.shape[1])
    if positions is None or side * side != positions.shape[1]:
        raise ModelError(f"{source}: a Vim without the positions of a square image; only those are supported")
    size = 16 * side  # with patches at a stride of 8 it is another image, and the same grid

    def network(name: str) -> vim.VimPyramid:
        return vim.VimPyramid(**vim.VARIANTS[name], image_size=size)

    recipe: dict[str, Any] = {
        "task": "backbone", "backbone": variants.find(state, vim.VARIANTS, network, "a Vim", source)
    }  # fmt: skip
    return {**recipe, "image_size": size}
