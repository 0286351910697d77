# SPDX-License-Identifier: Apache-2.0
"""A model file -> a TensorRT engine: in which precision, for which GPU, checked against fp32, kept in the cache."""

import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deeprob_perception.engines import cuda, lowering, model_file, parity, tensorrt_library
from deeprob_perception.engines.cache import EngineCache, Entry, Key
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.engines.tensorrt_library import Library
from deeprob_perception.errors import EngineError

# What is built instead when a precision's answers are too far from fp32's. fp16 before bf16, since it has three bits of
# mantissa more; bf16 after it, since it has fp32's range, and overflow is what fp16 fails by.
SAFER = {"int8": "fp16", "fp16": "bf16", "bf16": "fp32"}
AUTO = "fp16"
BF16_SINCE = 80  # compute capability
EVERY = 5.0  # seconds between two lines of progress
# (the fp32 model file, where to write) -> the quantised model file
Quantiser = Callable[[Path, Path], Path]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What an engine is for: a compute capability, the GPU's name where engines are tied to it, and whether it is here."""

    sm: str
    gpu: str
    library: Library
    local: bool

    def __str__(self) -> str:
        return f"{self.gpu} ({self.sm})" if self.gpu else self.sm


def find_target(sm: str | None = None) -> Target:
    """Return what to build for.

    :param sm: `sm_86` (`86` and `8.6` will do); None for the GPU of this machine.
    :raises EngineError: when there is no GPU and none was named, or the installed TensorRT does not build for it.
    """
    reason = cuda.unavailable()
    gpu = None if reason else cuda.Cuda().gpu()
    if sm is None and gpu is None:
        found, _ = tensorrt_library.libraries()
        known = next((", ".join(lib.targets()) for lib in found if lib.builds_anywhere), "sm_86")
        raise EngineError(f"no GPU to build for ({reason}); name a target: {known}")
    wanted = gpu.sm if sm is None and gpu else canonical(str(sm))
    if gpu is not None and gpu.sm == wanted:
        library = tensorrt_library.library(wanted)
        # One machine's TensorRT engine may run worse or not at all on a GPU of the same capability and another name.
        return Target(wanted, "" if library.builds_anywhere else gpu.name, library, True)
    return Target(wanted, "", tensorrt_library.library(wanted, anywhere=True), False)


def canonical(sm: str) -> str:
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", sm.strip().lower())
    if not match:
        raise EngineError(f"--target {sm}: give a compute capability, such as sm_86 (sm_87 is Jetson Orin's)")
    return f"sm_{match[1]}{match[2]}"


def build(
    model: ModelFile,
    precision: str = "auto",
    target: Target | None = None,
    cache_dir: Path | None = None,
    samples: parity.Samples | None = None,
    quantise: Quantiser | None = None,
    rebuild: bool = False,
) -> Entry:
    """Return a model's engine from the cache, or build it and keep it.

    :param precision: fp32, fp16, bf16, int8; `auto` is fp16, or what a lowered or quantised file is in.
    :param target: of `find_target`; None for the GPU of this machine.
    :param samples: frames to compare with fp32 on; None for drawn shapes.
    :param quantise: makes the int8 model file where int8 is asked of an fp32 one.
    :param rebuild: build even if it is in the cache.
    :returns: the engine; `facts["precision"]` is what it computes in, `facts["parity"]` how it compares with fp32,
        `facts["fallbacks"]` why it is not in the precision that was asked for.
    :raises EngineError: for an operator that TensorRT does not have (by name), a precision that cannot be made of this file,
        or a failing build.
    """
    target = target or find_target()
    key = key_of(model, precision, target)
    build = _Build(model, key.precision, target, samples, quantise)
    return EngineCache(cache_dir).get(key, build.run, rebuild)


