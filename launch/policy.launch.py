# SPDX-License-Identifier: Apache-2.0
"""A policy for one robot: `ros2 launch deeprob_perception policy.launch.py tip:=tool0 goal_topic:=/target/goal`.

It is disarmed until `ros2 service call /policy/enable std_srvs/srv/SetBool "{data: true}"`.
"""

from launch.actions import OpaqueFunction
from launch.substitutions import LaunchConfiguration

from deeprob_perception.nodes import launching
from deeprob_perception.nodes.launching import argument
from launch import Action, LaunchContext, LaunchDescription

# argument -> what it says; each is the parameter of its name
PARAMETERS = {
    "model": "A model's name (`deeprob models list`) or the path of an .onnx.",
    "root": "The link that goals are relative to.",
    "tip": "The link that shall be at the goal.",
    "robot_file": "A URDF file instead of the topic robot_description.",
    "output": "joint_trajectory, joint_command or commands.",
    "rate": "Control rate, Hz.",
}
OUTPUTS = ("joint_trajectory", "joint_command", "commands")


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments at top level, so that --show-args is complete, and start the node with them."""
    return LaunchDescription([
        launching.params_file("policy"),
        argument("goal_topic", "goal", "Where goals come from."),
        argument("joint_states_topic", "joint_states", "Where joint states come from."),
        argument("command_topic", "",
                 "Where commands go, such as /arm_controller/joint_trajectory; empty: the node's own topic."),
        *(launching.override(name, text) for name, text in PARAMETERS.items()),
        *launching.common(),
        launching.configured(
            [OpaqueFunction(function=policy)], "params_file", {name: name for name in PARAMETERS}, numbers=["rate"]),
    ])  # fmt: skip


def policy(context: LaunchContext) -> list[Action]:
    """Return the node; its topic of commands is renamed if command_topic is given."""
    remapped = {name: launching.value_of(context, f"{name}_topic") for name in ("goal", "joint_states")}
    if commands := launching.value_of(context, "command_topic"):
        remapped |= {f"~/{topic}": commands for topic in OUTPUTS}
    return [launching.node("policy", remapped, LaunchConfiguration("namespace"))]
