# SPDX-License-Identifier: Apache-2.0
"""The target node: mask, depth and calibration in; where the object of a class is, in the robot's frame, out (docs/target.md).

One thread does all of it: a frame takes some milliseconds (`locate_p50_ms` in diagnostics). Images stay serialised until a
mask has found its depth image.
"""

import sys
import traceback
from time import monotonic, perf_counter
from typing import Any

import numpy as np
from geometry_msgs.msg import PointStamped
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import String

from deeprob_perception.errors import PerceptionError, TargetError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, deserialize
from deeprob_perception.messages.headers import stamp_of
from deeprob_perception.messages.images import to_array
from deeprob_perception.nodes.base import LATCHED, OUTPUT, SENSOR
from deeprob_perception.nodes.labels import LABEL_TYPES, names_of, ros_name
from deeprob_perception.nodes.lifecycle import PerceptionNode, reported, spin
from deeprob_perception.nodes.parameters import Setting, Settings
from deeprob_perception.nodes.target_diagnostics import TargetDiagnostics
from deeprob_perception.nodes.transforms import TransformError, Transforms
from deeprob_perception.robots import Urdf, parse, read
from deeprob_perception.target import CameraMount, Intrinsics, Pairs, Sighting, Steady, locate, metres, pose_of
from deeprob_perception.timing import Samples

STATES = QoSProfile(depth=20, reliability=ReliabilityPolicy.BEST_EFFORT)
WINDOW = 600  # frames whose times are kept
POSES_FROM = ("robot", "parameter", "tf2")

SETTINGS = (
    Setting("autostart", True, "Configure and activate at start; false leaves that to a lifecycle manager."),
    Setting("build_only", False, "Check the parameters, then end."),
    Setting("target_class", "", "The class to look for: its name, or its id in the mask. Empty: nothing.", live=True),
    Setting("depth_transport", "raw", "Subscribe to `depth` (raw) or to `depth/compressed` (png).",
            choices=("raw", "compressed")),
    Setting("camera_pose_from", "robot", "Whence the camera's pose is: a link of the robot's description, camera_pose, or tf2.",
            choices=POSES_FROM),
    Setting("camera_pose", [0.0] * 6, "x, y, z (m) and roll, pitch, yaw (rad) of the optical frame in base_frame."),
    Setting("camera_frame", "", "The camera's optical frame; empty: the mask's frame_id."),
    Setting("base_frame", "", "The frame of the goal; empty: the root link of the robot's description."),
    Setting("frame_prefix", "", "What stands before the links' names in frame_ids, as robot_state_publisher's."),
    Setting("robot_file", "", "A URDF file; empty: the topic robot_description."),
    Setting("slop", 0.02, "Seconds between the stamps of a mask and its depth image at most.", between=(0.0, 1.0)),
    Setting("median_frames", 5, "Positions that the goal is the median of; 1: the newest.", live=True, between=(1, 100)),
    Setting("median_seconds", 2.0, "Older positions do not count.", live=True, between=(0.0, 60.0)),
    Setting("minimum_pixels", 30, "Pixels with depth that an object has at least.", live=True, between=(1, 10**6)),
    Setting("border", 1, "Pixels that the mask is shrunk by: its edge is least certain.", live=True, between=(0, 20)),
    Setting("bounds", [0.0], "x, y, z from and to (6 numbers, m, in base_frame) that an object is within; [0.0]: anywhere."),
    Setting("max_jump", 0.15, "m; for median_seconds an object is looked for so near to where it was, at most; 0: anywhere.",
            live=True, between=(0.0, 100.0)),
    Setting("offset", [0.0] * 3, "m, added to the goal in base_frame: above the object, say."),
    Setting("stale_after", 1.0, "Seconds without a goal before a warning.", live=True, between=(0.01, 3600.0)),
)  # fmt: skip


