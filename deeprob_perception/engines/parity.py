# SPDX-License-Identifier: Apache-2.0
"""How far an engine's answers are from ONNX Runtime's in fp32, on sample frames, before anybody relies on it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from deeprob_perception.errors import EngineError

# image uint8 [1, H, W, 3] -> labels, confidence: uint8 [1, H, W], or features: float32 [1, h, w, C]
Answer = tuple[np.ndarray, ...]
Run = Callable[[np.ndarray], Answer]

# Share of labels that must equal fp32's. bf16's 8 bits of mantissa move more of the borders between classes than fp16's 11
# (99.5 and 99.98 % on the shipped models); int8 is allowed what quantisation commonly costs there.
AGREEMENT = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.98, "int8": 0.95}
# Mean cosine of features with fp32's.
LIKENESS = {"fp32": 0.9999, "fp16": 0.999, "bf16": 0.98, "int8": 0.95}
MIOU_LOSS = 0.01  # of mean IoU, where there is ground truth: one point
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Frames to compare on: `images` uint8 `[1, H, W, 3]` BGR of the model's size, and where they come from.

    `truth`: for each image the true labels uint8 `[H, W]` (ids that are no class are void), or None.
    """

    images: Sequence[np.ndarray]
    origin: str
    truth: Sequence[np.ndarray | None] = field(default_factory=list)


@dataclass(frozen=True)
class Parity:
    """What was measured.

    - `of`: `labels` or `features`
    - `agreement`: share of equal labels; of features the mean cosine
    - `max_error`, `mean_error`: of confidence, 1.0 = certain; of features 1 - cosine
    - `nans`: pixels without a number: a confidence of 0, which soft-max over at most 255 classes cannot give; or patches
    - `miou`, `reference_miou`: against ground truth; None where there is none
    - `measured_by`: what ran in the engine's stead or the engine itself; `frames`, `origin`
    - `reference`: what it was compared with: fp32, or a lowered or quantised file's own graph by ONNX Runtime
    """

    agreement: float
    max_error: float
    mean_error: float
    nans: int
    miou: float | None
    reference_miou: float | None
    frames: int
    origin: str
    measured_by: str
    reference: str = "fp32"
    of: str = "labels"

    def shortfall(self, precision: str) -> str | None:
        """Return why an engine that answers so is not to be trusted; None when it is."""
        if self.nans:
            places = "patches" if self.of == "features" else "pixels"
            return f"{self.nans} {places} of {self.frames} frames are no numbers (overflow)"
        if self.of == "features" and self.agreement < LIKENESS[precision]:
            least = f"{LIKENESS[precision]} is asked for"
            return f"the mean cosine of its features with those of {self.reference} is {self.agreement:.5f}; {least}"
        if self.of == "labels" and self.agreement < AGREEMENT[precision]:
            least = f"{AGREEMENT[precision]:.1%} are asked for"
            return f"only {self.agreement:.2%} of the labels are those of {self.reference}; {least}"
        if self.miou is not None and self.reference_miou is not None and self.reference_miou - self.miou > MIOU_LOSS:
            ours, theirs = f"mean IoU is {self.miou:.3f}", f"in {self.reference} {self.reference_miou:.3f}"
            return f"{ours}, {theirs}; at most {MIOU_LOSS} may be lost"
        return None

    def line(self) -> str:
        """Return the figures for people."""
        if self.of == "features":
            text = f"mean cosine of features {self.agreement:.5f} with {self.reference}, at least {1 - self.max_error:.4f}, "
            return f"{text}{self.nans} NaN; {self.frames} frames of {self.origin}, measured by {self.measured_by}"
        text = (
            f"{self.agreement:.3%} of labels as in {self.reference}, confidence off by {self.mean_error:.4f} on average and "
            f"{self.max_error:.3f} at most, {self.nans} NaN"
        )
        if self.miou is not None and self.reference_miou is not None:
            text += f", mIoU {self.miou:.3f} ({self.reference} {self.reference_miou:.3f})"
        return f"{text}; {self.frames} frames of {self.origin}, measured by {self.measured_by}"

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    expected: Sequence[Answer], run: Run, samples: Samples, measured_by: str, held: str = "fp32"
) -> Parity:
    """Compare what `run` answers on the samples with `expected`, the reference's answer to each.

    :param held: what the reference's file is in.
    """
    if not samples.images:
        raise EngineError(f"there are no frames to compare on in {samples.origin}")
    reference = "fp32" if held == "fp32" else f"the {held} file by ONNX Runtime"
    if len(expected[0]) == 1:
        return measure_features(expected, run, samples, measured_by, reference)
    equal, largest, total, nans = [], 0.0, [], 0
    ours, theirs = _Iou(), _Iou()
    for i, (image, (labels, confidence)) in enumerate(zip(samples.images, expected, strict=True)):
        got_labels, got_confidence = run(image)
        equal.append(float((got_labels == labels).mean()))
        error = np.abs(got_confidence.astype(np.int16) - confidence.astype(np.int16)) / 255
        largest, nans = max(largest, float(error.max())), nans + int((got_confidence == 0).sum())
        total.append(float(error.mean()))
        truth = samples.truth[i] if i < len(samples.truth) else None
        if truth is not None:
            ours.add(got_labels[0], truth)
            theirs.add(labels[0], truth)
    return Parity(
        agreement=float(np.mean(equal)),
        max_error=largest,
        mean_error=float(np.mean(total)),
        nans=nans,
        miou=ours.mean(),
        reference_miou=theirs.mean(),
        frames=len(samples.images),
        origin=samples.origin,
        measured_by=measured_by,
        reference=reference,
    )


