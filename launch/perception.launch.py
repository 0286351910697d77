# SPDX-License-Identifier: Apache-2.0
"""Perception of one camera: `ros2 launch deeprob_perception perception.launch.py image_topic:=/camera/image_raw`."""

from launch.conditions import IfCondition
from launch.events.process import ProcessExited
from launch.substitutions import LaunchConfiguration, PythonExpression

from deeprob_perception.nodes import launching
from deeprob_perception.nodes.launching import argument, override
from launch import Action, LaunchContext, LaunchDescription


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments at top level, so that --show-args is complete, and start the nodes with them."""
    return LaunchDescription([
        argument("tasks", "segmentation", "Which nodes run on the camera.", ("segmentation", "tracking", "all")),
        launching.params_file("segmentation"),
        launching.params_file("tracking", "tracking_params_file"),
        argument("image_topic", "camera/image_raw",
                 "The camera's topic; with image_transport:=compressed, the one with /compressed after it is read."),
        override("image_transport", "sensor_msgs/Image or CompressedImage.", ("raw", "compressed")),
        override("model", "Of segmentation: a name (`deeprob models list`) or the path of an .onnx."),
        override("tracking_model", "Of tracking, likewise: a model of features."),
        override("backend", "What runs the model.", ("auto", "tensorrt", "openvino", "onnxruntime", "torch")),
        *launching.common(),
        argument("build_only", "false", "Build the model's engine into the cache and end, for baking images; the exit status "
                 "tells.", launching.SWITCH),
        of_camera("segmentation", "params_file", "model"),
        of_camera("tracking", "tracking_params_file", "tracking_model"),
    ])  # fmt: skip


def of_camera(task: str, params_file: str, model: str) -> Action:
    """Return the node of a task, if it is asked for."""
    started = launching.node(
        task, {"image": LaunchConfiguration("image_topic")}, LaunchConfiguration("namespace"), on_exit=report_build)
    return launching.configured(
        [started], params_file, {"image_transport": "image_transport", "model": model, "backend": "backend"},
        switches=["build_only"],
        condition=IfCondition(PythonExpression(["'", LaunchConfiguration("tasks"), f"' in ('{task}', 'all')"])),
    )  # fmt: skip


def report_build(event: ProcessExited, context: LaunchContext) -> None:
    """End with an error if an engine could not be built; the status of `ros2 launch` is 0 whatever its processes' are."""
    if event.returncode and LaunchConfiguration("build_only", default="false").perform(context) == "true":
        raise RuntimeError(f"{event.process_name} ended with {event.returncode}: no engine was built")
