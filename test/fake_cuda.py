# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the CUDA runtime and TensorRT, in host memory, for the logic around them on machines without a GPU.

Device memory is host memory that only `cudaMemcpyAsync` and the network touch. Work in a stream is done when somebody waits
for it, not when it is given, so that a missing wait shows as stale results. While a stream is captured, work is recorded and
not done. What it cannot show: whether a real driver and a real TensorRT do what these do.
"""

import ctypes
from enum import IntEnum
from types import SimpleNamespace

import numpy as np


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


WORDS = {2: b"out of memory", 35: b"CUDA driver version is insufficient for CUDA runtime version", 100: b"no device",
         900: b"operation not permitted when stream is capturing"}


class FakeRuntime:
    """As much of `cuda.bindings.runtime` as `engines.cuda` calls. `fail[name]` is the status that a call returns."""

    cudaError_t = Status
    cudaHostAllocDefault = 0
    cudaStreamNonBlocking = 1
    cudaEventBlockingSync = 1
    cudaEventDisableTiming = 2
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor", cudaDevAttrIntegrated="integrated"
    )

    def __init__(self):
        self.fail = {}
        self.calls = []
        self.memory = {}  # address -> buffer
        self.pending = []  # work of the stream, not done yet
        self.capturing = None
        self.driver, self.devices = 13000, 1

    def _call(self, name, *values):
        self.calls.append(name)
        return (Status(self.fail.get(name, 0)), *values)

    def _allocate(self, name, nbytes):
        if name in self.fail:
            return self._call(name, None)
        buffer = ctypes.create_string_buffer(nbytes)
        self.memory[ctypes.addressof(buffer)] = buffer
        return self._call(name, ctypes.addressof(buffer))

    def give(self, work):
        (self.pending if self.capturing is None else self.capturing).append(work)

    def finish(self):
        while self.pending:
            self.pending.pop(0)()

    def cudaGetErrorString(self, status):
        return Status.cudaSuccess, WORDS.get(int(status), b"invalid value")

    def cudaDriverGetVersion(self):
        return self._call("cudaDriverGetVersion", self.driver)

    def cudaRuntimeGetVersion(self):
        return self._call("cudaRuntimeGetVersion", 13050)

    def cudaGetDeviceCount(self):
        return self._call("cudaGetDeviceCount", self.devices)

    def cudaSetDevice(self, index):
        return self._call("cudaSetDevice")

    def cudaDeviceGetAttribute(self, attribute, index):
        return self._call("cudaDeviceGetAttribute", {"major": 8, "minor": 6, "integrated": 0}[attribute])

    def cudaGetDeviceProperties(self, index):
        return self._call("cudaGetDeviceProperties", SimpleNamespace(name=b"Fake RTX\0", totalGlobalMem=8 << 30))

    def cudaMalloc(self, nbytes):
        return self._allocate("cudaMalloc", nbytes)

    def cudaHostAlloc(self, nbytes, flags):
        return self._allocate("cudaHostAlloc", nbytes)

    def cudaFree(self, address):
        del self.memory[address]
        return self._call("cudaFree")

    def cudaFreeHost(self, address):
        del self.memory[address]
        return self._call("cudaFreeHost")

    def cudaStreamCreateWithFlags(self, flags):
        return self._call("cudaStreamCreateWithFlags", 7)

    def cudaStreamDestroy(self, stream):
        return self._call("cudaStreamDestroy")

    def cudaStreamSynchronize(self, stream):
        self.finish()
        return self._call("cudaStreamSynchronize")

    def cudaEventCreateWithFlags(self, flags):
        return self._call("cudaEventCreateWithFlags", "event")

    def cudaEventDestroy(self, event):
        return self._call("cudaEventDestroy")

    def cudaEventRecord(self, event, stream):
        return self._call("cudaEventRecord")

    def cudaEventSynchronize(self, event):
        self.finish()
        return self._call("cudaEventSynchronize")

    def cudaMemcpyAsync(self, target, source, nbytes, kind, stream):
        name = "to_device" if kind == 1 else "to_host"
        self.give(lambda: (self.calls.append(name), ctypes.memmove(target, source, nbytes)))
        return self._call("cudaMemcpyAsync")

    def cudaStreamBeginCapture(self, stream, mode):
        if "cudaStreamBeginCapture" not in self.fail:
            self.capturing = []
        return self._call("cudaStreamBeginCapture")

    def cudaStreamEndCapture(self, stream):
        graph, self.capturing = self.capturing, None
        return self._call("cudaStreamEndCapture", graph)

    def cudaGraphInstantiate(self, graph, flags):
        return self._call("cudaGraphInstantiate", tuple(graph))

    def cudaGraphDestroy(self, graph):
        return self._call("cudaGraphDestroy")

    def cudaGraphLaunch(self, graph, stream):
        for work in graph:
            self.give(work)
        return self._call("cudaGraphLaunch")

    def cudaGraphExecDestroy(self, graph):
        return self._call("cudaGraphExecDestroy")


class FakeContext:
    """The network: labels are the image's blue channel, confidence its green one."""

    def __init__(self, engine):
        self.engine, self.addresses = engine, {}
        self.refuses_capture = False

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        runtime = self.engine.fake.runtime
        if self.engine.fake.execution_fails or (self.refuses_capture and runtime.capturing is not None):
            self.engine.fake.log.errors.append("the network cannot run now\nsecond line")
            return False
        runtime.give(self.compute)
        return True

    def compute(self):
        height, width = self.engine.fake.size
        image = self.view("image", (1, height, width, 3))
        self.view("labels", (1, height, width))[:] = image[..., 0]
        self.view("confidence", (1, height, width))[:] = image[..., 1]

    def view(self, name, shape):
        memory = (ctypes.c_uint8 * int(np.prod(shape))).from_address(self.addresses[name])
        return np.ctypeslib.as_array(memory).reshape(shape)


class FakeEngine:
    def __init__(self, fake):
        self.fake = fake
        height, width = fake.size
        self.shapes = {"image": (1, height, width, 3), "labels": (1, height, width), "confidence": (1, height, width)}
        self.num_io_tensors = 3

    def get_tensor_name(self, i):
        return list(self.shapes)[i]

    def get_tensor_shape(self, name):
        return self.shapes[name]

    def get_tensor_dtype(self, name):
        return "UINT8"

    def create_execution_context(self):
        if self.fake.no_memory:
            self.fake.log.errors.append("Requested size was 1 byte: out of memory")
            return None
        self.fake.context = FakeContext(self)
        return self.fake.context


class FakeLibrary:
    """A `tensorrt_library.Library` whose engines are the bytes `b"engine"`."""

    name, version, title, builds_anywhere = "tensorrt", "10.3.0", "TensorRT 10.3.0", False

    def __init__(self, runtime, size):
        self.runtime, self.size = runtime, size
        self.execution_fails = self.no_memory = False
        self.context = None
        self.log = SimpleNamespace(errors=[], last_error=self._last_error)
        self.module = SimpleNamespace(Runtime=lambda log: self, nptype=lambda dtype: np.uint8)

    def _last_error(self):
        return self.log.errors.pop().splitlines()[0] if self.log.errors else "no reason given"

    def logger(self):
        return self.log

    def targets(self):
        return []

    def deserialize_cuda_engine(self, plan):
        if plan != b"engine":
            self.log.errors.append("Magic tag does not match")
            return None
        return FakeEngine(self)
