# SPDX-License-Identifier: Apache-2.0
"""One frame on the GPU: copy in, compute, copy out, as one CUDA graph where the driver allows it.

Everything is allocated once. What a call returns is a copy that the caller may keep, since the page-locked buffers are
written again by the next frame.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deeprob_perception.engines.cuda import Cuda
from deeprob_perception.engines.model_file import TensorSpec
from deeprob_perception.errors import EngineError

log = logging.getLogger(__name__)


class Frame:
    """Buffers of a model's inputs and outputs, and the work of a frame on them.

    :param enqueue: gives the network to a stream (its number), on the addresses in `addresses`; it may raise EngineError.
    :param bind: called once for each name and device address before anything runs.
    """

    def __init__(
        self,
        cuda: Cuda,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        bind: Callable[[str, int], None],
        enqueue: Callable[[int], None],
        name: str,
    ):
        self._cuda, self._enqueue, self._name = cuda, enqueue, name
        self._inputs = [spec.name for spec in inputs]
        self._host: dict[str, np.ndarray] = {}
        self._device: dict[str, int] = {}
        # Captured work for each set of outputs that was asked for; None where capture was refused.
        self._graphs: dict[tuple[str, ...], Any] = {}
        self._warm: set[tuple[str, ...]] = set()
        self._stream: int | None = None
        self._event: Any = None
        cuda.use()
        try:
            self._stream = cuda.stream()
            self._event = cuda.event()
            for spec in (*inputs, *outputs):
                what = f"{spec.name} of {name}"
                self._host[spec.name] = cuda.pinned_array(spec.shape, np.dtype(spec.dtype), what)
                self._device[spec.name] = cuda.device_buffer(self._host[spec.name].nbytes, what)
                bind(spec.name, self._device[spec.name])
        except EngineError:
            self.close()
            raise

    def run(self, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Compute; `inputs` are checked and contiguous. Outputs that are not named are not copied back."""
        cuda, wanted = self._cuda, tuple(outputs)
        if self._stream is None:
            raise EngineError(f"the engine of {self._name} is closed; load it again")
        cuda.use()
        for name in self._inputs:
            np.copyto(self._host[name], inputs[name])
        if wanted in self._warm and wanted not in self._graphs:
            self._graphs[wanted] = self._capture(wanted)
        graph = self._graphs.get(wanted)
        if graph is None:
            self._work(wanted)
        else:
            cuda.launch(graph, self._stream)
        cuda.wait(self._event, self._stream)
        # Only from the second frame on: TensorRT allocates and compiles in the first, which no capture may hold.
        self._warm.add(wanted)
        return {name: self._host[name].copy() for name in outputs}

    def _work(self, outputs: Sequence[str]) -> None:
        assert self._stream is not None
        for name in self._inputs:
            self._cuda.to_device(self._device[name], self._host[name], self._stream)
        self._enqueue(self._stream)
        for name in outputs:
            self._cuda.to_host(self._host[name], self._device[name], self._stream)

    def _capture(self, outputs: tuple[str, ...]) -> Any:
        """Return the frame as a graph; None, with one warning, where it cannot be captured: then each call enqueues anew."""
        assert self._stream is not None
        begun = False
        failed: EngineError | None = None
        graph = None
        try:
            self._cuda.begin_capture(self._stream)
            begun = True
            self._work(outputs)
        except EngineError as error:
            failed = error
        if begun:
            # A capture that failed half-way must be ended too, or the stream stays unusable.
            try:
                graph = self._cuda.end_capture(self._stream)
            except EngineError as error:
                failed = failed or error
        if failed is not None:
            log.warning("%s: no CUDA graph, each frame is enqueued anew: %s", self._name, failed)
            if graph is not None:
                self._cuda.runtime.cudaGraphExecDestroy(graph)
            return None
        return graph

    def close(self) -> None:
        """Give back all memory; a second call does nothing."""
        if self._stream is None:
            return
        runtime = self._cuda.runtime
        runtime.cudaStreamSynchronize(self._stream)
        for graph in self._graphs.values():
            if graph is not None:
                runtime.cudaGraphExecDestroy(graph)
        for address in self._device.values():
            self._cuda.free(address)
        for array in self._host.values():
            self._cuda.free_pinned(array)
        if self._event is not None:
            runtime.cudaEventDestroy(self._event)
        runtime.cudaStreamDestroy(self._stream)
        self._stream = None
        self._graphs, self._device, self._host = {}, {}, {}
