# SPDX-License-Identifier: Apache-2.0
"""A folder of rendered training frames: images/, labels/ and classes.json, the layout that training and evaluation read."""

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np

from deeprob_perception.errors import DataError
from deeprob_perception.segmentation.classes import CLASS_SETS
from deeprob_perception.sim.camera import Camera
from deeprob_perception.sim.render import Frame, SceneRenderer
from deeprob_perception.sim.scene import Scene
from deeprob_perception.sim.sensor import Sensor

JPEG_QUALITY = 92
# A view is kept when it shows something, and nothing sits in front of the lens.
_LEAST_FOREGROUND = 0.15
_LEAST_DEPTH = 0.15  # m
_ATTEMPTS = 10


def render_dataset(out: Path, frames: int, seed: int, size: tuple[int, int] = (640, 480), views: int = 2, workers: int = 2,
                   progress: Callable[[int], None] = lambda count: None) -> None:
    """Write `frames` labelled frames under `out`; the bytes depend on the arguments but not on `workers`.

    :param views: frames per scene; between two of them the arm moves on and the camera goes elsewhere.
    :param progress: called with the number of frames just finished.
    :raises DataError: if a value is out of range or `out` holds frames already.
    :raises SimulationError: if nothing can be rendered on this machine.
    """
    for name, value in (("frames", frames), ("views", views), ("workers", workers)):
        if value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    if seed < 0:
        raise DataError(f"seed is {seed}; it must not be negative")
    if min(size) < 32 or max(size) > 4096:
        raise DataError(f"size is {size[0]}x{size[1]}; each side must be 32 to 4096 pixels")
    if any((out / "images").glob("*")):
        raise DataError(f"{out}/images holds frames already; choose another folder or remove them")
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "labels").mkdir(exist_ok=True)
    (out / "classes.json").write_text(json.dumps(asdict(CLASS_SETS["tabletop"]), indent=1) + "\n")
    scenes = [(out, seed, start, min(views, frames - start), size) for start in range(0, frames, views)]
    if workers == 1:
        with SceneRenderer() as renderer:
            for scene in scenes:
                progress(_render_scene(renderer, *scene))
        return
    context = multiprocessing.get_context("spawn")  # a forked OpenGL context is of no use
    with ProcessPoolExecutor(min(workers, len(scenes)), context, initializer=_start_worker) as pool:
        try:
            for done in as_completed([pool.submit(_worker_task, scene) for scene in scenes]):
                progress(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def render_view(renderer: SceneRenderer, scene: Scene, rng: np.random.Generator, size: tuple[int, int]) -> Frame:
    """Render the scene from a random camera that sees enough of it, before any sensor."""
    for _ in range(_ATTEMPTS):
        camera: Camera = scene.random_camera(rng, size)
        geoms, depth = renderer.truth(scene, camera)
        foreground = np.count_nonzero(scene.geom_class[geoms])
        if foreground >= _LEAST_FOREGROUND * geoms.size and depth.min() > _LEAST_DEPTH:
            break
    return renderer.frame(scene, camera)


def _render_scene(renderer: SceneRenderer, out: Path, seed: int, start: int, views: int, size: tuple[int, int]) -> int:
    """Render frames `start` to `start + views - 1`, all of one scene; return their number."""
    scene = Scene((seed, start), duration=4.0, size=size)
    rng = np.random.default_rng((seed, start, 1))
    for view in range(views):
        scene.advance(scene.time + rng.uniform(0.1, 0.7))
        frame = render_view(renderer, scene, rng, size)
        name = f"{seed}_{start + view:06d}"
        picture = Sensor.random(rng).apply(frame.colour, rng)
        _write(out / "images" / f"{name}.jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY))
        _write(out / "labels" / f"{name}.png", frame.labels, ())
    return views


def _write(path: Path, picture: np.ndarray, options: tuple[int, ...]) -> None:
    if not cv2.imwrite(str(path), picture, options):
        raise DataError(f"cannot write {path}; is the disk full?")


_worker_renderer: SceneRenderer | None = None


def _start_worker() -> None:
    # One process per core: Mesa's own threads would only be in each other's way.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    cv2.setNumThreads(1)


def _worker_task(scene: tuple[Path, int, int, int, tuple[int, int]]) -> int:
    global _worker_renderer
    if _worker_renderer is None:
        _worker_renderer = SceneRenderer()
    return _render_scene(_worker_renderer, *scene)
