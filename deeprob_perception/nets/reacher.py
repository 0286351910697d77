# SPDX-License-Identifier: Apache-2.0
"""Networks that answer tokens of joints with actions, built from a recipe: GET in its variants, and a plain MLP."""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from deeprob_perception.errors import ModelError
from deeprob_perception.nets.get import GraphEmbodimentTransformer

# What is left out of GET, or put in its place, to see what it is good for.
VARIANTS: dict[str, dict[str, Any]] = {
    "get": {},
    "no_graph": dict(spatial=False, parent=False, child=False),
    "no_self_model": dict(self_model=False),
    "mlp": dict(mlp=True),
}


class FlatNet(nn.Module):
    """The baseline without attention: all tokens in one vector, all actions out of it."""

    def __init__(self, token_dim: int, slots: int, width: int, layers: int = 4):
        super().__init__()
        self.slots = slots
        sizes = [slots * token_dim, *([width] * layers)]
        self.body = nn.Sequential(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.GELU())))
        self.action = nn.Linear(width, slots)
        self.forward_kinematics = nn.Linear(width, slots * 3)

    def forward(self, tokens: Tensor, padding: Tensor | None = None, **graph: Tensor) -> dict[str, Tensor]:
        batch, joints, size = tokens.shape
        x = self.body(nn.functional.pad(tokens, (0, 0, 0, self.slots - joints)).reshape(batch, self.slots * size))
        return {
            "action": self.action(x)[:, :joints],
            "forward_kinematics": self.forward_kinematics(x).reshape(batch, self.slots, 3)[:, :joints],
        }


def build(recipe: dict[str, Any]) -> nn.Module:
    """Return the network of a recipe, with random weights.

    :param recipe: `variant` (a key of `VARIANTS`), `token`, `slots`, `width`, `heads`, `layers`, `feedforward`.
    :raises ModelError: for an unknown variant.
    """
    if recipe["variant"] not in VARIANTS:
        raise ModelError(f"there is no variant {recipe['variant']!r}; there are: {', '.join(VARIANTS)}")
    options = dict(VARIANTS[recipe["variant"]])
    width = recipe["width"]
    if options.pop("mlp", False):
        return FlatNet(recipe["token"], recipe["slots"], 4 * width)
    outputs = {"action": 1} if not options.pop("self_model", True) else {"action": 1, "forward_kinematics": 3}
    return GraphEmbodimentTransformer(
        recipe["token"], width, recipe["heads"], recipe["layers"], recipe["feedforward"], dropout=0.0, outputs=outputs,
        head_units=width, input_norm=False, max_joints=recipe["slots"], **options,
    )  # fmt: skip
