# SPDX-License-Identifier: Apache-2.0
"""A video of a simulated table top in which the way of every surface point is known: what point tracks are measured on.

Every surface carries a pattern, nothing casts a shadow and nothing shines: a corner that moves with a shadow or a highlight
is no point of a surface, and a plain wall has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import mujoco
import numpy as np

from deeprob_perception.errors import DataError
from deeprob_perception.sim.camera import Camera
from deeprob_perception.sim.record import CameraPath
from deeprob_perception.sim.render import Frame, SceneRenderer
from deeprob_perception.sim.scene import OBJECTS, Scene
from deeprob_perception.sim.sensor import Sensor

_SEED_KEY = 0xC11  # keeps clips apart from recordings and data sets of the same seed
_PHYSICS_STEPS_PER_FRAME = 20
SURFACE = 0.006  # m, and this share of the distance: a point is seen where the depth image is no nearer


@dataclass(frozen=True)
class ClipFrame:
    """One frame: `bgr` uint8 `[H, W, 3]`, `objects` uint8 `[H, W]` (1, 2, ... for the loose objects, 0 for the rest), and
    where things are."""

    bgr: np.ndarray
    objects: np.ndarray
    truth: Frame
    geom_poses: np.ndarray  # float64 [G, 4, 4], in the world


def render_clip(
    frames: int, fps: float, seed: int, size: tuple[int, int] = (640, 480), moving: bool = True
) -> Iterator[ClipFrame]:
    """Yield the frames of a clip; equal arguments give equal frames.

    :param size: width and height. :param moving: whether the arm and a pushed ball move, beside the camera.
    :raises DataError: for numbers that make no clip. :raises SimulationError: if nothing can be rendered here.
    """
    if frames < 1 or not 1 <= fps <= 240:
        raise DataError(f"{frames} frames at {fps:g} a second make no clip; give at least one, at 1 to 240 a second")
    scene = Scene((_SEED_KEY, seed), duration=frames / fps, multisamples=4, shadow_map=2048, size=size, kinds=OBJECTS,
                  timestep=1.0 / (fps * _PHYSICS_STEPS_PER_FRAME))  # fmt: skip
    rng = np.random.default_rng((_SEED_KEY, seed, 1))
    path, sensor = CameraPath(scene, rng, size), Sensor(target=112.0, vignette=0.1, blur=0.5, shot_noise=1.6, read_noise=0.6)
    pattern(scene, rng)
    number = np.zeros(scene.model.ngeom + 1, np.uint8)  # the last is for "nothing"
    for i, name in enumerate(scene.object_names, start=1):
        for geom in range(scene.model.ngeom):
            body = scene.model.body(scene.model.geom_bodyid[geom]).name
            number[geom] = i if body == name else number[geom]
    balls = [name for name in scene.object_names if name.startswith("ball")]
    if moving and balls:
        heading = rng.uniform(0, 2 * np.pi)
        scene.push(balls[0], 0.15 * np.array([np.cos(heading), np.sin(heading), 0.0]))
    with SceneRenderer() as renderer:
        for index in range(frames):
            if moving:
                scene.advance(index / fps)
            frame = renderer.frame(scene, path.at(index / fps))
            poses = np.tile(np.eye(4), (scene.model.ngeom, 1, 1))
            poses[:, :3, :3] = scene.data.geom_xmat.reshape(-1, 3, 3)
            poses[:, :3, 3] = scene.data.geom_xpos
            yield ClipFrame(sensor.apply(frame.colour, rng), number[frame.geoms], frame, poses)


def pattern(scene: Scene, rng: np.random.Generator) -> None:
    """Give every material of a scene a texture of spots of several sizes, and take shadows and highlights away."""
    model = scene.model
    cubes = np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_CUBE)
    for texture in range(model.ntex):
        width, start = int(model.tex_width[texture]), int(model.tex_adr[texture])
        faces = int(model.tex_height[texture]) // width
        pictures = np.concatenate([spots(rng, width) for _ in range(faces)])
        model.tex_data[start : start + pictures.size] = pictures.ravel()
    bare = model.mat_texid[:, mujoco.mjtTextureRole.mjTEXROLE_RGB] < 0
    model.mat_texid[bare, mujoco.mjtTextureRole.mjTEXROLE_RGB] = rng.choice(cubes, int(bare.sum()))
    model.mat_rgba[:, :3] = 0.5 + 0.5 * model.mat_rgba[:, :3]  # a dark material would hide its pattern
    model.mat_specular[:] = 0
    model.light_castshadow[:] = 0


def spots(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a picture uint8 `[size, size, 3]` of coloured noise with detail of several sizes."""
    picture = np.zeros((size, size, 3), np.float32)
    for cells, weight in ((10, 0.6), (30, 1.0), (90, 1.0)):
        coarse = rng.random((cells, cells, 3), np.float32)
        picture += weight * cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    low, high = picture.min(), picture.max()
    return ((picture - low) / (high - low) * 255).astype(np.uint8)


class SurfacePoints:
    """Points that stick to the surfaces on which they were seen."""

    def __init__(self, frame: ClipFrame, places: np.ndarray):
        """:param places: x, y in pixels of the frame, `[n, 2]`; the surface of the nearest pixel is theirs."""
        camera = frame.truth.camera
        columns, rows = np.round(places).astype(int).T
        self._geoms = frame.truth.geoms[rows, columns]
        depth = frame.truth.depth[rows, columns].astype(np.float64)
        rays = np.column_stack((places, np.ones(len(places)))) @ np.linalg.inv(camera.matrix).T
        world = (rays * depth[:, None]) @ camera.pose[:3, :3].T + camera.pose[:3, 3]
        self.there = (depth > 0) & (self._geoms >= 0)
        """Whether there is a surface at all, bool `[n]`."""
        poses = frame.geom_poses[self._geoms]
        self._local = np.einsum("nji,nj->ni", poses[:, :3, :3], world - poses[:, :3, 3])

    def at(self, frame: ClipFrame) -> tuple[np.ndarray, np.ndarray]:
        """Return where they are in another frame, float64 `[n, 2]`, and whether they are seen there, bool `[n]`."""
        camera: Camera = frame.truth.camera
        poses = frame.geom_poses[self._geoms]
        world = np.einsum("nij,nj->ni", poses[:, :3, :3], self._local) + poses[:, :3, 3]
        places, depth = camera.project(world)
        columns, rows = np.round(places).astype(int).T
        inside = (depth > 0) & (columns >= 0) & (columns < camera.width) & (rows >= 0) & (rows < camera.height)
        seen = frame.truth.depth[rows.clip(0, camera.height - 1), columns.clip(0, camera.width - 1)]
        near = np.abs(seen - depth) < SURFACE + 0.01 * depth
        return places, self.there & inside & near
