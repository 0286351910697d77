# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the CPU: the fastest on x86, and bfloat16 where the CPU has it (AMX, AVX512-BF16)."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception.engines.engine import Engine
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError, ModelError
from deeprob_perception.share import PACKAGE

# Our names of precisions -> OpenVINO's.
HINTS = {"fp32": "f32", "bf16": "bf16"}
log = logging.getLogger(__name__)


def unavailable() -> str | None:
    try:
        import openvino

        if "CPU" not in openvino.Core().available_devices:
            return "openvino finds no CPU device"
    except Exception as error:  # a broken wheel raises anything
        return f"{error} (`pip install openvino` mends it)"
    return None


def load(model: ModelFile, precision: str, cache_dir: Path | None, threads: int) -> Engine:
    return OpenVinoEngine(model, precision, cache_dir, threads)


class OpenVinoEngine(Engine):
    """Compiles the graph once for each set of outputs that is asked for, so that none is computed in vain."""

    backend = "openvino"

    def __init__(self, model: ModelFile, precision: str, cache_dir: Path | None, threads: int):
        super().__init__(model, precision)
        if precision != "auto" and precision not in HINTS:
            raise EngineError(f"the back end openvino computes in {' or '.join(HINTS)}, not in {precision}; take one of these")
        import openvino

        self._openvino = openvino
        self._core = openvino.Core()
        self.device = self._core.get_property("CPU", "FULL_DEVICE_NAME").strip()
        has_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        wanted = ("bf16" if has_bf16 else "fp32") if precision == "auto" else precision
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": HINTS[wanted],
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        folder = cache_folder(cache_dir)
        if folder is not None:
            self._options["CACHE_DIR"] = str(folder)
        self._requests: dict[tuple[str, ...], Any] = {}
        try:
            self._model = self._core.read_model(model.path)
        except RuntimeError as error:
            raise ModelError(f"{model.path}: OpenVINO refuses it: {_last_line(error)}") from error
        # The node's usual request; what else is asked for is compiled when it first is.
        request = self._request((self.outputs[0].name,))
        hint = request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string()
        actual = {theirs: ours for ours, theirs in HINTS.items()}.get(hint, hint)
        self.precision = actual
        if actual != wanted:
            log.warning("%s: asked for %s, but this CPU (%s) computes in %s", model.path.name, wanted, self.device, actual)

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        request = self._request(tuple(outputs))
        try:
            request.infer(inputs, share_inputs=True)
            # The request's own buffers are written again by the next frame.
            return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(outputs)}
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on {self.path.name}: {_last_line(error)}") from error

    def _request(self, outputs: tuple[str, ...]) -> Any:
        if outputs not in self._requests:
            model = self._openvino.Model(
                [self._model.output(name) for name in outputs], self._model.get_parameters(), self.path.stem
            )
            try:
                compiled = self._core.compile_model(model, "CPU", self._options)
            except RuntimeError as error:
                raise EngineError(f"OpenVINO cannot compile {self.path}: {_last_line(error)}") from error
            self._requests[outputs] = compiled.create_infer_request()
        return self._requests[outputs]


def cache_folder(cache_dir: Path | None) -> Path | None:
    """Return the folder for compiled models, made if need be; None, with a warning, when it cannot be written."""
    import platformdirs

    folder = (cache_dir or platformdirs.user_cache_path(PACKAGE)) / "openvino"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        log.warning("no cache of compiled models: %s: %s; every start compiles anew", folder, error.strerror)
        return None
    return folder


def _last_line(error: Exception) -> str:
    """OpenVINO's messages are stacks of source lines that end in the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
