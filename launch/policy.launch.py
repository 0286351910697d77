# SPDX-License-Identifier: Apache-2.0
"""A policy for one robot: `ros2 launch deeprob_perception policy.launch.py tip:=tool0 goal_topic:=/target/goal`."""

import sys
from pathlib import Path

from launch.actions import DeclareLaunchArgument, GroupAction, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import EqualsSubstitution, LaunchConfiguration, NotEqualsSubstitution
from launch_ros.actions import LifecycleNode, SetParameter, SetParametersFromFile
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription

CONFIG = Path(__file__).resolve().parents[1] / "config" / "policy.yaml"
AS_IN_FILE = "Empty: as params_file has it."
# argument -> what it says; each is the parameter of its name
PARAMETERS = {
    "model": "A model's name (`deeprob models list`) or the path of an .onnx.",
    "root": "The link that goals are relative to.",
    "tip": "The link that shall be at the goal.",
    "robot_file": "A URDF file instead of the topic robot_description.",
    "output": "joint_trajectory, joint_command or commands.",
    "rate": "Control rate, Hz.",
}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments at top level, so that --show-args is complete, and start the node with them."""
    arguments = [
        DeclareLaunchArgument("params_file", default_value=str(CONFIG), description="Parameters of the node, YAML."),
        DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and its topics."),
        DeclareLaunchArgument("goal_topic", default_value="goal", description="Where goals come from."),
        DeclareLaunchArgument("joint_states_topic", default_value="joint_states", description="Where joint states come from."),
        DeclareLaunchArgument(
            "command_topic", default_value="",
            description="Where commands go, such as /arm_controller/joint_trajectory; empty: the node's own topic."),
        *(DeclareLaunchArgument(name, default_value="", description=f"{text} {AS_IN_FILE}")
          for name, text in PARAMETERS.items()),
        DeclareLaunchArgument(
            "use_sim_time", default_value="false", choices=["true", "false"],
            description="Take time from /clock (a simulation)."),
        DeclareLaunchArgument(
            "log_level", default_value="info", choices=["debug", "info", "warn", "error", "fatal"],
            description="What the node logs."),
        DeclareLaunchArgument(
            "autostart", default_value="true", choices=["true", "false"],
            description="Whether the node configures and activates itself; it is disarmed until ~/enable in any case."),
    ]  # fmt: skip
    # Parameters come in the order of these actions, so what is given on the command line beats the file.
    given = []
    for name in PARAMETERS:
        value = LaunchConfiguration(name)
        # Strings in YAML's quotes, because they come to the node as text on its command line, and a link may be named 0.
        typed = ParameterValue(value, value_type=float) if name == "rate" else ParameterValue(["'", value, "'"], value_type=str)
        given.append(SetParameter(name, typed, condition=IfCondition(NotEqualsSubstitution(value, ""))))

    def node(condition: IfCondition, remapped: list) -> LifecycleNode:
        return LifecycleNode(
            # By module and not as package and executable: that runs where the package came by pip too, and with the
            # interpreter that has it.
            executable=sys.executable,
            arguments=["-m", "deeprob_perception.nodes.policy"],
            name="policy",
            exec_name="policy",
            namespace=LaunchConfiguration("namespace"),
            remappings=[
                ("goal", LaunchConfiguration("goal_topic")),
                ("joint_states", LaunchConfiguration("joint_states_topic")),
                *remapped,
            ],
            ros_arguments=["--log-level", LaunchConfiguration("log_level")],
            output="screen",
            emulate_tty=True,
            condition=condition,
        )

    commands = LaunchConfiguration("command_topic")
    return LaunchDescription([
        *arguments,
        GroupAction([
            OpaqueFunction(function=check_file),
            SetParametersFromFile(LaunchConfiguration("params_file")),
            *given,
            SetParameter("use_sim_time", LaunchConfiguration("use_sim_time")),
            SetParameter("autostart", LaunchConfiguration("autostart")),
            node(IfCondition(EqualsSubstitution(commands, "")), []),
            node(IfCondition(NotEqualsSubstitution(commands, "")),
                 [(f"~/{topic}", commands) for topic in ("joint_trajectory", "joint_command", "commands")]),
        ]),
    ])  # fmt: skip


def check_file(context: LaunchContext) -> None:
    """Refuse a params_file that is none; launch_ros ends with an assertion that says nothing."""
    path = LaunchConfiguration("params_file").perform(context)
    if not Path(path).is_file():
        raise FileNotFoundError(f"params_file is {path!r}: there is no such file")
