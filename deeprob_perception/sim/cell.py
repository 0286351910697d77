# SPDX-License-Identifier: Apache-2.0
"""The robot cell: a random table top with a robot that does what it is told, and a camera that stands beside it.

One object is the one that shall be touched. Where it stands, the robot's tool can be: poses are drawn until one puts the tool
low over the table, and the object goes there. The camera is one that sees it.
"""

from dataclasses import dataclass
from xml.etree import ElementTree

import mujoco
import numpy as np

from deeprob_perception.errors import RobotError
from deeprob_perception.robots import Robot, Urdf, parse
from deeprob_perception.robots.robot import euler
from deeprob_perception.robots.urdf import elements, rotation
from deeprob_perception.sim import SimulationError, skeleton
from deeprob_perception.sim.arm import finishes
from deeprob_perception.sim.camera import OPTICAL_FRAME, Camera, look_at
from deeprob_perception.sim.follower import TrajectoryFollower
from deeprob_perception.sim.materials import Materials
from deeprob_perception.sim.objects import ObjectFactory
from deeprob_perception.sim.render import SceneRenderer
from deeprob_perception.sim.scene import OBJECTS, empty, geom_classes, places, stand
from deeprob_perception.sim.surroundings import add_lights, add_room

TOUCH = 0.02  # m between tool and surface
NEAR = 0.5  # m: farther distances are not looked for exactly
_SEED_KEY = 0xCE11  # keeps cells apart from data sets and recordings of the same seed
_TIMESTEP = 0.004
_SETTLE = 100  # steps
_POSES = 4000  # drawn to find one that fits
_LOW = 0.02, 0.08  # m above the table: the tool where the object goes
_CLEAR = 0.05  # m above the table: the joints of a robot whose tool is where the object goes
_START = 0.15, 0.2  # m, or share of a small robot's length: the same of one that starts, and its tool; few things are higher
_AWAY = 0.2  # m from the robot's base, and from the start to the object
_VIEWS = 40  # cameras that are tried
_VISIBLE = 1e-3  # share of the picture that the object takes at least


@dataclass(frozen=True)
class Wish:
    """What to build. urdf: the robot's description. tool: its link that shall touch. kind: class of the object to touch.

    clutter: least and most of other objects, none of that class. size: of pictures, width and height.
    """

    seed: int
    urdf: str
    tool: str
    kind: str = "ball"
    clutter: tuple[int, int] = (3, 6)
    size: tuple[int, int] = (640, 480)


