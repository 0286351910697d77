# SPDX-License-Identifier: Apache-2.0
"""The few CUDA runtime calls that an engine needs, by `cuda.bindings`: no torch, no pycuda.

The runtime API works in the device's primary context, which all engines of a process (and torch, where it is loaded) share.
That context is current per thread, so each thread that comes here names the device first (`Cuda.use`).
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from deeprob_perception.errors import EngineError


class OutOfGpuMemory(EngineError):
    """The GPU has no room for what was to be allocated."""


@dataclass(frozen=True)
class Gpu:
    """A device: its name, compute capability as `sm_86`, memory in MB, and whether it shares the CPU's memory (Jetson)."""

    index: int
    name: str
    sm: str
    memory_mb: int
    integrated: bool


def unavailable() -> str | None:
    """Return why there is no CUDA device to work with, in one line; None when there is one."""
    try:
        from cuda.bindings import runtime
    except Exception as error:  # a broken wheel raises anything
        return f"{error} (`pip install cuda-bindings` mends it; with CUDA 12, as on JetPack 6: 'cuda-bindings<13')"
    status, driver = runtime.cudaDriverGetVersion()
    if status != runtime.cudaError_t.cudaSuccess or not driver:
        return "there is no NVIDIA driver on this machine (`nvidia-smi` shows one where there is)"
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
        _, wanted = runtime.cudaRuntimeGetVersion()
        return (
            f"the NVIDIA driver knows CUDA {version(driver)}, and cuda-bindings brings {version(wanted)}; update the driver, "
            f"or `pip install 'cuda-bindings=={driver // 1000}.*'`"
        )
    if status != runtime.cudaError_t.cudaSuccess or not count:
        return f"the NVIDIA driver finds no GPU ({describe(runtime, status)}); CUDA_VISIBLE_DEVICES may hide it"
    return None


def version(number: int) -> str:
    """Return CUDA's 12060 as 12.6."""
    return f"{number // 1000}.{number % 1000 // 10}"


def describe(runtime: Any, status: Any) -> str:
    _, text = runtime.cudaGetErrorString(status)
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


class Cuda:
    """One device of the CUDA runtime. A call that fails raises EngineError with what was tried and CUDA's own words."""

    def __init__(self, index: int = 0):
        from cuda.bindings import runtime

        self.runtime = runtime
        self.index = index

    def call(self, what: str, returned: tuple) -> Any:
        """Return what a runtime call gave beside its status."""
        status, *values = returned
        if status == self.runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfGpuMemory(
                f"out of GPU memory: {what}; end other programs that use the GPU, or take a smaller model or fp16"
            )
        if status != self.runtime.cudaError_t.cudaSuccess:
            raise EngineError(f"CUDA failed: {what}: {describe(self.runtime, status)}")
        return values[0] if len(values) == 1 else values

    def use(self) -> None:
        """Make the device's primary context current in the calling thread."""
        self.call(f"taking device {self.index}", self.runtime.cudaSetDevice(self.index))

    def gpu(self) -> Gpu:
        rt, index = self.runtime, self.index
        attribute = rt.cudaDeviceAttr
        wanted = (
            attribute.cudaDevAttrComputeCapabilityMajor,
            attribute.cudaDevAttrComputeCapabilityMinor,
            attribute.cudaDevAttrIntegrated,
        )
        major, minor, integrated = (self.call("reading the GPU", rt.cudaDeviceGetAttribute(w, index)) for w in wanted)
        properties = self.call("reading the GPU", rt.cudaGetDeviceProperties(index))
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        memory = int(properties.totalGlobalMem) >> 20
        return Gpu(index, name.strip("\0 "), f"sm_{major}{minor}", memory, bool(integrated))

    # Memory -----------------------------------------------------------------------------------------------------------

    def device_buffer(self, nbytes: int, what: str) -> int:
        """Return the address of device memory."""
        return int(self.call(f"{nbytes} bytes for {what}", self.runtime.cudaMalloc(nbytes)))

    def pinned_array(self, shape: tuple[int, ...], dtype: np.dtype, what: str) -> np.ndarray:
        """Return an array in page-locked host memory, from which and to which the GPU copies on its own."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        returned = self.runtime.cudaHostAlloc(nbytes, self.runtime.cudaHostAllocDefault)
        address = int(self.call(f"{nbytes} page-locked bytes for {what}", returned))
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def free(self, address: int) -> None:
        self.runtime.cudaFree(address)

    def free_pinned(self, array: np.ndarray) -> None:
        self.runtime.cudaFreeHost(array.ctypes.data)

    # Work -------------------------------------------------------------------------------------------------------------

    def stream(self) -> int:
        # Not blocking: work of others in the default stream, as torch's, holds nothing up.
        flags = self.runtime.cudaStreamNonBlocking
        return int(self.call("making a stream", self.runtime.cudaStreamCreateWithFlags(flags)))

    def event(self) -> Any:
        # Who waits for it sleeps: a spinning wait would take a core from the decoder and the executor.
        flags = self.runtime.cudaEventBlockingSync | self.runtime.cudaEventDisableTiming
        return self.call("making an event", self.runtime.cudaEventCreateWithFlags(flags))

    def to_device(self, address: int, array: np.ndarray, stream: int) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("copying to the GPU", self.runtime.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, stream))

    def to_host(self, array: np.ndarray, address: int, stream: int) -> None:
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("copying from the GPU", self.runtime.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, stream))

    def wait(self, event: Any, stream: int) -> None:
        """Sleep until all work given to the stream so far is done."""
        self.call("marking the frame's end", self.runtime.cudaEventRecord(event, stream))
        self.call("running the frame", self.runtime.cudaEventSynchronize(event))

    def begin_capture(self, stream: int) -> None:
        # Thread-local: what other threads do meanwhile neither enters the graph nor breaks it.
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("beginning a capture", self.runtime.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: int) -> Any:
        """Return the captured work, ready to launch."""
        graph = self.call("ending a capture", self.runtime.cudaStreamEndCapture(stream))
        try:
            return self.call("making a CUDA graph", self.runtime.cudaGraphInstantiate(graph, 0))
        finally:
            self.runtime.cudaGraphDestroy(graph)

    def launch(self, graph: Any, stream: int) -> None:
        self.call("launching the CUDA graph", self.runtime.cudaGraphLaunch(graph, stream))
