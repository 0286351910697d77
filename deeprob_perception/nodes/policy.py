# SPDX-License-Identifier: Apache-2.0
"""The policy node: joint states and a goal in, joint commands out, within the safety contract (docs/policy.md).

One thread does all of it: a step takes some milliseconds, and a lock less is a way less to command what is outdated.
"""

import sys
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from geometry_msgs.msg import PointStamped
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.timer import Timer
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from deeprob_perception import engines, zoo
from deeprob_perception.errors import RobotError, describe
from deeprob_perception.nodes.base import LATCHED, engine_facts, engine_settings
from deeprob_perception.nodes.commands import OUTPUTS, Commander, markers
from deeprob_perception.nodes.goal_frames import GoalFrames
from deeprob_perception.nodes.lifecycle import PerceptionNode, reported, spin
from deeprob_perception.nodes.parameters import Setting, Settings
from deeprob_perception.nodes.policy_diagnostics import PolicyDiagnostics
from deeprob_perception.policy.approach import Approach
from deeprob_perception.policy.beat import Beat
from deeprob_perception.policy.loop import ControlLoop, policy_of
from deeprob_perception.policy.readings import Goal
from deeprob_perception.policy.safety import DISARMED, MOVING, Bound, Setpoint, limits_of
from deeprob_perception.robots import Robot, Urdf, parse, read

try:
    from visualization_msgs.msg import MarkerArray
except ImportError:  # markers are for looking at
    MarkerArray = None

# Depth: joint states may come in parts from several publishers, of which none may push out another's.
STATES = QoSProfile(depth=20, reliability=ReliabilityPolicy.BEST_EFFORT)
GOALS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
COMMANDS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
CHANGED = "robot_description has changed: look at it, then call ~/enable again"
LOOK = 1.0  # seconds between two looks at the self-model of a robot that is not moving
MARKERS = 0.1  # seconds between two of markers

SETTINGS = (
    Setting("autostart", True, "Configure and activate at start; false leaves that to a lifecycle manager."),
    *(setting for setting in engine_settings("reach") if setting.name not in ("backend", "threads", "serve_while_building")),
    Setting("backend", "onnxruntime", "What runs the model; a network of 1 MB gains nothing by a GPU.",
            choices=("auto", *engines.BACKENDS)),
    Setting("threads", 1, "Threads for one inference; 0 is all cores.", between=(0, 1024)),
    Setting("robot_file", "", "A URDF file; empty: the topic robot_description."),
    Setting("root", "", "The link that goals and the self-model are relative to; empty: the URDF's root."),
    Setting("tip", "", "The link that shall be at the goal; `reach` needs it."),
    Setting("joints", [""], "The joints to move; [\"\"]: all from root to tip, or below the root."),
    Setting("command_joints", [""], "Their order in commands, the controller's; [\"\"]: that of the URDF."),
    Setting("frame_prefix", "", "What stands before the links' names in frame_ids, as robot_state_publisher's."),
    Setting("rate", 20.0, "Control rate, Hz.", between=(1.0, 200.0)),
    Setting("output", "joint_trajectory", "What to publish.", choices=tuple(OUTPUTS)),
    Setting("streaming", False, "Leave out the point at which each trajectory comes to rest."),
    Setting("approach_height", 0.0, "From how high above a goal it is come to, m, along the root's z axis; 0: straight.",
            between=(0.0, 10.0)),
    Setting("approach_radius", 0.04, "Distance beside the goal, m, within which the tip goes straight to it.",
            between=(0.0, 10.0)),
    Setting("max_age", 0.2, "Seconds after which a joint's position is too old to act on.", between=(0.01, 10.0)),
    Setting("goal_max_age", 1.0, "Seconds after which a goal is too old to follow.", between=(0.01, 3600.0)),
    Setting("velocity_share", 1.0, "Share of the URDF's velocity limits that is used.", between=(0.0, 1.0)),
    Setting("max_velocity", [2.0, 0.5], "The most for joints that turn and that slide, rad/s and m/s."),
    Setting("max_step", [0.0, 0.0], "The most that a command changes in a period, rad and m; 0: as the velocities allow."),
    Setting("max_start_gap", [0.1, 0.02], "The most between commanded and measured pose at the start, rad and m."),
    Setting("max_gap", [0.5, 0.1], "The most between commanded and measured pose on the way, rad and m."),
    Setting("self_model_warn_mm", 50.0, "Self-model's error that is warned of, mm.", live=True, between=(0.0, 1e6)),
)


