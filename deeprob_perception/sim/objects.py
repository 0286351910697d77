# SPDX-License-Identifier: Apache-2.0
"""The things on the table: boxes, balls, cylinders and mugs of random size and finish."""

from itertools import pairwise

import mujoco
import numpy as np

from deeprob_perception.sim.materials import Materials

# Mesh slots per scene: a fixed number, since a render context kept between scenes has a fixed layout (see materials.py).
MUG_MESHES = 2
_AROUND = 40  # points around the mug's wall
_TUBE = 10  # points around the handle's tube


def mug_mesh(radius: float, height: float, taper: float, wall: float) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices float64 `[n, 3]` (m) and triangles int32 `[m, 3]` of a mug that stands on z = 0, its handle along +x.

    :param radius: outer radius at the bottom; the rim's is `radius * taper`.
    :param wall: thickness of the wall.
    """
    rim = radius * taper
    profile = np.array([  # radius and height along a cut through the wall, from the axis below to the axis within
        (0.0, 0.0), (radius * 0.92, 0.0), (radius, height * 0.05), (rim, height), (rim - wall, height),
        (radius - wall, height * 0.08), (0.0, wall * 1.5)])
    # Points doubled along each edge keep the rim and the foot from being smoothed away by averaged normals.
    profile = np.concatenate([np.linspace(a, b, 6)[:-1] for a, b in pairwise(profile)] + [profile[-1:]])
    angle = np.linspace(0, 2 * np.pi, _AROUND, endpoint=False)
    shell = np.stack([np.outer(profile[:, 0], np.cos(angle)), np.outer(profile[:, 0], np.sin(angle)),
                      np.repeat(profile[:, 1:], _AROUND, axis=1)], axis=-1).reshape(-1, 3)
    arc = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 16)
    centre_r = radius + (rim - radius) * 0.5 - wall * 0.5
    reach, span, tube = 0.62 * radius, 0.32 * height, min(0.16 * radius, 0.07 * height)
    centres = np.stack([centre_r + reach * np.cos(arc), np.zeros_like(arc), 0.52 * height + span * np.sin(arc)], axis=-1)
    normal = np.stack([np.cos(arc), np.zeros_like(arc), np.sin(arc)], axis=-1)
    turn = np.linspace(0, 2 * np.pi, _TUBE, endpoint=False)
    handle = (centres[:, None] + tube * (normal[:, None] * np.cos(turn)[:, None]
                                         + np.array([0, 1.4, 0]) * np.sin(turn)[:, None])).reshape(-1, 3)
    faces = np.concatenate([_strip(len(profile), _AROUND), _strip(len(arc), _TUBE) + len(shell)])
    return np.concatenate([shell, handle]), faces


def add_mug_meshes(spec: mujoco.MjSpec, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Add MUG_MESHES meshes named `mug<n>`; return radius, height and taper of each."""
    shapes = []
    for index in range(MUG_MESHES):
        radius, height, taper = rng.uniform(0.032, 0.05), rng.uniform(0.075, 0.125), rng.uniform(1.0, 1.3)
        vertices, faces = mug_mesh(radius, height, taper, wall=0.004)
        mesh = spec.add_mesh(name=f"mug{index}")
        mesh.uservert, mesh.userface = vertices.ravel().tolist(), faces.ravel().tolist()
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
        shapes.append((radius, height, taper))
    return shapes


class ObjectFactory:
    """Adds objects to one scene; each is a free body named `<class><n>` whose visible geoms are `<class>:<n>`."""

    def __init__(self, spec: mujoco.MjSpec, materials: Materials, rng: np.random.Generator):
        self._spec, self._materials, self._rng, self._count = spec, materials, rng, 0
        self._mugs = add_mug_meshes(spec, rng)
        self.names: list[str] = []

    def add(self, kind: str, position: np.ndarray) -> str:
        """Add a `box`, `ball`, `cylinder` or `mug` whose lowest point is near `position` (m); return the body's name."""
        rng, name = self._rng, f"{kind}{self._count}"
        body = self._spec.worldbody.add_body(name=name)
        body.add_freejoint(name=f"{name}_free")
        yaw = rng.uniform(0, 2 * np.pi)
        quat = np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        common = {"contype": 1, "conaffinity": 3, "condim": 6, "friction": [0.8, 0.01, 0.0005], "density": 500}
        visible = {"name": f"{kind}:{self._count}", "material": self._materials.any()}
        if kind == "box":
            size = rng.uniform(0.022, 0.065, 3)
            if rng.random() < 0.25:  # a book, a tile
                size[2] = rng.uniform(0.008, 0.02)
            lift = size[2]
            body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size.tolist(), **visible, **common)
        elif kind == "ball":
            lift = rng.uniform(0.024, 0.06)
            body.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[lift, 0, 0], **visible, **common)
        elif kind == "cylinder":
            radius, half = rng.uniform(0.02, 0.05), rng.uniform(0.03, 0.09)
            lift = half
            if rng.random() < 0.3:  # lying
                quat, lift = _product(quat, np.array([np.sqrt(0.5), np.sqrt(0.5), 0, 0])), radius
            body.add_geom(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[radius, half, 0], **visible, **common)
        else:
            lift, quat = self._mug(body, visible, common, quat)
        body.pos = (position + np.array([0, 0, lift + 0.004])).tolist()
        body.quat = quat.tolist()
        self._count += 1
        self.names.append(name)
        return name

    def _mug(self, body: mujoco.MjsBody, visible: dict, common: dict, quat: np.ndarray) -> tuple[float, np.ndarray]:
        """Add the visible mesh and, for contacts, an unseen cylinder with a box for the handle; return lift and pose."""
        index = int(self._rng.integers(MUG_MESHES))
        radius, height, taper = self._mugs[index]
        middle, outer = height / 2, radius * (1 + taper) / 2
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname=f"mug{index}", pos=[0, 0, -middle],
                      contype=0, conaffinity=0, mass=0, **visible)
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=[outer, middle, 0], group=3, **common)
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=[outer + 0.3 * radius, 0, 0],
                      size=[0.32 * radius, 0.16 * radius, 0.3 * height], group=3, **common)
        if self._rng.random() < 0.15:  # lying on its side, handle up
            lying = _product(quat, np.array([np.sqrt(0.5), 0, np.sqrt(0.5), 0]))
            return outer, _product(lying, np.array([0, 0, 0, 1.0]))
        return middle, quat


def _strip(rings: int, points: int) -> np.ndarray:
    """Return the triangles between consecutive closed rings of points, int32 `[2 * (rings - 1) * points, 3]`."""
    ring, point = np.mgrid[0:rings - 1, 0:points]
    a, b = ring * points + point, ring * points + (point + 1) % points
    c, d = a + points, b + points
    return np.concatenate([np.stack([a, b, d], -1).reshape(-1, 3), np.stack([a, d, c], -1).reshape(-1, 3)]).astype(np.int32)


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Hamilton product of two quaternions (w, x, y, z)."""
    result = np.zeros(4)
    mujoco.mju_mulQuat(result, first, second)
    return result
