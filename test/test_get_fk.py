# SPDX-License-Identifier: Apache-2.0
"""Self-modelling of hands: the recipe learns, scores what it says, and nobody is scored on what it was trained on."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs the extra `train`")

from deeprob_perception.cli import app, commands  # noqa: E402, F401
from deeprob_perception.errors import DataError  # noqa: E402
from deeprob_perception.robots import Robot, parse  # noqa: E402
from deeprob_perception.training import get_fk  # noqa: E402

FINGER = """<robot name="finger"><link name="palm"/><link name="a"/><link name="b"/>
<joint name="0" type="revolute"><origin xyz="0 0.02 0.1" rpy="0.3 0 0"/><parent link="palm"/><child link="a"/>
<axis xyz="0 0 1"/><limit lower="-1" upper="1"/></joint>
<joint name="1" type="{kind}"><origin xyz="0.{length} 0 0"/><parent link="a"/><child link="b"/>
<axis xyz="0 1 0"/><limit lower="-1" upper="1"/></joint></robot>"""


def finger(length="04", kind="revolute") -> get_fk.Hand:
    return get_fk.Hand(f"finger{length}", Robot(parse(FINGER.format(length=length, kind=kind))))


def test_tokens_and_targets_are_the_kinematics():
    hand = finger()
    tokens, positions = hand.sample(3, np.random.default_rng(0))
    angles = np.random.default_rng(0).uniform(-1, 1, (3, 2))
    assert tokens.shape == (3, 2, get_fk.TOKEN) and positions.shape == (3, 2, 3)
    np.testing.assert_allclose(tokens[..., 0], np.sin(angles), atol=1e-6)
    np.testing.assert_allclose(tokens[:, 1, 2:5], [[0.4, 0, 0]] * 3, atol=1e-6)  # decimetres
    np.testing.assert_allclose(positions[:, 0], [[0, 0.2, 1.0]] * 3, atol=1e-6)
    reach = np.linalg.norm(positions[:, 1] - positions[:, 0], axis=-1)
    np.testing.assert_allclose(reach, 0.4, atol=1e-6)


def test_a_batch_pads_and_each_row_has_its_own_hands_graph():
    three = FINGER.replace("</robot>", "").format(length="03", kind="revolute") + (
        '<link name="c"/><joint name="2" type="revolute"><origin xyz="0.03 0 0"/><parent link="b"/><child link="c"/>'
        '<axis xyz="0 1 0"/><limit lower="-1" upper="1"/></joint></robot>')  # fmt: skip
    hands = [finger(), get_fk.Hand("three", Robot(parse(three)))]
    settings = get_fk.Settings(batch_size=8, hands_a_batch=2, steps=1)
    tokens, positions, graph, padding = next(get_fk.batches(hands, settings))
    assert tokens.shape == (8, 3, get_fk.TOKEN) and graph["distance"].shape == (8, 3, 3)
    for row in range(8):
        joints = int((~padding[row]).sum())
        hand = hands[joints - 2]
        for key, matrix in hand.graph.items():
            assert torch.equal(graph[key][row, :joints, :joints], matrix)
        assert (graph["distance"][row, joints:] == -1).all()
        assert positions[row, joints:].abs().max() == 0 if joints < 3 else True


def test_robots_that_the_experiment_is_not_for_are_refused():
    with pytest.raises(DataError, match="finger04 has joints that slide"):
        finger(kind="prismatic")


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    """A very short training of all three by the command."""
    out = tmp_path_factory.mktemp("get_fk")
    size = ["--steps", "60", "--batch-size", "32", "--width", "32", "--layers", "2"]
    folder = str(shared / "robots" / "leap_variants")
    result = CliRunner().invoke(app, ["train", "get-fk", "--robots", folder, "--out", str(out), *size])
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
def test_training_leaves_what_evaluation_reads_and_it_has_learned(run, shared, tmp_path):
    folder, out = shared / "robots" / "leap_variants", tmp_path / "fk.json"
    result = CliRunner().invoke(app, ["eval", "get-fk", "--robots", str(folder), "--models", str(run), "--json", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert list(report) == ["get", "et", "et_dfs"]
    hands = get_fk.load_hands(folder, get_fk.VALIDATION)
    untrained = get_fk.evaluate(get_fk.build("get", get_fk.Settings(width=32, layers=2, feedforward=64)), hands)
    for scores in report.values():
        assert set(scores["robots"]) == set(get_fk.VALIDATION)
        assert scores["mean_mm"] == pytest.approx(np.mean(list(scores["robots"].values())))
        assert 0 < scores["mean_mm"] < 0.8 * untrained["mean_mm"]


@pytest.mark.slow
def test_hands_that_were_trained_on_are_not_scored_on(run, shared):
    folder = str(shared / "robots" / "leap_variants")
    result = CliRunner().invoke(app, ["eval", "get-fk", "--robots", folder, "--models", str(run), "--hands", "001,004"])
    assert isinstance(result.exception, DataError)
    assert "hands 001 were trained on" in str(result.exception)


def test_the_splits_do_not_overlap():
    assert len(set(get_fk.TRAIN)) == 44 and len(set(get_fk.VALIDATION)) == 10
    assert not set(get_fk.TRAIN) & set(get_fk.VALIDATION)


def test_missing_weights_say_how_to_make_them(shared, tmp_path):
    folder = str(shared / "robots" / "leap_variants")
    result = CliRunner().invoke(app, ["eval", "get-fk", "--robots", folder, "--models", str(tmp_path)])
    assert "deeprob train get-fk" in str(result.exception)