PAIRS = ("max_velocity", "max_step", "max_start_gap", "max_gap")  # of joints that turn and of those that slide


class PolicyNode(PerceptionNode):
    """Runs a policy's control loop by a timer; callbacks of messages only put down what came."""

    # Declare ----------------------------------------------------------------------------------------------------------

    def __init__(self, **node_options: Any):
        super().__init__("policy", **node_options)
        self.settings = Settings(self, SETTINGS, self.state)
        for name in PAIRS:
            self.settings.add_check(name, partial(pair_fault, name))
        self.engine: engines.Engine | None = None
        self.facts: dict[str, str] = {}
        self.loop: ControlLoop | None = None
        self.failure = self.robot_failure = ""
        self.beat = Beat(1.0)
        self.published = 0
        self._commander: Commander | None = None
        self._frames: GoalFrames | None = None
        self._description: str | None = None
        self._command: Any = None
        self._markers: Any = None
        self._subscriptions_: list[Any] = []
        self._timer: Timer | None = None
        self._last = self._looked = self._marked = 0.0
        self.create_service(SetBool, "~/enable", self._on_enable)
        self.create_service(Trigger, "~/reset", self._on_reset)
        self._diagnostics = PolicyDiagnostics(self)

    @property
    def description_topic(self) -> str:
        return self.resolve_topic_name("robot_description")

    def now(self) -> float:
        """Return the node's time in seconds: simulated where use_sim_time is set."""
        return self.get_clock().now().nanoseconds / 1e9

    # Configure --------------------------------------------------------------------------------------------------------

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        self.failure = self.robot_failure = ""
        self.published = 0
        settings = self.settings
        try:
            for name in PAIRS:
                if fault := pair_fault(name, settings[name]):
                    raise RobotError(fault)
            engine = engines.load(zoo.resolve(settings["model"]), settings["backend"], settings["precision"],
                                  settings["cache_dir"] or None, settings["threads"])
            self.engine = engine
            self.facts = {"name": engine.metadata["name"], "task": engine.metadata["task"], "path": str(engine.path),
                          "sha256": zoo.checksum(engine.path), **engine_facts(engine)}
            if settings["robot_file"]:
                self._build(read(settings["robot_file"]))
        except Exception as error:  # whatever a model file or a back end throws: the node stays up and says it
            return self.not_configured(error)
        topic, kind = OUTPUTS[settings["output"]]
        overriding = QoSOverridingOptions.with_default_policies
        self._command = self.create_lifecycle_publisher(kind, f"~/{topic}", COMMANDS, qos_overriding_options=overriding())
        if MarkerArray is not None:
            self._markers = self.create_lifecycle_publisher(MarkerArray, "~/self_model", 1)
        self._frames = GoalFrames(self, settings["frame_prefix"])
        subscribe = self.create_subscription
        self._subscriptions_ = [
            subscribe(JointState, "joint_states", self._on_joint_states, STATES, qos_overriding_options=overriding()),
            subscribe(PointStamped, "goal", self._on_goal, GOALS, qos_overriding_options=overriding()),
        ]
        if not settings["robot_file"]:
            self._subscriptions_.append(subscribe(String, "robot_description", self._on_description, LATCHED))
        return super().on_configure(state)

    def _build(self, urdf: Urdf) -> None:
        """Make the loop for a robot. Raises PerceptionError."""
        assert self.engine is not None
        settings = self.settings
        rate, tip = settings["rate"], settings["tip"]
        task = self.engine.metadata["task"]
        joints, order = (chosen(settings[name]) for name in ("joints", "command_joints"))
        robot = Robot(urdf, settings["root"] or None, (tip or None) if task == "reach" else None, joints or None)
        if order and sorted(order) != sorted(robot.joint_names):
            raise RobotError(f"command_joints names {', '.join(order)}; the joints that are moved are "
                             f"{', '.join(robot.joint_names)}: name each of them once")
        velocity, step, start_gap, gap = (Bound(*settings[name]) for name in PAIRS)
        limits = limits_of(robot, rate, velocity, step, start_gap, gap, settings["velocity_share"])
        approach = Approach(settings["approach_height"], settings["approach_radius"])
        policy = policy_of(self.engine, robot, tip, rate, approach)
        loop = ControlLoop(robot, policy, limits, settings["max_age"], settings["goal_max_age"])
        # A back end's first inference takes several times as long as the others: not on the first step.
        rest = np.clip(0.0, robot.lower, robot.upper)
        policy.reset(rest)
        policy.act(rest, np.zeros(3))
        self._commander = Commander(robot.joint_names, order, 1 / rate, settings["streaming"])
        self.loop = loop
        names = robot.joint_names
        self.get_logger().info(f"{robot.name}: {len(names)} joints from {robot.root}: {', '.join(names)}")

    # Activate ---------------------------------------------------------------------------------------------------------

    @reported
    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        result = super().on_activate(state)
        self.beat = Beat(1 / self.settings["rate"])
        self._last = 0.0
        if self.loop is not None:
            self.loop.safety.forget()
        self._timer = self.create_timer(1 / self.settings["rate"], self._step)
        self.get_logger().info(f"active and disarmed: {self.resolve_topic_name('joint_states')}, "
                               f"{self.resolve_topic_name('goal')} -> {self._command.topic_name}; ~/enable arms it")
        return result

    # Callbacks --------------------------------------------------------------------------------------------------------

    def _on_description(self, message: String) -> None:
        if message.data == self._description:
            return
        change = self._description is not None
        self._disarm("description_changed", CHANGED)
        self._description, self.loop, self.robot_failure = message.data, None, ""
        try:
            self._build(parse(message.data))
        except Exception as error:  # the text may come from anybody
            self.robot_failure = f"{self.description_topic}: {describe(error)}"
            self.get_logger().error(self.robot_failure)
            return
        if change and self.loop is not None:
            self.loop.safety.disable("description_changed", CHANGED)

    def _on_joint_states(self, message: JointState) -> None:
        if self.loop is None:
            return
        stamp = message.header.stamp
        if not self.loop.readings.add(message.name, message.position, stamp.sec + stamp.nanosec * 1e-9, self.now()):
            self.loop.safety.refusals["bad_joint_states"] += 1

    def _on_goal(self, message: PointStamped) -> None:
        if self.loop is None or self._frames is None:
            return
        point = np.array([message.point.x, message.point.y, message.point.z])
        now, stamp = self.now(), message.header.stamp
        seconds = stamp.sec + stamp.nanosec * 1e-9
        when = min(seconds, now) if seconds > 0 else now
        if not np.isfinite(point).all():
            self.loop.goal = Goal(None, when, ("goal_not_finite", f"the goal is {point.tolist()}"))
            return
        found = self._frames.to_root(self.loop.robot, self.loop.readings.positions, message.header.frame_id, point)
        self.loop.goal = Goal(None, when, ("goal_frame", found)) if isinstance(found, str) else Goal(found, when)

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if not request.data:
            self._disarm("not_enabled", "disarmed by ~/enable")
            response.success, response.message = True, "disarmed"
            return response
        refused = self._not_ready() or (self.loop.enable(self.now()) if self.loop else "")
        response.success, response.message = not refused, f"not enabled: {refused}" if refused else "enabled"
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        refused = self._not_ready() or (self.loop.reset(self.now()) if self.loop else "")
        response.success, response.message = not refused, refused or "started anew from the measured pose"
        return response

    def _not_ready(self) -> str:
        if self.state() != "active":
            return f"the node is {self.state()}, not active"
        return (self.robot_failure or f"nobody has published {self.description_topic} yet") if self.loop is None else ""

    # The control loop -------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        now = self.now()
        if now < self._last:
            self._clock_went_back()
        self._last = now
        self.beat.step(now)
        if self.loop is None:
            return
        setpoint = self.loop.step(now)
        if setpoint is not None:
            self._publish(setpoint)
        if self.loop.safety.state != MOVING and monotonic() - self._looked > LOOK:
            self._looked = monotonic()
            self.loop.look(now)
        self._show()

    def _publish(self, setpoint: Setpoint) -> None:
        assert self._commander is not None
        stamp = self.get_clock().now().to_msg()
        self._command.publish(self._commander.message(self.settings["output"], setpoint, stamp))
        self.published += 1

    def _show(self) -> None:
        """Publish where the self-model believes the joints to be, if somebody looks."""
        if self._markers is None or self.loop is None or self.loop.self_model is None:
            return
        if monotonic() - self._marked > MARKERS and self._markers.get_subscription_count():
            self._marked = monotonic()
            frame = self.settings["frame_prefix"] + self.loop.robot.root
            self._markers.publish(markers(self.loop.self_model, frame, self.get_clock().now().to_msg()))

    def _disarm(self, cause: str, reason: str) -> None:
        """Disarm, and bring a robot that moves to rest."""
        if self.loop is None:
            return
        if self.loop.safety.state != DISARMED:
            self.get_logger().warning(f"disarmed: {reason}")
        self.loop.safety.disable(cause, reason)
        setpoint = self.loop.safety.take_halt()
        if setpoint is not None and self._command is not None:
            self._publish(setpoint)

    def _clock_went_back(self) -> None:
        self.beat.restart()
        if self.loop is not None:
            self._disarm("clock_went_back", "the clock went back (a simulation that was reset?): call ~/reset, then ~/enable")
            self.loop.readings.clear()
            self.loop.goal = Goal()

    # Deactivate, clean up ---------------------------------------------------------------------------------------------

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        self._disarm("not_enabled", "the node was deactivated: activate it, then call ~/enable")
        self._stop_timer()
        return super().on_deactivate(state)

    def close(self) -> None:
        """Stop and release everything; a robot in motion comes to rest where ROS still lets us say so."""
        try:
            if self.context.ok():
                self._disarm("not_enabled", "the node ends")
        except Exception:  # a signal that comes now ends ROS under us, and with it what we wanted to say
            if self.context.ok():
                raise
        super().close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self.destroy_timer(self._timer)
            self._timer = None

    def _release(self) -> None:
        self._stop_timer()
        for subscription in self._subscriptions_:
            self.destroy_subscription(subscription)
        self._subscriptions_ = []
        for publisher in (self._command, self._markers):
            if publisher is not None:
                self.destroy_lifecycle_publisher(publisher)
        self._command = self._markers = None
        if self._frames is not None:
            self._frames.close()
            self._frames = None
        self.engine, self.loop, self.facts, self._description = None, None, {}, None


def pair_fault(name: str, value: Any) -> str:
    """Return what is wrong with a bound for joints that turn and that slide, or ""."""
    values = list(value or [])
    if len(values) == 2 and all(np.isfinite(x) and x >= 0 for x in values):
        return ""
    return f"{name} is {values}; give two numbers of 0 or more, for joints that turn (rad) and that slide (m)"


def chosen(names: Any) -> list[str]:
    """Return the names of a list parameter, whose empty value is [""]: an empty list has no type in ROS."""
    return [str(name) for name in names or () if str(name)]


def main(args: list[str] | None = None) -> None:
    """Run the node: `policy --ros-args -p tip:=tool0 -r goal:=/target/goal`."""
    sys.exit(spin(PolicyNode, args))


if __name__ == "__main__":
    main()
