# SPDX-License-Identifier: Apache-2.0
"""Published Swin checkpoints -> our tensor names: Hugging Face's, Microsoft's and mmsegmentation's layouts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeprob_perception.errors import ModelError
from deeprob_perception.nets import swin

State = dict[str, Tensor]

# Buffers that are computed from the shape, and parts that a segmentation network doesn't run: the auxiliary training
# head, the classifier of ImageNet, the mask token of SimMIM.
IGNORED = re.compile(r"relative_position_index$|attn_mask$|mask_token$|^auxiliary_head\.|^(classifier|head)\.(weight|bias)$")

# Applied in this order to every name of a foreign checkpoint; the layouts' own names don't collide.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^module\.", ""),  # DistributedDataParallel
    # The backbone's parts stand under `backbone.` in a segmenter, under `swin.` in a classifier, under both in a new
    # transformers' UPerNet, and bare in Microsoft's classifiers and in `SwinModel`.
    (r"^(backbone\.)?(swin\.)?(?!decode_head\.|auxiliary_head\.|classifier\.|head\.)", "backbone."),
    (r"^backbone\.embeddings\.patch_embeddings\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.embeddings\.norm\.", "backbone.patch_embed.norm."),
    (r"^backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.(encoder\.)?layers\.", "backbone.stages."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(self|relative_position_bias)\.relative_position_bias_table", ".attn.relative_position_bias_table"),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.intermediate\.dense\.|\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"(?<!attention)\.output\.dense\.|\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^backbone\.(norm|layernorm)\.", "backbone.final_norm."),
    (r"^decode_head\.(classifier|conv_seg)\.", "head.classify."),
    (r"^decode_head\.psp_modules\.(\d+)\.1\.", r"head.ppm.branches.\1."),
    (r"^decode_head\.bottleneck\.", "head.ppm.bottleneck."),
    (r"^decode_head\.lateral_convs\.", "head.laterals."),
    (r"^decode_head\.fpn_convs\.", "head.smooth."),
    (r"^decode_head\.fpn_bottleneck\.", "head.fuse."),
    (r"^(head\..*)\.batch_norm\.", r"\1.bn."),
)


def check_config(config: dict[str, Any], source: Path) -> None:
    """Refuse what the tensors don't show but changes the result: another activation, pooling, epsilon or order."""
    kind = config.get("model_type", "swin")
    if kind not in ("swin", "upernet"):
        raise ModelError(f"{source}: config.json has model_type={kind!r}; only swin and upernet are supported")
    backbone = config.get("backbone_config") or {} if kind == "upernet" else config
    supported: tuple[tuple[dict[str, Any], str, Any], ...] = (
        (backbone, "model_type", "swin"),
        (backbone, "hidden_act", "gelu"),
        (backbone, "layer_norm_eps", 1e-5),
        (backbone, "patch_size", 4),
        (backbone, "use_absolute_embeddings", False),
        (config if kind == "upernet" else {}, "pool_scales", [1, 2, 3, 6]),
        (backbone if kind == "upernet" else {}, "out_features", ["stage1", "stage2", "stage3", "stage4"]),
    )
    for section, key, value in supported:
        if section.get(key, value) != value:
            raise ModelError(f"{source}: config.json has {key}={section[key]!r}; only {value!r} is supported")


def rename(tensors: Mapping[str, Tensor], source: str) -> State:
    """Bring a foreign state_dict to our names and tensor orders, whichever of the known layouts it has."""
    if any("cpb_mlp" in name or "logit_scale" in name for name in tensors):
        raise ModelError(f"{source}: a Swin Transformer V2 checkpoint; this package has Swin V1")
    # mmsegmentation merges patches with nn.Unfold, whose channel order differs from Microsoft's.
    unfold = any(".attn.w_msa." in name for name in tensors)
    state: State = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("module.")
        if IGNORED.search(bare):
            continue
        name = our_name(name)
        if unfold and ".downsample." in name:
            tensor = undo_unfold_order(tensor)
        if name in state:
            raise ModelError(f"{source}: two tensors mean {name}")
        state[name] = tensor
    join_qkv(state)
    complete(state)
    return state


