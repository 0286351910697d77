# SPDX-License-Identifier: Apache-2.0
"""Self-distillation with no labels: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021).

A student network sees all crops of a picture, its teacher the two large ones; the student learns to answer as the teacher
does on another crop. The teacher is the exponential moving average of the student. What keeps both from answering the same
to everything: the teacher's outputs are centred (no output wins for all pictures) and sharpened (not all outputs are alike).

One addition of our own, off by default (`dense_weight`): the same is asked of patches. Where two global crops show the same
place, the student's patch learns to answer as the teacher's does in the other crop (in the spirit of iBOT, Zhou et al., ICLR
2022, and DenseCL, Wang et al., CVPR 2021, but with the correspondence that the crops give). A class token teaches patches
little in short trainings, and patches are what tracking compares.

Shapes in comments: B pictures, L local crops, K outputs of the head, C channels of the backbone.
"""

import csv
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from deeprob_perception.errors import DataError
from deeprob_perception.nets.features import FeatureNet, build
from deeprob_perception.nets.segmenter import IMAGENET_MEAN, IMAGENET_STD
from deeprob_perception.training.crops import CropPairs, MultiCrop
from deeprob_perception.training.schedule import warmup_cosine
from deeprob_perception.training.segmentation import (
    autocast_for,
    one_thread,
    parameter_groups,
    save_atomically,
    start_distributed,
)

# The columns of `log.csv`.
LOG = (
    "step", "epoch", "loss", "dense_loss", "entropy_of_mean", "kl_to_uniform", "information", "learning_rate", "images_per_s"
)  # fmt: skip


@dataclass
class Settings:
    """What a run is made of; written to `settings.json` beside its checkpoints. Names and defaults follow the paper's code
    but for sizes, which are those of a small network and few pictures."""

    backbone: str = "vit-micro"
    epochs: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_epochs: float = 5.0
    weight_decay: tuple[float, float] = (0.04, 0.4)  # rises along half a cosine
    gradient_clip: float = 3.0
    freeze_last_layer: float = 1.0  # epochs
    drop_path: float = 0.1
    teacher_momentum: float = 0.99  # rises to 1 along half a cosine; 0.996 is for batches of 1024 and 100 epochs of ImageNet
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.04)  # at first, and after the warm-up; the paper's best ends at 0.07
    temperature_warmup_epochs: float = 30.0
    centre: bool = True
    centre_momentum: float = 0.9
    outputs: int = 4096
    dense_weight: float = 0.0
    precision: str = "auto"
    workers: int = 1
    threads: int = 0
    seed: int = 0
    crops: MultiCrop = field(default_factory=MultiCrop)


