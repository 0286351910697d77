# SPDX-License-Identifier: Apache-2.0
"""How fast a model could be at best: its arithmetic and its memory traffic, counted in the graph, over what the machine does.

Two limits, of which the larger binds. Neither is a promise: arithmetic other than matrix products is left out, and an
engine may keep in the cache what the byte limit moves through memory.
"""

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from deeprob_perception import machine

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
PRODUCTS = ("MatMul", "Gemm", "Conv")
# Sides of the square matrices: 2.1 GFLOP on a CPU, beyond its caches; on a GPU enough to fill it.
MATMUL = {"cpu": 1024, "cuda": 8192}
# Channels and side of the pictures of the 3x3 convolution: of 4.8 GFLOP, and of 2.5 TFLOP on a GPU.
CONVOLUTION = {"cpu": (256, 64), "cuda": (1024, 366)}
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes; many times the largest cache
# FLOP/s of a small product below which a precision is emulated (fp16 on a CPU without it reaches 0.8e9), and its rate no
# limit of anything.
SLOW = 2e9
REPEATS = 4  # the quickest of them counts; the first ones wake the threads


@dataclass(frozen=True)
class Work:
    """What one frame needs.

    gflop: matrix products and convolutions, a multiply-add counted as two. weights: how many numbers are read that
    don't depend on the picture. activations: how many numbers the products read and write; what lies between two
    products is taken to be fused into them.
    """

    gflop: float
    weights: int
    activations: int

    def megabytes(self, precision: str) -> float:
        """Return the traffic in MB (10^6 bytes) when every number is of this precision."""
        return (self.weights + self.activations) * BYTES[precision] / 1e6


def count(path: Path) -> Work:
    """Count a model's work in its graph."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    # Whole numbers of 64 bits are shapes and indices, which engines fold away.
    weights = sum(prod(t.dims) for t in graph.initializer if t.data_type != onnx.TensorProto.INT64)
    fixed = {t.name for t in graph.initializer}
    flop = activations = 0
    for node in graph.node:
        if all(name in fixed for name in node.input):  # a cast or a de-quantised weight, or a Constant without inputs
            fixed.update(node.output)
        if node.op_type in PRODUCTS:
            size = prod(shapes[node.output[0]])
            inner = shapes[node.input[1]][1:] if node.op_type == "Conv" else shapes[node.input[0]][-1:]
            flop += 2 * size * prod(inner)
            activations += size + sum(prod(shapes[name]) for name in node.input[:2] if name not in fixed)
    return Work(flop / 1e9, weights, activations)


class Limits:
    """The machine's own rates, in a process of its own as candidates are, so that they take turns with them.

    :param device: `cpu` or `cuda`.
    :param threads: for products and copies; 0 for as many as there are cores.
    """

    def __init__(self, device: str, threads: int, precisions: Iterable[str]):
        self._device = device
        self._products: dict[str, Product] = {}
        self._missing: dict[str, str] = {}
        for precision in precisions:
            try:
                trial = matmul(precision, device, 256, threads)
                if min(quickest(trial) for _ in range(3)) > 2 * 256**3 / SLOW:
                    raise RuntimeError("torch emulates it here")
                self._products[f"{precision} matmul"] = Product(
                    2 * MATMUL[device] ** 3, matmul(precision, device, MATMUL[device], threads)
                )
                if precision != "int8":
                    self._products[f"{precision} convolution"] = convolution(precision, device)
            except (ImportError, RuntimeError, AttributeError) as error:
                self._missing[precision] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        self._copy = copy(device, threads)

    def missing(self) -> dict[str, str]:
        """Return why a precision has no rate."""
        return self._missing

    def turn(self) -> dict[str, float]:
        """Return FLOP/s as `<precision> matmul` and `<precision> convolution`, and bytes/s as `copy` (read plus written)."""
        rates = {name: product.flop / quickest(product.run) for name, product in self._products.items()}
        return {**rates, "copy": 2 * COPIED[self._device] / quickest(self._copy)}


class Product(NamedTuple):
    """A call, and its arithmetic."""

    flop: float
    run: Callable[[], Any]


def quickest(run: Callable[[], Any]) -> float:
    """Return the seconds of the quickest of a few runs."""
    found = []
    for _ in range(REPEATS):
        start = perf_counter()
        run()
        found.append(perf_counter() - start)
    return min(found)


def matmul(precision: str, device: str, side: int, threads: int) -> Callable[[], Any]:
    """Return a call that multiplies two square matrices by torch.

    :raises ImportError, RuntimeError: where torch is missing or cannot do it.
    """
    import torch

    if threads and device == "cpu":
        torch.set_num_threads(threads)
    if precision == "int8" and device == "cpu":
        # torch's integer product for people (_int_mm) is slower than its bf16 one; the layer of quantised models is not.
        torch.backends.quantized.engine = "onednn"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in favour of a package that serves no CPU
            ones = torch.ones(side, side)
            left = torch.quantize_per_tensor(ones, 0.1, 0, torch.quint8)
            weight = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), None)
        return lambda: torch.ops.quantized.linear(left, weight, 1.0, 0)
    matrix = torch.ones(side, side, dtype=dtype(precision), device=device)
    multiply = torch._int_mm if precision == "int8" else torch.mm
    return waiting(lambda: multiply(matrix, matrix), device)


def convolution(precision: str, device: str) -> Product:
    """Return a 3x3 convolution: on AMD's processors torch's matrix product in fp32 reaches half of what this does."""
    import torch

    channels, side = CONVOLUTION[device]
    options = dict(dtype=dtype(precision), device=device)
    image = torch.ones(1, channels, side, side, **options).to(memory_format=torch.channels_last)
    kernel = torch.ones(channels, channels, 3, 3, **options).to(memory_format=torch.channels_last)

    def run() -> Any:
        with torch.inference_mode():
            return torch.nn.functional.conv2d(image, kernel, padding=1)

    return Product(2.0 * 9 * channels**2 * side**2, waiting(run, device))


def dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}[precision]


def waiting(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Return a call that lasts until the device is done."""
    if device == "cpu":
        return run
    import torch

    return lambda: (run(), torch.cuda.synchronize())


def copy(device: str, threads: int) -> Callable[[], Any]:
    """Return a call that copies `COPIED[device]` bytes within the device's memory."""
    if device == "cuda":
        import torch

        source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return waiting(lambda: target.copy_(source), device)
    parts = threads or machine.cores()
    sources = np.array_split(np.ones(COPIED[device], np.uint8), parts)
    targets = [np.empty_like(part) for part in sources]
    pool = ThreadPoolExecutor(parts)  # numpy lets go of the interpreter while it copies
    return lambda: list(pool.map(np.copyto, targets, sources))
