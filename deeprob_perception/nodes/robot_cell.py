# SPDX-License-Identifier: Apache-2.0
"""The robot cell node: a simulated robot and camera on real topics, for whoever has neither at hand (docs/robot_cell.md).

The executor's thread moves the robot and tells its joints; a worker renders, as OpenGL wants it from one thread, and takes
longer than a period of the joints. What it renders is a copy of the state at the time of the stamp.
"""

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.clock import Clock, ClockType
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from deeprob_perception.errors import PerceptionError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, make_header, serialize
from deeprob_perception.messages.images import make_compressed, make_image
from deeprob_perception.nodes.base import LATCHED, OUTPUT
from deeprob_perception.nodes.diagnosis import Level
from deeprob_perception.nodes.diagnostics import PERIOD, status_of
from deeprob_perception.nodes.lifecycle import PerceptionNode, reported, spin
from deeprob_perception.nodes.parameters import Setting, Settings
from deeprob_perception.sim.arms import ARMS, TOOL
from deeprob_perception.sim.camera import OPTICAL_FRAME
from deeprob_perception.sim.cell import Cell, Wish
from deeprob_perception.sim.follower import Point
from deeprob_perception.sim.record import camera_info, millimetres
from deeprob_perception.sim.render import Frame, SceneRenderer
from deeprob_perception.sim.scene import OBJECTS
from deeprob_perception.sim.sensor import Sensor

STATE_RATE = 10.0  # Hz, of ~/state
CATCH_UP = 0.5  # seconds of simulation at most to make up for at once; a machine that slept has not moved its robot
COMMANDS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
_SENSOR = Sensor(target=112.0, vignette=0.15, blur=0.5, shot_noise=1.6, read_noise=0.6)
JPEG_QUALITY = 90

SETTINGS = (
    Setting("autostart", True, "Configure and activate at start; false leaves that to a lifecycle manager."),
    Setting("build_only", False, "Build a cell, then end."),
    Setting("seed", 0, "The first cell; ~/next takes the one after. Equal seeds give equal cells.", between=(0, 2**31 - 1)),
    Setting("robot", "capsule_arm", f"{' or '.join(ARMS)}, or a URDF file."),
    Setting("tip", "", "The link of a URDF file that shall touch."),
    Setting("target_class", "ball", "The class of the one object that shall be touched.", live=True, choices=OBJECTS),
    Setting("width", 640, "Of pictures.", between=(32, 1920)),
    Setting("height", 480, "Of pictures.", between=(32, 1080)),
    Setting("frame_rate", 10.0, "Pictures a second at most.", between=(0.1, 60.0)),
    Setting("joint_rate", 100.0, "Joint states a second, and how often a trajectory is looked at.", between=(10.0, 250.0)),
)


