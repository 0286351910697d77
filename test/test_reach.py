# SPDX-License-Identifier: Apache-2.0
"""Reaching: kinematics of many robots at once, the expert's and the policy's limits, export, and learning it."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprob_perception import robots
from deeprob_perception.errors import DataError, ModelError, RobotError
from deeprob_perception.policy import evaluate, expert
from deeprob_perception.policy.tokens import LAYOUT, TOKEN, fixed, tokens
from deeprob_perception.robots.batch import of_robot
from deeprob_perception.robots.generate import FAMILIES, collect, frames, generate

LIMIT = '<limit lower="{}" upper="{}" velocity="{}" effort="1"/>'
# A lift, two turning joints (one without ends), a mimicking finger beside the tip.
ROBOT = f"""<robot name="lift"><link name="base"/><link name="carriage"/><link name="upper"/><link name="lower"/>
<link name="tool"/><link name="finger"/>
<joint name="rise" type="prismatic"><parent link="base"/><child link="carriage"/><origin xyz="0 0.1 0.2"/><axis xyz="0 0 1"/>
{LIMIT.format(0, 0.6, 0.3)}</joint>
<joint name="shoulder" type="revolute"><parent link="carriage"/><child link="upper"/><origin xyz="0.1 0 0" rpy="0.3 0 1"/>
<axis xyz="0 1 0"/>{LIMIT.format(-1.5, 2.0, 1.5)}</joint>
<joint name="elbow" type="continuous"><parent link="upper"/><child link="lower"/><origin xyz="0.3 0 0"/>
<axis xyz="0 0 1"/></joint>
<joint name="flange" type="fixed"><parent link="lower"/><child link="tool"/><origin xyz="0.25 0 0.05" rpy="0 0.5 0"/></joint>
<joint name="grip" type="prismatic"><parent link="tool"/><child link="finger"/><axis xyz="1 0 0"/>{LIMIT.format(0, 0.05, 0.1)}
<mimic joint="rise" multiplier="0.05"/></joint></robot>"""


@pytest.fixture(scope="module")
def lift() -> robots.Robot:
    return robots.Robot(robots.parse(ROBOT), tip="tool")


def draw(batch, states: int, random: np.random.Generator) -> np.ndarray:
    lower, upper = np.maximum(batch.lower, -3)[:, None], np.minimum(batch.upper, 3)[:, None]
    return random.uniform(lower, upper, (len(batch), states, batch.lower.shape[1])).astype(np.float32)


# Kinematics -----------------------------------------------------------------------------------------------------------


def test_a_batch_of_one_robot_has_its_poses_jacobian_and_graph(lift):
    batch = of_robot(lift, "tool", 5)
    positions = draw(batch, 6, np.random.default_rng(1))
    turned, places = batch.poses(positions)
    tips = batch.tips(turned, places)
    own = positions[0, :, :3].astype(np.float64)
    expected = lift.forward_kinematics(own)
    np.testing.assert_allclose(places[0, :, :3], expected[:, :, :3, 3], atol=1e-5)
    np.testing.assert_allclose(turned[0, :, :3], expected[:, :, :3, :3], atol=1e-5)
    np.testing.assert_allclose(tips[0], lift.forward_kinematics(own, ["tool"])[:, 0, :3, 3], atol=1e-5)
    jacobian = batch.jacobian(turned, places, tips)[0, :, :3]
    np.testing.assert_allclose(jacobian.swapaxes(1, 2), lift.jacobian(own, "tool")[:, :3], atol=1e-5)
    graph, alone = batch.graphs(), lift.graph()
    for name in ("distance", "parent", "child"):
        assert np.array_equal(getattr(graph, name)[0, :3, :3], getattr(alone, name)), name
    assert (graph.distance[0, 3:] == -1).all() and not graph.parent[0, :, 3:].any()
    assert batch.reach[0] == pytest.approx(np.hypot(0.1, 0.2) + 0.6 + 0.1 + 0.3 + np.hypot(0.25, 0.05), rel=1e-5)


@pytest.mark.parametrize("file", ["franka_panda", "ur5e", "so101", "stretch_se3", "allegro_hand_right"])
def test_real_robots_as_batches_have_their_poses_and_graphs(shared, file):
    _, tip, _ = evaluate.KNOWN[file]
    robot = robots.Robot(robots.read(shared / f"robots/real/{file}.urdf"))
    whole = robots.Robot(robots.read(shared / f"robots/real/{file}.urdf"), tip=tip)
    for one in (robot, whole):
        batch, graph = of_robot(one, tip, 16), one.graph()
        count = len(one.joint_names)
        assert np.array_equal(batch.graphs().distance[0, :count, :count], graph.distance)
        assert np.array_equal(batch.graphs().parent[0, :count, :count], graph.parent)


def test_a_robot_that_cannot_be_expressed_is_refused(lift):
    with pytest.raises(RobotError, match="3 joints to move, the model takes 2"):
        of_robot(lift, "tool", 2)
    with pytest.raises(RobotError, match="no link 'hand'"):
        of_robot(lift, "hand")
    with pytest.raises(RobotError, match="mimics"):
        of_robot(robots.Robot(robots.parse(ROBOT)), "finger")
    with pytest.raises(RobotError, match="no joint that is moved"):
        of_robot(lift, "base")


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES], ids=lambda family: family.__name__)
def test_every_family_makes_robots_with_joints_in_order_and_room_to_move(family):
    random = np.random.default_rng(3)
    batch = collect([frames(family(random), random) for _ in range(30)], 9)
    there = ~batch.padding
    assert (batch.count >= 3).all() and (batch.count <= 9).all() and (batch.reach > 0.02).all() and (batch.reach < 5).all()
    assert (batch.upper > batch.lower)[there].all() and (batch.velocity > 0)[there].all()
    assert (batch.parent < np.arange(9))[there].all() and batch.carries.any(1).all()
    np.testing.assert_allclose(np.linalg.norm(batch.axes, axis=-1), 1, atol=1e-5)
    turns = batch.origins[..., :3, :3]
    np.testing.assert_allclose(turns @ turns.swapaxes(-1, -2), np.broadcast_to(np.eye(3), turns.shape), atol=1e-5)
    assert (np.linalg.det(turns) > 0.99).all()


# The expert and the step ----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 100.0), st.floats(0.002, 1.0))
@settings(max_examples=40, deadline=None)
def test_whatever_a_network_answers_a_step_keeps_all_limits(seed, size, period):
    random = np.random.default_rng(seed)
    batch = generate(6, seed % 1000)
    before = draw(batch, 3, random)
    found = random.normal(scale=size, size=before.shape).astype(np.float32)
    after = expert.step(batch, found, random.normal(size=(6, 3, 3)), before, period)
    lower, upper = batch.lower[:, None], batch.upper[:, None]
    assert ((after >= lower - 1e-6) & (after <= upper + 1e-6)).all()
    moved = np.abs(after - before) <= batch.velocity[:, None] * period * (1 + 1e-3) + 1e-6
    assert moved[~np.broadcast_to(batch.padding[:, None], moved.shape)].all()


def test_the_expert_reaches_most_goals_and_leaves_joints_beside_the_chain_alone():
    random = np.random.default_rng(0)
    batch = generate(150, 5)
    positions, goals = draw(batch, 2, random), batch.tips(*batch.poses(draw(batch, 2, random)))
    aside = ~batch.carries
    for _ in range(100):
        turned, places = batch.poses(positions)
        tips = batch.tips(turned, places)
        found = expert.direction(batch, batch.jacobian(turned, places, tips), goals - tips, positions)
        assert not found[np.broadcast_to(aside[:, None], found.shape)].any()
        positions = expert.step(batch, found, goals - tips, positions, 0.05).astype(np.float32)
    off = np.linalg.norm(goals - batch.tips(*batch.poses(positions)), axis=-1) / batch.reach[:, None]
    assert (off < 0.01).mean() > 0.7 and np.median(off) < 1e-4


def test_tokens_do_not_change_when_robot_and_goal_are_scaled_or_carried_elsewhere():
    batch = generate(40, 7)
    batch = batch[~batch.prismatic.any(1)]  # lengths of sliding joints scale with the robot, and their positions would, too
    random = np.random.default_rng(1)
    positions, goals = draw(batch, 2, random), batch.tips(*batch.poses(draw(batch, 2, random)))
    told, _ = tokens(batch, fixed(batch), positions, goals)
    origins = batch.origins.copy()
    origins[..., :3, 3] *= 2.5
    scaled = replace(batch, origins=origins, tip=batch.tip * 2.5)
    again, _ = tokens(scaled, fixed(scaled), positions, goals * 2.5)
    assert told.shape == (len(batch), 2, 9, TOKEN) and np.isfinite(told).all()
    np.testing.assert_allclose(again, told, atol=2e-3)


# Learning and running it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    pytest.importorskip("torch", reason="training needs the extra `train` (torch)")
    from deeprob_perception.training.reach import Settings, train

    out = tmp_path_factory.mktemp("reach")
    small = dict(robots=300, robots_a_batch=16, states_a_robot=8, evaluate_every=40, threads=1, width=32, feedforward=64,
                 layers=2)  # fmt: skip
    for variant in ("get", "mlp"):
        train(out, Settings(variant=variant, steps=80, **small))
    train(out, Settings(variant="get", steps=120, **small), resume=True)
    return out


@pytest.fixture(scope="module")
def model(trained):
    from deeprob_perception import zoo

    recipe, state = zoo.load_checkpoint(trained / "get.safetensors")
    return zoo.export(recipe, state, trained / "get.onnx", 0, 0, {"name": "reach", "licence": "Apache-2.0"})


def test_a_short_training_learns_and_goes_on_where_it_was_cut(trained):
    with (trained / "get.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["40", "80", "120"]
    assert float(rows[-1]["action"]) < float(rows[0]["action"])
    assert float(rows[-1]["self_model"]) < float(rows[0]["self_model"])


def test_an_unknown_variant_is_named(tmp_path):
    pytest.importorskip("torch", reason="training needs the extra `train` (torch)")
    from deeprob_perception.training.reach import Settings, train

    with pytest.raises(DataError, match="no_graph"):
        train(tmp_path, Settings(variant="gut"))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_exported_policy_is_the_trained_one_for_robots_of_any_number_of_joints(model, trained, backend, tmp_path):
    import torch

    from deeprob_perception import engines, zoo
    from deeprob_perception.nets.reacher import build

    recipe, state = zoo.load_checkpoint(trained / "get.safetensors")
    net = build(recipe).eval()
    net.load_state_dict(state)
    engine = engines.load(model, backend=backend, precision="fp32", threads=1, cache_dir=tmp_path)
    batch = generate(8, 11)
    random = np.random.default_rng(2)
    told, _ = tokens(batch, fixed(batch), draw(batch, 1, random), random.normal(size=(8, 1, 3)).astype(np.float32))
    graphs = batch.graphs()
    for row in range(len(batch)):
        count, matrices = int(batch.count[row]), {}
        inputs = {"tokens": np.zeros((1, 16, TOKEN), np.float32), "padding": np.arange(16)[None] >= count}
        inputs["tokens"][0, :count] = told[row, 0, :count]
        for name, fill in (("distance", -1), ("parent", 0), ("child", 0)):
            inputs[name] = np.full((1, 16, 16), fill, np.int64)
            inputs[name][0, :count, :count] = getattr(graphs, name)[row, :count, :count]
            matrices[name] = torch.from_numpy(getattr(graphs, name)[row, :count, :count])
        with torch.no_grad():
            alone = net(torch.from_numpy(told[row, :, :count]), **matrices)
        found = engine(**inputs)
        np.testing.assert_allclose(found["action"][0, :count], alone["action"][0], atol=1e-5)
        np.testing.assert_allclose(found["forward_kinematics"][0, :count], alone["forward_kinematics"][0], atol=1e-5)
        assert not found["action"][0, count:].any()


def test_the_policy_stays_within_limits_and_its_score_has_the_layout_of_the_docs(model, lift, tmp_path):
    from deeprob_perception import engines
    from deeprob_perception.policy.reach import ReachPolicy

    engine = engines.load(model, backend="onnxruntime", precision="fp32", threads=1)
    policy = ReachPolicy(engine, lift, "tool", 20.0)
    positions = np.array([0.0, 2.0, 4.0])
    for _ in range(60):
        command = policy.act(positions, np.array([0.3, 0.2, 0.9]))
        assert (command.positions >= lift.lower - 1e-9).all() and (command.positions <= lift.upper + 1e-9).all()
        assert (np.abs(command.velocities) <= np.array([0.3, 1.5, 1.0]) * 1.001).all()  # the elbow's description names none
        np.testing.assert_allclose(command.velocities, (command.positions - positions) * 20, atol=1e-9)
        positions = command.positions
    still = policy.act(positions, None)
    assert np.array_equal(still.positions, positions) and not still.velocities.any()
    (tmp_path / "lift.urdf").write_text(ROBOT)
    arguments = ["--robots", str(tmp_path), "--episodes", "3", "--model", str(model), "--json", str(tmp_path / "r.json")]
    done = subprocess.run(
        [sys.executable, "-m", "deeprob_perception", "eval", "reach", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "r.json").read_text())["robots"]["lift"]
    assert {"expert", "get"} <= scores.keys() and 0 <= scores["get"] <= 1 and scores["get_broken"] == 0


def test_a_model_of_another_token_layout_is_refused(model, lift, tmp_path):
    import onnx

    from deeprob_perception import engines
    from deeprob_perception.policy.reach import ReachPolicy

    proto = onnx.load(model)
    for entry in proto.metadata_props:
        entry.value = "reach-0" if entry.key == "deeprob.layout" else entry.value
    onnx.save(proto, tmp_path / "old.onnx")
    with pytest.raises(ModelError, match=LAYOUT):
        ReachPolicy(engines.load(tmp_path / "old.onnx", backend="onnxruntime", precision="fp32"), lift, "tool")


def test_tensorrt_builds_the_policy_without_a_gpu(model):
    library = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX (extra `tensorrt`)")
    builder = library.Builder(library.Logger(library.Logger.ERROR))
    network = builder.create_network(0)
    parser = library.OnnxParser(network, library.Logger(library.Logger.ERROR))
    assert parser.parse(model.read_bytes()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize(
    "command",
    [["build", "reach", "--target", "sm_86"], ["bench", "engine", "--model", "reach"], ["quantize", "reach", "--out", "q"]],
    ids=lambda command: command[0],
)
def test_commands_for_images_refuse_a_policy_in_one_line_and_the_list_shows_it(command, tmp_path):
    if command[0] == "quantize":
        command = [*command, "--data", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "deeprob_perception", *command], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 2 and "takes no image" in done.stderr and "Traceback" not in done.stderr


def test_the_list_of_models_shows_policies_too():
    done = subprocess.run(
        [sys.executable, "-m", "deeprob_perception", "models", "list"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "16" in done.stdout and "reach" in done.stdout, done.stderr
