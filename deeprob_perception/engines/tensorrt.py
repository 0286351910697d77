# SPDX-License-Identifier: Apache-2.0
"""TensorRT on an NVIDIA GPU: `tensorrt` 10 and 11, and TensorRT for RTX, by one code path (docs/tensorrt.md)."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception.engines import builder, cuda, tensorrt_library
from deeprob_perception.engines.cache import EngineCache
from deeprob_perception.engines.engine import Engine
from deeprob_perception.engines.frame import Frame
from deeprob_perception.engines.model_file import ModelFile, TensorSpec
from deeprob_perception.engines.tensorrt_library import Library
from deeprob_perception.errors import EngineError
from deeprob_perception.files import write_whole

log = logging.getLogger(__name__)


class EngineRefused(EngineError):
    """TensorRT does not take the bytes as an engine: damaged, of another version, or for another GPU."""


def unavailable() -> str | None:
    # The GPU first: without one the library, a third of a second of import, need not be looked for.
    reason = cuda.unavailable()
    if reason:
        return reason
    try:
        tensorrt_library.library(cuda.Cuda().gpu().sm)
    except EngineError as error:
        return str(error)
    return None


def load(model: ModelFile, precision: str, cache_dir: Path | None, threads: int) -> Engine:
    """Return the engine from the cache, or build it: minutes on a Jetson, told in the log every few seconds.

    One that TensorRT refuses although its file is whole (after an update of the driver, say) is built anew, once.
    """
    target = builder.find_target()
    for attempt in ("as it is", "anew"):
        entry = builder.build(model, precision, target, cache_dir, rebuild=attempt == "anew")
        kernels = entry.path and entry.path.with_suffix(".kernels")
        try:
            return TensorRtEngine(model, precision, entry.facts["precision"], target.library, entry.plan, kernels)
        except EngineRefused as error:
            if entry.built:
                raise
            log.warning("%s: %s; it is built anew", entry.path, error)
            EngineCache(cache_dir).discard(builder.key_of(model, precision, target))
    raise AssertionError("an engine that was built anew is returned or raised")


def ready(model: ModelFile, precision: str, cache_dir: Path | None) -> bool:
    """Tell whether `load` finds the engine in the cache, so that it would not have to build first."""
    return EngineCache(cache_dir).find(builder.key_of(model, precision, builder.find_target())) is not None


class TensorRtEngine(Engine):
    """A deserialised engine with its buffers.

    :param precision: what the engine's graph computes in.
    :param plan: the engine's bytes.
    :param kernels: where TensorRT for RTX keeps what it compiles on this machine, so that the next start need not.
    :raises EngineRefused: when the bytes are no engine that this TensorRT and this GPU can run.
    :raises OutOfGpuMemory: when there is no room on the GPU.
    """

    backend = "tensorrt"

    def __init__(
        self, model: ModelFile, requested_precision: str, precision: str, library: Library, plan: bytes,
        kernels: Path | None = None,
    ):  # fmt: skip
        super().__init__(model, requested_precision)
        self.precision = precision
        self._library, self._logger = library, library.logger()
        self._kernels_file = kernels
        self._cuda = cuda.Cuda()
        gpu = self._cuda.gpu()
        self.device = f"{gpu.name} ({gpu.sm}, {library.title})"
        self._frame: Frame | None = None
        self._cuda.use()
        self._logger.errors.clear()
        trt = library.module
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineRefused(f"{library.title} refuses the engine of {model.path.name}: {self._logger.last_error()}")
        self._check(trt)
        self._kernels: Any = None
        self._context = self._make_context()
        if self._context is None:
            reason = self._logger.last_error()
            failed = cuda.OutOfGpuMemory if "memory" in reason.lower() else EngineError
            raise failed(f"{library.title} cannot set up {model.path.name} on {gpu.name}: {reason}")
        self._frame = Frame(self._cuda, self.inputs, self.outputs, self._bind, self._enqueue, model.path.name)
        self._frames = 0

    def _check(self, trt: Any) -> None:
        """Raise EngineRefused unless the engine's tensors are the model's."""
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {
            name: TensorSpec(name, tuple(engine.get_tensor_shape(name)), np.dtype(trt.nptype(engine.get_tensor_dtype(name))))
            for name in names
        }
        expected = {spec.name: spec for spec in (*self.inputs, *self.outputs)}
        if found != expected:
            theirs, ours = (", ".join(map(str, specs.values())) for specs in (found, expected))
            raise EngineRefused(f"the engine is of another model: it has {theirs}, and {self.path.name} has {ours}")

    def _make_context(self) -> Any:
        if not self._library.builds_anywhere or not hasattr(self._engine, "create_runtime_config"):
            return self._engine.create_execution_context()
        # TensorRT for RTX compiles kernels for this very GPU when a context is made; its runtime cache keeps them.
        config = self._engine.create_runtime_config()
        self._kernels = config.create_runtime_cache()
        if self._kernels_file is not None and self._kernels_file.is_file():
            with contextlib.suppress(OSError):
                if not self._kernels.deserialize(self._kernels_file.read_bytes()):
                    log.info("%s: of another driver or version; kernels are compiled anew", self._kernels_file)
        config.set_runtime_cache(self._kernels)
        return self._engine.create_execution_context(config)

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"TensorRT takes no address for {name}: {self._logger.last_error()}")

    def _enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"TensorRT failed on {self.path.name}: {self._logger.last_error()}")

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        if self._frame is None:
            raise EngineError(f"the engine of {self.path.name} is closed; load it again")
        results = self._frame.run(inputs, outputs)
        if self._frames == 0:
            self._keep_kernels()
        self._frames += 1
        return results

    def _keep_kernels(self) -> None:
        """Write what was compiled by the first frame, for the next start; where it cannot be written, that start compiles."""
        if self._kernels is None or self._kernels_file is None or self._kernels_file.is_file():
            return
        try:
            write_whole(self._kernels_file, bytes(self._kernels.serialize()))
        except OSError as error:
            log.warning("%s: cannot be kept (%s); each start compiles its kernels", self._kernels_file, error.strerror)

    def all_of(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return all outputs, in the model's order, of an image uint8 `[1, H, W, 3]`."""
        found = self(image=image)
        return tuple(found[spec.name] for spec in self.outputs)

    def close(self) -> None:
        """Give back the GPU's memory now, and not when the last reference goes."""
        if self._frame is not None:
            self._frame.close()
        # In this order: TensorRT wants contexts gone before their engine, and engines before their runtime.
        self._frame = self._context = self._kernels = self._engine = self._runtime = None

    def __del__(self) -> None:
        # At the interpreter's end modules may be gone, and what is left is the driver's to clean.
        with contextlib.suppress(Exception):
            self.close()
