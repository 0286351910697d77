# SPDX-License-Identifier: Apache-2.0
"""GET-Zero's published checkpoint layout -> our weights -> a policy's model file -> the reference model's own outputs."""

import copy
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")

from safetensors import safe_open  # noqa: E402
from test_get import recipe as pseudo_random  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from deeprob_perception import checkpoints, engines, zoo  # noqa: E402
from deeprob_perception.cli import app, commands  # noqa: E402, F401  registers the commands
from deeprob_perception.errors import ModelError, PerceptionError  # noqa: E402
from deeprob_perception.nets.get import build, tokens_of  # noqa: E402
from deeprob_perception.policy.leap import RATE, LeapPolicy, next_target  # noqa: E402
from deeprob_perception.policy.loop import policy_of  # noqa: E402
from deeprob_perception.robots import Robot, read  # noqa: E402

HANDS = ("001", "004", "024", "026", "071", "098", "139", "142", "193", "235", "587", "590", "633")
HEADS = ("policy", "policy_forward_kinematics")
TOLERANCE = dict(atol=2e-5, rtol=1e-4)  # what the reference numbers' README suggests
SLOTS = 16

# The configurations of the release's final model, in a small size.
TOKENIZATION = {
    "enableGeometryEncoding": True, "includeDebugBlankLocalObs": False, "includeChildLinkLength": False,
    "includeJointAxis": False, "includeJointOrigin": True, "includeJointRot": True, "includeJointAngleLimits": False,
    "includeDegreeCount": False, "includeChildLinkId": False, "obsHistorySize": 6, "flushVariableGlobalObsOnReset": False,
    "flushVariableLocalObsOnReset": True, "includeVariableGlobalObs": True, "includeVariableLocalObs": True,
    "variableGlobalObsSize": 2, "variableLocalObsSize": 2, "fixedGlobalObsSize": 0, "fixedLocalObsSize": 6,
    "globalObsSize": 12, "localObsSize": 18, "linkNameToId": {"palm_lower": 0},
}  # fmt: skip
MODEL = {
    "embodiment_encoding": "graphormer",
    "positional_encoding": {"dropout": 0.1},
    "graphormer": {
        "positional_encoding": "none",
        "attention": {
            "bias_before_softmax": True, "enable_spatial_encoding": True, "enable_parent_encoding": True,
            "enable_child_encoding": True, "enable_edge_encoding": False, "edge_encoding_size": 8,
        },
    },
    "transformer": {
        "token_embed_dim": 64, "feedforward_dim": 128, "num_attention_heads": 4, "num_layers": 3, "dropout": 0.1,
        "enable_input_layer_norm": True, "obs_property_embed_dim": 4,
    },
    "head_defaults": {"units": [16], "activation": "elu", "output_dim": None, "squeeze_output_dim": False},
    "heads": {
        "policy": {"output_dim": 1, "squeeze_output_dim": True},
        "policy_forward_kinematics": {"output_dim": 3, "squeeze_output_dim": False},
    },
    "max_dof_count": SLOTS,
    "max_degree_count": 4,
}  # fmt: skip


