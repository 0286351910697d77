# SPDX-License-Identifier: Apache-2.0
"""What stands around a network in a model: 8-bit image in; 8-bit labels, or features of unit length, out; all in one graph."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeprob_perception.errors import ModelError


class ImageGraph(nn.Module):
    """`image` uint8 `[1, H, W, 3]` BGR -> what the network says of it, in the type of the network's weights.

    Logits `[1, K, H, W]` of a segmentation network, features `[1, h, w, C]` of a ViT.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, net: nn.Module, recipe: dict[str, Any]):
        super().__init__()
        self.net = net
        self.first = first_kernel(net)
        std = torch.tensor(recipe["std"], dtype=torch.float32).flip(0)  # RGB in the recipe, BGR here
        mean = torch.tensor(recipe["mean"], dtype=torch.float32).flip(0)
        self.register_buffer("scale", (1 / (255 * std)).reshape(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).reshape(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Any:
        # Cast before transposing: TensorRT refuses a uint8 transpose.
        x = image.to(torch.float32).permute(0, 3, 1, 2) * self.scale + self.offset  # [1, 3, H, W], BGR
        # The first kernel's channels are turned round instead of the image's: back ends do that once, while they load.
        kernel = self.net.get_parameter(self.first).flip(1)
        if kernel.dtype != x.dtype:
            x = x.to(kernel.dtype)
        return torch.func.functional_call(self.net, {self.first: kernel}, x)


class SegmentationGraph(ImageGraph):
    """What is exported: `image` uint8 `[1, H, W, 3]` BGR -> `labels` uint8 `[1, H, W]`, `confidence` uint8 `[1, H, W]`."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(image)
        return labels_of(logits), confidence_of(logits)


class FeatureGraph(ImageGraph):
    """What is exported: `image` uint8 `[1, H, W, 3]` BGR -> `features` float32 `[1, h, w, C]` of unit length, one a patch."""

    def forward(self, image: Tensor) -> Tensor:
        return features_of(super().forward(image))


def labels_of(logits: Tensor) -> Tensor:
    """Return uint8 `[1, H, W]`: the class of the largest of logits `[1, K, H, W]`."""
    return logits.argmax(1).to(torch.uint8)


def confidence_of(logits: Tensor) -> Tensor:
    """Return uint8 `[1, H, W]`, 255 = 1.0: the largest soft-max value without the others: exp(max - logsumexp)."""
    top = logits.amax(1, keepdim=True)
    confidence = 1 / (logits - top).exp().sum(1)
    return (confidence * 255).round().to(torch.uint8)


def features_of(features: Tensor) -> Tensor:
    """Return features `[1, h, w, C]` with length one along C: what is compared is their direction."""
    return F.normalize(features, dim=-1)


# What a model file puts out -> how it comes of what the network says (float32).
OUTPUTS = {"labels": labels_of, "confidence": confidence_of, "features": features_of}


def first_kernel(net: nn.Module) -> str:
    """Return the name of the weight that reads the image: the first convolution's, of three input channels."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != 3:
                raise ModelError(f"the network's first convolution takes {module.in_channels} channels; images have 3")
            return f"{name}.weight"
    raise ModelError("the network has no convolution that could read an image")
