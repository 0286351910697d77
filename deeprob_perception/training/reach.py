# SPDX-License-Identifier: Apache-2.0
"""Teach one network to reach with any robot: behaviour cloning of damped least squares on robots that never were.

The network is the Graph Embodiment Transformer (`nets/get.py`); what it is told and answers is in `policy/tokens.py`, who
teaches it in `policy/expert.py`, on which robots in `robots/generate.py`. Half of the states are drawn at random; half are
those that the network itself runs into, labelled by the expert (Ross et al., "A Reduction of Imitation Learning and Structured
Prediction to No-Regret Online Learning", AISTATS 2011).
"""

import csv
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from deeprob_perception.errors import DataError
from deeprob_perception.nets.reacher import VARIANTS, build
from deeprob_perception.policy import expert
from deeprob_perception.policy.tokens import LAYOUT, SCALE, TOKEN, State, fixed, tokens
from deeprob_perception.robots.batch import RobotBatch
from deeprob_perception.robots.generate import generate
from deeprob_perception.robots.robot import Graph
from deeprob_perception.training.schedule import warmup_cosine
from deeprob_perception.training.segmentation import autocast_for, save_atomically

JOINTS = 9  # of the robots that are trained on; the network itself takes up to 16
SLOTS = 16
SHAPE = ("variant", "width", "heads", "layers", "feedforward")  # of the settings: what the network is built from
COLUMN = slice(25, 28)  # of a token: the joint's column of the Jacobian, of reach
LARGEST = 3.0  # of an action that is taught: near a singularity the expert asks for more, which no joint can do


@dataclass
class Settings:
    """What a run is made of; it travels with the weights."""

    variant: str = "get"
    width: int = 128
    heads: int = 8
    layers: int = 4
    feedforward: int = 256
    steps: int = 20000
    robots_a_batch: int = 64
    states_a_robot: int = 16
    robots: int = 40000
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    task_weight: float = 1.0
    self_model_weight: float = 1.0
    evaluate_every: int = 1000
    precision: str = "auto"
    fine_share: float = 0.15  # of the steps, the last: in fp32 whatever the precision, as bf16 has three digits
    threads: int = 0
    seed: int = 0


def recipe_of(settings: Settings) -> dict[str, Any]:
    """Return what a network is built from, and what its inputs mean."""
    shape = {key: value for key, value in asdict(settings).items() if key in SHAPE}
    return {"task": "reach", "backbone": settings.variant, "layout": LAYOUT, "token": TOKEN, "slots": SLOTS, **shape}


def draw(robots: RobotBatch, states: int, random: np.random.Generator) -> np.ndarray:
    """Return positions within the limits, float32 `[R, states, n]`; some joints at a limit, where policies often are."""
    lower, upper = np.maximum(robots.lower, -np.pi)[:, None], np.minimum(robots.upper, np.pi)[:, None]
    shape = (len(robots), states, robots.lower.shape[1])
    positions = random.uniform(lower, upper, shape)
    at = random.random(shape)
    ends = robots.limited[:, None]
    positions = np.where(ends & (at < 0.05), robots.lower[:, None], positions)
    return np.where(ends & (at > 0.95), robots.upper[:, None], positions).astype(np.float32)


