# SPDX-License-Identifier: Apache-2.0
"""Where OpenVINO's time goes, model files against each other in one run: the figures of docs/engines.md.

    python tools/where_time_goes.py FILE.onnx:PRECISION FILE.onnx:PRECISION ...     e.g. street.onnx:bf16 street8.onnx:int8

The files take turns with one thread, and what is compared is the process's CPU time, which other work on the machine
disturbs least; then with two threads, by the clock. The table is OpenVINO's own timing of each kind of operator, one thread.
"""

import sys
import time
from collections import Counter

import numpy as np

from deeprob_perception import engines

ROUNDS = 20


def turns(specs: list[str], threads: int) -> list[float]:
    """Return each file's median time of a frame, ms: CPU time with one thread, wall time with more."""
    clock = time.process_time if threads == 1 else time.perf_counter
    loaded = [engines.load(file, "openvino", precision, threads=threads) for file, precision in map(split, specs)]
    images = [random_image(engine.inputs[0].shape) for engine in loaded]
    times: list[list[float]] = [[] for _ in specs]
    for i in range(ROUNDS + 2):
        for k in range(len(specs)):
            k = (k + i) % len(specs)
            start = clock()
            loaded[k](image=images[k], outputs=("labels",))
            if i >= 2:
                times[k].append((clock() - start) * 1e3)
    return [float(np.median(row)) for row in times]


def profile(file: str, precision: str) -> dict[str, float]:
    """Return the median ms a frame of each kind of operator, all of them with one thread."""
    import openvino

    options = {"PERF_COUNT": True, "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    options["INFERENCE_PRECISION_HINT"] = "f32" if precision == "fp32" else "bf16"
    core = openvino.Core()
    graph = core.read_model(file)
    labels = openvino.Model([graph.output("labels")], graph.get_parameters(), "labels")
    request = core.compile_model(labels, "CPU", options).create_infer_request()
    image = random_image(tuple(labels.input(0).shape))
    frames: list[Counter] = []
    for _ in range(ROUNDS + 2):
        request.infer([image])
        frame: Counter = Counter()
        for node in request.profiling_info:
            frame[f"{node.node_type} {node.exec_type}"] += node.real_time.total_seconds() * 1e3
        frames.append(frame)
    return {kind: float(np.median([frame[kind] for frame in frames[2:]])) for kind in frames[-1]}


def random_image(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def split(spec: str) -> tuple[str, str]:
    file, _, precision = spec.rpartition(":")
    return file, precision


def main(specs: list[str]) -> None:
    for threads, unit in ((1, "CPU ms, one thread"), (2, "ms, two threads")):
        times = turns(specs, threads)
        for spec, value in zip(specs, times, strict=True):
            print(f"{value:8.1f} {unit}  x{value / times[0]:.2f}  {spec}")
    for spec in specs:
        print(spec)
        for kind, value in sorted(profile(*split(spec)).items(), key=lambda item: -item[1])[:14]:
            print(f"{value:8.2f}  {kind}")


if __name__ == "__main__":
    main(sys.argv[1:])