def golden(shared, name):
    with safe_open(shared / "golden" / "get" / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118  no dict


def deeprob(*arguments):
    """Run a command; return what it printed."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    if result.exception:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def exported(shared, tmp_path_factory):
    """The golden weights in the published layout, converted and exported by the commands that users have."""
    folder = tmp_path_factory.mktemp("get")
    weights, about = golden(shared, "get_small_weights")
    tokenization, model = json.loads(about["tokenization"]), json.loads(about["model_config"])
    torch.save({"model": weights, "tokenization_config": tokenization, "model_config": model}, folder / "published.pt")
    said = deeprob("models", "convert", folder / "published.pt", "--out", folder / "leap.safetensors")
    assert "get, leap_rotation policy for up to 16 joints" in said
    said = deeprob("export", folder / "leap.safetensors", "--out", folder / "leap.onnx", "--licence", "MIT")
    assert "16 joints, get" in said.replace("\n", " ")
    return folder / "leap.onnx"


@pytest.fixture(scope="module")
def engine(exported):
    return engines.load(exported, "onnxruntime", cache_dir=exported.parent, threads=1)


def asked(engine, tokens, matrices):
    """Return an engine's answers to tokens `[B, n, 30]` one after the other, `[B, n]` and `[B, n, 3]`; padding with garbage."""
    count = tokens.shape[1]
    inputs = {"padding": np.arange(SLOTS)[None] >= count, "tokens": np.full((1, SLOTS, 30), 1e3, np.float32)}
    for name, (matrix, fill) in matrices.items():
        inputs[name] = np.full((1, SLOTS, SLOTS), fill, np.int64)
        inputs[name][0, :count, :count] = matrix
    known = {spec.name for spec in engine.inputs}
    rows = []
    for row in tokens:
        inputs["tokens"][0, :count] = row
        found = engine(**{name: value for name, value in inputs.items() if name in known})
        assert not any(found[name][0, count:].any() for name in found), "padding has outputs"
        rows.append({name: value[0, :count] for name, value in found.items()})
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def graph_of(tensors, prefix):
    return {ours: (tensors[prefix + theirs].numpy(), fill)
            for ours, theirs, fill in (("distance", "spd", -1), ("parent", "parent", 0), ("child", "child", 0))}  # fmt: skip


@pytest.mark.parametrize("hand", HANDS)
def test_the_exported_policy_answers_as_the_reference(shared, engine, hand):
    tensors, _ = golden(shared, f"get_small_{hand}")
    found = asked(engine, tokens_of(tensors["obs"]).numpy(), graph_of(tensors, "graph."))
    for name in HEADS:
        np.testing.assert_allclose(found[name], tensors[name].numpy(), **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("hand", HANDS)
def test_from_description_and_measured_states_to_the_references_command(shared, engine, hand):
    """The node's way: URDF, joint positions and what was commanded in; the reference's action on the last target out."""
    tensors, _ = golden(shared, f"get_small_{hand}")
    robot = Robot(read(shared / "robots" / "leap_variants" / f"{hand}.urdf"))
    policy = policy_of(engine, robot, "", RATE)
    assert isinstance(policy, LeapPolicy)
    # The first of the streams begins with the phase of a start, as the node's do.
    measured, targets = (tensors[f"raw.{name}"][:, 0].numpy().astype(np.float64) for name in ("q", "target"))
    policy.reset(measured[0])
    for at, target in zip(measured, targets, strict=True):
        policy.follow(target)
        command = policy.act(at)
    action = tensors["policy"][0].numpy().astype(np.float64)
    assert (np.abs(action) < 1).any(), "all clipped"
    expected = next_target(targets[-1], action, robot.lower, robot.upper)
    np.testing.assert_allclose(command.positions, expected, atol=2e-6)
    assert np.abs(expected - targets[-1]).max() > 1e-3, "nothing moves"
    np.testing.assert_allclose(command.joint_positions, tensors[HEADS[1]][0].numpy(), **TOLERANCE)


def test_a_checkpoint_of_the_papers_size_answers_as_the_reference(shared, tmp_path):
    tensors, about = golden(shared, "get_paper_io")
    config = copy.deepcopy(MODEL) | {"transformer": json.loads(about["model_config"])["transformer"]}
    named = zip(json.loads(about["parameter_names"]), json.loads(about["parameter_shapes"]), strict=True)
    weights = {name: pseudo_random(name, tuple(shape)) for name, shape in named}
    checkpoint = {"model": weights, "tokenization_config": TOKENIZATION, "model_config": config}
    torch.save(checkpoint, tmp_path / "published.pt")
    deeprob("models", "convert", tmp_path / "published.pt", "--export", tmp_path / "leap.onnx")
    engine = engines.load(tmp_path / "leap.onnx", "onnxruntime", cache_dir=tmp_path, threads=1)
    graphs, _ = golden(shared, "graphs_and_fk_24")
    for hand in json.loads(about["embodiments"]):
        found = asked(engine, tokens_of(tensors[f"{hand}.obs"]).numpy(), graph_of(graphs, f"{hand}."))
        for name in HEADS:
            np.testing.assert_allclose(found[name], tensors[f"{hand}.{name}"].numpy(), atol=1e-4, rtol=1e-3, err_msg=name)


def test_the_model_file_says_what_it_is_and_the_weights_are_the_published_ones(shared, exported, engine):
    about = engine.metadata
    assert (about["task"], about["layout"], about["name"], about["licence"]) == ("leap_rotation", "leap-1", "leap", "MIT")
    recipe, state = zoo.load_checkpoint(exported.with_suffix(".safetensors"))
    weights, _ = golden(shared, "get_small_weights")
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert json.loads(about["recipe"]) == recipe


ABLATIONS = {
    "ET": {"embodiment_encoding": "none"},
    "ET_MMPE": {"embodiment_encoding": "learned"},
    "GET_NSE": {"enable_spatial_encoding": False},
    "GET_NPCE": {"enable_parent_encoding": False, "enable_child_encoding": False},
    "GET_bias_after_softmax": {"bias_before_softmax": False},
}


def ablation(changes, heads):
    config = copy.deepcopy(MODEL)
    config["transformer"]["num_layers"] = 2
    config["heads"] = {name: config["heads"][name] for name in heads}
    for key, value in changes.items():
        (config if key in config else config["graphormer"]["attention"])[key] = value
    return config


@pytest.mark.parametrize("variant", ABLATIONS)
def test_checkpoints_of_the_papers_ablations_answer_as_the_reference(shared, tmp_path, variant):
    tensors, about = golden(shared, f"variant_{variant}")
    heads = json.loads(about["heads"])
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    checkpoint = {"model": weights, "tokenization_config": TOKENIZATION, "model_config": ablation(ABLATIONS[variant], heads)}
    torch.save(checkpoint, tmp_path / "published.pt")
    deeprob("models", "convert", tmp_path / "published.pt", "--export", tmp_path / "leap.onnx")
    engine = engines.load(tmp_path / "leap.onnx", "onnxruntime", cache_dir=tmp_path, threads=1)
    graphs, _ = golden(shared, "graphs_and_fk_24")
    for hand in json.loads(about["embodiments"]):
        found = asked(engine, tokens_of(tensors[f"{hand}.obs"]).numpy(), graph_of(graphs, f"{hand}."))
        assert list(found) == heads
        for name in heads:  # those of bias_after_softmax reach 60
            np.testing.assert_allclose(found[name], tensors[f"{hand}.{name}"].numpy(), atol=1e-4, rtol=1e-4, err_msg=name)


# What is refused: no golden weights needed -----------------------------------------------------------------------------


def published():
    """Return a checkpoint in the published layout with random weights."""
    recipe = {"token": 30, "slots": SLOTS, "network": {"width": 64, "heads": 4, "layers": 3, "feedforward": 128}}
    torch.manual_seed(0)
    weights = build(recipe).state_dict()
    return {"model": weights, "tokenization_config": dict(TOKENIZATION), "model_config": copy.deepcopy(MODEL)}


def refusal(checkpoint, path):
    torch.save(checkpoint, path)
    with pytest.raises(PerceptionError) as caught:
        checkpoints.convert(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_an_untouched_checkpoint_converts(tmp_path):
    torch.save(published(), tmp_path / "get.pt")
    assert checkpoints.convert(tmp_path / "get.pt")[0]["task"] == "leap_rotation"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"obsHistorySize": 5}, "obsHistorySize=5 instead of 6"),
        ({"includeJointAxis": True}, "includeJointAxis=True instead of False"),
        ({"includeSomethingNew": True}, "includeSomethingNew=True instead of False"),
        ({"includeJointRot": False, "fixedLocalObsSize": 3}, "includeJointRot=False instead of True, fixedLocalObsSize=3"),
        ({"enableGeometryEncoding": False}, "enableGeometryEncoding=False instead of True"),
        ({"flushVariableLocalObsOnReset": False}, "flushVariableLocalObsOnReset=False instead of True"),
        ({"localObsSize": None}, "localObsSize=None instead of 18"),
        ({"variableLocalObsSize": ...}, "no variableLocalObsSize, which is to be 2"),
    ],
)
def test_another_layout_of_tokens_is_refused_with_what_differs(change, complaint, tmp_path):
    checkpoint = published()
    config = checkpoint["tokenization_config"]
    config.update({key: value for key, value in change.items() if value is not ...})
    for key in [key for key, value in change.items() if value is ...]:
        del config[key]
    said = refusal(checkpoint, tmp_path / "get.pt")
    assert complaint in said and "tokens are not those that the policy node makes" in said