class ProjectionHead(nn.Module):
    """Features `[..., C]` -> outputs `[..., K]`: an MLP, unit length, and a linear layer whose rows have unit length too."""

    def __init__(self, dim: int, outputs: int, hidden: int = 512, bottleneck: int = 192):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # Weight normalisation with its length fixed at one (`norm_last_layer`).
        self.last = nn.Parameter(torch.randn(outputs, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1, eps=1e-6)
        return F.linear(x, F.normalize(self.last, dim=-1))


class HeadedBackbone(nn.Module):
    """A ViT with the head on its class token and, for the dense loss, on its patches."""

    def __init__(self, net: FeatureNet, outputs: int, dense: bool):
        super().__init__()
        self.net = net
        dim = net.backbone.embed_dim
        self.head = ProjectionHead(dim, outputs)
        self.patch_head = ProjectionHead(dim, outputs) if dense else None

    def forward(self, sizes: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Map crops, a batch `[n, 3, S, S]` for each size, the global ones first, to class outputs `[sum n, K]`
        and the patch outputs of the first size `[n, H, W, K]`."""
        tokens, patches = zip(*(self.net.backbone(crops) for crops in sizes), strict=True)
        dense = None if self.patch_head is None else self.patch_head(patches[0])
        return self.head(torch.cat(tokens)), dense


class TeacherOutputs(nn.Module):
    """Centres and sharpens what the teacher says, and keeps the centre: the moving average of its mean output."""

    centre: Tensor

    def __init__(self, outputs: int, momentum: float, centred: bool = True):
        super().__init__()
        self.momentum = momentum
        self.centred = centred
        self.register_buffer("centre", torch.zeros(outputs))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Return probabilities, and move the centre: logits `[..., K]` -> `[..., K]`."""
        centred = logits - self.centre if self.centred else logits
        probabilities = (centred / temperature).softmax(-1)
        mean = logits.flatten(0, -2).mean(0)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.centre.lerp_(mean, 1 - self.momentum)
        return probabilities


class Spread:
    """How the teacher's answers are spread, over some steps: the two ways to collapse, and how far off they are (nats).

    `entropy_of_mean`: of the mean answer; at most log K. Near zero, all pictures get one answer (centring keeps it up).
    `kl_to_uniform`: of a single answer, on average. Near zero, each answer is "anything" (sharpening keeps it up).
    `information`: what an answer tells of its picture: the entropy of the mean less the mean entropy. Zero in both cases.
    """

    def __init__(self, outputs: int):
        self.outputs = outputs
        self.clear()

    def clear(self) -> None:
        self.count, self.entropy = 0, 0.0
        self.mean: Tensor | None = None

    def add(self, probabilities: Tensor) -> None:
        flat = probabilities.flatten(0, -2).double()
        self.count += len(flat)
        self.entropy += float(torch.special.entr(flat).sum())
        self.mean = flat.sum(0) if self.mean is None else self.mean + flat.sum(0)

    def report(self) -> dict[str, float]:
        assert self.mean is not None
        of_mean, mean = float(torch.special.entr(self.mean / self.count).sum()), self.entropy / self.count
        return {
            "entropy_of_mean": of_mean,
            "kl_to_uniform": math.log(self.outputs) - mean,
            "information": max(0.0, of_mean - mean),
        }


def collapse(spread: dict[str, float], outputs: int) -> str | None:
    """Return what has collapsed, in words, by a report of `Spread`; None while it has not."""
    most = math.log(outputs)
    if spread["information"] > 0.02 * most:
        return None
    if spread["kl_to_uniform"] < 0.5 * most:
        return "collapsed: the teacher gives every picture the same flat answer; sharpen it (a lower teacher temperature)"
    return "collapsed: the teacher gives every picture one and the same answer; centre its outputs"


def class_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of every student crop with every other teacher crop.

    :param student: logits `[V, B, K]`, the two global crops first. :param teacher: probabilities `[2, B, K]`.
    """
    log_p = (student / temperature).log_softmax(-1)
    terms = [
        -(teacher[i] * log_p[j]).sum(-1).mean() for i in range(len(teacher)) for j in range(len(student)) if i != j
    ]  # fmt: skip
    return torch.stack(terms).mean()


def dense_loss(student: Tensor, teacher: Tensor, places: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of the student's patches with the teacher's at the same places of the other crop.

    :param student: logits `[2, B, H, W, K]`. :param teacher: probabilities likewise.
    :param places: `[B, 2, 5]`, of `CropPairs`.
    """
    _, batch, height, width, _ = student.shape
    total, count = student.new_zeros(()), student.new_zeros(())
    log_p = (student / temperature).log_softmax(-1)
    for own, other in ((0, 1), (1, 0)):
        rows, columns, inside = matches(places[:, own], places[:, other], height, width)
        there = teacher[other][torch.arange(batch, device=student.device)[:, None, None], rows, columns]  # [B, H, W, K]
        cross = -(there * log_p[own]).sum(-1)
        total, count = total + (cross * inside).sum(), count + inside.sum()
    return total / count.clamp(min=1)


def matches(own: Tensor, other: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for every patch of a crop, row and column `[B, H, W]` of the nearest one of the other crop, and if it has it.

    :param own, other: places of the crops in the frame, `[B, 5]` each.
    """
    device = own.device
    down = ((torch.arange(height, device=device) + 0.5) / height)[None, :, None]
    along = ((torch.arange(width, device=device) + 0.5) / width)[None, None, :]
    x, y, w, h, mirrored = (v[:, None, None] for v in own.unbind(-1))
    frame_x, frame_y = x + torch.where(mirrored > 0, 1 - along, along) * w, y + down * h
    x, y, w, h, mirrored = (v[:, None, None] for v in other.unbind(-1))
    along, down = (frame_x - x) / w, (frame_y - y) / h
    along = torch.where(mirrored > 0, 1 - along, along)
    along, down = torch.broadcast_tensors(along, down)
    inside = (along >= 0) & (along < 1) & (down >= 0) & (down < 1)
    columns = (along * width).long().clamp(0, width - 1)
    rows = (down * height).long().clamp(0, height - 1)
    return rows, columns, inside


def half_cosine(start: float, end: float, share: float) -> float:
    """Go from start to end along half a cosine, `share` of the way (0 to 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def train(frames: list[bytes], out: Path, settings: Settings, resume: bool = False) -> dict[str, float]:
    """Train; leave `model.safetensors` (the teacher's backbone), `last.pt` (to resume from), `log.csv`, `curves.png` in `out`.

    :param frames: jpeg each, of `crops.read_frames`.
    :returns: `Spread`'s report of the last epoch and its mean `loss`.
    """
    s = settings
    rank, world = start_distributed()
    lead = rank == 0
    torch.manual_seed(s.seed + rank)
    if s.threads:
        torch.set_num_threads(s.threads)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    out.mkdir(parents=True, exist_ok=True)
    recipe = {
        "task": "features", "backbone": s.backbone, "image_size": s.crops.global_size, "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }  # fmt: skip
    student = HeadedBackbone(build(recipe, s.drop_path), s.outputs, s.dense_weight > 0).to(device)
    teacher = HeadedBackbone(build(recipe), s.outputs, s.dense_weight > 0).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    answers, dense_answers = (TeacherOutputs(s.outputs, s.centre_momentum, s.centre).to(device) for _ in range(2))
    patch = student.net.backbone.patch_size
    for size in (s.crops.global_size, s.crops.local_size):
        if size % patch:
            raise DataError(f"crops of {size} pixels are no multiple of the patches of {patch} of {s.backbone}")
    data = CropPairs(frames, s.crops)
    sampler = DistributedSampler(data, drop_last=True) if world > 1 else RandomSampler(data)
    loader = DataLoader(
        data, s.batch_size, sampler=sampler, num_workers=s.workers, drop_last=True, persistent_workers=s.workers > 0,
        pin_memory=device.type == "cuda", worker_init_fn=one_thread,
        # Not by fork: frames of videos were decoded by threads whose locks a forked child would wait for.
        multiprocessing_context="forkserver" if s.workers else None,
    )  # fmt: skip
    each = len(loader)
    if not each:
        raise DataError(f"{len(data)} frames are too few for a batch of {s.batch_size} on {world} processes")
    steps = s.epochs * each
    rate = s.learning_rate * s.batch_size * world / 256  # the linear rule of Goyal et al., as in the paper
    optimizer = torch.optim.AdamW(parameter_groups(student, s.weight_decay[0]), lr=rate)
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
    epoch = step = 0
    last = out / "last.pt"
    if resume and last.is_file():
        state = torch.load(last, map_location=device, weights_only=True)
        student.load_state_dict(state["student"])
        teacher.load_state_dict(state["teacher"])
        answers.load_state_dict(state["answers"])
        dense_answers.load_state_dict(state["dense_answers"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, step = state["epoch"], state["step"]
    elif lead:
        (out / "settings.json").write_text(json.dumps(asdict(s), indent=1) + "\n")
        with (out / "log.csv").open("w", newline="") as file:
            csv.writer(file).writerow(LOG)
    model = nn.parallel.DistributedDataParallel(student) if world > 1 else student
    autocast = autocast_for(s.precision, device)
    spread = Spread(s.outputs)
    row: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not lead) as progress:
        bar = progress.add_task("training", total=steps, completed=step)
        while epoch < s.epochs:
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            started, total = time.perf_counter(), torch.zeros(2)
            spread.clear()
            for globals_, locals_, places in loader:
                share = step / steps
                factor = max(warmup_cosine(step, steps, round(s.warmup_epochs * each)), 1e-3)
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
                    group["weight_decay"] = half_cosine(*s.weight_decay, share) if group["weight_decay"] else 0.0
                warm = min(1.0, step / max(1.0, s.temperature_warmup_epochs * each))
                temperature = s.teacher_temperature[0] + (s.teacher_temperature[1] - s.teacher_temperature[0]) * warm
                # Views first: [B, V, ...] -> [V * B, ...]
                sizes = [crops.transpose(0, 1).flatten(0, 1) for crops in (globals_, locals_) if crops.shape[1]]
                sizes = [(crops.to(device, non_blocking=True).float() - mean) / std for crops in sizes]
                batch = len(globals_)
                with autocast:
                    with torch.no_grad():
                        wanted, wanted_dense = teacher(sizes[:1])
                    found, found_dense = model(sizes)
                target = answers(wanted.float().reshape(2, batch, -1), temperature)
                spread.add(target)
                loss = of_class = class_loss(found.float().reshape(-1, batch, s.outputs), target, s.student_temperature)
                of_patches = torch.zeros(())
                if found_dense is not None and wanted_dense is not None:
                    shape = (2, batch, *found_dense.shape[1:])
                    target_dense = dense_answers(wanted_dense.float().reshape(shape), temperature)
                    of_patches = dense_loss(
                        found_dense.float().reshape(shape), target_dense, places.to(device), s.student_temperature
                    )
                    loss = loss + s.dense_weight * of_patches
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if step < s.freeze_last_layer * each:
                    for head in (student.head, student.patch_head):
                        if head is not None:
                            head.last.grad = None
                nn.utils.clip_grad_norm_(student.parameters(), s.gradient_clip)
                optimizer.step()
                move(teacher, student, half_cosine(s.teacher_momentum, 1.0, share))
                total += torch.stack((of_class.detach(), of_patches.detach())).cpu()
                step += 1
                progress.update(bar, completed=step, description=f"epoch {epoch + 1} loss {float(loss.detach()):.3f}")
            epoch += 1
            row = {
                "loss": float(total[0]) / each, "dense_loss": float(total[1]) / each, **spread.report(),
                "learning_rate": rate * factor, "images_per_s": world * s.batch_size * each / (time.perf_counter() - started),
            }  # fmt: skip
            if lead:
                with (out / "log.csv").open("a", newline="") as file:
                    csv.writer(file).writerow([step, epoch, *(f"{row[key]:.5g}" for key in LOG[2:])])
                if not progress.console.is_terminal:
                    said = ", ".join(f"{key} {row[key]:.4g}" for key in LOG[2:] if row[key])
                    print(f"epoch {epoch}/{s.epochs}: {said}", flush=True)
                if epoch > s.freeze_last_layer and (warning := collapse(row, s.outputs)):
                    progress.console.print(f"epoch {epoch}: {warning}")
                save_atomically(
                    {"student": student.state_dict(), "teacher": teacher.state_dict(), "answers": answers.state_dict(),
                     "dense_answers": dense_answers.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch,
                     "step": step}, last)  # fmt: skip
                keep_teacher(teacher, recipe, out)
    if lead:
        plot_log(out / "log.csv", out / "curves.png")
    if world > 1:
        dist.destroy_process_group()
    return row


@torch.no_grad()
def move(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Let the teacher's weights follow the student's."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def keep_teacher(teacher: HeadedBackbone, recipe: dict[str, Any], out: Path) -> None:
    from deeprob_perception.zoo import save_checkpoint

    save_checkpoint(out / "model.safetensors", teacher.net.state_dict(), recipe)


def plot_log(log: Path, out: Path) -> None:
    """Draw the loss and the spread of the teacher's answers over the epochs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure, (above, below) = plt.subplots(2, figsize=(7, 6), sharex=True, constrained_layout=True)
    for axis, names in ((above, ("loss", "dense_loss")), (below, ("entropy_of_mean", "kl_to_uniform", "information"))):
        for name in names:
            axis.plot([int(r["epoch"]) for r in rows], [float(r[name]) for r in rows], label=name)
        axis.legend()
    above.set_ylabel("training loss")
    below.set_ylabel("nats")
    below.set_xlabel("epoch")
    figure.savefig(out, dpi=120)
    plt.close(figure)
