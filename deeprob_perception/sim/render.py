# SPDX-License-Identifier: Apache-2.0
"""From a scene to pictures: colour, depth and exact labels, off screen, with MuJoCo's renderer on EGL."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

import mujoco
import numpy as np

from deeprob_perception.sim import EGL_ADVICE, SimulationError
from deeprob_perception.sim.camera import Camera


@dataclass(frozen=True)
class Frame:
    """What one camera sees, and the truth about it, at one time.

    `colour` uint8 BGR `[H, W, 3]`; `depth` float32 `[H, W]`, metres along the optical axis, 0 where nothing is seen;
    `labels` uint8 `[H, W]`, class ids in the order of scene.CLASSES; `geoms` int32 `[H, W]`, MuJoCo's geom ids, -1 for none.
    """

    colour: np.ndarray
    depth: np.ndarray
    labels: np.ndarray
    geoms: np.ndarray
    camera: Camera
    time: float
    joint_names: tuple[str, ...]
    joint_positions: np.ndarray
    joint_velocities: np.ndarray


class Scenery(Protocol):
    """What can be rendered: a MuJoCo model and its state, the class of each geom, and what the robot's joints do."""

    @property
    def model(self) -> mujoco.MjModel: ...
    @property
    def data(self) -> mujoco.MjData: ...
    @property
    def geom_class(self) -> np.ndarray: ...
    @property
    def time(self) -> float: ...
    @property
    def joint_names(self) -> tuple[str, ...]: ...
    def joint_state(self) -> tuple[np.ndarray, np.ndarray]: ...


class SceneRenderer:
    """Renders scenes one after the other with one OpenGL context.

    A context with its textures takes about 0.3 s to make on a CPU; all scenes have the same texture and mesh layout, so
    the context is kept and only contents are uploaded. Not for use from several threads.
    """

    def __init__(self) -> None:
        self._gl: Any = None
        self._context: mujoco.MjrContext | None = None
        self._layout: tuple | None = None
        self._scene: Scenery | None = None
        self._view: mujoco.MjvScenery | None = None
        self._option = mujoco.MjvOption()
        self._option.geomgroup[3] = 0  # collision shapes

    def __enter__(self) -> "SceneRenderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the OpenGL context."""
        if self._context is not None:
            self._context.free()
        if self._gl is not None:
            self._gl.free()
        self._context = self._gl = self._scene = self._layout = None

    def truth(self, scene: Scenery, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
        """Return geom ids int32 `[H, W]` (-1: none) and depth float32 `[H, W]` (m, 0: none), from one pass."""
        view, context, rect = self._prepare(scene, camera)
        flags = view.flags
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 1
        mujoco.mjr_render(rect, view, context)
        flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = 0
        codes = np.empty((camera.height, camera.width, 3), np.uint8)
        buffer = np.empty((camera.height, camera.width), np.float32)
        mujoco.mjr_readPixels(codes, buffer, rect, context)
        segment = np.flipud(codes).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        ids = np.full(view.ngeom + 1, -1, np.int32)
        for geom in view.geoms[: view.ngeom]:
            if geom.segid >= 0 and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                ids[geom.segid + 1] = geom.objid
        geoms = ids[segment]
        near, far = (float(v) * scene.model.stat.extent for v in (scene.model.vis.map.znear, scene.model.vis.map.zfar))
        # The depth buffer is reversed (1 near, 0 far): z = near * far / (near + d * (far - near)).
        depth = (near * far / (near + np.flipud(buffer).astype(np.float64) * (far - near))).astype(np.float32)
        depth[geoms < 0] = 0.0
        return geoms, depth

    def colour(self, scene: Scenery, camera: Camera) -> np.ndarray:
        """Return the picture, uint8 BGR `[H, W, 3]`, as a perfect camera would take it."""
        view, context, rect = self._prepare(scene, camera)
        mujoco.mjr_render(rect, view, context)
        rgb = np.empty((camera.height, camera.width, 3), np.uint8)
        mujoco.mjr_readPixels(rgb, None, rect, context)
        return np.ascontiguousarray(rgb[::-1, :, ::-1])

    def frame(self, scene: Scenery, camera: Camera) -> Frame:
        """Render colour, depth and labels of the scene as it is now."""
        geoms, depth = self.truth(scene, camera)
        labels = np.where(geoms >= 0, scene.geom_class[geoms], 0).astype(np.uint8)
        positions, velocities = scene.joint_state()
        return Frame(self.colour(scene, camera), depth, labels, geoms, camera, scene.time, scene.joint_names,
                     positions, velocities)

    def _prepare(self, scene: Scenery, camera: Camera) -> tuple[mujoco.MjvScene, mujoco.MjrContext, mujoco.MjrRect]:
        if scene is not self._scene:
            self._load(scene)
        assert self._view is not None and self._context is not None
        model, data = scene.model, scene.data
        model.cam_fovy[0] = np.degrees(camera.fovy)
        data.cam_xpos[0] = camera.pose[:3, 3]
        data.cam_xmat[0] = (camera.pose[:3, :3] * np.array([1, -1, -1])).ravel()  # OpenGL: y up, looking along -z
        eye = mujoco.MjvCamera()
        eye.type, eye.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        mujoco.mjv_updateScene(model, data, self._option, None, eye, mujoco.mjtCatBit.mjCAT_ALL, self._view)
        return self._view, self._context, mujoco.MjrRect(0, 0, camera.width, camera.height)

    def _load(self, scene: Scenery) -> None:
        """Bring a scene's textures and meshes into the context, making one where there is none that fits."""
        model = scene.model
        layout = (model.tex_width.tolist(), model.tex_height.tolist(), model.mesh_vertnum.tolist(),
                  model.vis.quality.offsamples, model.vis.quality.shadowsize,
                  model.vis.global_.offwidth, model.vis.global_.offheight)
        if self._context is None or layout != self._layout:
            self.close()
            self._open(model)
        else:
            for texture in range(model.ntex):
                mujoco.mjr_uploadTexture(model, self._context, texture)
            for mesh in range(model.nmesh):
                mujoco.mjr_uploadMesh(model, self._context, mesh)
            # The context has copied from its first scene which material has which texture; that goes by scene, too.
            for name in ("mat_texid", "mat_texuniform", "mat_texrepeat"):
                mapping = getattr(model, name).ravel()
                getattr(self._context, name)[: mapping.size] = mapping
        self._view = mujoco.MjvScene(model, maxgeom=400)
        self._scene, self._layout = scene, layout

    def _open(self, model: mujoco.MjModel) -> None:
        width, height = model.vis.global_.offwidth, model.vis.global_.offheight
        try:
            # MuJoCo chooses at its import, which may have come before this package named EGL.
            if os.environ["MUJOCO_GL"] == "egl":
                from mujoco.egl import GLContext
            else:
                from mujoco.rendering.classic.gl_context import GLContext
            self._gl = GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # PyOpenGL and MuJoCo raise many kinds
            raise SimulationError(
                f"cannot make an OpenGL context (MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}); {EGL_ADVICE}") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
