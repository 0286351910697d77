# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU: runs everywhere, float32 only."""

from pathlib import Path

import numpy as np

from deeprob_perception.engines.engine import Engine
from deeprob_perception.engines.host import processor_name
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError, ModelError


def unavailable() -> str | None:
    try:
        import onnxruntime  # noqa: F401
    except Exception as error:  # a broken wheel raises anything
        return f"{error} (`pip install onnxruntime` mends it)"
    return None


def load(model: ModelFile, precision: str, cache_dir: Path | None, threads: int) -> Engine:
    return OnnxRuntimeEngine(model, precision, threads)


class OnnxRuntimeEngine(Engine):
    backend = "onnxruntime"
    precision = "fp32"

    def __init__(self, model: ModelFile, precision: str, threads: int):
        super().__init__(model, precision)
        if precision not in ("auto", "fp32"):
            raise EngineError(f"the back end onnxruntime computes in fp32, not in {precision}; take openvino or fp32")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning workers would starve the rest of the process: the decoder, the publisher, rclpy's executor.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no public base class
            raise ModelError(f"{model.path}: ONNX Runtime refuses it: {_first_line(error)}") from error
        self.device = processor_name()
        # Without this the whole graph runs, and outputs that nobody asked for are thrown away.
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        try:
            arrays = self._session.run(outputs, inputs, self._options)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {self.path.name}: {_first_line(error)}") from error
        return dict(zip(outputs, arrays, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
