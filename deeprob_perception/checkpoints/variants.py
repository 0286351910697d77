# SPDX-License-Identifier: Apache-2.0
"""Which variant of an architecture a checkpoint is: the one whose network has its tensors' names and shapes."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from deeprob_perception.checkpoints.files import State
from deeprob_perception.errors import ModelError

PREFIX = "backbone."


def find(state: State, variants: Iterable[str], network: Callable[[str], nn.Module], kind: str, source: str) -> str:
    """Return the name of the variant that `state` (names of ours, `backbone....`) fits best.

    :param network: makes a variant's backbone of its name; it is laid out without memory.
    :raises ModelError: when none has the depth and widths of the tensors, with those that there are.
    """
    own = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in state.items() if name.startswith(PREFIX)}
    variants = list(variants)
    for name in variants:
        with torch.device("meta"):
            expected = {key: tuple(tensor.shape) for key, tensor in network(name).state_dict().items()}
        # What is left out or too much is `check_state`'s to say, by name; a variant differs in hundreds of tensors.
        strange = sum(own.get(key) != shape for key, shape in expected.items() if not key.startswith("neck."))
        strange += sum(key not in expected for key in own)
        if strange <= len(expected) // 10:
            return name
    blocks = len({key.rsplit(".", 2)[0] for key in own if key.endswith(("norm.weight", "norm1.weight"))})
    raise ModelError(f"{source}: {kind} of {len(own)} tensors with {blocks} blocks, which is none of {', '.join(variants)}")
