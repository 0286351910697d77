# SPDX-License-Identifier: Apache-2.0
"""Published SegFormer checkpoints -> our tensor names: Hugging Face's layout, the encoder alone or with its all-MLP head."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeprob_perception.checkpoints import variants
from deeprob_perception.checkpoints.files import State
from deeprob_perception.errors import ModelError
from deeprob_perception.nets import segformer

IGNORED = re.compile(r"^classifier\.")  # of ImageNet

RENAMES: tuple[tuple[str, str], ...] = (
    (r"^segformer\.|^(?=encoder\.|stages\.)", "backbone."),
    (r"^backbone\.encoder\.", "backbone."),
    (r"^backbone\.patch_embeddings\.(\d)\.", r"backbone.stages.\1.embed."),
    (r"^backbone\.block\.(\d)\.", r"backbone.stages.\1.blocks."),
    (r"^backbone\.layer_norm\.(\d)\.", r"backbone.stages.\1.norm."),
    # As transformers 5 holds them in memory.
    (r"\.patch_embeddings\.", ".embed."),
    (r"^(backbone\.stages\.\d)\.layer_norm\.", r"\1.norm."),
    (r"\.embed\.layer_norm\.", ".embed.norm."),
    (r"\.layer_norm_1\.", ".norm1."),
    (r"\.layer_norm_2\.", ".norm2."),
    (r"\.(layernorm_before)\.", ".norm1."),
    (r"\.(layernorm_after)\.", ".norm2."),
    (r"\.attention\.(?:self\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:self\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:self\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(self\.sr|sequence_reduction\.sequence_reduction)\.", ".attn.reduce."),
    (r"\.attention\.(self|sequence_reduction)\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.mlp\.dense1\.", ".mlp.fc1."),
    (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
    (r"\.mlp\.dense2\.", ".mlp.fc2."),
    (r"^decode_head\.linear_(?:c|projections)\.(\d)\.proj\.", r"head.projections.\1."),
    (r"^decode_head\.linear_fuse\.", "head.fuse."),
    (r"^decode_head\.batch_norm\.", "head.bn."),
    (r"^decode_head\.classifier\.", "head.classify."),
)


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Tell a SegFormer by the convolution in its MLP."""
    return any(".mlp.dwconv." in name for name in tensors)


def check_config(config: dict[str, Any], source: Path) -> None:
    """Refuse what the tensors don't show but changes the result."""
    supported: dict[str, Any] = {
        "model_type": "segformer", "hidden_act": "gelu", "num_attention_heads": list(segformer.HEADS),
        "sr_ratios": list(segformer.REDUCTIONS), "strides": [4, 2, 2, 2], "patch_sizes": [7, 3, 3, 3],
        "reshape_last_stage": True,
    }  # fmt: skip
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise ModelError(f"{source}: config.json has {key}={config[key]!r}; only {value!r} is supported")


def rename(tensors: Mapping[str, Tensor], source: str) -> State:
    """Bring a foreign state_dict to our names."""
    state: State = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        if IGNORED.search(name):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in state:
            raise ModelError(f"{source}: two tensors mean {name}")
        state[name] = tensor
    if "head.bn.running_mean" in state:
        state.setdefault("head.bn.num_batches_tracked", torch.tensor(0))
    return state


def infer_recipe(state: State, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Find the variant by its tensors' shapes."""

    def network(name: str) -> segformer.MixTransformer:
        return segformer.MixTransformer(**segformer.VARIANTS[name])

    name = variants.find(state, segformer.VARIANTS, network, "a SegFormer encoder", source)
    recipe: dict[str, Any] = {"task": "backbone", "backbone": name}
    if "head.classify.weight" in state:
        recipe.update(task="segmentation", head="segformer", head_channels=state["head.classify.weight"].shape[1])
    return recipe
