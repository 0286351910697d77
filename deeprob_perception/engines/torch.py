# SPDX-License-Identifier: Apache-2.0
"""torch, for GPUs without TensorRT: the exported program in half precision, as one CUDA graph. Also on the CPU, for tests.

The one back end that needs torch, and the one place in `engines` that reaches up to the networks (`program`, within
functions): a program is traced from the network that the file's recipe names, and kept, so that this happens once.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deeprob_perception.engines import store
from deeprob_perception.engines.engine import Engine, settle_precision
from deeprob_perception.engines.host import processor_name
from deeprob_perception.engines.model_file import ModelFile
from deeprob_perception.errors import EngineError, ModelError

WARM_UP = 3  # frames before a capture: kernels are chosen and memory is laid out in the first ones
log = logging.getLogger(__name__)


def unavailable() -> str | None:
    try:
        # OpenMP's workers would spin on after each frame and starve the rest of the process.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import torch  # noqa: F401
    except Exception as error:  # a broken wheel raises anything
        return f"{error} (`pip install torch` mends it)"
    return None


def drives_gpu() -> bool:
    """Tell whether torch is installed and can use an NVIDIA GPU; imports torch."""
    if unavailable():
        return False
    import torch

    return bool(torch.cuda.is_available())


def load(model: ModelFile, precision: str, cache_dir: Path | None, threads: int) -> Engine:
    return TorchEngine(model, precision, cache_dir, threads)


class TorchEngine(Engine):
    """The network as an exported program; of what it says, the outputs that are asked for."""

    backend = "torch"

    def __init__(self, model: ModelFile, precision: str, cache_dir: Path | None, threads: int):
        super().__init__(model, precision)
        if [spec.name for spec in self.inputs] != ["image"]:
            taken = ", ".join(spec.name for spec in self.inputs)
            raise EngineError(f"{model.path} takes {taken}: the torch back end runs networks on images; take another one")
        import torch

        self._torch = torch
        cuda = torch.cuda.is_available()
        if cuda:
            # bfloat16 first: no activation of any network overflows it, which float16's 65504 cannot promise.
            floats = ("bf16", "fp16", "fp32") if torch.cuda.is_bf16_supported(including_emulation=False) else ("fp16", "fp32")
        else:
            floats = ("fp32", "bf16")
        self.precision = settle_precision(model, precision, self.backend, floats, quantised=False)
        self.device = torch.cuda.get_device_name() if cuda else processor_name()
        self._place = "cuda" if cuda else "cpu"
        if threads and not cuda:
            torch.set_num_threads(threads)  # of the whole process: torch has no other
        self._program = self._kept_program(model, cache_dir)
        self._runs: dict[tuple[str, ...], Callable[[np.ndarray], list[np.ndarray]]] = {}

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        wanted = tuple(outputs)
        try:
            if wanted not in self._runs:
                self._runs[wanted] = self._capture(wanted) if self._place == "cuda" else self._plain(wanted)
            return dict(zip(outputs, self._runs[wanted](inputs["image"]), strict=True))
        except (RuntimeError, AssertionError) as error:  # torch's own, out of memory too
            raise EngineError(f"torch failed on {self.path.name}: {_first_line(error)}") from error

    def _kept_program(self, model: ModelFile, cache_dir: Path | None) -> Any:
        from deeprob_perception import program

        kept = store.folder(cache_dir, "torch")
        facts = {"version": self._torch.__version__, "precision": self.precision, "place": self._place}
        path = kept and kept / f"{store.key(model.path.stem, model=model.sha256, **facts)}.pt2"
        content = store.get(path)
        if content is not None:
            try:
                return program.read(content)
            except EngineError as error:
                log.warning("%s: refused (%s); it is made anew", path, error)
        try:
            content = program.make(model.path, model.inputs[0].shape, self.precision, self._place)
        except ModelError:
            raise
        except Exception as error:  # torch.export has a hierarchy of its own, and lets others through
            raise EngineError(f"torch cannot export {model.path}: {_first_line(error)}") from error
        store.put(path, content)
        return program.read(content)

    def _forward(self, image: Any, outputs: tuple[str, ...]) -> list[Any]:
        from deeprob_perception.nets.image_graph import OUTPUTS

        said = self._program(image).float()
        return [OUTPUTS[name](said) for name in outputs]

    def _plain(self, outputs: tuple[str, ...]) -> Callable[[np.ndarray], list[np.ndarray]]:
        """Return a function that runs the operators one by one."""

        def run(image: np.ndarray) -> list[np.ndarray]:
            with self._torch.inference_mode():
                # torch would warn of a read-only array; a copy costs 0.1 ms and is cast next anyway.
                found = self._forward(self._torch.from_numpy(image.copy()).to(self._place), outputs)
                return [tensor.cpu().numpy().copy() for tensor in found]

        return run

    def _capture(self, outputs: tuple[str, ...]) -> Callable[[np.ndarray], list[np.ndarray]]:
        """Return a function that replays one CUDA graph a frame; where capture is refused, the plain one, with a warning."""
        torch = self._torch
        shape = self.inputs[0].shape
        plain = self._plain(outputs)
        for _ in range(WARM_UP):
            plain(np.zeros(shape, np.uint8))
        # Page-locked, so that copies are asynchronous; all memory is allocated here, once.
        host = torch.zeros(shape, dtype=torch.uint8).pin_memory()
        results = [
            torch.from_numpy(np.zeros(spec.shape, spec.dtype)).pin_memory() for spec in self.outputs if spec.name in outputs
        ]
        image = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        try:
            with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
                image.copy_(host, non_blocking=True)
                found = self._forward(image, outputs)
                for result, tensor in zip(results, found, strict=True):
                    result.copy_(tensor, non_blocking=True)
        except RuntimeError as error:
            log.warning("%s: no CUDA graph (%s); operators run one by one", self.path.name, _first_line(error))
            torch.cuda.synchronize()
            return plain

        def run(array: np.ndarray) -> list[np.ndarray]:
            np.copyto(host.numpy(), array)
            with torch.cuda.stream(stream):
                graph.replay()
            stream.synchronize()
            return [result.numpy().copy() for result in results]

        return run


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