def measure_features(
    expected: Sequence[Answer], run: Run, samples: Samples, measured_by: str, reference: str
) -> Parity:
    """Compare features of unit length by their cosine."""
    errors, nans = [], 0
    for image, (features,) in zip(samples.images, expected, strict=True):
        (got,) = run(image)
        cosine = (got * features).sum(-1)
        # A patch without a number, or of all zeros (normalised overflow), has no direction.
        broken = ~np.isfinite(cosine) | (np.abs(got).sum(-1) == 0)
        nans += int(broken.sum())
        errors.append(1 - np.where(broken, 0.0, cosine))
    error = np.stack(errors)
    return Parity(
        agreement=float(1 - error.mean()), max_error=float(error.max()), mean_error=float(error.mean()), nans=nans, miou=None,
        reference_miou=None, frames=len(samples.images), origin=samples.origin, measured_by=measured_by, reference=reference,
        of="features",
    )  # fmt: skip


class _Iou:
    """Mean intersection over union of the classes that occur. (`segmentation.scores` lies above this package.)"""

    def __init__(self) -> None:
        self.counts = np.zeros((256, 256), np.int64)

    def add(self, labels: np.ndarray, truth: np.ndarray) -> None:
        pairs = truth.astype(np.int64) * 256 + labels
        self.counts += np.bincount(pairs[truth != 255], minlength=65536).reshape(256, 256)

    def mean(self) -> float | None:
        hits = np.diag(self.counts)
        union = self.counts.sum(0) + self.counts.sum(1) - hits
        return float((hits[union > 0] / union[union > 0]).mean()) if self.counts.any() else None


def onnx_session(proto: Any, what: str, threads: int = 0) -> Run:
    """Return an ONNX model as something to call, by ONNX Runtime on the CPU.

    :raises EngineError: where ONNX Runtime is missing or refuses the model.
    """
    try:
        import onnxruntime
    except Exception as error:  # a broken wheel raises anything
        raise EngineError(f"parity with fp32 is measured by ONNX Runtime, which is missing ({error})") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no public base class
        raise EngineError(f"ONNX Runtime refuses {what}: {str(error).strip().splitlines()[0]}") from error

    def run(image: np.ndarray) -> Answer:
        return tuple(session.run(None, {"image": image}))

    return run


def synthetic(shape: tuple[int, ...], count: int = 4) -> Samples:
    """Return smooth blobs of colour with sharp shapes on them, always the same: for when no real frame is at hand."""
    import cv2

    random = np.random.default_rng(0)
    _, height, width, _ = shape
    images = []
    for _ in range(count):
        image = cv2.resize(random.integers(0, 256, (5, 7, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            centre = (int(random.integers(0, width)), int(random.integers(0, height)))
            radius = int(random.integers(3, max(4, height // 6)))
            cv2.circle(image, centre, radius, random.integers(0, 256, 3).tolist(), -1, cv2.LINE_AA)
        noisy = np.clip(image + random.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
        images.append(np.ascontiguousarray(noisy)[None])
    return Samples(images, "drawn shapes")
