# SPDX-License-Identifier: Apache-2.0
"""Serialised messages (CDR, as DDS and rosbag2 carry them) <-> message objects, by rosbags' typestore.

A node that subscribes with `raw=True` and publishes bytes handles the very objects that replay reads from a bag, and
saves rclpy's own conversion of the pixels in each direction (docs/images.md).
"""

from functools import lru_cache
from typing import Any

import numpy as np
from rosbags.serde import SerdeError
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from deeprob_perception.errors import MessageError

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
STRING = "std_msgs/msg/String"
LABEL_INFO = "vision_msgs/msg/LabelInfo"
# Their payload, `data`, is the last field: serialize() relies on it.
_PAYLOAD_LAST = frozenset({IMAGE, COMPRESSED_IMAGE})
_NO_DATA = np.empty(0, np.uint8)


@lru_cache(maxsize=1)
def typestore() -> Typestore:
    """Return the message types of ROS 2 Jazzy, and of vision_msgs what our nodes publish; all used here are Dashing's, too."""
    store = get_typestore(Stores.ROS2_JAZZY)
    store.register(get_types_from_msg("uint16 class_id\nstring class_name", "vision_msgs/msg/VisionClass"))
    fields = "std_msgs/Header header\nvision_msgs/VisionClass[] class_map\nfloat32 threshold"
    store.register(get_types_from_msg(fields, LABEL_INFO))
    return store


def message(msgtype: str, *fields: Any) -> Any:
    """Return a new rosbags message object of `msgtype`, its fields in the order of the .msg file."""
    return typestore().types[msgtype](*fields)


def deserialize(raw: bytes | bytearray | memoryview, msgtype: str) -> Any:
    """Return the message object that `raw` holds; array fields are views of `raw`, not copies.

    Raises MessageError if the type is unknown or the bytes do not fit it.
    """
    store = typestore()
    if msgtype not in store.fielddefs:
        raise MessageError(f"message type {msgtype!r} is not among the standard ROS 2 messages")
    try:
        # A memoryview, because slicing bytes off a header copies the image once.
        return store.deserialize_cdr(memoryview(raw), msgtype)
    except (SerdeError, ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise MessageError(f"{len(raw)} bytes are not a serialised {msgtype}: {error}") from error


def serialize(msg: Any, msgtype: str) -> bytes:
    """Return `msg` (rosbags' object, or any with the same fields) as little-endian CDR bytes.

    Image and CompressedImage cost one copy of the pixels instead of two: the fields before `data` are serialised with
    an empty payload, whose length is then replaced.
    """
    store = typestore()
    if msgtype not in _PAYLOAD_LAST:
        return bytes(store.serialize_cdr(msg, msgtype, little_endian=True))
    payload = memoryview(msg.data).cast("B") if len(msg.data) else memoryview(b"")
    if msgtype == IMAGE:
        head = message(msgtype, msg.header, msg.height, msg.width, msg.encoding, msg.is_bigendian, msg.step, _NO_DATA)
    else:
        head = message(msgtype, msg.header, msg.format, _NO_DATA)
    before = store.serialize_cdr(head, msgtype, little_endian=True)[:-4]
    return b"".join((before, payload.nbytes.to_bytes(4, "little"), payload))


def stamp_ns(header: Any) -> int:
    """Return the header's stamp in nanoseconds (rclpy's, rosbags' and ROS 1's field names)."""
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def make_header(stamp: int, frame_id: str) -> Any:
    """Return a rosbags std_msgs/Header with `stamp` in nanoseconds."""
    sec, nanosec = divmod(int(stamp), 1_000_000_000)
    return message("std_msgs/msg/Header", message("builtin_interfaces/msg/Time", sec, nanosec), frame_id)


def make_string(text: str) -> Any:
    """Return a rosbags std_msgs/String."""
    return message(STRING, text)
