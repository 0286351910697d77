# SPDX-License-Identifier: Apache-2.0
"""Train a segmentation network on a folder of labelled images.

AdamW with a cosine schedule, weighted cross-entropy plus soft Dice, an exponential moving average of the weights, which is
what is evaluated and saved. One process, or several under `torchrun` (torch's DistributedDataParallel).
"""

import csv
import json
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from deeprob_perception.errors import DataError, ModelError
from deeprob_perception.nets.segmenter import IMAGENET_MEAN, IMAGENET_STD, SegmentationNet, build
from deeprob_perception.segmentation.classes import ClassSet
from deeprob_perception.segmentation.dataset import VOID, Sample, read_image, read_label
from deeprob_perception.segmentation.scores import Confusion
from deeprob_perception.segmentation.segmenter import resized, restored
from deeprob_perception.training.data import Augmentation, CropDataset
from deeprob_perception.training.schedule import warmup_cosine

# Parameters of two axes and more that are no matrices.
UNDECAYED = (
    "relative_position_bias_table", "pos_embed", "cls_token", "register_tokens", "A_log", "A_logs", "A_b_log", "dt_projs_bias",
)  # fmt: skip


@dataclass
class Settings:
    """What a run is made of; written to `settings.json` beside its checkpoints."""

    backbone: str = "swin-micro"
    head: str = "fpn"
    epochs: int = 60
    batch_size: int = 4
    optimizer: str = "adamw"
    learning_rate: float = 6e-4
    weight_decay: float = 0.05
    warmup_steps: int = 200
    drop_path: float = 0.05
    ema_decay: float = 0.998
    gradient_clip: float = 1.0
    dice_weight: float = 0.5
    undo_weights: float = 1.0
    precision: str = "auto"
    workers: int = 1
    threads: int = 0
    seed: int = 0
    eval_every: int = 0
    eval_size: tuple[int, int] | None = None  # height and width that images are scored at; None: their own
    augmentation: Augmentation = field(default_factory=Augmentation)


class Averaged(AveragedModel):
    """Exponential moving average of weights and buffers; young averages follow faster, or they would keep the random start."""

    def __init__(self, net: nn.Module, decay: float):
        def average(old: list[Tensor], new: list[Tensor], count: Tensor) -> None:
            if old[0].is_floating_point():
                torch._foreach_lerp_(old, new, 1 - min(decay, (1 + int(count)) / (10 + int(count))))
            else:
                torch._foreach_copy_(old, new)

        super().__init__(net, multi_avg_fn=average, use_buffers=True)