def key_of(model: ModelFile, precision: str, target: Target) -> Key:
    held = model.precision
    if precision == "auto":
        precision = AUTO if held == "fp32" else held
    if held not in ("fp32", precision):
        raise EngineError(f"{model.path.name} is in {held} already; ask for {held}, or give the fp32 file for {precision}")
    return Key(
        name=re.sub(r"[^\w.-]", "_", model.path.stem),
        model_sha256=model.sha256,
        library=target.library.name,
        version=target.library.version,
        gpu=target.gpu,
        target=target.sm,
        precision=precision,
        shapes=", ".join(map(str, (*model.inputs, *model.outputs))),
        rules=lowering.VERSION,
    )


class _Build:
    """One build: precision by precision, from what was asked for to the safer ones, until the answers are fp32's."""

    def __init__(
        self, model: ModelFile, precision: str, target: Target, samples: parity.Samples | None, quantise: Quantiser | None
    ):
        self.model, self.precision, self.target, self.quantise = model, precision, target, quantise
        self.samples = samples or parity.synthetic(model_file.image_shape(model))
        self.proto = model_file.parse(model.path)
        self.held = lowering.precision_of(self.proto)
        self.expected: list[Any] = []

    def run(self) -> tuple[bytes, dict[str, Any]]:
        began = time.monotonic()
        precision, fallbacks = self.precision, list[str]()
        while True:
            last = precision == "fp32" or self.held != "fp32"
            try:
                plan, found, reason = self.attempt(precision)
            except EngineError as error:
                # A TensorRT whose parser has no bfloat16 still has fp32; an operator that it lacks fails there too.
                if precision != "bf16" or not fallbacks:
                    raise
                plan, found, reason = b"", None, str(error)
            if reason is None or last:
                break
            safer = SAFER[precision]
            if safer == "bf16" and int(self.target.sm[3:]) < BF16_SINCE:
                safer = SAFER[safer]
            log.warning("%s: %s is not to be trusted: %s; building %s instead", self.name, precision, reason, safer)
            fallbacks.append(f"{precision}: {reason}")
            precision = safer
        if reason is not None:
            log.warning("%s: even in %s %s", self.name, precision, reason)
        facts = {
            "requested_precision": self.precision,
            "precision": precision,
            "parity": found.facts() if found else None,
            "shortfall": reason,
            "fallbacks": fallbacks,
            "library": self.target.library.title,
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 1),
        }
        return plan, facts

    @property
    def name(self) -> str:
        return self.model.path.name

    def attempt(self, precision: str) -> tuple[bytes, parity.Parity | None, str | None]:
        """Build in one precision; return the engine, its parity, and why it is not to be trusted (engine b"", then)."""
        proto, stand_in = self.graphs(precision)
        if self.target.local:
            plan = self.plan(proto, precision)
            found = self.compare_engine(plan, precision)
            return plan, found, found.shortfall(precision) if found else None
        if self.held != "fp32":
            log.warning("%s: not compared with fp32: the file is in %s already, and no GPU is here to run the engine; "
                        "build from the fp32 file to have it compared", self.name, self.held)
            return self.plan(proto, precision), None, None
        # An engine for another machine cannot be run here: the graph that it is built from is, before minutes are spent on it.
        found = self.compare(stand_in, f"onnxruntime on the {precision} graph, since the GPU is not in this machine")
        reason = found.shortfall(precision) if found else None
        if reason and precision != "fp32":
            return b"", found, reason
        return self.plan(proto, precision), found, reason

    def graphs(self, precision: str) -> tuple[Any, Any]:
        """Return the model in a precision: for TensorRT, and as ONNX Runtime shall run it in TensorRT's stead."""
        if self.held != "fp32":
            return self.proto, self.proto
        if precision == "int8":
            proto = self.quantised()
            return proto, proto
        return lowering.lower(self.proto, precision), lowering.lower(self.proto, precision, emulate=True)

    def quantised(self) -> Any:
        if self.quantise is None:
            raise EngineError(
                f"int8 of {self.name} needs frames to calibrate on: `deeprob build {self.model.path} --precision int8 "
                "--calibration FOLDER_OR_BAG` once, or give a model file that is int8 already"
            )
        with tempfile.TemporaryDirectory() as folder:
            read = model_file.read(self.quantise(self.model.path, Path(folder) / f"{self.model.path.stem}-int8.onnx"))
            if read.precision != "int8":
                raise EngineError(f"the quantised {self.name} does not say that it is int8; this is an error of ours")
            return model_file.parse(read.path)

    def plan(self, proto: Any, precision: str) -> bytes:
        with Progress(f"{self.model.path.stem} {precision} for {self.target}"):
            return serialise(proto, self.target, self.name)

    def compare_engine(self, plan: bytes, precision: str) -> parity.Parity | None:
        from deeprob_perception.engines import tensorrt

        engine = tensorrt.TensorRtEngine(self.model, precision, precision, self.target.library, plan)
        try:
            return self.compare(engine.all_of, f"TensorRT on {engine.device}")
        finally:
            engine.close()

    def compare(self, run: Any, measured_by: str) -> parity.Parity | None:
        """Measure a callable, or a graph by ONNX Runtime; None, with a warning, where ONNX Runtime is missing."""
        try:
            if not self.expected:
                reference = parity.onnx_session(self.proto, self.name)
                self.expected = [reference(image) for image in self.samples.images]
            candidate = run if callable(run) else parity.onnx_session(run, f"{self.name}, lowered")
        except EngineError as error:
            log.warning("%s: not compared with fp32: %s", self.name, error)
            return None
        return parity.measure(self.expected, candidate, self.samples, measured_by, self.held)


