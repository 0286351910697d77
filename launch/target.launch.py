# SPDX-License-Identifier: Apache-2.0
"""Where an object is: `ros2 launch deeprob_perception target.launch.py target_class:=mug depth_topic:=/camera/depth`."""

import sys
from pathlib import Path

from launch.actions import DeclareLaunchArgument, GroupAction, OpaqueFunction
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, NotEqualsSubstitution
from launch_ros.actions import LifecycleNode, SetParameter, SetParametersFromFile
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchContext, LaunchDescription

CONFIG = Path(__file__).resolve().parents[1] / "config" / "target.yaml"
AS_IN_FILE = "Empty: as params_file has it."
# argument -> what it says; each is the parameter of its name
PARAMETERS = {
    "target_class": "The class to look for, by name or id.",
    "camera_pose_from": "robot, parameter or tf2.",
    "base_frame": "The frame of the goal.",
    "depth_transport": "raw or compressed.",
    "robot_file": "A URDF file instead of the topic robot_description.",
}
TOPICS = {
    "mask": ("segmentation/mask", "Label masks."),
    "label_info": ("segmentation/label_info", "The names of their classes."),
    "depth": ("camera/depth/image_raw", "Depth that is registered to the mask's camera."),
    "camera_info": ("camera/camera_info", "Its calibration."),
    "joint_states": ("joint_states", "Joint states, where joints carry the camera."),
}


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments at top level, so that --show-args is complete, and start the node with them."""
    arguments = [
        DeclareLaunchArgument("params_file", default_value=str(CONFIG), description="Parameters of the node, YAML."),
        DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and its topics."),
        *(DeclareLaunchArgument(f"{name}_topic", default_value=topic, description=text)
          for name, (topic, text) in TOPICS.items()),
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
            description="Whether the node configures and activates itself."),
    ]  # fmt: skip
    # Parameters come in the order of these actions, so what is given on the command line beats the file.
    given = []
    for name in PARAMETERS:
        value = LaunchConfiguration(name)
        # In YAML's quotes, because it comes to the node as text on its command line, and a class may be 3.
        quoted = ParameterValue(["'", value, "'"], value_type=str)
        given.append(SetParameter(name, quoted, condition=IfCondition(NotEqualsSubstitution(value, ""))))
    return LaunchDescription([
        *arguments,
        GroupAction([
            OpaqueFunction(function=check_file),
            SetParametersFromFile(LaunchConfiguration("params_file")),
            *given,
            SetParameter("use_sim_time", LaunchConfiguration("use_sim_time")),
            SetParameter("autostart", LaunchConfiguration("autostart")),
            LifecycleNode(
                # By module: that runs where the package came by pip too, and with the interpreter that has it.
                executable=sys.executable,
                arguments=["-m", "deeprob_perception.nodes.target"],
                name="target",
                exec_name="target",
                namespace=LaunchConfiguration("namespace"),
                remappings=[(name, LaunchConfiguration(f"{name}_topic")) for name in TOPICS],
                ros_arguments=["--log-level", LaunchConfiguration("log_level")],
                output="screen",
                emulate_tty=True,
            ),
        ]),
    ])  # fmt: skip


def check_file(context: LaunchContext) -> None:
    """Refuse a params_file that is none; launch_ros ends with an assertion that says nothing."""
    path = LaunchConfiguration("params_file").perform(context)
    if not Path(path).is_file():
        raise FileNotFoundError(f"params_file is {path!r}: there is no such file")
