# SPDX-License-Identifier: Apache-2.0
"""Parameters as a table: declared with descriptors, all checked before any is set, fixed ones refused with a reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter


@dataclass(frozen=True)
class Setting:
    """One parameter.

    live: may be set while the node is configured. between: inclusive range of a number.
    """

    name: str
    default: Any
    description: str
    live: bool = False
    between: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()

    def descriptor(self) -> ParameterDescriptor:
        """Return the descriptor that `ros2 param describe` shows; ranges in it are enforced by rclpy."""
        fixed = "" if self.live else " Fixed while the node is configured."
        descriptor = ParameterDescriptor(description=self.description + fixed)
        if self.choices:
            descriptor.additional_constraints = f"one of {', '.join(self.choices)}"
        if self.between and isinstance(self.default, int):
            low, high = (int(bound) for bound in self.between)
            descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
        elif self.between:
            descriptor.floating_point_range = [FloatingPointRange(from_value=self.between[0], to_value=self.between[1])]
        return descriptor


class Settings:
    """The parameters of a node: declares them and answers whether they may be set.

    state: returns the lifecycle state's label; what is not `live` may be set in `unconfigured` only.
    """

    def __init__(self, node: Node, settings: Iterable[Setting], state: Callable[[], str]):
        self._node = node
        self._state = state
        self._settings = {setting.name: setting for setting in settings}
        self._checks: dict[str, Callable[[Any], str]] = {}
        node.add_on_set_parameters_callback(self._allowed)
        for setting in self._settings.values():
            node.declare_parameter(setting.name, setting.default, setting.descriptor())

    def __getitem__(self, name: str) -> Any:
        return self._node.get_parameter(name).value

    def add_check(self, name: str, check: Callable[[Any], str]) -> None:
        """Ask `check` too before `name` is set; it returns what is wrong with a value, or ""."""
        self._checks[name] = check

    def _allowed(self, parameters: list[Parameter]) -> SetParametersResult:
        """Refuse the whole set, with every reason, if one value is wrong or may not be set now."""
        reasons = [reason for parameter in parameters if (reason := self._refusal(parameter))]
        return SetParametersResult(successful=not reasons, reason="; ".join(reasons))

    def _refusal(self, parameter: Parameter) -> str:
        setting = self._settings.get(parameter.name)
        if setting is None:  # use_sim_time, qos_overrides...: rclpy's own
            return ""
        state = self._state()
        if not setting.live and state != "unconfigured" and self._node.has_parameter(parameter.name):
            node = self._node.get_fully_qualified_name()
            steps = ["deactivate", "cleanup"] if state == "active" else ["cleanup"]
            commands = ", ".join(f"`ros2 lifecycle set {node} {step}`" for step in steps)
            return f"{parameter.name} is fixed while the node is {state}: {commands}, set it, then configure and activate"
        if setting.choices and parameter.value not in setting.choices:
            return f"{setting.name} is {parameter.value!r}, but has to be one of {', '.join(setting.choices)}"
        check = self._checks.get(setting.name)
        return check(parameter.value) if check else ""
