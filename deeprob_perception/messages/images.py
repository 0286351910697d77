# SPDX-License-Identifier: Apache-2.0
"""sensor_msgs/Image and CompressedImage <-> numpy arrays: the one place where pixels are converted.

Messages are duck-typed, so rclpy's and rosbags' objects (ROS 2 and ROS 1) work alike: one with `format` is a
CompressedImage, one with `encoding` an Image. Whatever is wrong with a message ends in an ImageError that names its
encoding, size, step and data length, and what they should be.
"""

from array import array as byte_array
from typing import Any

import cv2
import numpy as np

from deeprob_perception.errors import ImageError
from deeprob_perception.messages import compression
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE, message
from deeprob_perception.messages.encodings import ENCODINGS, Colour, Encoding, find


def to_bgr(msg: Any) -> np.ndarray:
    """Return the picture as uint8 `[H, W, 3]`, BGR.

    For `bgr8` (and `8UC3`) it is a read-only view of the message's data, without a copy, whatever the step. 16-bit
    values are scaled by 255/65535 and rounded, alpha is dropped, YUV is BT.601 with video range (as in cv_bridge).

    Raises ImageError for a malformed message and for encodings which are no colour (16UC1, 32FC1, ...).
    """
    if _is_compressed(msg):
        pixels, encoding = compression.decode(msg.format, _data(msg))
        return _colour(pixels, encoding, msg)
    encoding = _encoding(msg)
    if encoding.colour is Colour.NONE:
        raise ImageError(
            f"{_describe(msg)} holds depth or data, not colours: choose a colour or mono topic, "
            "or read it with to_array()"
        )
    return _colour(_pixels(msg, encoding), encoding, msg)


def to_array(msg: Any) -> np.ndarray:
    """Return the values as they are: `[H, W]` or `[H, W, C]` in the encoding's dtype and channel order.

    Native byte order; a read-only view of the message where its byte order is the machine's. Masks (mono8), depth
    (16UC1 in mm, 32FC1 in m: REP 118) and feature maps are read by this. nv12 and nv21 give `[H * 3 / 2, step]`,
    nv24 `[H * 3, step]`. A compressed colour picture comes in OpenCV's order, BGR or BGRA.
    Raises ImageError for a malformed message.
    """
    if _is_compressed(msg):
        return compression.decode(msg.format, _data(msg))[0]
    return _pixels(msg, _encoding(msg))


def make_image(array: np.ndarray, encoding: str, header: Any) -> Any:
    """Return a rosbags sensor_msgs/Image of `array`, `[H, W]` or `[H, W, C]`; its data is a view where contiguous."""
    height, width, step, data = _packed(array, encoding)
    return message(IMAGE, header, height, width, encoding, 0, step, data)


def fill_image(msg: Any, array: np.ndarray, encoding: str) -> Any:
    """Fill rclpy's (or any) Image message with `array`, leaving its header, and return it.

    The bytes pass through array.array("B"), the one type which rclpy takes over unchecked: anything else is tens of
    times slower there.
    """
    height, width, step, data = _packed(array, encoding)
    values = byte_array("B")
    values.frombytes(data.data)
    msg.height, msg.width, msg.encoding, msg.is_bigendian, msg.step, msg.data = height, width, encoding, 0, step, values
    return msg


def make_compressed(array: np.ndarray, header: Any, format: str = "jpeg", quality: int = 90) -> Any:
    """Return a rosbags sensor_msgs/CompressedImage of `array`.

    array: uint8 `[H, W, 3]` BGR, uint8 `[H, W]` (mono8) or, png only, uint16 `[H, W]` (16UC1).
    format: "jpeg" (`quality` 1 to 100) or "png" (lossless). The message's format string is the one that
    compressed_image_transport writes, such as `bgr8; jpeg compressed bgr8`.
    """
    text, data = compression.encode(array, format, quality)
    return message(COMPRESSED_IMAGE, header, text, data)


def _is_compressed(msg: Any) -> bool:
    return hasattr(msg, "format")


def _describe(msg: Any) -> str:
    if _is_compressed(msg):
        return f"compressed image, format {str(msg.format)[:60]!r}, {_length(msg)} bytes"
    return (
        f"image, encoding {str(msg.encoding)[:40]!r}, {msg.width}x{msg.height}, step {msg.step}, "
        f"{_length(msg)} bytes of data"
    )


def _length(msg: Any) -> int | str:
    try:
        return len(msg.data)
    except TypeError:
        return f"{type(msg.data).__name__}, not"


def _data(msg: Any) -> np.ndarray:
    """Return the message's data as uint8 `[n]`, without a copy for array.array, bytes and numpy arrays."""
    data = msg.data
    try:
        if isinstance(data, np.ndarray):
            values = data.reshape(-1).view(np.uint8)
        elif isinstance(data, (bytes, bytearray, memoryview, byte_array)):
            values = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
        else:
            values = np.array(data, np.uint8).reshape(-1)
    except (TypeError, ValueError, OverflowError) as error:
        raise ImageError(f"{_describe(msg)}: its data is no sequence of bytes ({error})") from error
    view = values.view()
    view.flags.writeable = False  # an alias of the message: nobody may draw into it
    return view


