# SPDX-License-Identifier: Apache-2.0
"""Self-modelling alone: where is every joint, given the joints' angles? GET beside plain transformers, on hands never seen.

The one experiment of GET-Zero (Patel and Song, ICRA 2025, table 3) that needs no simulator: descriptions of hands go in, random
angles and their forward kinematics are the data. Trained on the paper's 44 hands, selected on its 10 validation hands.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from deeprob_perception.errors import DataError
from deeprob_perception.nets.get import GraphEmbodimentTransformer
from deeprob_perception.robots import Robot, read
from deeprob_perception.training.schedule import warmup_cosine

# The paper's splits, by the numbers of its generated LEAP hands.
TRAIN = tuple(
    f"{number:03d}"
    for number in (
        *(1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 21, 22, 23, 26, 51, 56, 95, 103, 119, 120, 121, 123, 124, 125, 126, 127),
        *(129, 130, 131, 132, 134, 140, 141, 144, 154, 164, 165, 169, 174, 189, 194, 221),
    )
)
VALIDATION = ("004", "024", "046", "071", "098", "122", "139", "142", "200", "204")

VARIANTS: dict[str, dict[str, bool]] = {
    "get": {},
    "et": dict(spatial=False, parent=False, child=False),
    "et_dfs": dict(spatial=False, parent=False, child=False, slots=True),
}
TOKEN = 14  # sine and cosine of the angle; origin, rotation (two columns) and axis of the joint in the frame before it
DECIMETRE = 0.1  # m: the unit of lengths inside, in which a hand's are of order one
HEAD = "forward_kinematics"


@dataclass
class Settings:
    """What a run is made of; written to `settings.json` beside its weights."""

    width: int = 128
    heads: int = 8
    layers: int = 4
    feedforward: int = 256
    steps: int = 12000
    batch_size: int = 256
    hands_a_batch: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    gradient_clip: float = 1.0
    evaluate_every: int = 1000
    threads: int = 0
    seed: int = 0


class Hand:
    """A robot as the network sees it: what of its tokens stays the same, its graph, and samples of its kinematics."""

    def __init__(self, name: str, robot: Robot):
        if not (np.isfinite(robot.lower).all() and np.isfinite(robot.upper).all()) or robot.prismatic.any():
            raise DataError(f"the robot {name} has joints that slide or have no ends; this experiment is for turning ones")
        self.name, self.robot = name, robot
        count = len(robot.joint_names)
        turns = robot.origins[:, :3, :2].transpose(0, 2, 1).reshape(count, 6)
        self.fixed = np.concatenate((robot.origins[:, :3, 3] / DECIMETRE, turns, robot.axes), -1)  # [n, 12]
        graph = robot.graph()
        self.graph = {key: torch.from_numpy(getattr(graph, key)) for key in ("distance", "parent", "child")}

    def sample(self, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return tokens float32 `[count, n, TOKEN]` and positions of the joints' frames in the root's `[count, n, 3]`, dm."""
        angles = random.uniform(self.robot.lower, self.robot.upper, (count, len(self.robot.lower)))
        tokens = np.concatenate(
            (np.sin(angles)[..., None], np.cos(angles)[..., None], np.broadcast_to(self.fixed, (*angles.shape, 12))), -1
        )
        positions = self.robot.forward_kinematics(angles)[..., :3, 3] / DECIMETRE
        return torch.from_numpy(tokens).float(), torch.from_numpy(positions).float()


def load_hands(folder: Path, names: Sequence[str]) -> list[Hand]:
    """Read the hands `NAME.urdf` of a folder.

    :raises DataError: for a missing one. :raises RobotError: for a broken one.
    """
    missing = [name for name in names if not (folder / f"{name}.urdf").is_file()]
    if missing:
        raise DataError(f"{folder} lacks {len(missing)} of the {len(names)} hands: {', '.join(missing[:6])}")
    return [Hand(name, Robot(read(folder / f"{name}.urdf"))) for name in names]


def build(variant: str, settings: Settings) -> GraphEmbodimentTransformer:
    """Return the network of a variant (a key of `VARIANTS`), with random weights."""
    # No learned LayerNorm of the token: it would divide lengths by what the angles happen to be.
    return GraphEmbodimentTransformer(
        TOKEN, settings.width, settings.heads, settings.layers, settings.feedforward, dropout=0.0, outputs={HEAD: 3},
        head_units=settings.width, input_norm=False, **VARIANTS[variant],
    )  # fmt: skip


