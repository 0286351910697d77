# SPDX-License-Identifier: Apache-2.0
"""A Vision Transformer as a feature extractor, built from a recipe (a plain dict that travels with the weights)."""

from typing import Any

from torch import Tensor, nn

from deeprob_perception.errors import ModelError
from deeprob_perception.nets import vit


class FeatureNet(nn.Module):
    """Images float32 `[B, 3, H*p, W*p]`, RGB, normalised -> features float32 `[B, H, W, C]`, one vector a patch."""

    def __init__(self, backbone: vit.VisionTransformer):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)[1]


def build(recipe: dict[str, Any], drop_path_rate: float = 0.0) -> FeatureNet:
    """Build the network that a recipe describes, with random weights.

    :param recipe: `backbone` (a name in `vit.VARIANTS`) and, where they differ from the variant's, `image_size` (of the
        position embedding, a side or height and width) and `norm_eps`.
    :raises ModelError: for an unknown name, listing those that there are.
    """
    name = recipe["backbone"]
    if name not in vit.VARIANTS:
        raise ModelError(f"unknown backbone {name!r}; there are: {', '.join(vit.VARIANTS)}")
    options = {key: recipe[key] for key in ("image_size", "norm_eps") if recipe.get(key)}
    return FeatureNet(vit.VisionTransformer(**{**vit.VARIANTS[name], "drop_path_rate": drop_path_rate, **options}))
