# SPDX-License-Identifier: Apache-2.0
"""A bag of one simulated table top: what a robot with a depth camera over a table records, and the true labels."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deeprob_perception.bags import BagWriter
from deeprob_perception.errors import DataError
from deeprob_perception.messages.cdr import make_header, typestore
from deeprob_perception.sim.camera import OPTICAL_FRAME, Camera, look_at
from deeprob_perception.sim.render import Frame, SceneRenderer
from deeprob_perception.sim.scene import OBJECTS, Scene
from deeprob_perception.sim.sensor import Sensor

COLOUR, INFO, DEPTH, MASK, JOINTS = (
    "/camera/image_raw/compressed", "/camera/camera_info", "/camera/depth/image_raw/compressed",
    "/ground_truth/mask/compressed", "/joint_states")
TOPICS = {
    COLOUR: "sensor_msgs/msg/CompressedImage",
    INFO: "sensor_msgs/msg/CameraInfo",
    DEPTH: "sensor_msgs/msg/CompressedImage",
    MASK: "sensor_msgs/msg/CompressedImage",
    JOINTS: "sensor_msgs/msg/JointState",
}
EPOCH = 1_700_000_000_000_000_000  # ns; any fixed time that is plainly a wall clock's: a recording must not depend on today
JOINT_STATES_PER_FRAME = 4
_PHYSICS_STEPS_PER_FRAME = 20
_JPEG_QUALITY = 70
# A decent camera: what it adds must be seen, but noise is what fills a jpeg.
_SENSOR = Sensor(target=112.0, vignette=0.15, blur=0.6, shot_noise=1.6, read_noise=0.6)
# Keeps a recording apart from the scenes of a data set with the same seed, whose seeds are (seed, frame).
_SEED_KEY = 0xBA6


def record(out: Path, seconds: float, fps: float, seed: int, size: tuple[int, int] = (640, 480), depth_every: int = 3,
           progress: Callable[[int], None] = lambda count: None) -> int:
    """Write a bag of `seconds` at `fps` frames a second to `out` (`*.mcap`); return the number of frames.

    Equal arguments give equal messages. Colour, camera info, mask and one joint state of a frame carry one stamp, and so
    does depth where a frame has it.

    :param depth_every: every n-th frame has depth: a lossless 16-bit picture is as large as all the rest of a frame.
    :param progress: called with the number of frames just finished.
    :raises DataError: if a value is out of range.
    :raises BagError: if `out` cannot be written.
    :raises SimulationError: if nothing can be rendered on this machine.
    """
    frames = round(seconds * fps)
    if frames < 1 or not 1 <= fps <= 120:
        raise DataError(f"{seconds:g} s at {fps:g} frames a second: give at least one frame, and 1 to 120 a second")
    if seed < 0:
        raise DataError(f"seed is {seed}; it must not be negative")
    if depth_every < 1:
        raise DataError(f"depth_every is {depth_every}; it must be at least 1")
    with BagWriter(out) as bag:
        for topic, kind in TOPICS.items():
            bag.add_topic(topic, kind)
        for topic, stamp, message in messages(frames, fps, seed, size, depth_every):
            bag.write(topic, stamp, message)
            if topic == MASK:
                progress(1)
    return frames


def messages(frames: int, fps: float, seed: int, size: tuple[int, int], depth_every: int = 3) -> Iterator[tuple[str, int, Any]]:
    """Yield topic, stamp (ns) and message of a recording, in the order of time."""
    steps = JOINT_STATES_PER_FRAME
    timestep = 1.0 / (fps * _PHYSICS_STEPS_PER_FRAME)
    # Two of everything: each class is there to be found, and may be hidden behind the arm.
    scene = Scene((_SEED_KEY, seed), duration=frames / fps, multisamples=4, shadow_map=2048, size=size, kinds=OBJECTS * 2,
                  timestep=timestep)
    rng = np.random.default_rng((_SEED_KEY, seed, 1))
    path = CameraPath(scene, rng, size)
    balls = [name for name in scene.object_names if name.startswith("ball")]
    pushes = {round(frames * share): ball for share, ball in zip((0.1, 0.5), balls, strict=False)}
    with SceneRenderer() as renderer:
        for index in range(frames):
            if index in pushes:
                heading = rng.uniform(0, 2 * np.pi)
                scene.push(pushes[index], 0.15 * np.array([np.cos(heading), np.sin(heading), 0.0]))
            for step in range(steps):
                tick = index * steps + step
                scene.advance(tick / (steps * fps))
                stamp = EPOCH + round(tick * 1e9 / (steps * fps))
                yield JOINTS, stamp, _joint_state(scene, stamp)
                if step == 0:
                    frame = renderer.frame(scene, path.at(scene.time))
                    yield from _frame_messages(frame, stamp, rng, index % depth_every == 0)


class CameraPath:
    """A hand-held camera's slow swing around the table, with the small sway of a hand."""

    def __init__(self, scene: Scene, rng: np.random.Generator, size: tuple[int, int]):
        base = scene.model.body("arm_base").pos
        self._size, self._fovy = size, np.radians(48.0)
        self._target = np.array([*(0.25 * base[:2]), scene.room.table_top + 0.1])
        # From the side of the arm, so that it reaches across the picture instead of away from or towards the lens.
        self._azimuth = float(np.arctan2(base[1], base[0])) + rng.choice([-1.0, 1.0]) * rng.uniform(1.6, 2.2)
        self._phases = rng.uniform(0, 2 * np.pi, (2, 6))

    def at(self, time: float) -> Camera:
        """Return the camera at `time` seconds."""
        slow = np.sin(2 * np.pi * time / np.array([19.0, 13.0, 11.0, 17.0, 15.0, 14.0]) + self._phases[0])
        hand = np.sin(2 * np.pi * time * np.array([0.71, 0.93, 1.17, 0.83, 1.31, 0.57]) + self._phases[1])
        azimuth, rise, far = self._azimuth + 0.35 * slow[0], np.radians(34.0) + 0.1 * slow[1], 1.05 + 0.12 * slow[2]
        direction = np.array([np.cos(rise) * np.cos(azimuth), np.cos(rise) * np.sin(azimuth), np.sin(rise)])
        eye = self._target + far * direction + 0.004 * hand[:3]  # m
        target = self._target + 0.03 * slow[3:] + 0.003 * hand[3:]
        return Camera(*self._size, self._fovy, look_at(eye, target, roll=0.02 * slow[3] + 0.004 * hand[5]))


