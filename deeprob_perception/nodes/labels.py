# SPDX-License-Identifier: Apache-2.0
"""The names of a mask's classes on a topic: vision_msgs/LabelInfo where that is installed, else a std_msgs/String of JSON."""

import json
from typing import Any

from rclpy.type_support import check_for_type_support
from std_msgs.msg import String

try:
    from vision_msgs.msg import LabelInfo, VisionClass

    check_for_type_support(LabelInfo)
except Exception:  # not on PyPI, without LabelInfo before 4.1, or its libraries do not load
    LabelInfo = None

# What can be read, the best first.
LABEL_TYPES: tuple[type, ...] = (String,) if LabelInfo is None else (LabelInfo, String)


def label_info(class_names: list[str], stamp: Any) -> Any:
    """Return the message of the type `LABEL_TYPES[0]`. A String holds `{"0": "background", ...}`.

    :param stamp: builtin_interfaces/Time, when these names began to hold.
    """
    if LabelInfo is None:
        return String(data=json.dumps(dict(enumerate(class_names))))
    message = LabelInfo(threshold=0.0)
    message.header.stamp = stamp
    for index, name in enumerate(class_names):
        message.class_map.append(VisionClass(class_id=index, class_name=name))
    return message


def names_of(message: Any) -> list[str]:
    """Return the classes' names by id, "" for an id without one. :raises ValueError: when the message has none."""
    try:
        if isinstance(message, String):
            pairs = {int(key): str(name) for key, name in json.loads(message.data).items()}
        else:
            pairs = {entry.class_id: entry.class_name for entry in message.class_map}
        last = max(pairs, default=-1)
        if not 0 <= last < 65536:  # of a 16-bit mask
            raise ValueError
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"no names of classes: {str(message)[:200]}") from error
    return [pairs.get(i, "") for i in range(last + 1)]


def ros_name(kind: type) -> str:
    """Return a message class's name as the graph has it, `std_msgs/msg/String`."""
    package, _, _ = kind.__module__.partition(".")
    return f"{package}/msg/{kind.__name__}"
