# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU: runs everywhere, in float32, or int8 where the file is quantised."""

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception.engines import store
from deeprob_perception.engines.engine import Engine, settle_precision
from deeprob_perception.engines.host import processor_name
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError, ModelError

log = logging.getLogger(__name__)


def unavailable() -> str | None:
    try:
        import onnxruntime  # noqa: F401
    except Exception as error:  # a broken wheel raises anything
        return f"{error} (`pip install onnxruntime` mends it)"
    return None


def load(model: ModelFile, precision: str, cache_dir: Path | None, threads: int) -> Engine:
    return OnnxRuntimeEngine(model, precision, cache_dir, threads)


class OnnxRuntimeEngine(Engine):
    """Runs the optimised graph, which is kept between starts: optimising takes longer than all the rest of one."""

    backend = "onnxruntime"

    def __init__(self, model: ModelFile, precision: str, cache_dir: Path | None, threads: int):
        super().__init__(model, precision)
        self.precision = settle_precision(model, precision, self.backend, ("fp32",))
        import onnxruntime

        self._onnxruntime = onnxruntime
        self._threads = threads
        self.device = processor_name()
        self._session = self._kept_session(model, cache_dir)
        # Without this the whole graph runs, and outputs that nobody asked for are thrown away.
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        try:
            arrays = self._session.run(outputs, inputs, self._options)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on {self.path.name}: {_first_line(error)}") from error
        return dict(zip(outputs, arrays, strict=True))

    def _kept_session(self, model: ModelFile, cache_dir: Path | None) -> Any:
        """Return a session of the kept optimised graph, or else of the file, whose optimised graph is then kept."""
        kept = store.folder(cache_dir, "onnxruntime")
        # The graph is laid out for this processor's vectors.
        facts = {"version": self._onnxruntime.__version__, "device": self.device}
        path = kept and kept / store.key(model.path.stem, model=model.sha256, **facts)
        content = store.get(path)
        if content is not None:
            try:
                return self._open(content, optimised=True)
            except Exception as error:
                log.warning("%s: ONNX Runtime refuses it (%s); it is made anew", path, _first_line(error))
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "optimised.onnx"
            try:
                session = self._open(str(model.path), save_to=written if path else None)
            except Exception as error:  # its exceptions have no public base class
                raise ModelError(f"{model.path}: ONNX Runtime refuses it: {_first_line(error)}") from error
            if path is not None and written.is_file():
                store.put(path, written.read_bytes())
        return session

    def _open(self, source: str | bytes, optimised: bool = False, save_to: Path | None = None) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Spinning workers would starve the rest of the process: the decoder, the publisher, rclpy's executor.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if optimised:
            options.graph_optimization_level = self._onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save_to is not None:
            options.optimized_model_filepath = str(save_to)
        return self._onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