def test_weights_that_take_other_tokens_than_their_configuration_makes_are_refused(tmp_path):
    checkpoint = published()
    checkpoint["model"]["token_embedding.weight"] = torch.zeros(64, 24)
    assert "take tokens of [24] features" in refusal(checkpoint, tmp_path / "get.pt")


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("transformer.num_layers", 4, "15 missing (encoder.layers.3."),
        ("transformer.num_layers", 2, "15 unexpected (encoder.layers.2."),
        ("transformer.num_layers", 10**9, "transformer.num_layers=1000000000, which is not a size from 1 to 4096"),
        ("transformer.num_layers", True, "transformer.num_layers=True, which is not a size"),
        ("transformer.token_embed_dim", "64", "transformer.token_embed_dim='64', which is not a size"),
        ("transformer.token_embed_dim", 128, "token_embedding.weight [64, 30] instead of [128, 30]"),
        ("transformer.num_attention_heads", 3, "3 attention heads, which do not divide the width 64"),
        ("transformer.num_attention_heads", 8, "spatial_embedding.weight [17, 4] instead of [17, 8]"),
        ("transformer", ..., "model_config has no transformer, which"),
        ("transformer.feedforward_dim", ..., "model_config has no transformer.feedforward_dim"),
        ("max_dof_count", 20, "spatial_embedding.weight [17, 4] instead of [21, 4]"),
        ("embodiment_encoding", "centrality", "'centrality'; only none and learned"),
        ("embodiment_encoding", "none", "unexpected (encoder.layers.0.spatial_embedding.weight"),
        ("graphormer.positional_encoding", "centrality", "'centrality'; only none and learned"),
        ("graphormer.attention.enable_edge_encoding", True, "enable_edge_encoding"),
        ("head_defaults.activation", "relu", "layers of [16] with relu"),
        ("head_defaults.units", [16, 16], "layers of [16, 16] with elu"),
        ("head_defaults.units", ["a"], "head units 0='a', which is not a size"),
        ("heads.policy.activation", "relu", "its heads differ"),
        ("heads.policy", ..., "no head 'policy'"),
        ("heads", [], "heads=[], which is not a dict"),
    ],
)
def test_another_network_than_the_tensors_or_the_model_file_allow_is_refused(path, value, complaint, tmp_path):
    checkpoint = published()
    section = checkpoint["model_config"]
    *above, last = path.split(".")
    for key in above:
        section = section[key]
    if value is ...:
        del section[last]
    else:
        section[last] = value
    assert complaint in refusal(checkpoint, tmp_path / "get.pt")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: c["model"].pop("encoder.layers.1.norm1.weight"), "1 missing (encoder.layers.1.norm1.weight)"),
        (lambda c: c["model"].pop("token_embedding.weight"), "1 missing (token_embedding.weight)"),
        (lambda c: c["model"].update({"obs_property_embeddings.0.weight": torch.ones(18, 4)}), "1 unexpected (obs_property"),
        (lambda c: c["model"].update({"token_embedding.weight": torch.tensor(1.0)}), "take tokens of [] features"),
        (lambda c: c.pop("model"), "holds no state_dict"),
        (lambda c: c.pop("tokenization_config"), "a GET without its tokenization_config"),
        (lambda c: c.pop("model_config"), "a GET without its model_config"),
        (lambda c: c.update(model_config="GET"), "a GET without its model_config"),
        # An expert of the same release (rl_games): another architecture, and none of ours.
        (lambda c: (c.clear(), c.update(model={"a2c_network.mu.weight": torch.ones(2, 2)})), "nor one of the others"),
    ],
)
def test_missing_and_foreign_parts_are_refused_by_name(change, complaint, tmp_path):
    checkpoint = published()
    change(checkpoint)
    assert complaint in refusal(checkpoint, tmp_path / "get.pt")


def test_heads_that_only_training_needed_are_left_out(tmp_path):
    checkpoint = published()
    checkpoint["model"]["head_modules.policy_degree.0.weight"] = torch.ones(16, 64)
    checkpoint["model_config"]["heads"]["policy_degree"] = {"output_dim": 5, "squeeze_output_dim": False}
    torch.save(checkpoint, tmp_path / "get.pt")
    recipe, state = checkpoints.convert(tmp_path / "get.pt")
    assert list(recipe["network"]["outputs"]) == list(HEADS)
    assert not any("policy_degree" in name for name in state)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_configuration_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    said = refusal({**published(), "tokenization_config": Malicious(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert "running code" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_by_name(share, tmp_path):
    torch.save(published(), tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"cut\.pt: damaged"):
        checkpoints.convert(tmp_path / "cut.pt")
