# SPDX-License-Identifier: Apache-2.0
"""Published GET-Zero checkpoints -> a `leap_rotation` policy: a state dict beside the configurations that it was trained with.

The file is `{"model": ..., "tokenization_config": ..., "model_config": ...}`, the latter two of plain dicts. Our parameters
have the published names. What the configurations claim is compared with the tensors by `check_state`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deeprob_perception.checkpoints.files import State
from deeprob_perception.errors import ModelError
from deeprob_perception.nets.get import GLOBAL, LOCAL
from deeprob_perception.policy.leap import LAYOUT, STEPS, TOKEN

CONFIGURATIONS = ("tokenization_config", "model_config")
# Under these switches and sizes the release makes the tokens of `policy.leap.History`. It stores no order of a token's
# features: the order follows from the switches, so all of them count.
TOKENIZATION = {
    "enableGeometryEncoding": True,
    "includeVariableGlobalObs": True,
    "includeVariableLocalObs": True,
    "includeJointOrigin": True,
    "includeJointRot": True,
    "obsHistorySize": STEPS,
    "variableGlobalObsSize": 2,  # sine and cosine of the phase
    "variableLocalObsSize": 2,  # position and target
    "fixedGlobalObsSize": 0,
    "fixedLocalObsSize": 6,
    "globalObsSize": GLOBAL,
    "localObsSize": LOCAL,
    "flushVariableGlobalObsOnReset": False,
    "flushVariableLocalObsOnReset": True,
}
HEADS = {"policy": 1, "policy_forward_kinematics": 3}  # that the policy node reads; others served training only
LARGEST = 4096  # of any size; the paper's network has 1024


def recognises(tensors: Mapping[str, Tensor], beside: Mapping[str, Any]) -> bool:
    """Tell a GET by its embedding of tokens, or where that is missing by the configuration that only this layout has."""
    return "token_embedding.weight" in tensors or "tokenization_config" in beside


def convert(tensors: Mapping[str, Tensor], beside: Mapping[str, Any], source: str) -> tuple[dict[str, Any], State]:
    """Return recipe and state of a checkpoint.

    :param beside: what the file holds beside the tensors.
    :raises ModelError: for other tokens than `policy.leap` makes, or a network that a policy's model file cannot hold.
    """
    for name in CONFIGURATIONS:
        if not isinstance(beside.get(name), Mapping):
            raise ModelError(f"{source}: a GET without its {name}, which the tensors don't show; convert the published file, "
                             "a dict of model, tokenization_config and model_config")  # fmt: skip
    check_tokens(tensors, beside["tokenization_config"], source)
    recipe = infer_recipe(beside, source)
    state = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("head_modules.") or name.split(".")[1] in HEADS
    }
    return recipe, state


def check_tokens(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> None:
    """Refuse other tokens: another history, other features, another order."""
    off = {key: False for key in config if str(key).startswith("include") and key not in TOKENIZATION}
    wrong = [
        f"{key}={config[key]!r} instead of {value!r}" if key in config else f"no {key}, which is to be {value!r}"
        for key, value in {**TOKENIZATION, **off}.items()
        if key not in config or config[key] != value
    ]
    if wrong:
        raise ModelError(
            f"{source}: its tokens are not those that the policy node makes; tokenization_config has {', '.join(wrong[:4])}"
            f"{', ...' if len(wrong) > 4 else ''}"
        )
    embedding = tensors.get("token_embedding.weight")
    if embedding is not None and embedding.shape[-1:] != (TOKEN,):  # a missing one is told with what else is
        raise ModelError(f"{source}: its weights take tokens of {list(embedding.shape)[-1:]} features, its "
                         f"tokenization_config makes {TOKEN}; the two are not of one training")  # fmt: skip


def infer_recipe(beside: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Read the network off its configuration."""

    def size(*path: str) -> int:
        return lookup(beside, source, int, *path)

    def switch(*path: str) -> bool:
        return lookup(beside, source, bool, *path)

    encoding = lookup(beside, source, str, "embodiment_encoding")
    graph = encoding == "graphormer"
    attention = ("graphormer", "attention")
    place = lookup(beside, source, str, "graphormer", "positional_encoding") if graph else encoding
    if place not in ("none", "learned"):
        raise ModelError(f"{source}: its joints' places are encoded by {place!r}; only none and learned are supported")
    if graph and switch(*attention, "enable_edge_encoding"):
        raise ModelError(f"{source}: it encodes the kinds of links (enable_edge_encoding), which a policy's model file has "
                         "no input for; take a network without")  # fmt: skip
    width, heads = size("transformer", "token_embed_dim"), size("transformer", "num_attention_heads")
    if width % heads:
        raise ModelError(f"{source}: model_config has {heads} attention heads, which do not divide the width {width}")
    outputs = {name: length for name, length in HEADS.items() if name in lookup(beside, source, dict, "heads")}
    if "policy" not in outputs:
        raise ModelError(f"{source}: its model_config has no head 'policy', so it moves nothing; take a policy's checkpoint")
    units, activation = head_layers(beside, outputs, source)
    if activation != "elu" or len(units) != 1:
        raise ModelError(f"{source}: its heads have layers of {units} with {activation}; only one, with elu, is supported")
    return {
        "task": "leap_rotation",
        "backbone": "get",
        "layout": LAYOUT,
        "token": TOKEN,
        "slots": size("max_dof_count"),
        "network": {
            "width": width,
            "heads": heads,
            "layers": size("transformer", "num_layers"),
            "feedforward": size("transformer", "feedforward_dim"),
            "outputs": outputs,
            "head_units": units[0],
            **{key: graph and switch(*attention, f"enable_{key}_encoding") for key in ("spatial", "parent", "child")},
            "slots": place == "learned",
            "bias_after_softmax": graph and not switch(*attention, "bias_before_softmax"),
            "input_norm": switch("transformer", "enable_input_layer_norm"),
        },
    }


def head_layers(beside: Mapping[str, Any], outputs: Mapping[str, int], source: str) -> tuple[list[int], str]:
    """Return the hidden layers' sizes and the activation of the heads, which they have in common."""
    found = []
    for name in outputs:
        own = lookup(beside, source, dict, "heads", name)
        section = {key: ("heads", name) if key in own else ("head_defaults",) for key in ("units", "activation")}
        units = lookup(beside, source, list, *section["units"], "units")
        found.append((units, lookup(beside, source, str, *section["activation"], "activation")))
    if any(layers != found[0] for layers in found):
        raise ModelError(f"{source}: its heads differ in their layers ({found}); only equal ones are supported")
    units, activation = found[0]
    for i, count in enumerate(units):
        checked(count, int, f"head units {i}", source)
    return units, activation


def lookup(beside: Mapping[str, Any], source: str, kind: type, *path: str) -> Any:
    """Return what model_config holds at a path.

    :raises ModelError: when there is nothing, or something of another kind, or no sensible size.
    """
    value: Any = beside["model_config"]
    for i, key in enumerate(path):
        if not isinstance(value, Mapping) or key not in value:
            raise ModelError(f"{source}: model_config has no {'.'.join(path[: i + 1])}, which the network depends on")
        value = value[key]
    return checked(value, kind, ".".join(path), source)


def checked(value: Any, kind: type, name: str, source: str) -> Any:
    fits = isinstance(value, kind)
    if kind is int:  # which Python takes a bool for, too
        fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST
    if not fits:
        wanted = {int: f"a size from 1 to {LARGEST}", bool: "true or false", str: "a name", list: "a list", dict: "a dict"}
        raise ModelError(f"{source}: model_config has {name}={value!r}, which is not {wanted[kind]}")
    return value