class TargetNode(PerceptionNode):
    """Publishes `~/goal` for every mask in which the object is seen and has depth; says why for the others."""

    # Declare ----------------------------------------------------------------------------------------------------------

    def __init__(self, **node_options: Any):
        super().__init__("target", **node_options)
        self.settings = Settings(self, SETTINGS, self.state)
        self.settings.add_check("target_class", lambda value: self._class_fault(str(value)))
        self.robot_failure = self.reason = ""
        self.masks = self.depths = self.published = self.failed = self.in_a_row = 0
        self.last: Sighting | None = None
        self.goal: np.ndarray | None = None
        self.goal_at = self.mask_at = self.depth_at = 0.0  # monotonic, seconds
        self.times = Samples(WINDOW)
        self.delays = Samples(WINDOW)  # ms from a mask's stamp to its goal
        self.pairs: Pairs[bytes, bytes] = Pairs(0)
        self._steady = Steady()
        self._sought = ""
        self._names: list[str] | None = None
        self.intrinsics: Intrinsics | str = ""
        self._urdf: Urdf | None = None
        self._description: str | None = None
        self._mount: CameraMount | None = None
        self._given: np.ndarray | None = None
        self._positions: dict[str, float] = {}
        self._transforms: Transforms | None = None
        self._output: Any = None
        self._inputs: list[Any] = []
        self._labels: Any = None
        self._diagnostics = TargetDiagnostics(self)

    def topic(self, name: str) -> str:
        return self.resolve_topic_name(name)

    # Configure --------------------------------------------------------------------------------------------------------

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        settings = self.settings
        self.failure = self.robot_failure = self.reason = ""
        self.masks = self.depths = self.published = self.failed = self.in_a_row = 0
        try:
            offset = np.array(settings["offset"], float)
            if offset.shape != (3,) or not np.isfinite(offset).all():
                raise TargetError(f"offset is {list(settings['offset'])}; give x, y, z in metres")
            bounds = list(settings["bounds"])
            if bounds != [0.0] and (len(bounds) != 6 or not all(a < b for a, b in zip(bounds[:3], bounds[3:], strict=True))):
                raise TargetError(f"bounds is {bounds}; give x, y, z from, then x, y, z to, in metres, or [0.0]")
            if settings["camera_pose_from"] == "parameter":
                self._given = pose_of(settings["camera_pose"])
                if not settings["base_frame"] and not settings["robot_file"]:
                    raise TargetError("camera_pose_from is parameter: name the frame that camera_pose is in by base_frame")
            if settings["camera_pose_from"] == "tf2":
                self._listen_to_tf()
            if settings["robot_file"]:
                self._urdf = read(settings["robot_file"])
        except Exception as error:  # the node stays up and says it
            return self.not_configured(error)
        overriding = QoSOverridingOptions.with_default_policies
        self._output = self.create_lifecycle_publisher(PointStamped, "~/goal", OUTPUT, qos_overriding_options=overriding())
        return super().on_configure(state)

    def _listen_to_tf(self) -> None:
        if not self.settings["base_frame"]:
            raise TargetError("camera_pose_from is tf2: name the frame of the goal by base_frame")
        self._transforms = Transforms(self)
        if self._transforms.absence:
            raise TargetError(f"camera_pose_from is tf2: {self._transforms.absence}; take robot or parameter")

    # Activate ---------------------------------------------------------------------------------------------------------

    @reported
    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        settings = self.settings
        self.pairs = Pairs(round(settings["slop"] * 1e9))
        self._steady.clear()
        self.goal, self.goal_at = None, monotonic()
        compressed = settings["depth_transport"] == "compressed"
        kind, depth = (CompressedImage, self.topic("depth") + "/compressed") if compressed else (Image, "depth")
        self._depth_type = COMPRESSED_IMAGE if compressed else IMAGE
        wanted: list[tuple[type, str, Any, QoSProfile, bool]] = [
            (Image, "mask", self._on_mask, SENSOR, True),
            (kind, depth, self._on_depth, SENSOR, True),
            (CameraInfo, "camera_info", self._on_camera_info, SENSOR, False),
        ]
        if settings["camera_pose_from"] == "robot":
            wanted.append((JointState, "joint_states", self._on_joint_states, STATES, False))
        if not settings["robot_file"] and settings["camera_pose_from"] == "robot":
            wanted.append((String, "robot_description", self._on_description, LATCHED, False))
        self._inputs = [
            self.create_subscription(kind, topic, callback, qos, raw=raw,
                                     qos_overriding_options=QoSOverridingOptions.with_default_policies())
            for kind, topic, callback, qos, raw in wanted]  # fmt: skip
        self._listen_for_names()
        self.get_logger().info(f"active: {self.topic('mask')}, {self.topic(depth)}, {self.topic('camera_info')} -> "
                               f"{self._output.topic_name}")
        return result

    def _listen_for_names(self) -> str:
        """Subscribe to the classes' names in the type that somebody publishes them in: DDS keeps the others apart.

        :returns: the types that are published and cannot be read here, or "".
        """
        topic = self.topic("label_info")
        offered = {info.topic_type for info in self.get_publishers_info_by_topic(topic)}
        kind = next((kind for kind in LABEL_TYPES if ros_name(kind) in offered), LABEL_TYPES[0])
        if self._labels is None or self._labels.msg_type is not kind:
            if self._labels is not None:
                self.destroy_subscription(self._labels)
            self._labels = self.create_subscription(kind, "label_info", self._on_label_info, LATCHED)
        return ", ".join(sorted(offered - {ros_name(kind) for kind in LABEL_TYPES}))

    # Callbacks --------------------------------------------------------------------------------------------------------

    def _on_label_info(self, message: Any) -> None:
        try:
            self._names = names_of(message)
        except ValueError as error:
            self.get_logger().error(f"{self.topic('label_info')}: {error}")

    def _on_camera_info(self, message: CameraInfo) -> None:
        try:
            self.intrinsics = Intrinsics.of(np.array(message.k), message.width, message.height)
        except TargetError as error:
            self.intrinsics = str(error)

    def _on_joint_states(self, message: JointState) -> None:
        if len(message.name) == len(message.position):
            self._positions.update(zip(message.name, message.position, strict=True))

    def _on_description(self, message: String) -> None:
        if message.data == self._description:
            return
        self._description, self._urdf, self._mount, self.robot_failure = message.data, None, None, ""
        self._positions.clear()
        self._steady.clear()
        self.pairs.clear()
        try:
            self._urdf = parse(message.data)
        except PerceptionError as error:
            self.robot_failure = f"{self.topic('robot_description')}: {error}"
            self.get_logger().error(self.robot_failure)

    def _on_mask(self, raw: bytes) -> None:
        self.masks += 1
        self.mask_at = monotonic()
        self._take(lambda: self.pairs.mask(stamp_of(raw), raw))

    def _on_depth(self, raw: bytes) -> None:
        self.depths += 1
        self.depth_at = monotonic()
        self._take(lambda: self.pairs.depth(stamp_of(raw), raw))

    def _take(self, joined: Any) -> None:
        """Locate the object in what has been joined; a bad message costs itself."""
        try:
            pair = joined()
            if pair is not None and self.settings["target_class"]:
                self._locate(*pair)
        except PerceptionError as error:
            self._fail(str(error))
        except Exception as error:  # a bug in one frame's way must not end the stream
            if not self.context.ok():
                return
            self._fail(f"{type(error).__name__}: {error}")
            self.get_logger().error(traceback.format_exc(), throttle_duration_sec=10.0)

    def _fail(self, reason: str) -> None:
        self.reason = reason
        self.in_a_row += 1
        self.failed += 1

    # The goal ---------------------------------------------------------------------------------------------------------

    def _locate(self, stamp: int, mask_raw: bytes, depth_raw: bytes) -> None:
        started = perf_counter()
        settings, sought = self.settings, self.settings["target_class"]
        if sought != self._sought:
            self._sought = sought
            self._steady.clear()
        if isinstance(self.intrinsics, str):
            raise TargetError(self.intrinsics or f"no calibration has come on {self.topic('camera_info')}")
        mask = deserialize(mask_raw, IMAGE)
        class_id = self._class_id(sought)
        frame = settings["camera_frame"] or mask.header.frame_id
        pose, base = self._pose(frame.lstrip("/"), stamp)
        depth = metres(to_array(deserialize(depth_raw, self._depth_type)))
        self._steady.frames, self._steady.seconds = settings["median_frames"], settings["median_seconds"]
        last = self._steady.last(stamp)

        def refusal(position: np.ndarray) -> str:
            return self._refusal(pose[:3, :3] @ position + pose[:3, 3], last)

        seen = locate(to_array(mask), class_id, depth, self.intrinsics, settings["minimum_pixels"], settings["border"], sought,
                      refusal)
        found = self._steady.add(stamp, pose[:3, :3] @ seen.position + pose[:3, 3]) + np.array(settings["offset"])
        message = PointStamped()
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp, 10**9)
        message.header.frame_id = base
        message.point.x, message.point.y, message.point.z = (float(v) for v in found)
        self._output.publish(message)
        self.published += 1
        self.last, self.goal, self.goal_at, self.reason, self.in_a_row = seen, found, monotonic(), "", 0
        self.times.add((perf_counter() - started) * 1e3)
        self.delays.add((self.get_clock().now().nanoseconds - stamp) / 1e6)

    def _refusal(self, place: np.ndarray, last: np.ndarray | None) -> str:
        """Return why what is at a place `[3]` (m, base frame) cannot be the object, or ""."""
        bounds = np.array(self.settings["bounds"])
        if len(bounds) == 6 and not ((place >= bounds[:3]) & (place <= bounds[3:])).all():
            return f"is at {place.round(2).tolist()}, outside bounds"
        jump = self.settings["max_jump"]
        if jump and last is not None and (far := float(np.linalg.norm(place - last))) > jump:
            return f"is {far:.2f} m from where it was just now (max_jump is {jump:g} m)"
        return ""

    def _class_fault(self, value: str) -> str:
        if not value or self._names is None or value.isdecimal() or value in self._names:
            return ""
        return f"target_class is {value!r}; the mask has: {', '.join(name for name in self._names if name)}"

    def _class_id(self, sought: str) -> int:
        if sought.isdecimal():
            return int(sought)
        if self._names is None:
            unread = self._listen_for_names()
            why = f", where they are {unread}, which cannot be read here" if unread else ""
            raise TargetError(f"no names of classes have come on {self.topic('label_info')}{why}; "
                              "or give target_class as an id")
        if fault := self._class_fault(sought):
            raise TargetError(fault)
        return self._names.index(sought)

    def _pose(self, frame: str, stamp: int) -> tuple[np.ndarray, str]:
        """Return the camera's pose `[4, 4]` in the base frame, and that frame's name with its prefix.

        :param stamp: of the mask, ns.
        """
        settings, prefix = self.settings, self.settings["frame_prefix"]
        base = settings["base_frame"]
        if settings["camera_pose_from"] == "parameter":
            assert self._given is not None
            return self._given, prefix + (base or (self._urdf.root if self._urdf else ""))
        if not frame:
            raise TargetError(f"the masks on {self.topic('mask')} have no frame_id: name the camera's frame by camera_frame")
        if settings["camera_pose_from"] == "tf2":
            return self._from_tf(prefix + base, frame, stamp), prefix + base
        if self._urdf is None:
            raise TargetError(self.robot_failure or f"nobody has published {self.topic('robot_description')} yet")
        link = frame.removeprefix(prefix)
        if self._mount is None or self._mount.camera != link:
            self._mount = CameraMount(self._urdf, link, base)
        return self._mount.pose(self._positions), prefix + self._mount.base

    def _from_tf(self, base: str, frame: str, stamp: int) -> np.ndarray:
        assert self._transforms is not None
        try:
            return self._transforms.pose(base, frame, stamp)
        except TransformError as error:
            raise TargetError(f"tf2 does not relate the camera's frame {frame} to {base}: {error}") from error

    # Deactivate, clean up ---------------------------------------------------------------------------------------------

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        self._close_inputs()
        return super().on_deactivate(state)

    def _close_inputs(self) -> None:
        for subscription in self._inputs:
            self.destroy_subscription(subscription)
        self._inputs = []
        if self._labels is not None:
            self.destroy_subscription(self._labels)
            self._labels = None

    def _release(self) -> None:
        self._close_inputs()
        if self._output is not None:
            self.destroy_lifecycle_publisher(self._output)
            self._output = None
        if self._transforms is not None:
            self._transforms.close()
            self._transforms = None
        self._urdf, self._description, self._mount, self._given, self._names = None, None, None, None, None
        self.intrinsics = ""
        self._positions.clear()


def main(args: list[str] | None = None) -> None:
    """Run the node: `target --ros-args -p target_class:=mug -r mask:=/segmentation/mask -r depth:=/camera/depth/image_raw`."""
    sys.exit(spin(TargetNode, args))


if __name__ == "__main__":
    main()
