# SPDX-License-Identifier: Apache-2.0
"""A simulated arm that touches what its camera sees: `ros2 launch deeprob_perception closed_loop.launch.py target_class:=mug`.

Robot cell, segmentation, target and policy. The policy is disarmed until
`ros2 service call /policy/enable std_srvs/srv/SetBool "{data: true}"`.
"""

from launch.substitutions import LaunchConfiguration
from launch_ros.parameter_descriptions import ParameterValue

from deeprob_perception.nodes.launching import argument, log_level, node
from launch import LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments at top level, so that --show-args is complete, and start the four nodes with them."""

    def given(name: str) -> ParameterValue:
        return ParameterValue(LaunchConfiguration(name), value_type=str)

    sought = given("target_class")
    return LaunchDescription([
        argument("robot", "capsule_arm", "capsule_arm, scara, or a URDF file."),
        argument("tip", "tool", "The link that shall touch; tool, of our own arms."),
        argument("target_class", "ball", "What to touch.", ("box", "ball", "cylinder", "mug")),
        argument("seed", "0", "Which cell: equal seeds give equal cells."),
        argument("model", "tabletop", "Of segmentation: a name or an .onnx."),
        argument("policy", "reach", "Of the policy: a name or an .onnx."),
        log_level(),
        node("robot_cell", {"joint_trajectory": "policy/joint_trajectory"},
             parameters=[{"robot": given("robot"), "tip": given("tip"), "target_class": sought,
                          "seed": LaunchConfiguration("seed")}]),
        node("segmentation", {"image": "camera/image_raw"},
             parameters=[{"model": given("model"), "image_transport": "compressed"}]),
        node("target", {"mask": "segmentation/mask", "label_info": "segmentation/label_info", "depth": "camera/depth/image_raw",
                        "camera_info": "camera/camera_info"},
             parameters=[{"target_class": sought}]),
        node("policy", {"goal": "target/goal"},
             parameters=[{"model": given("policy"), "tip": given("tip"), "velocity_share": 0.5, "goal_max_age": 3.0,
                          "approach_height": 0.15}]),
    ])  # fmt: skip
