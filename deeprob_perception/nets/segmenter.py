# SPDX-License-Identifier: Apache-2.0
"""A backbone under a head: the segmentation network, built from a recipe (a plain dict that travels with the weights)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deeprob_perception.errors import ModelError
from deeprob_perception.nets import backbones
from deeprob_perception.nets.fpn import FpnHead

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SegmentationNet(nn.Module):
    """Images float32 `[B, 3, H, W]`, RGB, normalised -> logits float32 `[B, classes, H, W]`."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.backbone(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


def build(recipe: dict[str, Any], drop_path_rate: float = 0.0) -> SegmentationNet:
    """Build the network that a recipe describes, with random weights.

    :param recipe: `backbone` (one of `backbones.names()`), `head` (`fpn`, `upernet` or `segformer`), `classes` (names in id
        order), and, where they differ from the usual, the backbone's options (`backbones.OPTIONS`) and `head_channels` (the
        width of the last two).
    :param drop_path_rate: stochastic depth while training.
    :raises ModelError: for an unknown name, listing those that there are.
    """
    backbone = backbones.build(recipe, drop_path_rate)
    classes = len(recipe["classes"])
    head: nn.Module
    if recipe["head"] == "fpn":
        head = FpnHead(backbone.channels, classes)
    elif recipe["head"] == "upernet":
        from deeprob_perception.nets.upernet import UPerHead

        head = UPerHead(backbone.channels, classes, recipe.get("head_channels", 512))
    elif recipe["head"] == "segformer":
        from deeprob_perception.nets.segformer import MlpHead

        head = MlpHead(backbone.channels, classes, recipe.get("head_channels", 256))
    else:
        raise ModelError(f"unknown head {recipe['head']!r}; there are: fpn, upernet, segformer")
    return SegmentationNet(backbone, head)
