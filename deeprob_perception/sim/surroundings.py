# SPDX-License-Identifier: Apache-2.0
"""Everything that is not on the table: the table itself, the room, lights, and things that belong to no class."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from deeprob_perception.sim.materials import Materials

_BOX = mujoco.mjtGeom.mjGEOM_BOX


@dataclass(frozen=True)
class Room:
    """Sizes of one scene's room and table, metres; the table stands over the origin, the floor at z = 0."""

    half_width: float
    half_depth: float
    height: float
    table_half: tuple[float, float]
    table_top: float


def add_room(spec: mujoco.MjSpec, materials: Materials, rng: np.random.Generator) -> Room:
    """Add floor, walls, ceiling, table and distractors; geoms are named `background:<n>` and `table:<n>`."""
    room = Room(half_width=rng.uniform(1.9, 3.2), half_depth=rng.uniform(1.9, 3.2), height=rng.uniform(2.5, 3.2),
                table_half=(rng.uniform(0.4, 0.62), rng.uniform(0.33, 0.5)), table_top=rng.uniform(0.55, 0.85))
    world, count = spec.worldbody, 0

    def background(kind: mujoco.mjtGeom, size: list[float], pos: list[float], material: str, **options: Any) -> None:
        nonlocal count
        world.add_geom(name=f"background:{count}", type=kind, size=size, pos=pos, material=material,
                       contype=1 if count == 0 else 0, conaffinity=1 if count == 0 else 0, **options)
        count += 1

    def surface(low: float = 0.3, high: float = 2.0) -> str:
        return materials.flat(rng.uniform(low, high)) if rng.random() < 0.6 else materials.plain()

    w, d, h = room.half_width, room.half_depth, room.height
    background(_BOX, [w, d, 0.05], [0, 0, -0.05], surface())
    background(_BOX, [w, d, 0.05], [0, 0, h + 0.05], materials.plain())
    same = surface()
    half = np.sqrt(0.5)
    # Each wall is a slab whose own z axis is its normal: flat pictures lie along x and y.
    for pos, size, quat in (([w, 0, h / 2], [h / 2, d, 0.02], [half, 0, half, 0]),
                            ([-w, 0, h / 2], [h / 2, d, 0.02], [half, 0, half, 0]),
                            ([0, d, h / 2], [w, h / 2, 0.02], [half, half, 0, 0]),
                            ([0, -d, h / 2], [w, h / 2, 0.02], [half, half, 0, 0])):
        background(_BOX, size, pos, same if rng.random() < 0.6 else surface(), quat=quat)
    for _ in range(rng.integers(0, 7)):
        _wall_piece(background, surface, materials, rng, room)
    for _ in range(rng.integers(0, 5)):  # lumps on the floor: bags, cushions, bins
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 1.0 + 0.8 * (min(w, d) - 1.0))
        radii = rng.uniform(0.1, 0.35, 3)
        background(mujoco.mjtGeom.mjGEOM_ELLIPSOID, radii.tolist(),
                   [far * np.cos(angle), far * np.sin(angle), radii[2] * 0.8], materials.any())
    _add_table(world, materials, rng, room)
    return room


def _wall_piece(background: Callable[..., None], surface: Callable[..., str], materials: Materials, rng: np.random.Generator,
                room: Room) -> None:
    """Add a poster, a shelf board or a pipe to a random wall."""
    along_x = rng.random() < 0.5  # the wall runs along x
    reach, offset = (room.half_width, room.half_depth) if along_x else (room.half_depth, room.half_width)
    side, place, z = rng.choice([-1.0, 1.0]), rng.uniform(-0.9, 0.9) * reach, rng.uniform(0.4, room.height - 0.4)
    half = np.sqrt(0.5)

    def at(gap: float) -> list[float]:
        return [place, side * (offset - gap), z] if along_x else [side * (offset - gap), place, z]

    kind = rng.random()
    if kind < 0.5:
        size = [rng.uniform(0.15, 0.7), rng.uniform(0.15, 0.5), 0.01]
        quat = [half, half, 0, 0] if along_x else [half, 0, half, 0]
        background(_BOX, size, at(0.03), surface(0.5, 4.0), quat=quat)
    elif kind < 0.75:
        size = [rng.uniform(0.3, 0.9), rng.uniform(0.1, 0.2), 0.015]
        background(_BOX, size if along_x else [size[1], size[0], size[2]], at(0.2), materials.any())
    else:
        background(mujoco.mjtGeom.mjGEOM_CAPSULE, [rng.uniform(0.03, 0.08), room.height, 0], at(0.12), materials.any())


