# SPDX-License-Identifier: Apache-2.0
"""Policy networks -> one self-describing `.onnx` for all robots: tokens, graph and padding in, actions out.

Weights stay float32: the file is small, and a robot's last millimetre is worth its digits.
"""

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deeprob_perception.engines.model_file import CONTRACT, PREFIX
from deeprob_perception.errors import ModelError
from deeprob_perception.export import fold_shapes, trace, write

INPUTS = ("tokens", "distance", "parent", "child", "padding")


class PolicyGraph(nn.Module):
    """A policy network with its inputs in a fixed order, whichever of them it reads."""

    def __init__(self, net: nn.Module, outputs: list[str]):
        super().__init__()
        self.net = net
        self.outputs = outputs

    def forward(self, tokens: Tensor, distance: Tensor, parent: Tensor, child: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        found = self.net(tokens, distance=distance, parent=parent, child=child, padding=padding)
        # Padded outputs are infinite in the network, a tripwire for whoever reads them; half types have no room for that.
        there = ~padding
        return tuple(
            torch.where(there if found[name].ndim == 2 else there[..., None], found[name], 0.0) for name in self.outputs
        )


def export_policy(net: nn.Module, recipe: dict[str, Any], path: Path, about: dict[str, str]) -> Path:
    """Write a policy network as an ONNX file.

    Inputs: `tokens` float32 `[1, N, F]`, `distance`, `parent`, `child` int64 `[1, N, N]`, `padding` bool `[1, N]`, for N = the
    recipe's `slots`. Outputs: `action` float32 `[1, N]` and, if the network has it, `forward_kinematics` float32 `[1, N, 3]`;
    zero at padding. An input that the network does without is not in the file.

    :param about: metadata such as `name` and `licence`.
    :returns: `path`. :raises ModelError: for a folder that cannot be written.
    """
    path, slots = Path(path), int(recipe["slots"])
    square = torch.zeros(1, slots, slots, dtype=torch.long)
    examples = {
        "tokens": torch.zeros(1, slots, int(recipe["token"])), "distance": square, "parent": square.clone(),
        "child": square.clone(), "padding": torch.zeros(1, slots, dtype=torch.bool),
    }  # fmt: skip
    with torch.no_grad():
        outputs = list(net.eval()(**examples))
    model = trace(PolicyGraph(net.cpu(), outputs).eval(), examples, outputs)
    fold_shapes(model, {f"net.{name}" for name in net.state_dict()})
    proto = ir.to_proto(model)
    drop_unread(proto)
    unknown = {"licence": "unknown", "training_data": "unknown", "metrics": "{}", "name": path.stem}
    metadata = {
        "contract": CONTRACT, **unknown, "task": recipe["task"], "layout": recipe["layout"],
        "recipe": json.dumps(recipe), **about,
    }  # fmt: skip
    for key, value in metadata.items():
        proto.metadata_props.add(key=PREFIX + key, value=value)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path.stem} exports to no valid graph: {error}") from error
    write(path, proto.SerializeToString())
    return path


def drop_unread(proto: onnx.ModelProto) -> None:
    """Take inputs out of a graph that no node reads."""
    read = {name for node in proto.graph.node for name in node.input}
    for i in reversed(range(len(proto.graph.input))):
        if proto.graph.input[i].name not in read:
            del proto.graph.input[i]
