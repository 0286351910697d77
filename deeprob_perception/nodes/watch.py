# SPDX-License-Identifier: Apache-2.0
"""/diagnostics onto stdout, one JSON object a line, for programs that import no ROS: `deeprob demo`, a shell with `jq`.

Run it as `python -m deeprob_perception.nodes.watch`. A line is `{status name: {"level", "message", "values"}}`.
"""

import json

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node

from deeprob_perception.nodes.dds import use_large_image_profile


def line(message: DiagnosticArray) -> str:
    """Return a message as one line of JSON; levels are 0 OK, 1 WARN, 2 ERROR, 3 STALE."""
    return json.dumps({
        status.name: {
            "level": status.level[0],
            "message": status.message,
            "values": {pair.key: pair.value for pair in status.values},
        }
        for status in message.status
    })


def main() -> None:
    """Print every diagnostic array until a signal, or until nobody reads any more."""
    use_large_image_profile()
    rclpy.init()
    node = Node("deeprob_watch", start_parameter_services=False)
    node.create_subscription(DiagnosticArray, "/diagnostics", lambda message: print(line(message), flush=True), 10)
    try:
        rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException, BrokenPipeError):
        pass
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
