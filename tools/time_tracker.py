# SPDX-License-Identifier: Apache-2.0
"""What tracking costs beside its network: the figures of docs/tracking.md.

    python tools/time_tracker.py ../shared/data/video/lucia --size 480x848 --size 240x424
    python tools/time_tracker.py bags/sample.mcap --size 480x640

The model is exported anew for each size of its input (needs the extra `train`), the frames are scaled to --frame, and the mask
of the first one is given. For every frame the network alone and a whole `Tracker.update` take turns, which of them goes first
alternates: so whatever else runs on the machine disturbs both alike, and their CPU times hardly.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from deeprob_perception import engines, machine, zoo
from deeprob_perception.bags.reader import open_bag
from deeprob_perception.errors import DataError
from deeprob_perception.messages import cdr, images
from deeprob_perception.replay import first_truth, truth_topic
from deeprob_perception.tracking.evaluate import find_sequences, fit, read_bgr, read_mask
from deeprob_perception.tracking.points import Following
from deeprob_perception.tracking.tracker import Tracker

FRAME_NS = 33_000_000
WARM_UP = 8  # frames: then the context of mask propagation is full
OBJECTS = (3, 5)  # classes of the sample bag's true masks that the demo gives: balls and mugs


def read(data: Path, count: int, height: int, width: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the first frames of a sequence's folder or of a bag with true masks, and the first mask, scaled."""
    if data.is_dir():
        sequence = find_sequences(data)[0]
        assert sequence.masks[0] is not None
        frames, mask = [read_bgr(path) for path in sequence.images[:count]], read_mask(sequence.masks[0])
    else:
        with open_bag(data) as bag:
            camera, labels = bag.image_topic(), truth_topic(bag)
            truth = None if labels is None else first_truth(bag, labels)
            if truth is None:
                raise DataError(f"{data} has no true masks to take objects from; give another bag, or a folder of a sequence")
            messages = zip(range(count), bag.messages([camera.name]), strict=False)
            frames = [images.to_bgr(cdr.deserialize(message.raw, camera.msgtype)) for _, message in messages]
        mask = np.where(np.isin(truth[1], OBJECTS), truth[1], 0).astype(np.uint8)
    return [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames], fit(mask, height, width)


def measure(engine: engines.Engine, frames: list[np.ndarray], mask: np.ndarray, threads: int) -> dict[str, np.ndarray]:
    """Return ms a frame, float64 `[n]`, of the network alone, of `Tracker.update`, and of its stages; and CPU ms of the two."""
    _, height, width, _ = engine.inputs[0].shape
    tracker = Tracker(engine, Following(count=256), threads=threads)
    tracker.seed_mask(mask)
    times: dict[str, list[float]] = {"network": [], "tracker": [], "network, CPU": [], "tracker, CPU": []}
    points: list[int] = []

    def timed(name: str, run: Callable[[], object]) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        run()
        times[name].append((time.perf_counter() - start) * 1e3)
        times[f"{name}, CPU"].append((time.process_time() - cpu) * 1e3)

    for i, frame in enumerate(frames):
        small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)[None]
        turns: list[tuple[str, Callable[[], object]]] = [
            ("network", partial(engine, image=small, outputs=("features",))),
            ("tracker", partial(tracker.update, frame, 1 + i * FRAME_NS)),
        ]
        for name, run in turns if i % 2 else reversed(turns):
            timed(name, run)
        points.append(int(np.count_nonzero(tracker.points.visible)))
    print(f"{np.median(points):.0f} points in sight (median)")
    stages = {f"  {name}": tracker.stages[name].values() for name in ("resize", "infer", "points", "mask")}
    return {name: np.array(row)[WARM_UP:] for name, row in {**times, **stages}.items()}


def size_of(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a sequence (images/, masks/), or a bag with true masks")
    parser.add_argument("--model", default="dino", help="name or file, of features")
    parser.add_argument("--size", type=size_of, action="append", metavar="HxW", help="of the network's input; repeatable")
    parser.add_argument("--frame", type=size_of, default=(480, 848), metavar="HxW", help="of the camera's images; 480x848")
    parser.add_argument("--frames", type=int, default=60, help=f"how many, {WARM_UP} of which are not counted; 60")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--threads", type=int, default=0, help="of the network and of mask propagation; 0: all cores")
    options = parser.parse_args()
    if options.frames <= WARM_UP:
        parser.error(f"--frames {options.frames}: the first {WARM_UP} are not counted; give more")
    facts = machine.facts()
    print(f"{facts['processor']}, {facts['cores']} cores; {options.data}, frames of {options.frame[0]}x{options.frame[1]}")
    frames, mask = read(options.data, options.frames, *options.frame)
    recipe, state = zoo.load_checkpoint(options.model)
    with tempfile.TemporaryDirectory() as folder:
        for height, width in options.size or [(480, 848), (240, 424)]:
            path = zoo.export(recipe, state, Path(folder) / f"{height}x{width}.onnx", height, width)
            engine = engines.load(path, options.backend, options.precision, threads=options.threads)
            times = measure(engine, frames, mask, options.threads)
            print(f"input {height}x{width}, {engine.backend} {engine.precision}: ms, median and 90 %")
            for name, row in times.items():
                print(f"  {name:12} {np.median(row):7.1f} {np.percentile(row, 90):7.1f}")
            for kind in ("", ", CPU"):
                whole, alone = np.median(times[f"tracker{kind}"]), np.median(times[f"network{kind}"])
                print(f"  tracker / network{kind}: {whole / alone:.2f}")


if __name__ == "__main__":
    main()
