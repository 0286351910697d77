# SPDX-License-Identifier: Apache-2.0
"""The Graph Embodiment Transformer against the reference model's own outputs, and its properties."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `train`")

from deeprob_perception.nets import get  # noqa: E402

SMALL = dict(width=64, heads=4, layers=3, feedforward=128)
HANDS = ("001", "004", "024", "026", "071", "098", "139", "142", "193", "235", "587", "590", "633")
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def golden(shared):
    """Return a function: file name -> its tensors, and its metadata as parsed JSON where it is some."""
    from safetensors import safe_open

    def read(name):
        with safe_open(shared / "golden" / "get" / f"{name}.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
            meta = {k: json.loads(v) if v[:1] in "[{" else v for k, v in (file.metadata() or {}).items()}
        return tensors, meta

    return read


@pytest.fixture(scope="module")
def small(golden):
    net = get.GraphEmbodimentTransformer(**SMALL).eval()
    net.load_state_dict(golden("get_small_weights")[0])
    return net


def graph_of(tensors, prefix="graph."):
    names = {"distance": "spd", "parent": "parent", "child": "child"}
    return {ours: tensors[prefix + theirs].long() for ours, theirs in names.items()}


@pytest.mark.parametrize("hand", HANDS)
def test_every_step_equals_the_reference(golden, small, hand):
    tensors, _ = golden(f"get_small_{hand}")
    tokens, graph = get.tokens_of(tensors["obs"]), graph_of(tensors)
    torch.testing.assert_close(tokens, tensors["tokens_raw"], atol=0, rtol=0)
    outs = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outs.append(out)) for layer in small.encoder.layers]
    with torch.inference_mode():
        found = small(tokens, **graph)
    for hook in hooks:
        hook.remove()
    for index, (layer, out) in enumerate(zip(small.encoder.layers, outs, strict=True)):
        torch.testing.assert_close(layer.bias(**graph), tensors[f"layer{index}.attn_bias"], **TOLERANCE)
        torch.testing.assert_close(out, tensors[f"layer{index}.out"], **TOLERANCE)
    for name in ("policy", "policy_forward_kinematics"):
        assert tensors[name].abs().max() > 0.1
        torch.testing.assert_close(found[name], tensors[name], **TOLERANCE)


def padded(golden):
    tensors, _ = golden("get_small_batch_padded")
    return tensors, get.tokens_of(tensors["obs"]), dict(
        distance=tensors["spd_padded"].long(), parent=tensors["parent_padded"].long(), child=tensors["child_padded"].long(),
        padding=tensors["key_padding_mask"],
    )  # fmt: skip


def test_a_padded_batch_of_many_hands_equals_the_reference(golden, small):
    tensors, tokens, graph = padded(golden)
    outs = []
    hook = small.encoder.layers[-1].register_forward_hook(lambda _m, _i, out: outs.append(out))
    with torch.inference_mode():
        found = small(tokens, **graph)
    hook.remove()
    joints = ~graph["padding"]
    torch.testing.assert_close(outs[0][joints], tensors["encoder_out"][joints], **TOLERANCE)
    for name in ("policy", "policy_forward_kinematics"):
        torch.testing.assert_close(found[name], tensors[name], **TOLERANCE)
        assert torch.isinf(found[name][graph["padding"]]).all()


def test_a_training_step_equals_the_reference(golden):
    weights, _ = golden("get_small_weights")
    net = get.GraphEmbodimentTransformer(**SMALL, dropout=0.0).train()
    net.load_state_dict(weights)
    _, tokens, graph = padded(golden)
    tensors, _ = golden("get_small_train_step")
    target = {name: tensors[f"target.{name}"] for name in ("policy", "policy_forward_kinematics")}
    losses = get.imitation_loss(net(tokens, **graph), target, graph["padding"])
    for name in target:
        torch.testing.assert_close(losses[name], tensors[f"loss.{name}_unweighted"].reshape(()), **TOLERANCE)
    torch.testing.assert_close(losses["total"], tensors["loss.total"].reshape(()), **TOLERANCE)
    losses["total"].backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"grad.{name}"], **TOLERANCE)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    torch.testing.assert_close(norm, tensors["grad_norm_before_clip"].reshape(()), **TOLERANCE)
    torch.optim.Adam(net.parameters(), lr=1.5e-4, betas=(0.9, 0.98)).step()
    for name, parameter in net.named_parameters():
        moved = tensors[f"grad.{name}"].abs() > 1e-5
        torch.testing.assert_close(parameter[moved], tensors[f"param_after_step.{name}"][moved], atol=1e-6, rtol=0)


VARIANTS = {
    "ET": dict(spatial=False, parent=False, child=False),
    "ET_MMPE": dict(spatial=False, parent=False, child=False, slots=True),
    "ET_WCE": dict(spatial=False, parent=False, child=False, centrality=True),
    "ET_WEE": dict(spatial=False, parent=False, child=False, edge=True),
    "GET_NSE": dict(spatial=False),
    "GET_NPCE": dict(parent=False, child=False),
    "GET_plus_CE_EE": dict(centrality=True, edge=True),
    "GET_bias_after_softmax": dict(bias_after_softmax=True),
}


def shortest_paths(links: torch.Tensor, distance: torch.Tensor, longest: int = 7) -> torch.Tensor:
    """Return the link types along each shortest path, int64 `[n, n, longest]` (-1 after its end), from those of neighbours."""
    count = len(links)
    path = torch.full((count, count, longest), -1)
    for i in range(count):
        for j in range(count):
            at = i
            for step in range(int(distance[i, j])):
                after = next(k for k in range(count) if links[at, k] >= 0 and distance[k, j] == distance[at, j] - 1)
                path[i, j, step] = links[at, after]
                at = after
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_ablations_and_baselines_equal_the_reference(golden, variant):
    tensors, meta = golden(f"variant_{variant}")
    graphs, _ = golden("graphs_and_fk_24")
    heads = {name: {"policy": 1, "policy_forward_kinematics": 3}[name] for name in meta["heads"]}
    net = get.GraphEmbodimentTransformer(**{**SMALL, "layers": 2}, outputs=heads, **VARIANTS[variant]).eval()
    net.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    tolerance = dict(atol=1e-5, rtol=1e-5)
    if variant == "GET_bias_after_softmax":  # weights far above 1: the outputs reach 60
        tolerance = dict(atol=1e-4, rtol=1e-5)
    for hand in meta["embodiments"]:
        graph = graph_of(graphs, f"{hand}.")
        extra = {}
        if net.encoder.layers[0].edge_embedding is not None:
            extra["path"] = shortest_paths(tensors[f"{hand}.edge"].long(), graph["distance"])
        if VARIANTS[variant].get("centrality"):
            extra["degree"] = tensors[f"{hand}.degree"].long()
        with torch.inference_mode():
            found = net(get.tokens_of(tensors[f"{hand}.obs"]), **graph, **extra)
        for name in heads:
            torch.testing.assert_close(found[name], tensors[f"{hand}.{name}"], **tolerance)


def test_the_paper_size_model_equals_the_reference(golden):
    tensors, meta = golden("get_paper_io")
    net = get.GraphEmbodimentTransformer().eval()
    assert sum(p.numel() for p in net.parameters()) == 16_860_960
    names = meta["parameter_names"]
    assert set(names) == set(net.state_dict())
    state = {name: recipe(name, tuple(net.state_dict()[name].shape)) for name in names}
    sums = torch.tensor([state[name].double().sum() for name in names])
    torch.testing.assert_close(sums, tensors["check.sum_f64"], atol=1e-6, rtol=1e-9)
    net.load_state_dict(state)
    graphs, _ = golden("graphs_and_fk_24")
    for hand in ("001", "139", "142", "193", "590"):
        with torch.inference_mode():
            found = net(get.tokens_of(tensors[f"{hand}.obs"]), **graph_of(graphs, f"{hand}."))
        for name in ("policy", "policy_forward_kinematics"):
            torch.testing.assert_close(found[name], tensors[f"{hand}.{name}"], atol=1e-4, rtol=1e-3)


def recipe(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the golden files' pseudo-random values of a parameter (their README says how they come about)."""
    import zlib

    z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) | np.arange(int(np.prod(shape)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    r = np.float32(2) * ((z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)) - np.float32(1)
    embedding = name.endswith("_embedding.weight") and "token" not in name
    if name.endswith(("norm1.weight", "norm2.weight", "input_layer_norm.weight")):
        offset, scale = 1.0, 0.2
    elif name.endswith("bias"):
        offset, scale = 0.0, 0.1
    elif embedding:
        offset, scale = 0.0, 1.5
    else:
        offset, scale = 0.0, (3 / shape[-1]) ** 0.5
    value = torch.from_numpy((np.float32(offset) + np.float32(scale) * r).reshape(shape))
    if embedding:
        value[0] = 0
    return value


def chain(joints: int) -> dict[str, torch.Tensor]:
    """Return the graph of an arm without branches."""
    place = torch.arange(joints)
    up = place[:, None] - place
    return {"distance": up.abs(), "parent": up.clamp(min=0), "child": (-up).clamp(min=0)}


def test_the_order_of_the_joints_does_not_matter():
    torch.manual_seed(0)
    net = get.GraphEmbodimentTransformer(**SMALL).eval()
    tokens, graph, order = torch.randn(2, 7, 30), chain(7), torch.randperm(7)
    with torch.inference_mode():
        expected = net(tokens, **graph)["policy"][:, order]
        found = net(tokens[:, order], **{name: matrix[order][:, order] for name, matrix in graph.items()})["policy"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - net(tokens, **graph)["policy"]).abs().max() > 1e-3


def test_row_0_of_the_tables_is_never_trained():
    net = get.GraphEmbodimentTransformer(**SMALL)
    net(torch.randn(2, 5, 30), **chain(5))["policy"].sum().backward()
    for layer in net.encoder.layers:
        assert layer.parent_embedding.weight.grad[0].abs().max() == 0
        assert layer.parent_embedding.weight.grad[1].abs().max() > 0


def test_one_export_serves_robots_with_and_without_padding(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = get.GraphEmbodimentTransformer(**SMALL).eval()
    joints = 9
    padding = torch.arange(joints)[None] >= joints
    inputs = dict(tokens=torch.randn(1, joints, 30), **chain(joints), padding=padding)
    program = torch.onnx.export(net, (), kwargs=inputs, dynamo=True, output_names=list(net.outputs), verbose=False)
    program.save(tmp_path / "get.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "get.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    for count in (9, 6):  # the robot that it was traced with, and one of fewer joints
        graph = {name: torch.zeros(joints, joints, dtype=torch.long) for name in ("distance", "parent", "child")}
        graph["distance"] -= 1
        for name, matrix in chain(count).items():
            graph[name][:count, :count] = matrix
        inputs |= {**graph, "padding": torch.arange(joints)[None] >= count}
        with torch.inference_mode():
            expected = net(**inputs)
            alone = net(inputs["tokens"][:, :count], **chain(count))
        found = dict(zip(names, session.run(None, {k: v.numpy() for k, v in inputs.items()}), strict=True))
        for name in expected:
            np.testing.assert_allclose(found[name][:, :count], expected[name][:, :count], atol=1e-5)
            np.testing.assert_allclose(found[name][:, :count], alone[name], atol=1e-5)
