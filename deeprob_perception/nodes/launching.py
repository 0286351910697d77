# SPDX-License-Identifier: Apache-2.0
"""What the launch files have in common: a node by its module, and arguments that beat its file of parameters.

Of launch and launch_ros they use what Humble has, too.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.actions import DeclareLaunchArgument, GroupAction, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, SetParameter, SetParametersFromFile
from launch_ros.parameter_descriptions import ParameterValue

from deeprob_perception.share import share_dir
from launch import Action, Condition, LaunchContext

LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")
SWITCH = ("true", "false")


def argument(name: str, default: str, description: str, choices: Iterable[str] | None = None) -> DeclareLaunchArgument:
    """Declare an argument of a launch file. choices: None is any text."""
    return DeclareLaunchArgument(name, default_value=default, description=description,
                                 choices=None if choices is None else list(choices))


def params_file(node: str, name: str = "params_file") -> DeclareLaunchArgument:
    """Declare the argument `name`: the YAML file of a node's parameters, by default the one that ships with the package."""
    return argument(name, str(share_dir() / "config" / f"{node}.yaml"), f"Parameters of the {node} node, YAML.")


def override(name: str, description: str, choices: Iterable[str] | None = None) -> DeclareLaunchArgument:
    """Declare an argument that is a node's parameter as soon as it is given."""
    return argument(name, "", f"{description} Empty: as params_file has it.", None if choices is None else ("", *choices))


def log_level() -> DeclareLaunchArgument:
    """Declare `log_level`, which `node` reads."""
    return argument("log_level", "info", "What the nodes log.", LOG_LEVELS)


def common() -> list[DeclareLaunchArgument]:
    """Declare what every node with a parameter file takes: namespace, use_sim_time, log_level and autostart."""
    return [
        argument("namespace", "", "Namespace of the nodes and their topics."),
        argument("use_sim_time", "false", "Take time from /clock (a simulation, or a bag played with --clock).", SWITCH),
        log_level(),
        argument("autostart", "true",
                 "Whether a node configures and activates itself; false leaves that to a lifecycle manager.", SWITCH),
    ]  # fmt: skip


def node(name: str, remapped: Mapping[str, Any], namespace: Any = "", **options: Any) -> LifecycleNode:
    """Return a node of this package.

    It is started by its module and not as package and executable: that runs where the package came by pip too, and with the
    interpreter that has it. The node itself sets the Fast DDS profile for large images, unless the user has.

    :param remapped: topic -> its name in the system, text or substitution. options: more of `LifecycleNode`.
    """
    return LifecycleNode(
        executable=sys.executable,
        arguments=["-m", f"deeprob_perception.nodes.{name}"],
        name=name,
        exec_name=name,
        namespace=namespace,
        remappings=list(remapped.items()),
        ros_arguments=["--log-level", LaunchConfiguration("log_level")],
        output="screen",
        emulate_tty=True,
        **options,
    )


def configured(nodes: Iterable[Action], file: str, overrides: Mapping[str, str], numbers: Iterable[str] = (),
               switches: Iterable[str] = (), condition: Condition | None = None) -> GroupAction:  # fmt: skip
    """Return nodes with the parameters of a file, which arguments that are given beat.

    :param file: the argument that names the file. overrides: parameter -> the argument that is its value unless empty.
    :param numbers: those of them that are numbers. switches: more arguments, true or false, of the parameter's name.
    """

    def parameters(context: LaunchContext) -> list[Action]:  # they come in the order of these actions
        path = value_of(context, file)
        if not Path(path).is_file():  # launch_ros ends with an assertion that says nothing
            raise FileNotFoundError(f"{file} is {path!r}: there is no such file")
        given = {parameter: text for parameter, name in overrides.items() if (text := value_of(context, name))}
        return [
            SetParametersFromFile(path),
            *(SetParameter(name, _number(overrides[name], text) if name in numbers else _text(text))
              for name, text in given.items()),
            *(SetParameter(name, value_of(context, name) == "true") for name in ("use_sim_time", "autostart", *switches)),
        ]  # fmt: skip

    return GroupAction([OpaqueFunction(function=parameters), *nodes], condition=condition)


def value_of(context: LaunchContext, name: str) -> str:
    """Return the text of an argument. Humble has no substitution that compares it."""
    return LaunchConfiguration(name).perform(context)


def _text(text: str) -> ParameterValue:
    """Return text in YAML's quotes: it comes to the node on its command line, and a link or a class may be named 0."""
    quoted = text.replace("'", "''")
    return ParameterValue(f"'{quoted}'", value_type=str)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}: give a number") from None
