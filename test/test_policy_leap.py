# SPDX-License-Identifier: Apache-2.0
"""The published LEAP policy's observation, reset and action rule, against the reference's own numbers."""

import json
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from policy_models import hand, leap_model, urdf
from safetensors import safe_open

from deeprob_perception import engines
from deeprob_perception.errors import PerceptionError
from deeprob_perception.policy.leap import RATE, History, LeapPolicy, next_target
from deeprob_perception.policy.loop import ControlLoop
from deeprob_perception.policy.safety import Bound, limits_of
from deeprob_perception.robots import Robot, parse, read

HANDS = ("001", "004", "139", "142", "193", "235", "590", "633")


def golden(path) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  no dict


def robot_of(shared, hand_id: str) -> Robot:
    path = next((shared / "robots" / "leap_variants").rglob(f"*{hand_id}*.urdf"))
    return Robot(read(path))


@pytest.mark.parametrize("hand_id", HANDS)
def test_tokens_of_a_stream_with_resets_are_the_references(shared, hand_id):
    tensors, about = golden(shared / "golden" / "get" / f"get_small_{hand_id}.safetensors")
    robot = robot_of(shared, hand_id)
    assert list(robot.joint_names) == json.loads(about["joint_order"])
    steps, rows, count = tensors["raw.q"].shape
    for row in range(rows):
        flagged, never = (History(robot.lower, robot.upper, robot.origins) for _ in range(2))
        for t in range(steps):
            phase = tuple(tensors["raw.phase"][t, row])
            at, target = tensors["raw.q"][t, row].astype(np.float64), tensors["raw.target"][t, row].astype(np.float64)
            for history, reset, name in (
                (flagged, bool(tensors["raw.reset"][t, row]), "raw.obs_after_step"),
                (never, False, "raw.obs_after_step_no_reset_flag"),
            ):
                history.push(phase, at, target, reset)
                observation = tensors[name][t, row]
                expected = np.concatenate(
                    (np.broadcast_to(observation[:12], (count, 12)), observation[12:].reshape(count, 18)), -1
                )  # fmt: skip
                np.testing.assert_allclose(history.tokens(), expected, atol=2e-6, err_msg=f"{name} at {t}")


def test_paper_observations_have_the_layout_of_our_tokens(shared):
    tensors, _ = golden(shared / "golden" / "get" / "get_paper_io.safetensors")
    for hand_id in ("001", "139", "142", "193", "590"):
        robot = robot_of(shared, hand_id)
        place = History(robot.lower, robot.upper, robot.origins).tokens()[:, 24:]
        for observation in tensors[f"{hand_id}.obs"]:
            np.testing.assert_allclose(observation[12:].reshape(len(place), 18)[:, 12:], place, atol=2e-6)


def test_the_action_rule_is_the_references(shared):
    tensors, _ = golden(shared / "golden" / "get" / "action_rule.safetensors")
    for hand_id in ("001", "139", "142", "193"):
        lower, upper = tensors[f"{hand_id}.lower"], tensors[f"{hand_id}.upper"]
        robot = robot_of(shared, hand_id)
        np.testing.assert_allclose(robot.lower, lower)
        np.testing.assert_allclose(robot.upper, upper)
        action, before = tensors[f"{hand_id}.action"].astype(np.float64), tensors[f"{hand_id}.prev_target"].astype(np.float64)
        assert (np.abs(action) > 1).any(), "nothing to clip"
        np.testing.assert_allclose(next_target(before, action, lower, upper), tensors[f"{hand_id}.target"], atol=1e-6)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leap")
    return engines.load(leap_model(folder / "leap.onnx"), "onnxruntime", cache_dir=folder, threads=1)


class Overheard:
    """An engine that keeps what it is told."""

    def __init__(self, engine):
        self._engine, self.tokens = engine, []
        self.inputs, self.outputs, self.metadata, self.path = engine.inputs, engine.outputs, engine.metadata, engine.path

    def __call__(self, outputs=None, **inputs):
        self.tokens.append(inputs["tokens"][0].copy())
        return self._engine(outputs=outputs, **inputs)


