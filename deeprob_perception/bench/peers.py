# SPDX-License-Identifier: Apache-2.0
"""What users would run instead of an engine, on the same weights: torch, torch.compile, transformers, plain ONNX Runtime.

Each takes the model file and a number of threads and returns a callable, uint8 `[1, H, W, 3]` BGR -> labels uint8
`[1, H, W]` or features float32 `[1, h, w, C]`, and the device that it computes on, `cpu` or `cuda`. torch's take a GPU
where torch has one, as users would.
"""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deeprob_perception.errors import EngineError

if TYPE_CHECKING:
    from torch import nn

Run = Callable[[np.ndarray], np.ndarray]


def eager(model: Path, threads: int) -> tuple[Run, str]:
    """Our own network in plain torch, float32, with the weights of the file."""
    recipe, net = ours(model)
    return from_pictures(net, recipe, threads)


def compiled(model: Path, threads: int) -> tuple[Run, str]:
    """The same through `torch.compile` with its defaults."""
    import torch

    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise EngineError("torch.compile needs a C++ compiler on a CPU (Debian: apt-get install g++)")
    recipe, net = ours(model)
    return from_pictures(torch.compile(net), recipe, threads)


def hugging_face(model: Path, threads: int) -> tuple[Run, str]:
    """Hugging Face's UPerNet on Swin with the weights of the file, float32.

    :raises EngineError: for a network that transformers has no equal of, or where transformers is missing.
    """
    try:
        # By name: a peer to compare with, of the extra `test`, that nothing in the package depends on.
        transformers = import_module("transformers")
    except ImportError:
        raise EngineError("transformers is not installed (extra `test`)") from None
    from deeprob_perception import zoo
    from deeprob_perception.checkpoints.swin import our_name
    from deeprob_perception.nets import swin

    recipe, state = zoo.load_checkpoint(model)
    if recipe["task"] != "segmentation":
        raise EngineError("compared for segmentation only")
    options = swin.VARIANTS.get(recipe["backbone"], {})
    if recipe["head"] != "upernet" or not options or options.get("conv_stem"):
        raise EngineError(f"transformers has no {recipe['backbone']} with the head {recipe['head']}")
    backbone = transformers.SwinConfig(
        **{key: options[key] for key in ("embed_dim", "depths", "num_heads")},
        window_size=recipe.get("window_size") or options.get("window_size", 7),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    net = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone,
            num_labels=len(recipe["classes"]),
            hidden_size=recipe.get("head_channels", 512),
            use_auxiliary_head=False,
        )
    )
    theirs = {}
    for name, tensor in net.state_dict().items():
        found = our_name(name)
        if found in state:
            theirs[name] = state[found]
            continue
        for i, part in enumerate(("query", "key", "value")):  # which ours holds in one
            joined = found.replace(f".attn.{part}.", ".attn.qkv.")
            if joined != found and joined in state:
                theirs[name] = state[joined].chunk(3)[i]
        # What follows from the shape, and a classifier's last norm, which nothing here reads.
        if name not in theirs and name.endswith(("relative_position_index", "swin.layernorm.weight", "swin.layernorm.bias")):
            theirs[name] = tensor
        elif name not in theirs:
            raise EngineError(f"transformers' {name} has no equal in {model}")
    net.load_state_dict(theirs)
    return from_pictures(net, recipe, threads, lambda output: output.logits)


def plain_onnxruntime(model: Path, threads: int) -> tuple[Run, str]:
    """ONNX Runtime as its documentation begins: a session with all defaults (`threads` is left to it, too)."""
    import onnxruntime

    providers = [p for p in onnxruntime.get_available_providers() if p in ("CUDAExecutionProvider", "CPUExecutionProvider")]
    session = onnxruntime.InferenceSession(str(model), providers=providers)
    name = session.get_outputs()[0].name

    def run(image: np.ndarray) -> np.ndarray:
        answer: np.ndarray = session.run([name], {"image": image})[0]
        return answer

    return run, "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"


EAGER = "torch eager"
PEERS: dict[str, Callable[[Path, int], tuple[Run, str]]] = {
    EAGER: eager,
    "torch.compile": compiled,
    "transformers eager": hugging_face,
    "onnxruntime defaults": plain_onnxruntime,
}


def ours(model: Path) -> "tuple[dict[str, Any], nn.Module]":
    from deeprob_perception import zoo
    from deeprob_perception.checkpoints import build

    recipe, state = zoo.load_checkpoint(model)
    net = build(recipe)
    net.load_state_dict(state)
    return recipe, net


def from_pictures(
    net: Any, recipe: dict[str, Any], threads: int, logits: Callable[[Any], Any] = lambda output: output
) -> tuple[Run, str]:
    """Put normalisation before a network and the arg-max (or unit length) behind it, all on the network's device."""
    import torch

    from deeprob_perception.nets.image_graph import features_of, labels_of

    finish = features_of if recipe["task"] == "features" else labels_of

    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net.eval().to(device)
    mean, std = (torch.tensor(recipe[key], device=device)[:, None, None] * 255 for key in ("mean", "std"))

    def run(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rgb = torch.from_numpy(image).to(device).flip(-1).permute(0, 3, 1, 2).float()
            answer: np.ndarray = finish(logits(net((rgb - mean) / std))).cpu().numpy()
        return answer

    return run, device
