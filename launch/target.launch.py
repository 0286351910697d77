# SPDX-License-Identifier: Apache-2.0
"""Where an object is: `ros2 launch deeprob_perception target.launch.py target_class:=mug depth_topic:=/camera/depth`."""

from launch.substitutions import LaunchConfiguration

from deeprob_perception.nodes import launching
from launch import LaunchDescription

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
    target = launching.node("target", {name: LaunchConfiguration(f"{name}_topic") for name in TOPICS},
                            LaunchConfiguration("namespace"))
    return LaunchDescription([
        launching.params_file("target"),
        *(launching.argument(f"{name}_topic", topic, text) for name, (topic, text) in TOPICS.items()),
        *(launching.override(name, text) for name, text in PARAMETERS.items()),
        *launching.common(),
        launching.configured([target], "params_file", {name: name for name in PARAMETERS}),
    ])  # fmt: skip
