# SPDX-License-Identifier: Apache-2.0
"""Weights files and their neighbours from the hub -> tensors and dicts, without running code from them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deeprob_perception.errors import ModelError

State = dict[str, Tensor]

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
# What a folder from the hub may hold, in the order of preference.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def read_tensors(path: Path) -> tuple[State, dict[str, Any]]:
    """Return the tensors of a weights file by name, and what else a training framework stored beside them.

    The latter is the content of `meta`, and under their names the configurations (`..._config`).
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), {}
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
    if path.suffix not in PICKLES:
        raise ModelError(f"{path}: not a weights file; there are: .safetensors, {', '.join(PICKLES)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises as many kinds as there are ways to be corrupt
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise ModelError(
            f"{path}: damaged, or cannot be read without running code from it, which is refused ({reason}); "
            "save its state_dict as .safetensors where it comes from"
        ) from error
    whole = content if isinstance(content, Mapping) else {}
    meta = whole["meta"] if isinstance(whole.get("meta"), dict) else {}
    beside = {**meta, **{key: value for key, value in whole.items() if str(key).endswith("_config")}}
    for key in ("state_dict", "model", "teacher"):  # DINO's own checkpoints hold student and teacher; the latter is published
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{path}: holds no state_dict of tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors, beside


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: not a JSON object")
    return content
