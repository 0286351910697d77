# SPDX-License-Identifier: Apache-2.0
"""sensor_msgs/PointCloud2 of image points with ids <-> a structured array; without ROS."""

from typing import Any

import numpy as np

from deeprob_perception.errors import MessageError
from deeprob_perception.messages.cdr import message, typestore

POINT_CLOUD = "sensor_msgs/msg/PointCloud2"
# Fields and their PointField datatypes: places in pixels, frames since the seed, 0 to 1, 0 or 1.
TRACK = np.dtype(
    {
        "names": ["u", "v", "id", "age", "confidence", "visible"],
        "formats": ["<f4", "<f4", "<u4", "<u4", "<f4", "u1"],
        "offsets": [0, 4, 8, 12, 16, 20],
        "itemsize": 24,
    }
)
_OFFSETS = dict(zip(TRACK.names or (), (0, 4, 8, 12, 16, 20), strict=True))
_DATATYPES = {"<f4": 7, "<u4": 6, "|u1": 2}


def make_tracks(
    points: np.ndarray, ids: np.ndarray, ages: np.ndarray, confidence: np.ndarray, visible: np.ndarray, header: Any
) -> Any:
    """Return a rosbags PointCloud2, one point a track.

    :param points: u, v in pixels, `[n, 2]`; the others `[n]`. :param header: the image's.
    """
    rows = np.zeros(len(ids), TRACK)
    rows["u"], rows["v"] = points.T
    rows["id"], rows["age"], rows["confidence"], rows["visible"] = ids, ages, confidence, visible
    field = typestore().types["sensor_msgs/msg/PointField"]
    fields = [
        field(name=name, offset=offset, datatype=_DATATYPES[TRACK[name].str], count=1) for name, offset in _OFFSETS.items()
    ]
    data = rows.view(np.uint8) if len(rows) else np.zeros(0, np.uint8)
    return message(POINT_CLOUD, header, 1, len(rows), fields, False, TRACK.itemsize, data.nbytes, data, True)


def read_tracks(msg: Any) -> np.ndarray:
    """Return a message of `make_tracks` as an array of dtype `TRACK`, `[n]`.

    :raises MessageError: for a cloud of other fields.
    """
    names = [field.name for field in msg.fields]
    if names != list(TRACK.names or ()) or msg.point_step != TRACK.itemsize:
        raise MessageError(f"the cloud has the fields {', '.join(names)}; tracks have {', '.join(TRACK.names or ())}")
    return np.frombuffer(bytes(msg.data), TRACK)