def our_name(name: str) -> str:
    """Return our name of a tensor of one of the known layouts; query, key and value stay apart, as ours has them joined."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    # mmsegmentation and Microsoft number the norms of the stages norm0..norm3, Hugging Face stage1..stage4.
    name = re.sub(r"^backbone\.norm(\d)\.", r"backbone.norms.\1.", name)
    return re.sub(r"^backbone\.hidden_states_norms\.stage(\d)\.", lambda m: f"backbone.norms.{int(m[1]) - 1}.", name)


def undo_unfold_order(tensor: Tensor) -> Tensor:
    """Reorder the last dimension of a patch merging's norm or reduction, 4C, from nn.Unfold's order to Microsoft's.

    nn.Unfold puts the channel first and then top left, top right, bottom left, bottom right; Microsoft's concatenation
    puts the position first: top left, bottom left, top right, bottom right.
    """
    return tensor.unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].transpose(-1, -2).flatten(-2)


def join_qkv(state: State) -> None:
    """Join separate query, key and value projections, as Hugging Face stores them, to one."""
    for name in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(name.replace(".query.", f".{part}."), None) for part in ("query", "key", "value")]
        present = [part for part in parts if part is not None]
        if len(present) == 3:
            state[name.replace(".query.", ".qkv.")] = torch.cat(present)


def complete(state: State) -> None:
    """Give a classifier's backbone, which has no stage norms, the identity; drop the final norm where it is unused."""
    final = {part: state.pop(f"backbone.final_norm.{part}", None) for part in ("weight", "bias")}
    for i in range(4):
        merge = state.get(f"backbone.stages.{i}.blocks.0.norm1.weight")
        if f"backbone.norms.{i}.weight" in state or merge is None or "head.classify.weight" in state:
            continue
        weight, bias = (final["weight"], final["bias"]) if i == 3 else (None, None)
        state[f"backbone.norms.{i}.weight"] = torch.ones_like(merge) if weight is None else weight
        state[f"backbone.norms.{i}.bias"] = torch.zeros_like(merge) if bias is None else bias
    for name in [name for name in state if re.fullmatch(r"head\..*\.bn\.running_mean", name)]:
        # A counter for training only, which older frameworks don't store.
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))


def infer_recipe(state: State, config: dict[str, Any], source: str) -> dict[str, Any]:
    """Read variant, window and head off the tensors' shapes."""
    patch = state.get("backbone.patch_embed.proj.weight")
    if patch is None:
        names = ", ".join(sorted(state)[:3])
        raise ModelError(
            f"{source}: not a Swin checkpoint of a known layout (its first tensors: {names}), nor one of the others that are "
            "read: VMamba, Vim, MambaOut, SegFormer, DINO, GET-Zero"
        )
    tables: dict[tuple[int, int], Tensor] = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", name)
        if match:
            tables[int(match[1]), int(match[2])] = tensor
    depths = tuple(sum(stage == i for stage, _ in tables) for i in range(4))
    heads = tuple(tables[i, 0].shape[-1] if (i, 0) in tables else 0 for i in range(4))
    measured = {"embed_dim": patch.shape[0], "depths": depths, "num_heads": heads}
    variant = next(
        (
            name
            for name, options in swin.VARIANTS.items()
            if not options.get("conv_stem") and all(options[key] == value for key, value in measured.items())
        ),
        None,
    )
    if variant is None:
        shown = ", ".join(f"{key} {value}" for key, value in measured.items())
        raise ModelError(f"{source}: a Swin with {shown}, which is none of {', '.join(swin.VARIANTS)}")
    rows = tables[0, 0].shape[0]
    window = (round(rows**0.5) + 1) // 2
    if (2 * window - 1) ** 2 != rows:
        raise ModelError(f"{source}: a relative position table of {rows} rows fits no square window")
    recipe: dict[str, Any] = {"task": "backbone", "backbone": variant, "window_size": window}
    if "head.classify.weight" in state:
        recipe.update(task="segmentation", head="upernet", head_channels=state["head.classify.weight"].shape[1])
    return recipe


def class_names(config: dict[str, Any], meta: dict[str, Any], count: int) -> list[str]:
    """Find the class names in config.json or in mmsegmentation's meta; else number them."""
    dataset = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), dict) else {}
    id2label = config.get("id2label") or {}
    names = [str(id2label.get(str(i), id2label.get(i, f"class {i}"))) for i in range(count)]
    for found in (meta.get("CLASSES"), (dataset or {}).get("classes")):
        if not id2label and isinstance(found, (list, tuple)) and len(found) == count:
            names = [str(name) for name in found]
    return names


def color_map(count: int) -> list[list[int]]:
    """Return the colour map of PASCAL VOC, one [r, g, b] a class: the bits of the id, spread over the three colours."""
    palette = []
    for i in range(count):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (i >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append(color)
    return palette
