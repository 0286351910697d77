# SPDX-License-Identifier: Apache-2.0
"""Stamps inside serialised messages, read and replaced without deserialising anything. Imports no ROS."""

import struct
from functools import lru_cache

from deeprob_perception.errors import MessageError
from deeprob_perception.messages.cdr import typestore

# CDR: a 4-byte encapsulation whose second byte's lowest bit is 1 for little endian, then the fields from the first on.
# A header that is the first field begins with its stamp: int32 seconds, uint32 nanoseconds.
_STAMP = slice(4, 12)


@lru_cache
def has_header(msgtype: str) -> bool:
    """Return whether messages of this type begin with a std_msgs/Header; False for types that are not known here."""
    definition = typestore().fielddefs.get(msgtype)
    return bool(definition and definition[1] and definition[1][0][1][1] == "std_msgs/msg/Header")


def stamp_of(raw: bytes) -> int:
    """Return the stamp in ns of a serialised message that begins with a header."""
    sec, nanosec = struct.unpack(_layout(raw), raw[_STAMP])
    return sec * 1_000_000_000 + nanosec


def restamped(raw: bytes, stamp: int) -> bytes:
    """Return a copy of a serialised message that begins with a header, with `stamp` (ns) in it."""
    copy = bytearray(raw)
    copy[_STAMP] = struct.pack(_layout(raw), *divmod(stamp, 1_000_000_000))
    return bytes(copy)


def _layout(raw: bytes) -> str:
    if len(raw) < _STAMP.stop:
        raise MessageError(f"a message of {len(raw)} bytes is too short to begin with a header")
    return "<iI" if raw[1] & 1 else ">iI"
