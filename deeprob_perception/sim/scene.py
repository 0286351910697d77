# SPDX-License-Identifier: Apache-2.0
"""One random table top: room, table, objects and a moving arm, as a MuJoCo model with a class for every geom."""

from collections.abc import Sequence

import mujoco
import numpy as np

from deeprob_perception.segmentation.classes import CLASS_SETS
from deeprob_perception.sim.arm import JOINT_NAMES, add_arm, joint_addresses, random_trajectory
from deeprob_perception.sim.camera import Camera, look_at
from deeprob_perception.sim.materials import Materials
from deeprob_perception.sim.objects import ObjectFactory
from deeprob_perception.sim.surroundings import Room, add_lights, add_room

CLASSES = tuple(CLASS_SETS["tabletop"].names)
OBJECTS = ("box", "ball", "cylinder", "mug")


class Scene:
    """A scene drawn from a seed, with its own clock; equal seeds give equal scenes.

    Attributes: `model`, `data` (MuJoCo's), `room`, `geom_class` uint8 `[ngeom]`, `object_names`, `trajectory`.
    """

    def __init__(self, seed: int | tuple[int, ...], duration: float = 20.0, multisamples: int = 0, shadow_map: int = 1024,
                 size: tuple[int, int] = (640, 480), clutter: tuple[int, int] = (5, 16),
                 kinds: tuple[str, ...] = (), timestep: float = 0.004):
        """Draw and settle the scene.

        :param duration: seconds for which the arm has somewhere to go.
        :param multisamples: samples per pixel of the colour picture; 0 for none.
        :param shadow_map: side of the shadow map, texels.
        :param size: largest picture that will be rendered, width and height.
        :param clutter: smallest and largest number of objects.
        :param kinds: the objects to put on the table, instead of a random lot.
        :param timestep: physics step, seconds; pictures are taken at multiples of it.
        """
        rng = np.random.default_rng(seed)
        spec = empty(size, multisamples, shadow_map, timestep)
        materials = Materials(spec, rng)
        self.room = add_room(spec, materials, rng)
        add_lights(spec, rng, self.room)
        base, yaw = stand(self.room, rng)
        add_arm(spec, materials, rng, base, yaw)
        factory = ObjectFactory(spec, materials, rng)
        count = len(kinds) or int(rng.integers(clutter[0], clutter[1] + 1))
        for index, place in enumerate(places(self.room, rng, base, count)):
            kind = kinds[index] if kinds else str(rng.choice(OBJECTS))
            factory.add(kind, np.array([*place, self.room.table_top]))
        spec.worldbody.add_camera(name="camera")
        self.object_names = tuple(factory.names)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.geom_class = geom_classes(self.model)
        self._qpos, self._qvel = joint_addresses(self.model)
        self.trajectory = random_trajectory(self.model, rng, self.room.table_top + 0.012, duration)
        self._place_arm()
        for _ in range(60):  # objects come to rest and out of the arm's way
            mujoco.mj_step(self.model, self.data)
            self._place_arm()
        self.data.time = 0.0
        self._place_arm()
        mujoco.mj_forward(self.model, self.data)

    @property
    def time(self) -> float:
        """Seconds since the scene's start."""
        return float(self.data.time)

    @property
    def joint_names(self) -> tuple[str, ...]:
        return JOINT_NAMES

    def joint_state(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the arm's positions (rad, m) and velocities (rad/s, m/s), float64 `[joints]` each."""
        return self.data.qpos[self._qpos].copy(), self.data.qvel[self._qvel].copy()

    def advance(self, time: float) -> None:
        """Move the arm along its trajectory and let the objects react, up to `time` seconds."""
        steps = round((time - self.data.time) / self.model.opt.timestep)
        for _ in range(steps):
            self._place_arm()
            mujoco.mj_step(self.model, self.data)
        self._place_arm()
        mujoco.mj_forward(self.model, self.data)

    def push(self, name: str, velocity: np.ndarray) -> None:
        """Give the object `name` a velocity, `[3]` m/s in the world."""
        address = self.model.joint(f"{name}_free").dofadr[0]
        self.data.qvel[address:address + 3] = velocity

    def random_camera(self, rng: np.random.Generator, size: tuple[int, int] = (640, 480)) -> Camera:
        """Draw a camera in the room that looks at the table top."""
        fovy = np.radians(rng.uniform(38, 62))
        target = np.array([*rng.uniform(-0.2, 0.2, 2), self.room.table_top + rng.uniform(-0.05, 0.25)])
        angle, rise, far = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(14, 68)), rng.uniform(0.55, 1.25)
        eye = target + far * np.array([np.cos(rise) * np.cos(angle), np.cos(rise) * np.sin(angle), np.sin(rise)])
        limit = np.array([self.room.half_width, self.room.half_depth, self.room.height]) - 0.25
        return Camera(*size, fovy, look_at(np.clip(eye, -limit, limit), target, roll=rng.normal(0, np.radians(4))))

    def _place_arm(self) -> None:
        self.data.qpos[self._qpos], self.data.qvel[self._qvel] = self.trajectory.at(self.data.time)


def stand(room: Room, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draw where a robot stands, near an edge of the table, `[3]` in m, and the yaw (rad) that faces the table's middle."""
    x, y = room.table_half
    side = rng.integers(4)
    along = rng.uniform(-0.4, 0.4)
    spot = [((x - 0.12), along * y), (-(x - 0.12), along * y), (along * x, y - 0.12), (along * x, -(y - 0.12))][side]
    return np.array([*spot, room.table_top]), float(np.arctan2(-spot[1], -spot[0]) + rng.normal(0, 0.2))


def places(
    room: Room, rng: np.random.Generator, base: np.ndarray, count: int, taken: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:  # fmt: skip
    """Draw up to `count` places on the table, `[2]` in m, that keep apart from one another, from what is taken, and from a
    robot's base."""
    half = np.array(room.table_half) - 0.07
    found: list[np.ndarray] = []
    for candidate in rng.uniform(-half, half, (40 * count, 2)):
        if len(found) == count:
            break
        free = all(np.hypot(*(candidate - other)) > 0.13 for other in (*taken, *found))
        if free and np.hypot(*(candidate - base[:2])) > 0.16:
            found.append(candidate)
    return found


def empty(size: tuple[int, int], multisamples: int, shadow_map: int, timestep: float) -> mujoco.MjSpec:
    """Return a specification without anything in it, for pictures of at most `size` (see Scene for the arguments)."""
    spec = mujoco.MjSpec()
    spec.option.timestep = timestep
    visual = spec.visual
    visual.global_.offwidth, visual.global_.offheight = size
    visual.quality.offsamples, visual.quality.shadowsize = multisamples, shadow_map
    visual.quality.numquads = 16  # lights are computed at vertices; walls and table need some
    visual.map.znear, visual.map.zfar = 0.02, 12.0
    spec.stat.extent, spec.stat.center = 1.0, [0, 0, 0.7]  # so that znear and zfar are metres
    return spec


def geom_classes(model: mujoco.MjModel) -> np.ndarray:
    """Return each geom's class id by its name, uint8 `[ngeom]`; unseen collision shapes have none and count as background."""
    names = (model.geom(index).name.partition(":")[0] or "background" for index in range(model.ngeom))
    return np.array([CLASSES.index(name) for name in names], np.uint8)