class Progress:
    """Say every few seconds that a build is going on, from a thread, since TensorRT says nothing for minutes."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        self.began = time.monotonic()
        self.done = threading.Event()
        log.info("building %s", self.what)
        self.thread = threading.Thread(target=self.tell, daemon=True)
        self.thread.start()

    def tell(self) -> None:
        while not self.done.wait(EVERY):
            seconds = time.monotonic() - self.began
            log.info("building %s, %.0f s so far; this is normal, several minutes on a Jetson Orin", self.what, seconds)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.done.set()
        self.thread.join()
        if kind is None:
            log.info("built %s in %.1f s", self.what, time.monotonic() - self.began)


def serialise(proto: Any, target: Target, name: str) -> bytes:
    """Parse an ONNX model and build it, strongly typed: in the precisions that its graph is written in, and no others.

    :raises EngineError: naming the operator that the parser does not have, or TensorRT's own reason.
    """
    trt, logger = target.library.module, target.library.logger()
    logger.errors.clear()
    try:
        builder = trt.Builder(logger)
    except Exception as error:  # pybind11 raises TypeError where the library gives a null pointer
        raise EngineError(f"{target.library.title} does not start: {logger.last_error()} ({error})") from error
    # TensorRT 10 has to be asked for it; later ones know nothing else.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(proto.SerializeToString()):
        raise EngineError(f"{target.library.title} cannot take {name}: {parser_errors(parser)}")
    config = builder.create_builder_config()
    # On by default, and then fp32 is not: products would be rounded to 10 bits of mantissa.
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if target.library.builds_anywhere:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{target.sm[3:]}"), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{target.library.title} cannot build {name} for {target}: {logger.last_error()}")
    return bytes(plan)


def parser_errors(parser: Any) -> str:
    """Return the parser's errors in one line: the operators that it lacks by name, or else the first that it refuses."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return "the ONNX parser gives no reason"
    first = errors[0]
    operator, node = first.node_operator() or "?", first.node_name() or "?"
    # The description's last line is the cause; what CUDA complains of after it, without a GPU, is none.
    reasons = [line.strip() for line in first.desc().splitlines() if line.strip() and "checkMacros" not in line]
    return f"the operator {operator} (node {node}) is not supported ({reasons[-1] if reasons else 'no reason given'})"