def goals_for(robots: RobotBatch, positions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return goals that are within reach, `[R, S, 3]`: half anywhere, half near, down to a thousandth of the way."""
    there = draw(robots, positions.shape[1], random)
    near = random.random((*positions.shape[:2], 1)) < 0.5
    share = 10 ** random.uniform(-3, 0, (*positions.shape[:2], 1))
    there = np.where(near, positions + (there - positions) * share, there).astype(np.float32)
    return robots.tips(*robots.poses(there))


@dataclass
class Batch:
    """States of some robots, ready for the network, and what the expert does in them."""

    robots: RobotBatch
    positions: np.ndarray
    goals: np.ndarray
    state: State
    tokens: Tensor
    graph: dict[str, Tensor]
    padding: Tensor
    action: Tensor
    places: Tensor


class School:
    """Robots to learn on: their graphs and constant parts are made once."""

    def __init__(self, robots: RobotBatch):
        self.robots = robots
        self.constant = fixed(robots)
        graphs = robots.graphs()
        self.graphs = Graph(*(matrix.astype(np.int8) for matrix in (graphs.distance, graphs.parent, graphs.child)))

    def batch(self, rows: np.ndarray, positions: np.ndarray, goals: np.ndarray) -> Batch:
        robots, states = self.robots[rows], positions.shape[1]
        told, state = tokens(robots, self.constant[rows], positions, goals)
        wanted = expert.direction(robots, state.jacobian, state.offset, positions)

        def each(matrix: np.ndarray) -> Tensor:
            return torch.from_numpy(matrix[rows].astype(np.int64)).repeat_interleave(states, 0)

        return Batch(
            robots, positions, goals, state, torch.from_numpy(told).flatten(0, 1),
            {name: each(getattr(self.graphs, name)) for name in ("distance", "parent", "child")},
            torch.from_numpy(robots.padding).repeat_interleave(states, 0),
            torch.from_numpy(np.clip(wanted / SCALE, -LARGEST, LARGEST)).flatten(0, 1),
            torch.from_numpy(state.places / robots.reach[:, None, None, None]).flatten(0, 1),
        )  # fmt: skip


@dataclass
class Rollout:
    """Some robots on their way: what the network is shown of its own doing."""

    rows: np.ndarray
    positions: np.ndarray
    goals: np.ndarray
    visits: int = 0


def rollout(school: School, settings: Settings, random: np.random.Generator) -> Rollout:
    rows = random.integers(0, len(school.robots), settings.robots_a_batch // 2)
    robots = school.robots[rows]
    positions = draw(robots, settings.states_a_robot, random)
    return Rollout(rows, positions, goals_for(robots, positions, random))


def losses(net: nn.Module, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the loss, its parts, and the actions `[B, n]`."""
    found = {name: value.float() for name, value in net(batch.tokens, **batch.graph, padding=batch.padding).items()}
    there = ~batch.padding
    error = (found["action"] - batch.action).masked_fill(batch.padding, 0)
    count = there.sum()
    parts = {"action": nn.functional.huber_loss(error, torch.zeros_like(error), reduction="sum", delta=0.3) / count}
    # How far the tip goes astray, of the way: what the robot sees of an error.
    astray = (batch.tokens[..., COLUMN] * error[..., None]).sum(1) * SCALE  # [B, 3]
    parts["task"] = nn.functional.huber_loss(astray, torch.zeros_like(astray), reduction="sum", delta=0.3) / len(astray)
    loss = parts["action"] + settings.task_weight * parts["task"]
    if "forward_kinematics" in found:
        off = (found["forward_kinematics"] - batch.places).masked_fill(batch.padding[..., None], 0)
        parts["self_model"] = off.square().sum() / count
        loss = loss + settings.self_model_weight * parts["self_model"]
    return loss, parts, found["action"].detach().masked_fill(batch.padding, 0)


def train(out: Path, settings: Settings, resume: bool = False) -> dict[str, float]:
    """Train one variant; leave `VARIANT.safetensors` (the best on the validation robots), its log and `VARIANT.pt` in `out`.

    :returns: the last `validate`.
    """
    s = settings
    if s.variant not in VARIANTS:
        raise DataError(f"there is no variant {s.variant!r}; there are: {', '.join(VARIANTS)}")
    if s.threads:
        torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    random = np.random.default_rng(s.seed)
    school = School(generate(s.robots, s.seed, JOINTS))
    validation = School(generate(150, s.seed + 10**6, JOINTS))
    net = build(recipe_of(s))
    optimizer = torch.optim.AdamW(net.parameters(), s.learning_rate, betas=(0.9, 0.98), weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, s.steps, s.warmup_steps))
    out.mkdir(parents=True, exist_ok=True)
    last, log = out / f"{s.variant}.pt", out / f"{s.variant}.csv"
    step, best = 0, -1.0
    if resume and last.is_file():
        state = torch.load(last, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        step, best = state["step"], state["best"]
        random = np.random.default_rng(s.seed + step)
    else:
        log.write_text("step,action,task,self_model,success,error,milliseconds\n")
    autocast = autocast_for(s.precision, torch.device("cpu"))
    ways = [rollout(school, s, random) for _ in range(16)]
    half = s.robots_a_batch // 2
    report: dict[str, float] = {}
    sums: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task(s.variant, total=s.steps, completed=step)
        started, since = time.perf_counter(), step
        while step < s.steps:
            way = ways[step % len(ways)]
            rows = random.integers(0, len(school.robots), half)
            positions = draw(school.robots[rows], s.states_a_robot, random)
            goals = goals_for(school.robots[rows], positions, random)
            batch = school.batch(
                np.concatenate((rows, way.rows)), np.concatenate((positions, way.positions)), np.concatenate((goals, way.goals))
            )
            with autocast if step < (1 - s.fine_share) * s.steps else nullcontext():
                loss, parts, action = losses(net, batch, s)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), s.gradient_clip)
            optimizer.step()
            schedule.step()
            step += 1
            walk(way, batch, action.reshape(batch.positions.shape).numpy(), half, random)
            if way.visits > 40:
                ways[(step - 1) % len(ways)] = rollout(school, s, random)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            progress.update(bar, completed=step)
            if step % s.evaluate_every == 0 or step == s.steps:
                spent = (time.perf_counter() - started) / (step - since)
                report = validate(net, validation, s.seed)
                means = {name: total / (step - since) for name, total in sums.items()}
                row = [step, *(f"{means.get(name, 0):.4g}" for name in ("action", "task", "self_model")),
                       f"{report['success']:.4f}", f"{report['error']:.5f}", f"{spent * 1e3:.0f}"]  # fmt: skip
                with log.open("a", newline="") as file:
                    csv.writer(file).writerow(row)
                print(f"{s.variant} {row}", flush=True)
                if report["success"] > best:
                    best = report["success"]
                    keep(net, s, out)
                save_atomically(
                    {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                     "step": step, "best": best}, last)  # fmt: skip
                started, since, sums = time.perf_counter(), step, {}
    return report


