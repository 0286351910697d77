# SPDX-License-Identifier: Apache-2.0
"""Measure the policy node on a chain of nine joints: `python tools/bench_policy.py --rate 100 --seconds 60 MODEL`.

The node is a process of its own. This one is the robot: it is where it is told to be, publishes its joints at 100 Hz and a goal
that wanders at 20 Hz, and prints what the node's diagnostics say in the end, as JSON.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PointStamped
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import JointState
from std_srvs.srv import SetBool
from trajectory_msgs.msg import JointTrajectory

from deeprob_perception.isolation import isolated

JOINTS = 9


def chain() -> str:
    """Return the URDF of an arm of JOINTS joints, one after the other, its axes taking turns."""
    text = '<robot name="chain"><link name="l0"/>'
    for i in range(JOINTS):
        axis = ("0 0 1", "0 1 0", "1 0 0")[i % 3]
        text += (f'<link name="l{i + 1}"/><joint name="j{i}" type="revolute"><parent link="l{i}"/><child link="l{i + 1}"/>'
                 f'<origin xyz="0 0 0.12"/><axis xyz="{axis}"/><limit lower="-2.5" upper="2.5" velocity="2"/></joint>')
    return text + "</robot>"


class Arm:
    """The robot's side of the topics."""

    def __init__(self) -> None:
        self.node = rclpy.create_node("chain")
        self.positions = {f"j{i}": 0.1 * (i % 3) for i in range(JOINTS)}
        self.values: dict[str, str] = {}
        self.states = self.node.create_publisher(JointState, "joint_states", 10)
        self.goals = self.node.create_publisher(PointStamped, "goal", 10)
        self.node.create_subscription(JointTrajectory, "/policy/joint_trajectory", self.on_command, 10)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self.on_diagnostics, 10)
        self.enable = self.node.create_client(SetBool, "/policy/enable")
        self.node.create_timer(0.01, self.speak)
        self.node.create_timer(0.05, self.wander)

    def on_command(self, message: JointTrajectory) -> None:
        self.positions.update(zip(message.joint_names, message.points[0].positions, strict=True))

    def on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.startswith("policy: "):
                self.values |= {pair.key: pair.value for pair in status.values}

    def speak(self) -> None:
        message = JointState(name=list(self.positions), position=list(self.positions.values()))
        message.header.stamp = self.node.get_clock().now().to_msg()
        self.states.publish(message)

    def wander(self) -> None:
        message = PointStamped()
        message.header.stamp, message.header.frame_id = self.node.get_clock().now().to_msg(), "l0"
        angle = time.monotonic() / 3
        message.point.x, message.point.y, message.point.z = 0.4 * math.cos(angle), 0.4 * math.sin(angle), 0.5
        self.goals.publish(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    os.environ.update(isolated() | os.environ)
    with tempfile.TemporaryDirectory() as folder:
        urdf = Path(folder) / "chain.urdf"
        urdf.write_text(chain())
        parameters = dict(model=options.model, rate=options.rate, robot_file=urdf, tip=f"l{JOINTS}")
        arguments = [part for name, value in parameters.items() for part in ("-p", f"{name}:={value}")]
        command = [sys.executable, "-m", "deeprob_perception.nodes.policy", "--ros-args", "--log-level", "warn", *arguments]
        with subprocess.Popen(command) as process:
            try:
                print(json.dumps(measure(options.seconds)))
            finally:
                process.terminate()


def measure(seconds: float) -> dict[str, object]:
    """Arm the node, let it move for so many seconds, and return its figures."""
    rclpy.init()
    arm = Arm()
    executor = SingleThreadedExecutor()
    executor.add_node(arm.node)
    enabled, patience = False, time.monotonic() + 30
    while not enabled:
        if time.monotonic() > patience:
            sys.exit(f"the node could not be enabled: {arm.values.get('reason', 'it says nothing')}")
        executor.spin_once(timeout_sec=0.1)
        if arm.enable.service_is_ready():
            future = arm.enable.call_async(SetBool.Request(data=True))
            executor.spin_until_future_complete(future, 5.0)
            enabled = future.done() and future.result().success
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        executor.spin_once(timeout_sec=0.1)
    keys = ("state", "rate", "steps", "late_steps", "worst_lateness_ms", "published", "step_p50_ms", "step_p95_ms",
            "step_p99_ms", "step_max_ms")  # fmt: skip
    found = {key: arm.values.get(key) for key in keys}
    late = int(arm.values["late_steps"]) / int(arm.values["steps"])
    found |= {"late_share": f"{late:.2%}", "refused": {k: v for k, v in arm.values.items() if k[:7] == "refused" and v != "0"}}
    rclpy.try_shutdown()
    return found


if __name__ == "__main__":
    main()
