# SPDX-License-Identifier: Apache-2.0
"""A simulated arm that touches what its camera sees: `ros2 launch deeprob_perception closed_loop.launch.py target_class:=mug`.

Robot cell, segmentation, target and policy. The policy is disarmed until
`ros2 service call /policy/enable std_srvs/srv/SetBool "{data: true}"`.
"""

import sys

from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments at top level, so that --show-args is complete, and start the four nodes with them."""
    arguments = [
        DeclareLaunchArgument("robot", default_value="capsule_arm", description="capsule_arm, scara, or a URDF file."),
        DeclareLaunchArgument("tip", default_value="tool", description="The link that shall touch; tool, of our own arms."),
        DeclareLaunchArgument(
            "target_class", default_value="ball", choices=["box", "ball", "cylinder", "mug"], description="What to touch."),
        DeclareLaunchArgument("seed", default_value="0", description="Which cell: equal seeds give equal cells."),
        DeclareLaunchArgument("model", default_value="tabletop", description="Of segmentation: a name or an .onnx."),
        DeclareLaunchArgument("policy", default_value="reach", description="Of the policy: a name or an .onnx."),
        DeclareLaunchArgument(
            "log_level", default_value="info", choices=["debug", "info", "warn", "error", "fatal"],
            description="What the nodes log."),
    ]  # fmt: skip
    camera = "camera/image_raw"

    def node(name: str, parameters: dict, remapped: dict) -> LifecycleNode:
        return LifecycleNode(
            # By module: that runs where the package came by pip too, and with the interpreter that has it.
            executable=sys.executable,
            arguments=["-m", f"deeprob_perception.nodes.{name}"],
            name=name,
            exec_name=name,
            namespace="",
            parameters=[parameters],
            remappings=list(remapped.items()),
            ros_arguments=["--log-level", LaunchConfiguration("log_level")],
            output="screen",
            emulate_tty=True,
        )

    def given(name: str) -> ParameterValue:
        return ParameterValue(LaunchConfiguration(name), value_type=str)

    sought = given("target_class")
    return LaunchDescription([
        *arguments,
        node("robot_cell",
             {"robot": given("robot"), "tip": given("tip"), "target_class": sought, "seed": LaunchConfiguration("seed")},
             {"joint_trajectory": "policy/joint_trajectory"}),
        node("segmentation", {"model": given("model"), "image_transport": "compressed"}, {"image": camera}),
        node("target", {"target_class": sought},
             {"mask": "segmentation/mask", "label_info": "segmentation/label_info", "depth": "camera/depth/image_raw",
              "camera_info": "camera/camera_info"}),
        node("policy",
             {"model": given("policy"), "tip": given("tip"), "velocity_share": 0.5,
              "goal_max_age": 3.0, "approach_height": 0.15},
             {"goal": "target/goal"}),
    ])  # fmt: skip