def walk(way: Rollout, batch: Batch, action: np.ndarray, half: int, random: np.random.Generator) -> None:
    """Let the robots on their way take the network's step; those that have arrived, or for long enough, start anew."""
    robots = batch.robots[half:]
    offset = batch.state.offset[half:]
    period = 0.05 * random.uniform(0.5, 2)
    way.positions = expert.step(robots, action[half:] * SCALE, offset, way.positions, period).astype(np.float32)
    arrived = np.linalg.norm(offset, axis=-1) / robots.reach[:, None] < 0.001
    anew = arrived | (random.random(arrived.shape) < 0.02)
    if anew.any():
        positions = draw(robots, way.positions.shape[1], random)
        goals = goals_for(robots, positions, random)
        way.positions = np.where(anew[..., None], positions, way.positions)
        way.goals = np.where(anew[..., None], goals, way.goals)
    way.visits += 1


@torch.inference_mode()
def validate(net: nn.Module, school: School, seed: int, states: int = 2, steps: int = 100) -> dict[str, float]:
    """Return `success`, the share of goals within 1 % of reach after `steps` at 20 Hz, and the median `error`, of reach."""
    random = np.random.default_rng(seed)
    net.eval()
    robots, rows = school.robots, np.arange(len(school.robots))
    positions = draw(robots, states, random)
    goals = robots.tips(*robots.poses(draw(robots, states, random)))
    for _ in range(steps):
        batch = school.batch(rows, positions, goals)
        found = net(batch.tokens, **batch.graph, padding=batch.padding)["action"].masked_fill(batch.padding, 0)
        action = found.reshape(positions.shape).numpy() * SCALE
        positions = expert.step(robots, action, batch.state.offset, positions, 0.05).astype(np.float32)
    tips = robots.tips(*robots.poses(positions))
    distance = np.linalg.norm(goals - tips, axis=-1) / robots.reach[:, None]
    net.train()
    return {"success": float((distance < 0.01).mean()), "error": float(np.median(distance))}


def keep(net: nn.Module, settings: Settings, out: Path) -> None:
    """Write the weights with what they are for, in a file that `deeprob export` reads."""
    from deeprob_perception.zoo import save_checkpoint

    save_checkpoint(out / f"{settings.variant}.safetensors", net.state_dict(), recipe_of(settings))
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
