# SPDX-License-Identifier: Apache-2.0
"""What every node of ours is before it does anything: a lifecycle node that logs, refuses politely, and ends when told to."""

import functools
import logging
import signal
import traceback
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.exceptions import ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn

from deeprob_perception.errors import PerceptionError, describe
from deeprob_perception.nodes.dds import use_large_image_profile
from deeprob_perception.nodes.parameters import Settings

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


def reported(
    transition: Callable[[Any, Any], TransitionCallbackReturn],
) -> Callable[[Any, Any], TransitionCallbackReturn]:
    """Let a transition that raises say why, and end unconfigured; rclpy drops the exception."""

    @functools.wraps(transition)
    def call(node: "PerceptionNode", state: Any) -> TransitionCallbackReturn:
        try:
            return transition(node, state)
        except Exception as error:
            node.not_configured(error)
            return TransitionCallbackReturn.ERROR

    return call


class PerceptionNode(LifecycleNode):
    """A lifecycle node whose log has the package's own records too, and which survives a transition that is not allowed.

    Subclasses set `settings`, with `autostart` and `build_only` among them, and release what they hold in `_release`, which is
    called on the way back to unconfigured, after an error, and at the end, perhaps more than once.
    """

    settings: Settings

    def __init__(self, name: str, **node_options: Any):
        super().__init__(name, **node_options)
        self.failure = ""  # why it could not be configured
        self._log_handler = _RosLog(self)
        logging.getLogger("deeprob_perception").addHandler(self._log_handler)
        logging.getLogger("deeprob_perception").setLevel(logging.INFO)
        self._answer_transition = self._service_change_state.callback
        self._service_change_state.callback = self._change_state

    def state(self) -> str:
        """Return the lifecycle state's label (rclpy has no public way to ask)."""
        machine = getattr(self, "_state_machine", None)  # parameters are declared before it exists
        return machine.current_state[1] if machine else "unconfigured"

    def _change_state(self, request: Any, response: Any) -> Any:
        """Answer a transition that the current state does not allow with `success: false`; rclpy dies of it instead."""
        try:
            return self._answer_transition(request, response)
        except Exception as error:
            wish = request.transition.label or request.transition.id
            self.get_logger().error(f"transition {wish} refused in state {self.state()}: {str(error).splitlines()[0]}")
            response.success = False
            return response

    def not_configured(self, error: Exception) -> TransitionCallbackReturn:
        """Stay up and say why configuring failed, whatever a file or a back end threw; `return` it in the `except`."""
        if not self.context.ok():
            return FAILURE  # told to stop meanwhile
        self.failure = describe(error)
        if not isinstance(error, PerceptionError):
            self.get_logger().error("".join(traceback.format_exception(error)))
        self.get_logger().error(f"not configured: {self.failure}. Mend it (`ros2 param set "
                                f"{self.get_fully_qualified_name()} ...`), then configure again")
        self._release()
        return FAILURE

    def on_cleanup(self, state: Any) -> TransitionCallbackReturn:
        self._release()
        return super().on_cleanup(state)

    def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
        self.close()
        return super().on_shutdown(state)

    def on_error(self, state: Any) -> TransitionCallbackReturn:
        self._release()
        return super().on_error(state)

    @abstractmethod
    def _release(self) -> None:
        """Stop, and give back what configuring took; also after one that failed half-way."""

    def close(self) -> None:
        """Release everything; may be called twice."""
        self._release()
        logging.getLogger("deeprob_perception").removeHandler(self._log_handler)


class _RosLog(logging.Handler):
    """Hands the package's own log records (which back end and why, precision) to the node's logger."""

    def __init__(self, node: LifecycleNode):
        super().__init__()
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._logger.error(record.getMessage())
        elif record.levelno >= logging.WARNING:
            self._logger.warning(record.getMessage())
        else:
            self._logger.info(record.getMessage())


def spin(create: Callable[[], PerceptionNode], args: list[str] | None = None) -> int:
    """Run a node until it is told to stop; return the exit status, 2 for parameters it cannot start with.

    With the parameter `build_only` the node is configured and ends; the status is then 1 if that failed.
    """
    use_large_image_profile()
    rclpy.init(args=args)
    try:
        node = create()
    except ParameterException as error:
        rclpy.logging.get_logger("deeprob_perception").fatal(f"cannot start: {error}")
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        if node.settings["build_only"]:
            return 0 if node.trigger_configure() == SUCCESS else 1
        if node.settings["autostart"] and node.trigger_configure() == SUCCESS:
            node.trigger_activate()
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except Exception:
        # A signal ends ROS at once, also under a callback that publishes.
        if rclpy.ok():
            raise
    finally:
        # Ctrl-C under `ros2 launch` comes twice, from the terminal and from launch.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        node.close()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    return 0
