# SPDX-License-Identifier: Apache-2.0
"""Perception of one camera: `ros2 launch deeprob_perception perception.launch.py image_topic:=/camera/image_raw`."""

import sys
from pathlib import Path

from launch.actions import DeclareLaunchArgument, GroupAction, OpaqueFunction
from launch.conditions import IfCondition
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration, NotEqualsSubstitution, PythonExpression
from launch_ros.actions import LifecycleNode, SetParameter, SetParametersFromFile

from launch import LaunchContext, LaunchDescription

CONFIG = Path(__file__).resolve().parents[1] / "config"
AS_IN_FILE = "Empty: as params_file has it."


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments at top level, so that --show-args is complete, and start the node with them."""
    arguments = [
        DeclareLaunchArgument(
            "tasks", default_value="segmentation", choices=["segmentation", "tracking", "all"],
            description="Which nodes run on the camera."),
        DeclareLaunchArgument(
            "params_file", default_value=str(CONFIG / "segmentation.yaml"),
            description="Parameters of the segmentation node, YAML."),
        DeclareLaunchArgument(
            "tracking_params_file", default_value=str(CONFIG / "tracking.yaml"),
            description="Parameters of the tracking node, YAML."),
        DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node and its topics."),
        DeclareLaunchArgument(
            "image_topic", default_value="camera/image_raw",
            description="The camera's topic; with image_transport:=compressed, the one with /compressed after it is read."),
        DeclareLaunchArgument(
            "image_transport", default_value="", choices=["", "raw", "compressed"],
            description=f"sensor_msgs/Image or CompressedImage. {AS_IN_FILE}"),
        DeclareLaunchArgument(
            "model", default_value="",
            description=f"Of segmentation: a name (`deeprob models list`) or the path of an .onnx. {AS_IN_FILE}"),
        DeclareLaunchArgument(
            "tracking_model", default_value="", description=f"Of tracking, likewise: a model of features. {AS_IN_FILE}"),
        DeclareLaunchArgument(
            "backend", default_value="", choices=["", "auto", "tensorrt", "openvino", "onnxruntime", "torch"],
            description=f"What runs the model. {AS_IN_FILE}"),
        DeclareLaunchArgument(
            "use_sim_time", default_value="false", choices=["true", "false"],
            description="Take time from /clock (a simulation, or a bag played with --clock)."),
        DeclareLaunchArgument(
            "log_level", default_value="info", choices=["debug", "info", "warn", "error", "fatal"],
            description="What the node logs."),
        DeclareLaunchArgument(
            "autostart", default_value="true", choices=["true", "false"],
            description="Whether the node configures and activates itself; false leaves that to a lifecycle manager."),
        DeclareLaunchArgument(
            "build_only", default_value="false", choices=["true", "false"],
            description="Build the model's engine into the cache and end, for baking images; the exit status tells."),
    ]
    return LaunchDescription([
        *arguments,
        node("segmentation", "params_file", "model"),
        node("tracking", "tracking_params_file", "tracking_model"),
    ])


def node(task: str, params_file: str, model: str) -> GroupAction:
    """Return the node of a task, if it is asked for. What is given on the command line beats the parameter file."""
    # Parameters come in the order of these actions.
    given = []
    for name, argument in (("image_transport", "image_transport"), ("model", model), ("backend", "backend")):
        value = LaunchConfiguration(argument)
        given.append(SetParameter(name, value, condition=IfCondition(NotEqualsSubstitution(value, ""))))
    started = LifecycleNode(
        # By module and not as package and executable: that runs where the package came by pip too, and with the
        # interpreter that has it. The node itself sets the Fast DDS profile for large images, unless the user has.
        executable=sys.executable,
        arguments=["-m", f"deeprob_perception.nodes.{task}"],
        name=task,
        exec_name=task,
        namespace=LaunchConfiguration("namespace"),
        remappings=[("image", LaunchConfiguration("image_topic"))],
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
        emulate_tty=True,
        on_exit=report_build,
    )
    asked = PythonExpression(["'", LaunchConfiguration("tasks"), f"' in ('{task}', 'all')"])
    return GroupAction(
        [
            OpaqueFunction(function=check_file, args=[params_file]),
            SetParametersFromFile(LaunchConfiguration(params_file)),
            *given,
            SetParameter("use_sim_time", LaunchConfiguration("use_sim_time")),
            SetParameter("autostart", LaunchConfiguration("autostart")),
            SetParameter("build_only", LaunchConfiguration("build_only")),
            started,
        ],
        condition=IfCondition(asked),
    )


def check_file(context: LaunchContext, argument: str) -> None:
    """Refuse a parameter file that is none; launch_ros ends with an assertion that says nothing."""
    path = LaunchConfiguration(argument).perform(context)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument} is {path!r}: there is no such file")


def report_build(event: ProcessExited, context: LaunchContext) -> None:
    """End with an error if an engine could not be built; the status of `ros2 launch` is 0 whatever its processes' are."""
    if event.returncode and LaunchConfiguration("build_only", default="false").perform(context) == "true":
        raise RuntimeError(f"{event.process_name} ended with {event.returncode}: no engine was built")
