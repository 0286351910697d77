# SPDX-License-Identifier: Apache-2.0
"""A plain Vision Transformer under a segmentation head: full attention, and the neck that makes a pyramid of one stride.

Weights of `nets/vit.py` fit by their names, so that a DINO checkpoint is something to start from.
"""

import math

import torch
from torch import Tensor

from deeprob_perception.errors import ModelError
from deeprob_perception.nets import vit
from deeprob_perception.nets.plain_pyramid import PlainNeck, pad_to_patch, resize_positions, taps

VARIANTS = vit.VARIANTS


class ViTPyramid(vit.VisionTransformer):
    """The backbone: images of any size in, maps at strides 4, 8, 16 and 32 out, all of one width.

    The four maps are taken after each quarter of the blocks and normalised by the one norm, as DINO evaluates its layers.

    :raises ModelError: for a patch that is no stride of the pyramid.
    """

    def __init__(self, **options):  # type: ignore[no-untyped-def]
        super().__init__(**options)
        if self.patch_size not in (8, 16):
            known = ", ".join(name for name, variant in VARIANTS.items() if variant["patch_size"] in (8, 16))
            raise ModelError(f"a ViT with patches of {self.patch_size} gives no map of stride 32; those that do: {known}")
        self.channels = [self.embed_dim] * 4
        self.neck = PlainNeck(self.embed_dim, self.patch_size)

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        x = self.patch_embed(pad_to_patch(images, self.patch_size))  # [B, H, W, C]
        batch, height, width, dim = x.shape
        x = x.flatten(1, 2)
        prefix = self.cls_token
        if self.pos_embed is not None:
            side = math.isqrt(self.pos_embed.shape[1] - 1)
            x = x + resize_positions(self.pos_embed[:, 1:], (side, side), (height, width))
            prefix = prefix + self.pos_embed[:, :1]
        if self.register_tokens is not None:
            prefix = torch.cat((prefix, self.register_tokens), 1)
        x = torch.cat((prefix.expand(batch, -1, -1), x), 1)  # [B, T, C]
        rotation = None if self.rope is None else self.rope(height, width)
        maps, wanted = [], taps(len(self.blocks))
        for i, block in enumerate(self.blocks):
            x = block(x, rotation)
            if i in wanted:
                tokens = self.norm(x)[:, prefix.shape[1] :]
                maps.append(tokens.transpose(1, 2).reshape(batch, dim, height, width))
        return self.neck(maps, *images.shape[2:])
