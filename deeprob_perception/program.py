# SPDX-License-Identifier: Apache-2.0
"""A model file's network as a program of torch's own (`torch.export`), for the back end `torch`; as bytes, and back.

The network is built from the recipe and the weights in the file and traced once; the program needs no code of ours to run.
"""

import io
import json
import zipfile
from pathlib import Path

import torch
from torch import nn

from deeprob_perception import zoo
from deeprob_perception.checkpoints import build
from deeprob_perception.errors import EngineError
from deeprob_perception.nets.image_graph import ImageGraph

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make(model: Path, shape: tuple[int, ...], precision: str, device: str) -> bytes:
    """Return the program `image` uint8 `shape` BGR -> what its network says (`nets.image_graph`), as bytes of a `.pt2` file.

    :param precision: of the weights and of all between them: a name in `DTYPES`.
    :param device: where it shall run, such as `cpu` or `cuda`; the trace is bound to it.
    :raises ModelError: when the file holds no network of ours.
    """
    recipe, state = zoo.load_checkpoint(model)
    net = build(recipe)
    net.load_state_dict(state)
    graph = ImageGraph(net.to(DTYPES[precision]), recipe).eval().to(device)
    with torch.no_grad():
        program = torch.export.export(graph, (torch.zeros(shape, dtype=torch.uint8, device=device),))
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def read(content: bytes) -> nn.Module:
    """Return what `make` made, ready to be called with an image.

    :raises EngineError: when it is no such program, or holds a pickle, which could run any code.
    """
    check(content)
    try:
        return torch.export.load(io.BytesIO(content)).module()
    except Exception as error:  # of the zip, of JSON, of torch's schema
        raise EngineError(f"not a program of torch: {(str(error) or repr(error)).splitlines()[0]}") from error


def check(content: bytes) -> None:
    """Raise EngineError unless loading unpickles plain tensors at most: `torch.export.load` itself unpickles anything."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                if Path(name).name.startswith(("custom_obj_", "opaque_obj_")):
                    raise EngineError(f"it holds a pickled object ({name})")
                if name.endswith(("weights_config.json", "constants_config.json")) and pickles(json.loads(archive.read(name))):
                    raise EngineError(f"it holds pickled tensors ({name})")
                if "/sample_inputs/" in name and archive.getinfo(name).file_size:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except EngineError:
        raise
    except Exception as error:  # a damaged zip, or torch's refusal to unpickle
        raise EngineError(f"not a program of torch: {(str(error) or repr(error)).splitlines()[0]}") from error


def pickles(config: object) -> bool:
    """Tell whether an archive's list of tensors names one that would be unpickled."""
    if isinstance(config, dict):
        return bool(config.get("use_pickle")) or any(pickles(value) for value in config.values())
    return isinstance(config, list) and any(pickles(value) for value in config)