class RobotCellNode(PerceptionNode):
    """Runs one cell at a time, in real time."""

    # Declare ----------------------------------------------------------------------------------------------------------

    def __init__(self, **node_options: Any):
        super().__init__("robot_cell", **node_options)
        self.settings = Settings(self, SETTINGS, self.state)
        self.cell: Cell | None = None
        self._seed = 0
        self._renderer: SceneRenderer | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="renderer")
        self._drawing: Future[None] | None = None
        self._random = np.random.default_rng(0)
        self._outputs: dict[str, Any] = {}
        self._subscription: Any = None
        self._timers_: list[Any] = []
        self._started = 0.0
        self.create_service(Trigger, "~/next", self._on_next)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_timer(PERIOD, self._diagnose, clock=Clock(clock_type=ClockType.STEADY_TIME))

    # Configure --------------------------------------------------------------------------------------------------------

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        self._seed, self.failure = self.settings["seed"], ""
        try:
            cell = self._build()
        except PerceptionError as error:
            return self.not_configured(error)
        create = self.create_lifecycle_publisher
        self._outputs = {
            "joint_states": create(JointState, "joint_states", OUTPUT),
            "robot_description": create(String, "robot_description", LATCHED),
            "image": create(Image, "camera/image_raw", OUTPUT),
            "compressed": create(CompressedImage, "camera/image_raw/compressed", OUTPUT),
            "depth": create(Image, "camera/depth/image_raw", OUTPUT),
            "camera_info": create(CameraInfo, "camera/camera_info", OUTPUT),
            "state": create(String, "~/state", OUTPUT),
        }
        self.cell = cell
        return super().on_configure(state)

    def _build(self) -> Cell:
        """Build the cell of the seed, on the worker's thread, where OpenGL lives."""
        settings = self.settings
        robot, tip = settings["robot"], settings["tip"]
        if robot in ARMS:
            urdf, tip = ARMS[robot](np.random.default_rng((0xA2, self._seed))), TOOL
        else:
            try:
                urdf = Path(robot).read_text()
            except (OSError, UnicodeError) as error:
                arms = ", ".join(ARMS)
                raise PerceptionError(f"robot is {robot!r}: no such arm ({arms}), and no file to read: {error}") from error
            if not tip:
                raise PerceptionError(f"robot is {robot}: name the link that shall touch by the parameter tip")
        wish = Wish(self._seed, urdf, tip, settings["target_class"], size=(settings["width"], settings["height"]))

        def build() -> Cell:
            if self._renderer is None:
                self._renderer = SceneRenderer()
            return Cell(wish, self._renderer)

        return self._worker.submit(build).result()

    # Activate ---------------------------------------------------------------------------------------------------------

    @reported
    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        settings = self.settings
        self._subscription = self.create_subscription(JointTrajectory, "joint_trajectory", self._on_trajectory, COMMANDS)
        self._begin()
        self._timers_ = [
            self.create_timer(1 / settings["joint_rate"], self._move),
            self.create_timer(1 / settings["frame_rate"], self._picture),
            self.create_timer(1 / STATE_RATE, self._tell),
        ]
        return result

    def _begin(self) -> None:
        """Start the clock of a new cell and tell who the robot is."""
        assert self.cell is not None
        self._started = monotonic() - self.cell.time
        self._outputs["robot_description"].publish(String(data=self.cell.urdf))
        self.get_logger().info(f"cell {self._seed}: {self.cell.robot.name}, to touch {self.cell.target}")

    # Callbacks --------------------------------------------------------------------------------------------------------

    def _on_trajectory(self, message: JointTrajectory) -> None:
        assert self.cell is not None
        self._advance()
        points = [Point(p.time_from_start.sec + p.time_from_start.nanosec * 1e-9, np.array(p.positions, float),
                        np.array(p.velocities, float)) for p in message.points]  # fmt: skip
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec  # 0: from now on
        start = self.cell.time + (stamp - self.get_clock().now().nanoseconds) / 1e9 if stamp else None
        if not self.cell.follower.take(self.cell.time, list(message.joint_names), points, start):
            self.get_logger().warning(f"a trajectory was refused: {self.cell.follower.reason}", throttle_duration_sec=5.0)

    def _on_next(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self.state() != "active":
            response.success, response.message = False, f"the node is {self.state()}, not active"
            return response
        self._seed += 1
        try:
            self.cell = self._build()
        except PerceptionError as error:
            response.success, response.message = False, f"seed {self._seed}: {error}"
            return response
        self._begin()
        response.success, response.message = True, json.dumps({"seed": self._seed, "target": self.cell.target})
        return response

    # In motion --------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        assert self.cell is not None
        now = monotonic() - self._started
        if now - self.cell.time > CATCH_UP:
            self._started += now - self.cell.time - CATCH_UP
            now = self.cell.time + CATCH_UP
        self.cell.advance(now)

    def _move(self) -> None:
        assert self.cell is not None
        self._advance()
        positions, velocities = self.cell.joint_state()
        message = JointState(name=list(self.cell.joint_names), position=positions.tolist(), velocity=velocities.tolist())
        message.header.stamp = self.get_clock().now().to_msg()
        self._outputs["joint_states"].publish(message)

    def _picture(self) -> None:
        """Hand a copy of the state to the worker, unless it still draws or nobody looks."""
        assert self.cell is not None
        wanted = {name for name in ("image", "compressed", "depth", "camera_info")
                  if self._outputs[name].get_subscription_count()}  # fmt: skip
        if not wanted or (self._drawing is not None and not self._drawing.done()):
            return
        if self._drawing is not None and (error := self._drawing.exception()) is not None:
            self.get_logger().error(f"a picture could not be drawn: {error}", throttle_duration_sec=5.0)
        self._advance()
        stamp = self.get_clock().now().nanoseconds
        view, camera = self.cell.look(), self.cell.camera

        def draw() -> None:
            assert self._renderer is not None
            self._publish(self._renderer.frame(view, camera), stamp, wanted)

        self._drawing = self._worker.submit(draw)

    def _publish(self, frame: Frame, stamp: int, wanted: set[str]) -> None:
        header = make_header(stamp, OPTICAL_FRAME)
        outputs = self._outputs
        outputs["camera_info"].publish(serialize(camera_info(frame.camera, header), "sensor_msgs/msg/CameraInfo"))
        if "depth" in wanted:
            outputs["depth"].publish(serialize(make_image(millimetres(frame.depth), "16UC1", header), IMAGE))
        if wanted & {"image", "compressed"}:
            picture = _SENSOR.apply(frame.colour, self._random)
            if "image" in wanted:
                outputs["image"].publish(serialize(make_image(picture, "bgr8", header), IMAGE))
            if "compressed" in wanted:
                jpeg = make_compressed(picture, header, "jpeg", JPEG_QUALITY)
                outputs["compressed"].publish(serialize(jpeg, COMPRESSED_IMAGE))

    def _tell(self) -> None:
        """Publish the truth of the cell: what no camera knows, and what a run is judged by."""
        cell = self.cell
        assert cell is not None
        follower = cell.follower
        self._outputs["state"].publish(String(data=json.dumps({
            "seed": self._seed, "robot": cell.robot.name, "target": cell.target, "time": round(cell.time, 3),
            "distance": round(cell.distance, 4), "touched": cell.touched, "place": cell.target_place.round(4).tolist(),
            "trajectories": follower.taken, "refused": follower.refused, "reason": follower.reason,
            "beyond_position": follower.beyond_position, "beyond_velocity": follower.beyond_velocity,
            "saturated": follower.saturated, "lowest": round(cell.lowest, 4) if np.isfinite(cell.lowest) else None,
        })))  # fmt: skip

    def _diagnose(self) -> None:
        """Say which cell this is, or why there is none, as `robot_cell: model`."""
        cell = self.cell
        told = f"cell {self._seed}: {cell.robot.name}" if cell is not None else self.state()
        if self.failure:
            told = f"not configured: {self.failure}"
        values = {} if cell is None else {"seed": str(self._seed), "robot": cell.robot.name, "target": cell.target,
                                          "refused_trajectories": str(cell.follower.refused)}  # fmt: skip
        message = DiagnosticArray()
        message.header.stamp = self.get_clock().now().to_msg()
        message.status = [status_of(self, "model", Level.ERROR if self.failure else Level.OK, told, values)]
        self._diagnostics.publish(message)

    # Deactivate, clean up ---------------------------------------------------------------------------------------------

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        self._stop()
        return super().on_deactivate(state)

    def close(self) -> None:
        """End the worker and release everything; may be called twice."""
        super().close()
        self._worker.shutdown()

    def _stop(self) -> None:
        for timer in self._timers_:
            self.destroy_timer(timer)
        self._timers_ = []
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
            self._subscription = None
        if self._drawing is not None:
            self._drawing.exception()  # waits
            self._drawing = None

    def _release(self) -> None:
        self._stop()
        outputs, self._outputs = self._outputs, {}
        for publisher in outputs.values():
            self.destroy_lifecycle_publisher(publisher)
        if self._renderer is not None:
            renderer, self._renderer = self._renderer, None
            self._worker.submit(renderer.close).result()
        self.cell = None


def main(args: list[str] | None = None) -> None:
    """Run the node: `robot_cell --ros-args -p robot:=scara -r joint_trajectory:=/policy/joint_trajectory`."""
    sys.exit(spin(RobotCellNode, args))


if __name__ == "__main__":
    main()
