# SPDX-License-Identifier: Apache-2.0
"""A policy for one robot: `ros2 launch deeprob_perception policy.launch.py tip:=tool0 goal_topic:=/target/goal`.

It is disarmed until `ros2 service call /policy/enable std_srvs/srv/SetBool "{data: true}"`.
"""

from launch.conditions import IfCondition
from launch.substitutions import EqualsSubstitution, LaunchConfiguration, NotEqualsSubstitution

from deeprob_perception.nodes import launching
from deeprob_perception.nodes.launching import argument
from launch import Action, LaunchDescription

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
    commands = LaunchConfiguration("command_topic")
    return LaunchDescription([
        launching.params_file("policy"),
        argument("goal_topic", "goal", "Where goals come from."),
        argument("joint_states_topic", "joint_states", "Where joint states come from."),
        argument("command_topic", "",
                 "Where commands go, such as /arm_controller/joint_trajectory; empty: the node's own topic."),
        *(launching.override(name, text) for name, text in PARAMETERS.items()),
        *launching.common(),
        launching.configured(
            [policy({}, condition=IfCondition(EqualsSubstitution(commands, ""))),
             policy({f"~/{topic}": commands for topic in OUTPUTS}, condition=IfCondition(NotEqualsSubstitution(commands, "")))],
            "params_file", {name: name for name in PARAMETERS}, numbers=["rate"]),
    ])  # fmt: skip


def policy(remapped: dict, condition: IfCondition) -> Action:
    """Return the node, with these topics renamed besides those of goals and joint states."""
    inputs = {name: LaunchConfiguration(f"{name}_topic") for name in ("goal", "joint_states")}
    return launching.node("policy", inputs | remapped, LaunchConfiguration("namespace"), condition=condition)
