# SPDX-License-Identifier: Apache-2.0
"""Is a replay what it was? Mask hashes against an earlier run's summary, and IoU where they differ."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception.bags import open_bag
from deeprob_perception.errors import BagError, MessageError
from deeprob_perception.messages import cdr, images
from deeprob_perception.replay_tasks import MASK, mask_hash
from deeprob_perception.segmentation.scores import Confusion


@dataclass(frozen=True)
class Difference:
    """A frame whose mask is not the expected one; `miou` None where the masks could not be compared."""

    frame: int
    stamp: int | None
    reason: str
    miou: float | None = None
    agreement: float | None = None
    accepted: bool = False


def compare(summary: dict[str, Any], expected: Path, min_iou: float | None = None) -> list[Difference]:
    """Return what differs between a replay's summary and an earlier run, in the order of the frames.

    :param expected: the earlier run's JSON, or its mcap with the masks.
    :param min_iou: accept a frame with another hash if its mask and the expected one have at least this mean IoU over the
        classes in either; needs the earlier masks: `expected` itself, or the bag that its JSON names.
    :raises BagError: when `expected` cannot be read, or min_iou is asked for and the masks are gone.
    """
    hashes, stamps, masks_path = _expected(expected)
    differing = [i for i, (a, b) in enumerate(zip(summary["hashes"], hashes, strict=False)) if a != b]
    differences: list[Difference] = []
    pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if min_iou is not None and differing:
        if masks_path is None or not masks_path.is_file():
            raise BagError(
                f"{len(differing)} masks differ, and for --min-iou the earlier ones are needed: {masks_path} is "
                "missing; keep the earlier run's bag beside its JSON, or give the bag itself to --expect"
            )
        ours, theirs = _masks(Path(summary["out"]), differing), _masks(masks_path, differing)
        pairs = {i: (ours[i], theirs[i]) for i in differing if i in ours and i in theirs}
    for i in differing:
        stamp = summary["stamps"][i]
        reason = "other mask" if stamp == stamps[i] else f"another frame, the earlier one has stamp {stamps[i]}"
        if i not in pairs:
            differences.append(Difference(i, stamp, reason))
            continue
        mine, earlier = pairs[i]
        if mine.shape != earlier.shape:
            differences.append(Difference(i, stamp, f"size {mine.shape}, earlier {earlier.shape}"))
            continue
        miou, agreement = mask_iou(mine, earlier), float((mine == earlier).mean())
        accepted = min_iou is not None and stamp == stamps[i] and miou >= min_iou
        differences.append(Difference(i, stamp, reason, miou, agreement, accepted))
    for i in range(len(hashes), len(summary["hashes"])):
        differences.append(Difference(i, summary["stamps"][i], "not in the earlier run"))
    for i in range(len(summary["hashes"]), len(hashes)):
        differences.append(Difference(i, stamps[i], "only in the earlier run"))
    return differences


def mask_iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Return the mean IoU of two masks, uint8 `[H, W]`, over the classes in either."""
    confusion = Confusion(256)
    confusion.add(mask, other)
    return confusion.miou()


def _expected(path: Path) -> tuple[list[str], list[int], Path | None]:
    """Return hashes, stamps, and where the masks are."""
    if path.suffix != ".json":
        hashes, stamps = [], []
        for stamp, mask in _mask_stream(path):
            hashes.append(mask_hash(mask))
            stamps.append(stamp)
        return hashes, stamps, path
    try:
        earlier = json.loads(path.read_text())
        hashes, stamps = [str(h) for h in earlier["hashes"]], [int(s) for s in earlier["stamps"]]
        if len(hashes) != len(stamps):
            raise ValueError(f"{len(hashes)} hashes but {len(stamps)} stamps")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BagError(f"{path} is no summary of a replay ({type(error).__name__}: {error}); make one with --json") from error
    out = earlier.get("out")
    masks = None if out is None else Path(out)
    if masks is not None and not masks.is_file():
        masks = path.parent / masks.name  # both were moved together
    return hashes, stamps, masks


def _mask_stream(bag_path: Path) -> Iterator[tuple[int, np.ndarray]]:
    with open_bag(bag_path) as bag:
        topic = bag.image_topic(MASK)
        for message in bag.messages([topic.name]):
            try:
                msg = cdr.deserialize(message.raw, message.topic.msgtype)
                yield cdr.stamp_ns(msg.header), images.to_array(msg)
            except MessageError as error:
                raise BagError(f"{bag_path}: a mask cannot be read: {error}") from error


def _masks(bag_path: Path, wanted: list[int]) -> dict[int, np.ndarray]:
    chosen = set(wanted)
    return {i: mask.copy() for i, (_, mask) in enumerate(_mask_stream(bag_path)) if i in chosen}