def load(folder: Path, variant: str) -> GraphEmbodimentTransformer:
    """Return a trained network of `train`.

    :raises DataError: when the folder holds no such run, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        net = build(variant, Settings(**json.loads((folder / "settings.json").read_text())))
        net.load_state_dict(load_file(folder / f"{variant}.safetensors"))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{folder} holds no run of `deeprob train get-fk` for {variant} ({reason})") from error
    return net


def train(variant: str, folder: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Train one variant; leave `VARIANT.safetensors` (the best on the validation hands), its log and settings in `out`.

    :return: the report of `evaluate` on the validation hands.
    """
    from safetensors.torch import save_file

    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    hands, validation = load_hands(folder, TRAIN), load_hands(folder, VALIDATION)
    net = build(variant, settings)
    optimizer = torch.optim.Adam(net.parameters(), settings.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, settings.steps, settings.warmup_steps)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
    weights, best = out / f"{variant}.safetensors", float("inf")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, (out / f"{variant}.csv").open("w") as log:
        log.write("step,loss,validation_mm,seconds\n")
        bar = progress.add_task(variant, total=settings.steps)
        started = time.perf_counter()
        for step, (tokens, positions, graph, padding) in enumerate(batches(hands, settings), start=1):
            found = net(tokens, **graph, padding=padding)[HEAD]
            error = (found - positions).masked_fill(padding[..., None], 0.0)
            loss = error.square().sum() / (~padding).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), settings.gradient_clip)
            optimizer.step()
            schedule.step()
            progress.update(bar, completed=step)
            if step % settings.evaluate_every == 0 or step == settings.steps:
                mean = evaluate(net, validation, samples=200)["mean_mm"]
                log.write(f"{step},{float(loss.detach()):.3e},{mean:.4f},{time.perf_counter() - started:.0f}\n")
                log.flush()
                progress.console.print(f"{variant} step {step}: {mean:.3f} mm on the validation hands")
                if mean < best:
                    best = mean
                    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, weights)
    return evaluate(load(out, variant), validation)


def batches(hands: list[Hand], settings: Settings) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor], Tensor]]:
    """Yield `settings.steps` batches of several hands, padded to the largest: tokens, positions, graph, padding `[B, n]`."""
    random = np.random.default_rng(settings.seed)
    each = settings.batch_size // settings.hands_a_batch
    for _ in range(settings.steps):
        chosen = [hands[i] for i in random.choice(len(hands), settings.hands_a_batch, replace=False)]
        most = max(len(hand.robot.joint_names) for hand in chosen)
        shape = (settings.hands_a_batch, each, most)
        tokens, positions = torch.zeros(*shape, TOKEN), torch.zeros(*shape, 3)
        padding = torch.ones(shape, dtype=torch.bool)
        square = (settings.hands_a_batch, 1, most, most)
        graph = {key: torch.zeros(square, dtype=torch.long) for key in ("distance", "parent", "child")}
        graph["distance"] -= 1
        for i, hand in enumerate(chosen):
            n = len(hand.robot.joint_names)
            tokens[i, :, :n], positions[i, :, :n] = hand.sample(each, random)
            padding[i, :, :n] = False
            for key, matrix in hand.graph.items():
                graph[key][i, 0, :n, :n] = matrix
        graph = {key: matrix.expand(-1, each, -1, -1).flatten(0, 1) for key, matrix in graph.items()}
        yield tokens.flatten(0, 1), positions.flatten(0, 1), graph, padding.flatten(0, 1)


@torch.inference_mode()
def evaluate(net: GraphEmbodimentTransformer, hands: Sequence[Hand], samples: int = 1000) -> dict[str, Any]:
    """Return `robots`, each hand's mean distance of predicted from true joint positions, and `mean_mm`, the mean of these."""
    net.eval()
    robots = {}
    for hand in hands:
        # Always the same angles for a hand, whichever the others are.
        tokens, positions = hand.sample(samples, np.random.default_rng(int.from_bytes(hand.name.encode(), "little") % 2**32))
        found = net(tokens, **hand.graph)[HEAD]
        robots[hand.name] = float((found - positions).norm(dim=-1).mean()) * DECIMETRE * 1000
    net.train()
    return {"mean_mm": float(np.mean(list(robots.values()))), "robots": robots}