def _frame_messages(frame: Frame, stamp: int, rng: np.random.Generator,
                    with_depth: bool) -> Iterator[tuple[str, int, Any]]:
    header = make_header(stamp, OPTICAL_FRAME)
    yield INFO, stamp, camera_info(frame.camera, header)
    yield COLOUR, stamp, _compressed(header, "bgr8; jpeg compressed bgr8", ".jpg", _SENSOR.apply(frame.colour, rng),
                                     (cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY))
    if with_depth:
        # Of PNG's filters, "sub" leaves least of rendered planes in 16 bits (30.7 kB a frame; "all" 32.5, "none" 59.6).
        yield DEPTH, stamp, _compressed(header, "16UC1; png compressed", ".png", millimetres(frame.depth), _png("SUB"))
    yield MASK, stamp, _compressed(header, "mono8; png compressed", ".png", frame.labels, _png("NONE"))


def _png(chosen: str) -> tuple[int, ...]:
    """Return how a png is written: as small as it gets, with this filter where OpenCV lets one choose it (4.11 does not)."""
    options = (cv2.IMWRITE_PNG_COMPRESSION, 9)
    if not hasattr(cv2, "IMWRITE_PNG_FILTER"):
        return options
    return (*options, cv2.IMWRITE_PNG_FILTER, getattr(cv2, f"IMWRITE_PNG_FILTER_{chosen}"))


def _compressed(header: Any, form: str, suffix: str, picture: np.ndarray, options: tuple[int, ...]) -> Any:
    ok, data = cv2.imencode(suffix, picture, options)
    if not ok:
        raise DataError(f"OpenCV cannot encode a picture of shape {picture.shape} as {suffix}")
    return typestore().types["sensor_msgs/msg/CompressedImage"](header=header, format=form, data=data.ravel())


def millimetres(depth: np.ndarray) -> np.ndarray:
    """Return depth `[H, W]` in metres as REP 118's uint16 `[H, W]`, mm."""
    return np.clip(np.rint(depth * 1000.0), 0, 65535).astype(np.uint16)


def camera_info(camera: Camera, header: Any) -> Any:
    """Return rosbags' sensor_msgs/CameraInfo of a camera."""
    types, k = typestore().types, camera.matrix
    return types["sensor_msgs/msg/CameraInfo"](
        header=header, height=camera.height, width=camera.width, distortion_model="plumb_bob", d=np.zeros(5),
        k=k.ravel(), r=np.eye(3).ravel(), p=np.hstack([k, np.zeros((3, 1))]).ravel(), binning_x=0, binning_y=0,
        roi=types["sensor_msgs/msg/RegionOfInterest"](x_offset=0, y_offset=0, height=0, width=0, do_rectify=False))


def _joint_state(scene: Scene, stamp: int) -> Any:
    positions, velocities = scene.joint_state()
    return typestore().types["sensor_msgs/msg/JointState"](
        header=make_header(stamp, ""), name=list(scene.joint_names), position=positions, velocity=velocities,
        effort=np.zeros(0))