def train(
    train_samples: list[Sample],
    val_samples: list[Sample],
    classes: ClassSet,
    out: Path,
    settings: Settings,
    resume: bool = False,
    init: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Train, and leave `model.safetensors`, `last.pt` (to resume from), `log.csv` and `curves.png` in `out`.

    :param init: weights to start from (fine-tuning); tensors of other shapes, as a head for other classes, are left out.
    :raises ModelError: when `init` has nothing of the backbone.
    :returns: the scores on `val_samples` (`iou`, `miou`, `pixel_accuracy`), or an empty dict without any.
    """
    rank, world = start_distributed()
    lead = rank == 0
    torch.manual_seed(settings.seed + rank)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    out.mkdir(parents=True, exist_ok=True)
    recipe = {
        "task": "segmentation", "backbone": settings.backbone, "head": settings.head, "classes": classes.names,
        "palette": classes.palette, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
    }  # fmt: skip

    net = build(recipe, settings.drop_path).to(device, memory_format=torch.channels_last)
    if init is not None:
        own = net.state_dict()
        fitting = {k: v for k, v in init.items() if k in own and own[k].shape == v.shape}
        if not any(k.startswith("backbone.") for k in fitting):
            raise ModelError(f"the weights to start from have nothing of a {settings.backbone}: they are another network's")
        net.load_state_dict(fitting, strict=False)
    averaged = Averaged(net, settings.ema_decay)
    data = CropDataset(train_samples, len(classes.names), settings.augmentation)
    sampler = DistributedSampler(data, drop_last=True) if world > 1 else RandomSampler(data)
    loader = DataLoader(
        data, settings.batch_size, sampler=sampler, num_workers=settings.workers, drop_last=True,
        persistent_workers=settings.workers > 0, pin_memory=device.type == "cuda", worker_init_fn=one_thread,
    )  # fmt: skip
    if not len(loader):
        raise DataError(f"{len(data)} training images are too few for a batch of {settings.batch_size} on {world} processes")
    steps = settings.epochs * len(loader)
    optimizers = optimizers_for(net, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: warmup_cosine(step, steps, settings.warmup_steps)) for o in optimizers
    ]
    criterion = SegmentationLoss(torch.from_numpy(data.frequency).float(), settings.dice_weight).to(device)
    autocast = autocast_for(settings.precision, device)
    mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))

    epoch = step = 0
    last = out / "last.pt"
    if resume and last.is_file():
        state = torch.load(last, map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        averaged.load_state_dict(state["averaged"])
        for part, kept in zip((*optimizers, *schedules), state["optimizers"] + state["schedules"], strict=True):
            part.load_state_dict(kept)
        epoch, step = state["epoch"], state["step"]
    elif lead:
        (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
        with (out / "log.csv").open("w", newline="") as file:
            csv.writer(file).writerow(("step", "epoch", "learning_rate", "loss", "images_per_s", "val_miou"))
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not lead) as progress:
        bar = progress.add_task("training", total=steps, completed=step)
        while epoch < settings.epochs:
            net.train()
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            started, total_loss = time.perf_counter(), 0.0
            for images, labels in loader:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                images = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
                with autocast:
                    logits = model(images)
                loss = criterion(logits.float(), labels)
                net.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), settings.gradient_clip)
                for part in (*optimizers, *schedules):
                    part.step()
                averaged.update_parameters(net)
                total_loss += float(loss.detach())
                step += 1
                progress.update(bar, completed=step, description=f"epoch {epoch + 1} loss {float(loss.detach()):.3f}")
            epoch += 1
            if lead:
                rate = world * settings.batch_size * len(loader) / (time.perf_counter() - started)
                evaluate = settings.eval_every and epoch % settings.eval_every == 0 and val_samples
                miou = scores_of(averaged.module, val_samples, recipe, settings.eval_size)["miou"] if evaluate else None
                row = (step, epoch, f"{schedules[0].get_last_lr()[0]:.3e}", f"{total_loss / len(loader):.4f}", f"{rate:.2f}",
                       "" if miou is None else f"{miou:.4f}")  # fmt: skip
                with (out / "log.csv").open("a", newline="") as file:
                    csv.writer(file).writerow(row)
                if not progress.console.is_terminal:
                    print(f"epoch {epoch}/{settings.epochs} loss {row[3]} images/s {row[4]} val mIoU {row[5]}", flush=True)
                save_atomically(
                    {"net": net.state_dict(), "averaged": averaged.state_dict(),
                     "optimizers": [o.state_dict() for o in optimizers], "schedules": [s.state_dict() for s in schedules],
                     "epoch": epoch, "step": step}, last)  # fmt: skip
    scores: dict[str, Any] = {}
    if lead:
        from deeprob_perception.zoo import save_checkpoint

        undo_class_weights(averaged.module, criterion.weight, settings.undo_weights)
        save_checkpoint(out / "model.safetensors", averaged.module.state_dict(), recipe)
        plot_log(out / "log.csv", out / "curves.png")
        if val_samples:
            scores = scores_of(averaged.module, val_samples, recipe, settings.eval_size)
            (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    if world > 1:
        dist.destroy_process_group()
    return scores


class SegmentationLoss(nn.Module):
    """Cross-entropy weighted by the square root of the inverse class frequency, plus soft Dice over the batch's classes."""

    weight: Tensor

    def __init__(self, frequency: Tensor, dice_weight: float):
        super().__init__()
        weight = (frequency + 1e-3).rsqrt()
        self.register_buffer("weight", (weight / (weight * frequency).sum()).clamp(max=6.0))
        self.dice_weight = dice_weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """:param logits: float `[B, K, H, W]`; :param labels: int64 `[B, H, W]`, `VOID` where nothing is known."""
        # Gathers and sums over class ids: one-hot maps would be the dearest part of a small network's step on a CPU.
        log_p = logits.log_softmax(1)
        known = labels != VOID
        labels = labels.masked_fill(~known, 0)
        right = log_p.gather(1, labels[:, None])[:, 0]  # [B, H, W]
        weight = self.weight[labels] * known
        loss = -(weight * right).sum() / weight.sum().clamp(min=1e-6)
        if not self.dice_weight:
            return loss
        ids, share = labels.flatten(), known.flatten().float()
        truth = torch.zeros_like(self.weight).index_add(0, ids, share)
        overlap = torch.zeros_like(self.weight).index_add(0, ids, right.flatten().exp() * share)
        dice = 1 - (2 * overlap + 1) / ((log_p.exp() * known[:, None]).sum((0, 2, 3)) + truth + 1)
        return loss + self.dice_weight * dice[truth > 0].mean() if bool((truth > 0).any()) else loss


@torch.no_grad()
def undo_class_weights(net: SegmentationNet, weight: Tensor, share: float = 1.0) -> None:
    """Take the logarithm of the loss's class weights `[K]`, or a share of it, off the logits.

    Weights make rare classes learn sooner, but a network trained so predicts the product of probability and weight: it finds
    too much of what is rare. (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, for the reverse.)
    """
    assert isinstance(net.head.classify, nn.Conv2d) and net.head.classify.bias is not None
    net.head.classify.bias -= share * weight.log()


@torch.inference_mode()
def scores_of(
    net: SegmentationNet, samples: list[Sample], recipe: dict[str, Any], size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Score a network on whole images, resized to `size` as the exported model would: `iou`, `miou`, `pixel_accuracy`."""
    device = next(net.parameters()).device
    mean, std = (torch.tensor(recipe[k], device=device).reshape(1, 3, 1, 1) * 255 for k in ("mean", "std"))
    was_training = net.training
    net.eval()
    confusion = Confusion(len(recipe["classes"]))
    for sample in samples:
        image = read_image(sample.image)
        height, width = image.shape[:2]
        if size is not None:
            image = resized(image, *size)
        batch = torch.from_numpy(image[:, :, ::-1].copy()).to(device).permute(2, 0, 1)[None].float()
        labels = net((batch - mean) / std).argmax(1)[0].to(torch.uint8).cpu().numpy()
        if size is not None:
            labels = restored(labels, height, width)
        confusion.add(labels, read_label(sample.label, len(recipe["classes"])))
    net.train(was_training)
    return confusion.report(recipe["classes"])


def optimizers_for(net: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return AdamW for everything, or for `muon` for what is no matrix of the backbone, and Muon for these.

    Muon (Jordan et al., 2024) makes each matrix's step orthogonal, scaled to AdamW's length (Liu et al., "Muon is Scalable for
    LLM Training", 2025), so that both take the same rate.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    matrices = set()
    if settings.optimizer == "muon":
        matrices = {module.weight for module in net.backbone.modules() if isinstance(module, nn.Linear)}
    groups = parameter_groups(net, decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in matrices]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, fused=True)]
    if matrices:
        ordered = [p for p in net.parameters() if p in matrices]
        optimizers.append(torch.optim.Muon(ordered, rate, decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and kernels only: not norms, biases, positions, or a scan's rates (Swin's, ViT's and Mamba's recipes)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        no_decay = parameter.ndim <= 1 or name.endswith(UNDECAYED)
        (plain if no_decay else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def autocast_for(precision: str, device: torch.device) -> Any:
    """Return the autocast context: bf16 where the processor computes in it, else none (emulated, it is slower than fp32)."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        precision = "bf16" if native else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def start_distributed() -> tuple[int, int]:
    """Join the process group that `torchrun` describes; `(0, 1)` when there is none."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), world


def one_thread(_: int) -> None:
    """OpenCV's own threads in a loader's worker only take the cores from the training."""
    cv2.setNumThreads(1)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def plot_log(log: Path, out: Path) -> None:
    """Draw loss and validation mIoU over the epochs as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with log.open() as file:
        rows = list(csv.DictReader(file))
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axis.plot([int(r["epoch"]) for r in rows], [float(r["loss"]) for r in rows], label="loss")
    axis.set_xlabel("epoch")
    axis.set_ylabel("training loss")
    scored = [(int(r["epoch"]), float(r["val_miou"])) for r in rows if r["val_miou"]]
    if scored:
        other = axis.twinx()
        other.plot(*zip(*scored, strict=True), "o-", color="tab:green")
        other.set_ylabel("validation mIoU", color="tab:green")
    figure.savefig(out, dpi=120)
    plt.close(figure)
