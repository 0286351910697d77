# SPDX-License-Identifier: Apache-2.0
"""The encodings of sensor_msgs/Image: how the pixels lie in memory, and how OpenCV turns them into BGR.

Names from sensor_msgs/image_encodings.hpp. OpenCV names a Bayer pattern by the second row's second and third pixel,
ROS by the first two rows' first two: `bayer_rggb8` is OpenCV's BG.
"""

import re
from dataclasses import dataclass
from enum import Enum

import cv2
import numpy as np

_GENERIC = re.compile(r"(8U|8S|16U|16S|32S|32F|64F)(?:C([1-9][0-9]{0,4}))?")
_DTYPES = {"8U": "u1", "8S": "i1", "16U": "u2", "16S": "i2", "32S": "i4", "32F": "f4", "64F": "f8"}


class Colour(Enum):
    """What the values of an encoding mean."""

    BGR = "bgr"  # already in order: a view is enough
    CONVERT = "convert"  # one cv2.cvtColor call
    SEMIPLANAR = "semiplanar"  # a plane of Y, then one of interleaved chroma
    NONE = "none"  # depth, features: no colour


@dataclass(frozen=True)
class Encoding:
    """One encoding: `dtype` (numpy, native order), interleaved `channels`, and the way to BGR."""

    name: str
    dtype: np.dtype
    channels: int
    colour: Colour = Colour.NONE
    to_bgr: int = -1  # cv2.COLOR_* code, for CONVERT and SEMIPLANAR
    half_chroma: bool = False  # semiplanar: chroma at half size (4:2:0), else at full size (4:4:4)

    @property
    def pixel_bytes(self) -> int:
        """Bytes a pixel takes in a row."""
        return self.dtype.itemsize * self.channels


def _table() -> dict[str, Encoding]:
    u1, u2 = np.dtype("u1"), np.dtype("u2")
    rows = [
        Encoding("bgr8", u1, 3, Colour.BGR),
        Encoding("8UC3", u1, 3, Colour.BGR),
        Encoding("bgr16", u2, 3, Colour.BGR),
        Encoding("8UC1", u1, 1, Colour.CONVERT, cv2.COLOR_GRAY2BGR),
        Encoding("8UC4", u1, 4, Colour.CONVERT, cv2.COLOR_BGRA2BGR),
    ]
    for depth, dtype in (("8", u1), ("16", u2)):
        rows += [
            Encoding(f"mono{depth}", dtype, 1, Colour.CONVERT, cv2.COLOR_GRAY2BGR),
            Encoding(f"rgb{depth}", dtype, 3, Colour.CONVERT, cv2.COLOR_RGB2BGR),
            Encoding(f"rgba{depth}", dtype, 4, Colour.CONVERT, cv2.COLOR_RGBA2BGR),
            Encoding(f"bgra{depth}", dtype, 4, Colour.CONVERT, cv2.COLOR_BGRA2BGR),
            Encoding(f"bayer_rggb{depth}", dtype, 1, Colour.CONVERT, cv2.COLOR_BayerBG2BGR),
            Encoding(f"bayer_bggr{depth}", dtype, 1, Colour.CONVERT, cv2.COLOR_BayerRG2BGR),
            Encoding(f"bayer_gbrg{depth}", dtype, 1, Colour.CONVERT, cv2.COLOR_BayerGR2BGR),
            Encoding(f"bayer_grbg{depth}", dtype, 1, Colour.CONVERT, cv2.COLOR_BayerGB2BGR),
        ]
    for name in ("yuv422", "uyvy"):
        rows.append(Encoding(name, u1, 2, Colour.CONVERT, cv2.COLOR_YUV2BGR_UYVY))
    for name in ("yuv422_yuy2", "yuyv"):
        rows.append(Encoding(name, u1, 2, Colour.CONVERT, cv2.COLOR_YUV2BGR_YUY2))
    rows += [
        Encoding("nv12", u1, 1, Colour.SEMIPLANAR, cv2.COLOR_YUV2BGR_NV12, half_chroma=True),
        Encoding("nv21", u1, 1, Colour.SEMIPLANAR, cv2.COLOR_YUV2BGR_NV21, half_chroma=True),
        # OpenCV has no NV24; its chroma lies in NV12's order (Cb first), see images.py.
        Encoding("nv24", u1, 1, Colour.SEMIPLANAR, cv2.COLOR_YUV2BGR_NV12, half_chroma=False),
    ]
    return {row.name: row for row in rows}


ENCODINGS = _table()


def find(name: str) -> Encoding | None:
    """Return the encoding called `name`, also generic ones such as `16UC1` and `32FC384`; None if there is none."""
    known = ENCODINGS.get(name)
    if known is None and (match := _GENERIC.fullmatch(name)):
        depth, channels = match.groups()
        return Encoding(name, np.dtype(_DTYPES[depth]), int(channels or 1))
    return known