@dataclass
class View:
    """A cell as it was when it was looked at, for a renderer in another thread."""

    model: mujoco.MjModel
    data: mujoco.MjData
    geom_class: np.ndarray
    joint_names: tuple[str, ...]
    time: float = 0.0
    positions: np.ndarray | None = None
    velocities: np.ndarray | None = None

    def joint_state(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.positions is not None and self.velocities is not None
        return self.positions, self.velocities


class Cell:
    """A cell in motion. Equal wishes give equal cells; what comes later depends on what the robot is told, and when.

    - `urdf`: the description with the camera's frame in it, a fixed link of the root; `robot`: the chain from root to tool
    - `camera`; `target`: the name of the body to touch; `time`: seconds since the start
    - `distance`: from the tool to its surface, m, `NEAR` for anything farther; `touched`: the time when it was first at most
      TOUCH, or None
    - `lowest`: the least that a moving part of the robot has been above the table top, m; negative: in it
    """

    def __init__(self, wish: Wish, renderer: SceneRenderer):
        """Build it. :raises SimulationError: when nothing fits. :raises RobotError: for the description."""
        if wish.kind not in OBJECTS:
            raise SimulationError(f"no object is a {wish.kind!r}; there are {', '.join(OBJECTS)}")
        rng = np.random.default_rng((_SEED_KEY, wish.seed))
        urdf = parse(wish.urdf)
        self.robot = Robot(urdf, tip=wish.tool)
        spec = empty(wish.size, 0, 1024, _TIMESTEP)
        materials = Materials(spec, rng)
        self.room = add_room(spec, materials, rng)
        add_lights(spec, rng, self.room)
        base, yaw = stand(self.room, rng)
        self._base = pose_at(base, yaw)
        skeleton.add_robot(spec, urdf, wish.tool, base, yaw, finishes(materials, rng))
        start, place = self._start_and_place(rng, wish.tool, skeleton.length_to(urdf, wish.tool))
        factory = ObjectFactory(spec, materials, rng)
        self.target = factory.add(wish.kind, np.array([*place, self.room.table_top]))
        others = [kind for kind in OBJECTS if kind != wish.kind]
        count = int(rng.integers(wish.clutter[0], wish.clutter[1] + 1))
        for spot in places(self.room, rng, base, count, [place]):
            factory.add(str(rng.choice(others)), np.array([*spot, self.room.table_top]))
        spec.worldbody.add_camera(name="camera")
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self.geom_class = geom_classes(self.model)
        self._skeleton = skeleton.find(self.model, urdf)
        self._moved = [self._skeleton.names.index(name) for name in self.robot.joint_names]
        self._tip = self.model.geom(skeleton.TIP).id
        self._surfaces = self._surfaces_of(self.target)
        self._shapes = self._moving_shapes()
        self._positions = np.clip(0.0, self._skeleton.robot.lower, self._skeleton.robot.upper)
        self._velocities = np.zeros_like(self._positions)
        robot = self.robot
        self.follower = TrajectoryFollower(robot.joint_names, robot.lower, robot.upper, robot.velocity, start)
        self.time = 0.0
        self.touched: float | None = None
        self.distance, self.lowest = NEAR, np.inf
        for _ in range(_SETTLE):
            self._place()
            mujoco.mj_step(self.model, self.data)
        self._place()
        mujoco.mj_forward(self.model, self.data)
        self._measure()
        self._view = View(self.model, mujoco.MjData(self.model), self.geom_class, self._skeleton.names)
        self.camera = self._find_camera(renderer, rng, base, wish.size)
        self.urdf = with_camera(wish.urdf, urdf, np.linalg.inv(self._base) @ self.camera.pose)

    def joint_state(self) -> tuple[np.ndarray, np.ndarray]:
        """Return positions (rad, m) and velocities of all joints that are moved, float64 `[n]` each, as in `joint_names`."""
        return self._positions.copy(), self._velocities.copy()

    @property
    def joint_names(self) -> tuple[str, ...]:
        return self._skeleton.names

    @property
    def target_place(self) -> np.ndarray:
        """Return where the middle of the object to touch is, float64 `[3]`, m, in the robot's root frame."""
        return (np.linalg.inv(self._base) @ [*self.data.body(self.target).xpos, 1.0])[:3]

    def advance(self, time: float) -> None:
        """Go on to `time`, in physics steps."""
        while self.time + _TIMESTEP <= time:
            self.time += _TIMESTEP
            self.follower.step(self.time, _TIMESTEP)
            self._place()
            mujoco.mj_step(self.model, self.data)
            self._place()
            self._measure()

    def look(self) -> View:
        """Return the cell as it is now; what was returned before becomes this."""
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_copyData(self._view.data, self.model, self.data)
        self._view.time = self.time
        self._view.positions, self._view.velocities = self.joint_state()
        return self._view

    # In motion --------------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        follower = self.follower
        self._positions[self._moved], self._velocities[self._moved] = follower.positions, follower.velocities
        self._skeleton.place(self.data, self._positions, self._velocities)

    def _measure(self) -> None:
        mujoco.mj_kinematics(self.model, self.data)
        found = min(mujoco.mj_geomDistance(self.model, self.data, self._tip, g, NEAR, None) for g in self._surfaces)
        self.distance = min(found + skeleton.TIP_RADIUS, NEAR)
        if self.touched is None and self.distance <= TOUCH:
            self.touched = self.time
        self.lowest = min(self.lowest, self._above_table())

    def _above_table(self) -> float:
        """Return how far the moving parts are above the table top, m; what is beside the table does not count."""
        model, data, shapes = self.model, self.data, self._shapes
        axis = data.geom_xmat[shapes].reshape(-1, 3, 3)[:, :, 2] * model.geom_size[shapes, 1][:, None]
        ends = np.concatenate((data.geom_xpos[shapes] + axis, data.geom_xpos[shapes] - axis))
        over = (np.abs(ends[:, :2]) < self.room.table_half).all(-1)
        heights = ends[:, 2] - np.tile(model.geom_size[shapes, 0], 2) - self.room.table_top
        return float(heights[over].min(initial=np.inf))

    # Building ---------------------------------------------------------------------------------------------------------

    def _start_and_place(self, rng: np.random.Generator, tool: str, length: float) -> tuple[np.ndarray, np.ndarray]:
        """Draw the joints' positions to start at, `[n]`, and where on the table the object goes, `[2]`, m."""
        robot = self.robot
        low, high = np.maximum(robot.lower, -np.pi), np.minimum(robot.upper, np.pi)
        drawn = rng.uniform(low, high, (_POSES, len(low)))
        frames = robot.forward_kinematics(drawn, robot.links)  # the root stands on the table
        first = robot.links.index(robot.joint_links[0])
        heights, tips = frames[:, first + 1 :, 2, 3], frames[:, robot.links.index(tool), :3, 3]
        lowest = heights[:, :-1].min(1)
        world = tips @ self._base[:3, :3].T + self._base[:3, 3]
        on_table = (np.abs(world[:, :2]) < np.array(self.room.table_half) - 0.07).all(1)
        away = np.hypot(tips[:, 0], tips[:, 1]) > _AWAY
        low_enough = (tips[:, 2] > _LOW[0]) & (tips[:, 2] < _LOW[1])
        ends = np.flatnonzero((lowest > _CLEAR) & on_table & away & low_enough)
        if not len(ends):
            raise SimulationError(f"in {_POSES} random poses, {tool!r} of {robot.name!r} was never low over the table with the "
                                  f"rest of the robot above it, {_AWAY} m from its base at least")
        end = ends[0]
        far = np.linalg.norm(tips - tips[end], axis=1) > _AWAY
        high = min(_START[0], _START[1] * length)
        starts = np.flatnonzero((lowest > high) & far & (tips[:, 2] > high))
        if not len(starts):
            raise SimulationError(f"in {_POSES} random poses, {robot.name!r} was never above the table by {high:.2f} m, "
                                  f"its {tool!r} too")
        return drawn[starts[0]], world[end, :2]

    def _surfaces_of(self, body: str) -> list[int]:
        """Return the geoms that collide: a mug's visible mesh does not, what stands in for it there has its outline."""
        model, number = self.model, self.model.body(body).id
        return [g for g in range(model.ngeom) if model.geom_bodyid[g] == number and model.geom_contype[g]]

    def _moving_shapes(self) -> np.ndarray:
        """Return the capsules beyond the second joint, int `[k]`: what is before them turns where the robot stands."""
        robot = self._skeleton.robot
        joints = {link: i for i, link in enumerate(robot.joint_links)}
        above = robot.graph().parent.max(1)
        moving = set()
        for link in robot.links:
            try:
                carrier = joints[robot.joint_links[robot.carrier(link)[0]]]
            except RobotError:  # nothing moves it
                continue
            if above[carrier]:
                moving.add(f"robot/{link}")
        named = ((g, self.model.body(self.model.geom_bodyid[g]).name) for g in range(self.model.ngeom))
        return np.array([g for g, body in named if body in moving and self.model.geom(g).name.startswith("robot:")])

    def _find_camera(
        self, renderer: SceneRenderer, rng: np.random.Generator, base: np.ndarray, size: tuple[int, int]
    ) -> Camera:  # fmt: skip
        """Draw a camera that sees the object, from the robot's side, so that it reaches across the picture."""
        view = self.look()
        visible = [g for g in range(self.model.ngeom)
                   if self.model.geom_bodyid[g] == self.model.body(self.target).id and self.model.geom(g).name]
        limit = np.array([self.room.half_width, self.room.half_depth, self.room.height]) - 0.25
        for _ in range(_VIEWS):
            middle = np.array([*(0.5 * self.data.body(self.target).xpos[:2] + 0.25 * base[:2]), self.room.table_top + 0.1])
            azimuth = np.arctan2(base[1], base[0]) + rng.choice([-1.0, 1.0]) * rng.uniform(1.2, 2.4)
            rise, far = np.radians(rng.uniform(30, 58)), rng.uniform(0.8, 1.15)
            direction = np.array([np.cos(rise) * np.cos(azimuth), np.cos(rise) * np.sin(azimuth), np.sin(rise)])
            pose = look_at(np.clip(middle + far * direction, -limit, limit), middle, roll=rng.normal(0, 0.03))
            camera = Camera(*size, np.radians(rng.uniform(44, 56)), pose)
            geoms, _ = renderer.truth(view, camera)
            if np.isin(geoms, visible).mean() >= _VISIBLE:
                return camera
        raise SimulationError(f"none of {_VIEWS} cameras saw the {self.target}; take another seed")


def pose_at(position: np.ndarray, yaw: float) -> np.ndarray:
    """Return the pose `[4, 4]` of what stands at `position` (m), turned by `yaw` (rad)."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation(0.0, 0.0, yaw), position
    return pose


def with_camera(text: str, urdf: Urdf, pose: np.ndarray) -> str:
    """Return a robot description with the camera's optical frame in it, a fixed link at `pose` `[4, 4]` of the root.

    :raises RobotError: when there is such a link already.
    """
    if OPTICAL_FRAME in urdf.links:
        raise RobotError(f"the robot {urdf.name!r} has a link {OPTICAL_FRAME!r}, which is the cell's camera; rename it")
    robot = elements(text)
    ElementTree.SubElement(robot, "link", name=OPTICAL_FRAME)
    joint = ElementTree.SubElement(robot, "joint", name="camera_mount", type="fixed")
    xyz, rpy = (" ".join(f"{v:.9g}" for v in values) for values in (pose[:3, 3], euler(pose[:3, :3])))
    ElementTree.SubElement(joint, "origin", xyz=xyz, rpy=rpy)
    ElementTree.SubElement(joint, "parent", link=urdf.root)
    ElementTree.SubElement(joint, "child", link=OPTICAL_FRAME)
    return ElementTree.tostring(robot, encoding="unicode")
