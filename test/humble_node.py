# SPDX-License-Identifier: Apache-2.0
"""The segmentation node where rclpy names things as Humble's does, over a middleware that does not tell of lost messages."""

import sys
from types import ModuleType

import rclpy.lifecycle  # noqa: F401  has what it needs of the module that is hidden below

try:
    from rclpy import event_handler
except ImportError:  # it is Humble's
    from rclpy import qos_event as event_handler


class Callbacks(event_handler.SubscriptionEventCallbacks):
    def create_event_handlers(self, *arguments):
        if self.message_lost:
            raise event_handler.UnsupportedEventTypeError("event type is not supported")
        return super().create_event_handlers(*arguments)


humble = ModuleType("rclpy.qos_event")
humble.SubscriptionEventCallbacks = Callbacks
humble.UnsupportedEventTypeError = event_handler.UnsupportedEventTypeError
sys.modules["rclpy.qos_event"] = humble
sys.modules["rclpy.event_handler"] = None

from deeprob_perception.nodes.segmentation import main  # noqa: E402

main()
