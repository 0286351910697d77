# SPDX-License-Identifier: Apache-2.0
"""What differs between the distributions of ROS 2, from Humble on, under one name each."""

from rclpy.subscription import Subscription

try:
    from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks, UnsupportedEventTypeError

__all__ = ["TELLS_MESSAGE_INFO", "SubscriptionEventCallbacks", "UnsupportedEventTypeError"]

# Whether a callback with a second parameter gets a message's times there; Humble calls it with the message alone.
TELLS_MESSAGE_INFO = hasattr(Subscription, "CallbackType")
