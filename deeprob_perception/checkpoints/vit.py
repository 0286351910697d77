# SPDX-License-Identifier: Apache-2.0
"""Published DINO, DINOv2 and DINOv3 checkpoints -> our tensor names: Meta's own layouts and Hugging Face's, old and new."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeprob_perception.checkpoints.files import State
from deeprob_perception.errors import ModelError
from deeprob_perception.nets import vit

# Projection heads of the training, pooler and classifier, the mask token of iBOT, the frequencies (computed from the
# shape), and which biases exist (DINOv3's keys have none; their zeros are dropped below).
IGNORED = re.compile(
    r"(^|\.)(head|dino_head|ibot_head|pooler|classifier)\.|mask_token$|rope_embed\.periods$|rope_embeddings\.inv_freq$"
    r"|bias_mask$|^(local_)?cls_norm\."
)

# Applied in this order to every name of a foreign checkpoint; the layouts' own names don't collide.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^(module\.)?(backbone\.|vit\.|dinov2\.|dinov2_with_registers\.|dinov3_vit\.)?", ""),
    (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"^storage_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?(weight|bias)$", r"patch_embed.proj.\2"),
    (r"^(encoder\.|model\.)?layers?\.(?=\d)", "blocks."),
    (r"\.(layernorm_before)\.", ".norm1."),
    (r"\.(layernorm_after)\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^(layernorm|norm)\.(weight|bias)$", r"norm.\2"),
    (r"^", "backbone."),
)


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Tell a plain ViT by its class token; a Swin has none."""
    return any(name.endswith("cls_token") for name in tensors)


def check_config(config: dict[str, Any], source: Path) -> None:
    """Refuse what the tensors don't show but changes the result."""
    supported = {"model_type": ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit"), "hidden_act": ("gelu",),
                 "rope_theta": (100.0,)}  # fmt: skip
    if config.get("use_swiglu_ffn") or config.get("use_gated_mlp"):
        supported["hidden_act"] = ("gelu", "silu")  # DINOv2's configuration says gelu and its gated MLP has SiLU all the same
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:
            known = ", ".join(map(str, values))
            raise ModelError(f"{source}: config.json has {key}={config[key]!r}; only {known} is supported")


def rename(tensors: Mapping[str, Tensor], source: str) -> State:
    """Bring a foreign state_dict to our names, whichever of the known layouts it has."""
    state: State = {}
    for name, tensor in tensors.items():
        if IGNORED.search(name):
            continue
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name, count=1)
        if name in state:
            raise ModelError(f"{source}: two tensors mean {name}")
        state[name] = tensor
    join_gates(state)
    join_qkv(state)
    return state


def join_gates(state: State) -> None:
    """Join gate and value of a gated MLP, as newer Hugging Face layouts store them apart, to one `w12`."""
    for name in [name for name in state if ".mlp.gate_proj." in name]:
        value = state.pop(name.replace(".gate_proj.", ".fc1."))
        state[name.replace(".gate_proj.", ".w12.")] = torch.cat((state.pop(name), value))
        down = name.replace(".gate_proj.", ".fc2.")
        state[down.replace(".fc2.", ".w3.")] = state.pop(down)


def join_qkv(state: State) -> None:
    """Join separate query, key and value projections to one; a key without bias gets zeros, which the network leaves out."""
    for name in [name for name in state if ".attn.query." in name]:
        query = state.pop(name)
        key = state.pop(name.replace(".query.", ".key."), None)
        value = state.pop(name.replace(".query.", ".value."), torch.zeros_like(query))
        state[name.replace(".query.", ".qkv.")] = torch.cat((query, torch.zeros_like(query) if key is None else key, value))


def infer_recipe(state: State, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Read the variant and the size of the position embedding off the tensors' shapes."""
    patch = state.get("backbone.patch_embed.proj.weight")
    if patch is None:
        names = ", ".join(sorted(state)[:3])
        raise ModelError(f"{source}: not a ViT checkpoint of a known layout (its first tensors: {names})")
    registers = state.get("backbone.register_tokens")
    measured: dict[str, Any] = {
        "patch_size": patch.shape[-1],
        "embed_dim": patch.shape[0],
        "depth": len({name.split(".")[2] for name in state if name.startswith("backbone.blocks.")}),
        "registers": 0 if registers is None else registers.shape[1],
        "layer_scale": "backbone.blocks.0.ls1.gamma" in state,
        "swiglu": "backbone.blocks.0.mlp.w12.weight" in state,
        "rope": "backbone.pos_embed" not in state,
    }
    heads = config.get("num_attention_heads")  # the tensors don't show them
    fitting = (
        name
        for name, options in vit.VARIANTS.items()
        if all(options.get(key, type(value)()) == value for key, value in measured.items())
    )
    name = next(fitting, None)
    if name is None:
        shown = ", ".join(f"{key} {value}" for key, value in measured.items())
        raise ModelError(f"{source}: a ViT with {shown}, which is none of {', '.join(vit.VARIANTS)}")
    if heads not in (None, vit.VARIANTS[name]["num_heads"]):
        raise ModelError(f"{source}: config.json has {heads} heads; {name} has {vit.VARIANTS[name]['num_heads']}")
    recipe: dict[str, Any] = {"task": "features", "backbone": name}
    if not measured["rope"]:
        recipe["image_size"] = math.isqrt(state["backbone.pos_embed"].shape[1] - 1) * measured["patch_size"]
    if "layer_norm_eps" in config:
        recipe["norm_eps"] = config["layer_norm_eps"]
    return recipe
