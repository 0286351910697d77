# SPDX-License-Identifier: Apache-2.0
"""The backbones that a recipe can name: one line of `ARCHITECTURES` and one file of nets/ for each architecture.

What a backbone is: a class whose keyword arguments a dict in `VARIANTS` holds, with `drop_path_rate` among them; `channels`,
those of its four maps; and `forward`, which takes images float `[B, 3, H, W]` of any size and returns the four maps
`[B, C_i, ceil(H / s), ceil(W / s)]` at the strides s = 4, 8, 16, 32. docs/backbones.md says how to add one.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from deeprob_perception.errors import ModelError
from deeprob_perception.nets import convnet, mambaout, segformer, swin, vim, vit_pyramid, vmamba

ARCHITECTURES: tuple[tuple[dict[str, dict], Callable[..., nn.Module]], ...] = (
    (swin.VARIANTS, swin.SwinTransformer),
    (vmamba.VARIANTS, vmamba.VMamba),
    (vim.VARIANTS, vim.VimPyramid),
    (mambaout.VARIANTS, mambaout.MambaOut),
    (segformer.VARIANTS, segformer.MixTransformer),
    (vit_pyramid.VARIANTS, vit_pyramid.ViTPyramid),
    (convnet.VARIANTS, convnet.ConvNet),
)

# What a recipe may set beside the name, where the architecture has it.
OPTIONS = ("window_size", "image_size", "norm_eps")


def names() -> list[str]:
    return [name for variants, _ in ARCHITECTURES for name in variants]


def build(recipe: dict[str, Any], drop_path_rate: float = 0.0) -> nn.Module:
    """Build the backbone that a recipe names, with random weights.

    :raises ModelError: for an unknown name, or an option that the architecture does not have, listing those that there are.
    """
    name = recipe["backbone"]
    found = next(((variants[name], backbone) for variants, backbone in ARCHITECTURES if name in variants), None)
    if found is None:
        raise ModelError(f"unknown backbone {name!r}; there are: {', '.join(names())}")
    variant, backbone = found
    options = {key: recipe[key] for key in OPTIONS if recipe.get(key)}
    taken = inspect.signature(backbone).parameters
    for key, value in options.items():
        if key not in taken:
            known = ", ".join(key for key in OPTIONS if key in taken) or "none"
            raise ModelError(f"the backbone {name} has no {key} (the recipe says {value}); its options are: {known}")
    return backbone(**{**variant, "drop_path_rate": drop_path_rate, **options})
