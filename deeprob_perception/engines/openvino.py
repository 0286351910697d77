# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the CPU: the fastest on x86, bfloat16 where the CPU has it (AMX, AVX512-BF16), and int8 of a quantised file."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception.engines import store
from deeprob_perception.engines.engine import Engine, settle_precision
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError, ModelError

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
    """Compiles the graph once for each set of outputs that is asked for, so that none is computed in vain.

    What was compiled is kept by us and not by OpenVINO's own `CACHE_DIR`: that one reads and hashes the whole ONNX again
    before it looks into its cache, which is a good part of a second start.
    """

    backend = "openvino"

    def __init__(self, model: ModelFile, precision: str, cache_dir: Path | None, threads: int):
        super().__init__(model, precision)
        import openvino

        self._openvino = openvino
        self._core = openvino.Core()
        self._file = model
        self._model: Any = None  # the graph, read when something has to be compiled
        self.device = self._core.get_property("CPU", "FULL_DEVICE_NAME").strip()
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        native = ("bf16", "fp32") if "BF16" in able else ("fp32", "bf16")
        wanted = settle_precision(model, precision, self.backend, native)
        # What is not quantised in an int8 file is in the quickest float.
        rest = native[0] if wanted == "int8" else wanted
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": HINTS[rest],
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._kept = store.folder(cache_dir, "openvino")
        self._requests: dict[tuple[str, ...], Any] = {}
        # The node's usual request; what else is asked for is compiled when it first is.
        request = self._request((self.outputs[0].name,))
        if wanted == "int8":
            actual = "int8" if "INT8" in able else "fp32"
        else:
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
            compiled = self._compiled(outputs)
            try:
                self._requests[outputs] = compiled.create_infer_request()
            except RuntimeError as error:
                raise EngineError(f"OpenVINO cannot run {self.path}: {_last_line(error)}") from error
        return self._requests[outputs]

    def _compiled(self, outputs: tuple[str, ...]) -> Any:
        path = None
        if self._kept is not None:
            version = self._openvino.get_version()
            facts = {"outputs": outputs, "options": self._options, "version": version, "device": self.device}
            path = self._kept / store.key(self.path.stem, model=self._file.sha256, **facts)
        kept = store.get(path)
        if kept is not None:
            try:
                return self._core.import_model(kept, "CPU", self._options)
            except RuntimeError as error:
                log.warning("%s: OpenVINO refuses it (%s); it is made anew", path, _last_line(error))
        if self._model is None:
            try:
                self._model = self._core.read_model(self.path)
            except RuntimeError as error:
                raise ModelError(f"{self.path}: OpenVINO refuses it: {_last_line(error)}") from error
        wanted = [self._model.output(name) for name in outputs]
        model = self._openvino.Model(wanted, self._model.get_parameters(), self.path.stem)
        try:
            compiled = self._core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile {self.path}: {_last_line(error)}") from error
        if path is not None:
            store.put(path, compiled.export_model().getvalue())
        return compiled


def _last_line(error: Exception) -> str:
    """OpenVINO's messages are stacks of source lines that end in the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