def test_a_reset_fills_the_history_with_the_measured_state_and_restarts_the_phase(engine):
    heard = Overheard(engine)
    policy = LeapPolicy(heard, Robot(parse(hand())))
    at = np.array([0.1, 0.2, 0.3, 0.4])
    for start in (at, at + 0.5):
        policy.reset(start)
        commands = [policy.act(start + 0.01 * k, None) for k in range(7)]
        first = heard.tokens[-7][:4]
        np.testing.assert_allclose(first[:, 18:24], np.repeat(start[:, None], 6, 1), atol=1e-6)  # targets: where it is
        np.testing.assert_allclose(first[:, 12:18], np.repeat(((start - 0.75) / 1.25)[:, None], 6, 1), atol=1e-6)
        assert first[0, 5] == pytest.approx(np.sin(-np.pi / 20), abs=1e-6)
        assert first[0, 11] == pytest.approx(np.cos(-np.pi / 20), abs=1e-6)
        last = heard.tokens[-1][:4]
        np.testing.assert_allclose(last[0, 12:18], (start[0] + 0.01 * np.arange(1, 7) - 0.75) / 1.25, atol=1e-6)
        sent = np.array([start, *(command.positions for command in commands)])
        np.testing.assert_allclose(last[:, 18:24], sent[1:7].T, atol=1e-6)  # the last one is what the sixth step asked for
    assert not heard.tokens[0][4:].any(), "padding has features"


def test_a_look_at_the_self_model_leaves_no_trace_in_the_history(engine):
    def first_tokens(looks: int) -> np.ndarray:
        robot = Robot(parse(hand()))
        policy = LeapPolicy(engine, robot)
        limits = limits_of(robot, RATE, Bound(2.0, 0.5), Bound(0, 0), Bound(0.1, 0.02), Bound(0.5, 0.1))
        loop = ControlLoop(robot, policy, limits, 0.2, 1.0)
        positions = np.full(len(robot.joint_names), 0.3)
        loop.readings.add(robot.joint_names, positions, 0.0, 0.0)
        for _ in range(looks):
            loop.look(0.0)
            assert not loop.look_failure
        assert loop.enable(0.0) == "" and loop.step(0.0) is not None
        return policy._tokens.copy()

    np.testing.assert_array_equal(first_tokens(0), first_tokens(3))


def test_targets_go_on_from_the_target_until_told_what_was_commanded(engine):
    policy = LeapPolicy(engine, Robot(parse(hand())))
    policy.reset(np.zeros(4))
    first = policy.act(np.zeros(4), None).positions
    second = policy.act(np.zeros(4), None)
    np.testing.assert_allclose(second.positions, first, atol=1e-9)  # the sine of 0
    policy.follow(np.full(4, 0.5))
    third = policy.act(np.zeros(4), None)
    np.testing.assert_allclose(third.positions, 0.5 + np.sin(np.pi / 20) / 24, atol=1e-6)
    np.testing.assert_allclose(third.velocities, np.sin(np.pi / 20) / 24 * RATE, atol=1e-5)


def test_what_the_policy_cannot_move_is_refused_by_name(engine):
    with pytest.raises(PerceptionError, match="trained at 20 Hz and cannot run at 100"):
        LeapPolicy(engine, Robot(parse(hand())), 100.0)
    with pytest.raises(PerceptionError, match="spin is none"):
        LeapPolicy(engine, Robot(parse(urdf())))


@pytest.mark.parametrize(("layout", "size", "complaint"), [("leap-2", 30, "tokens 'leap-2'"), ("leap-1", 31, "of 31 numbers")])
def test_a_model_trained_with_other_tokens_is_refused(layout, size, complaint, tmp_path):
    model = onnx.load(leap_model(tmp_path / "leap.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = size
    next(entry for entry in model.metadata_props if entry.key == "deeprob.layout").value = layout
    onnx.save(model, tmp_path / "leap.onnx")
    with pytest.raises(PerceptionError, match=complaint):
        LeapPolicy(engines.load(tmp_path / "leap.onnx", "onnxruntime", cache_dir=tmp_path, threads=1), Robot(parse(hand())))