def _add_table(world: mujoco.MjsBody, materials: Materials, rng: np.random.Generator, room: Room) -> None:
    x, y = room.table_half
    top, thick = room.table_top, rng.uniform(0.012, 0.03)
    finish = materials.flat(rng.uniform(0.5, 4.0)) if rng.random() < 0.7 else materials.plain()
    solid = {"contype": 1, "conaffinity": 1, "condim": 6, "friction": [0.8, 0.01, 0.0005]}
    world.add_geom(name="table:0", type=_BOX, size=[x, y, thick], pos=[0, 0, top - thick], material=finish, **solid)
    legs = finish if rng.random() < 0.4 else materials.any()
    width, height = rng.uniform(0.02, 0.035), (top - 2 * thick) / 2
    for index, (sx, sy) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1)), start=1):
        world.add_geom(name=f"table:{index}", type=_BOX, size=[width, width, height],
                       pos=[sx * (x - 0.06), sy * (y - 0.06), height], material=legs, contype=0, conaffinity=0)
    for index in range(rng.integers(0, 3)):  # sheets and mats lie on the table and belong to it
        yaw = rng.uniform(0, np.pi)
        size = [rng.uniform(0.05, 0.18), rng.uniform(0.05, 0.18), 0.0008]
        reach = np.hypot(size[0], size[1])
        world.add_geom(name=f"table:{5 + index}", type=_BOX, size=size, quat=[np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)],
                       pos=[rng.uniform(-1, 1) * (x - reach), rng.uniform(-1, 1) * (y - reach), top + 0.0009 * (1 + index)],
                       material=materials.flat(rng.uniform(2, 10)) if rng.random() < 0.5 else materials.plain(),
                       contype=0, conaffinity=0)


def add_lights(spec: mujoco.MjSpec, rng: np.random.Generator, room: Room) -> None:
    """Add a soft overall light and one to three lamps of slightly different colours; the first casts shadows, mostly."""
    head = spec.visual.headlight
    head.ambient, head.diffuse = [float(rng.uniform(0.2, 0.48))] * 3, [float(rng.uniform(0, 0.25))] * 3
    head.specular = [0, 0, 0]
    lamps = int(rng.integers(1, 4))
    for index in range(lamps):
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.8 * min(room.half_width, room.half_depth))
        position = np.array([far * np.cos(angle), far * np.sin(angle), rng.uniform(1.7, room.height - 0.1)])
        target = np.array([*rng.uniform(-0.4, 0.4, 2), room.table_top])
        direction = (target - position) / np.linalg.norm(target - position)
        strength = rng.uniform(0.5, 0.95) / lamps**0.6
        colour = strength * (1.0 + rng.uniform(-0.25, 0.25, 3))
        spec.worldbody.add_light(
            name=f"lamp{index}", pos=position.tolist(), dir=direction.tolist(), diffuse=colour.tolist(),
            specular=(0.5 * colour).tolist(), cutoff=float(rng.uniform(55, 80)), exponent=float(rng.uniform(0, 2)),
            # One shadow pass costs about as much as the picture itself, so only one lamp has one.
            castshadow=index == 0 and rng.random() < 0.85)