def _encoding(msg: Any) -> Encoding:
    encoding = find(msg.encoding)
    if encoding is None:
        raise ImageError(
            f"{_describe(msg)}: unknown encoding; known are {', '.join(ENCODINGS)} and generic ones "
            "such as 16UC1 and 32FC1"
        )
    return encoding


def _pixels(msg: Any, encoding: Encoding) -> np.ndarray:
    """Return a raw Image's values, `[H, W]` or `[H, W, C]` (semi-planar: `[rows, step]`), after checking its size."""
    height, width, step = int(msg.height), int(msg.width), int(msg.step)
    if height <= 0 or width <= 0:
        raise ImageError(f"{_describe(msg)}: a picture of no size; expected width and height above 0")
    row = width * encoding.pixel_bytes
    rows = height
    if encoding.colour is Colour.SEMIPLANAR:
        if encoding.half_chroma and (height % 2 or width % 2):
            raise ImageError(f"{_describe(msg)}: expected an even width and height")
        rows = height + height // 2 if encoding.half_chroma else 3 * height
    if step < row:
        raise ImageError(
            f"{_describe(msg)}: expected a step of at least {row} bytes "
            f"({width} pixels of {encoding.pixel_bytes} bytes)"
        )
    data = _data(msg)
    if data.size != rows * step:
        what = "step x height" if rows == height else f"step x {rows} rows of luma and chroma"
        raise ImageError(
            f"{_describe(msg)}: expected {rows * step} bytes ({what}), so it is "
            f"{'truncated' if data.size < rows * step else 'too long'}"
        )
    lines = data.reshape(rows, step)
    if encoding.colour is Colour.SEMIPLANAR:
        return lines
    dtype = encoding.dtype.newbyteorder(">" if msg.is_bigendian else "<")
    values = lines[:, :row].view(dtype)
    if not values.dtype.isnative or not values.flags.aligned:
        values = values.astype(encoding.dtype)
    return values if encoding.channels == 1 else values.reshape(height, width, encoding.channels)


def _colour(pixels: np.ndarray, encoding: Encoding, msg: Any) -> np.ndarray:
    """Return checked pixels as uint8 `[H, W, 3]` BGR."""
    try:
        if encoding.colour is Colour.SEMIPLANAR:
            bgr = _semiplanar(pixels, encoding, int(msg.height), int(msg.width))
        elif encoding.colour is Colour.CONVERT:
            bgr = cv2.cvtColor(pixels, encoding.to_bgr)
        elif encoding.colour is Colour.BGR:
            bgr = pixels
        else:
            raise ImageError(
                f"{_describe(msg)} holds depth or data, not colours: choose a colour or mono topic, "
                "or read it with to_array()"
            )
    except cv2.error as error:
        raise ImageError(f"{_describe(msg)}: OpenCV cannot convert it ({error.err})") from error
    if bgr.dtype == np.uint16:
        # Rounded, as OpenCV's convertTo and so cv_bridge do; rosbags-image cuts off.
        bgr = cv2.convertScaleAbs(bgr, alpha=255.0 / 65535.0)
    return bgr


def _semiplanar(lines: np.ndarray, encoding: Encoding, height: int, width: int) -> np.ndarray:
    luma = lines[:height, :width]
    if encoding.half_chroma:
        # OpenCV wants luma over chroma in one array without padding.
        return cv2.cvtColor(np.ascontiguousarray(lines[:, :width]), encoding.to_bgr)
    # Full chroma (4:4:4) is two bytes a pixel, so two lines of `step` hold one row. With every luma value doubled in
    # both directions it becomes a 4:2:0 picture of twice the size, which OpenCV converts by the arithmetic of NV12.
    chroma = lines[height:].reshape(height, -1)[:, : 2 * width]
    doubled = np.empty((3 * height, 2 * width), np.uint8)
    cv2.resize(luma, (2 * width, 2 * height), dst=doubled[: 2 * height], interpolation=cv2.INTER_NEAREST)
    doubled[2 * height :] = chroma
    return np.ascontiguousarray(cv2.cvtColor(doubled, encoding.to_bgr)[::2, ::2])


def _packed(array: np.ndarray, encoding: str) -> tuple[int, int, int, np.ndarray]:
    """Return height, width, step and the bytes (uint8 `[n]`) of `array`, after checking that it fits `encoding`."""
    layout = find(encoding)
    if layout is None or layout.colour is Colour.SEMIPLANAR:
        raise ImageError(f"cannot write an image with encoding {encoding!r}; choose one such as bgr8, mono8, 16UC1")
    channels = 1 if array.ndim == 2 else array.shape[-1]
    if array.ndim not in (2, 3) or channels != layout.channels or array.dtype != layout.dtype or not array.size:
        raise ImageError(
            f"an array {array.dtype} {list(array.shape)} is no {encoding} image; expected {layout.dtype} "
            f"[H, W{'' if layout.channels == 1 else f', {layout.channels}'}]"
        )
    height, width = array.shape[:2]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return height, width, width * layout.pixel_bytes, data
