# SPDX-License-Identifier: Apache-2.0
"""The payload of sensor_msgs/CompressedImage: jpeg, png, and depth as compressed_depth_image_transport sends it.

The format string is `<encoding>; <codec> compressed <order>` from compressed_image_transport, or just `jpeg` or `png`;
the codec is recognised by the stream's own first bytes, since the strings differ from driver to driver.
"""

import struct
import zlib

import cv2
import numpy as np

from deeprob_perception.errors import ImageError
from deeprob_perception.messages.encodings import Encoding, find

_JPEG = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_PNG = b"\x89PNG\r\n\x1a\n"
_DEPTH_HEADER = struct.Struct("<iff")  # compressed_depth_image_transport: format, quantisation A, B
# A stream of a few kilobytes can claim gigabytes of pixels; no camera sends more than this.
_MAX_PIXELS = 1 << 27


def decode(format: str, data: np.ndarray) -> tuple[np.ndarray, Encoding]:
    """Return the picture (`[H, W]` or `[H, W, C]`, uint8, uint16 or float32) and the encoding it is in now.

    format: the message's format string; data: uint8 `[n]`. Raises ImageError for another codec, a truncated or corrupt
    stream.
    """
    what = f"compressed image, format {str(format)[:60]!r}, {data.size} bytes"
    original, _, codec = str(format).partition(";")
    if "compressedDepth" in codec:
        return _decode_depth(original.strip(), data, what)
    pixels = _decode_stream(data, what)
    # compressed_image_transport names the channel order that it handed to the encoder; OpenCV took it for BGR.
    swapped = "compressed rgb" in codec and pixels.ndim == 3
    declared = find(original.strip())
    if pixels.ndim == 2 and declared and declared.channels == 1 and declared.dtype == pixels.dtype:
        return pixels, declared
    depth = 8 * pixels.itemsize
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    name = {1: "mono", 3: "rgb" if swapped else "bgr", 4: "rgba" if swapped else "bgra"}.get(channels)
    encoding = find(f"{name}{depth}")
    if encoding is None:
        raise ImageError(f"{what}: {channels} channels of {depth} bits; expected 1, 3 or 4 of 8 or 16 bits")
    return pixels, encoding


def encode(array: np.ndarray, format: str, quality: int) -> tuple[str, np.ndarray]:
    """Return the format string and the stream (uint8 `[n]`) of `array`; see images.make_compressed."""
    kinds = {("uint8", 3): "bgr8", ("uint8", 2): "mono8", ("uint16", 2): "16UC1"}
    encoding = kinds.get((str(array.dtype), array.ndim))
    what = f"cannot compress an array {array.dtype} {list(array.shape)} as {format!r}"
    fits = encoding is not None and array.size and (array.ndim == 2 or array.shape[2] == 3)
    if not fits or format not in ("jpeg", "png") or (format == "jpeg" and encoding == "16UC1"):
        raise ImageError(f"{what}; expected uint8 [H, W, 3] or [H, W] as 'jpeg' or 'png', or uint16 [H, W] as 'png'")
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if format == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 3]
    try:
        done, data = cv2.imencode(f".{format}", array, options)
    except cv2.error as error:
        raise ImageError(f"{what}: {error.err}") from error
    if not done:
        raise ImageError(what)
    order = " bgr8" if encoding == "bgr8" else ""
    return f"{encoding}; {format} compressed{order}", data.reshape(-1)


def _decode_stream(data: np.ndarray, what: str) -> np.ndarray:
    """Return the pixels of a whole jpeg or png stream; OpenCV alone would return half a picture of a cut one."""
    head = data[:8].tobytes()
    if head.startswith(_JPEG):
        size = _check_jpeg(data.tobytes(), what)
    elif head == _PNG:
        size = _check_png(data.tobytes(), what)
    elif not data.size:
        raise ImageError(f"{what}: it is empty; expected a jpeg or png stream")
    else:
        raise ImageError(
            f"{what}: neither jpeg nor png (it starts with {head.hex(' ')}); "
            "set the driver's compression to one of them"
        )
    if size[0] * size[1] > _MAX_PIXELS:
        raise ImageError(f"{what}: it claims {size[0]}x{size[1]} pixels; at most {_MAX_PIXELS} are read")
    try:
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError(f"{what}: OpenCV cannot decode it ({error.err})") from error
    if pixels is None or not pixels.size:
        raise ImageError(f"{what}: corrupt stream, OpenCV cannot decode it")
    return pixels


def _check_jpeg(stream: bytes, what: str) -> tuple[int, int]:
    """Return width and height after checking that the stream has a frame, a scan and its end mark (ITU T.81)."""
    at, size = 2, (0, 0)
    while at + 9 <= len(stream):
        if stream[at] != 0xFF:
            break
        marker = stream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOFn, table B.1
            height, width = struct.unpack_from(">HH", stream, at + 5)
            size = width, height
        if marker == 0xDA:  # start of scan; embedded thumbnails, with end marks of their own, come before it
            # Drivers that copy whole buffers leave padding behind the end mark, hence the search.
            if stream.rfind(_JPEG_END, at) < 0:
                raise ImageError(f"{what}: truncated jpeg, its end mark is missing")
            return size
        at += 2 + struct.unpack_from(">H", stream, at + 2)[0]
    raise ImageError(f"{what}: truncated or corrupt jpeg, it has no scan")


def _check_png(stream: bytes, what: str) -> tuple[int, int]:
    """Return width and height after checking every chunk's length and CRC (PNG, 5.3) up to IEND."""
    at, size = len(_PNG), (0, 0)
    while at + 12 <= len(stream):
        length, kind = struct.unpack_from(">I4s", stream, at)
        end = at + 8 + length
        if end + 4 > len(stream):
            break
        if struct.unpack_from(">I", stream, end)[0] != zlib.crc32(memoryview(stream)[at + 4 : end]):
            raise ImageError(f"{what}: corrupt png, wrong checksum in chunk {kind!r}")
        if kind == b"IHDR" and length >= 8:
            size = struct.unpack_from(">II", stream, at + 8)
        if kind == b"IEND":
            return size
        at = end + 4
    raise ImageError(f"{what}: truncated png, its end chunk is missing")


def _decode_depth(encoding: str, data: np.ndarray, what: str) -> tuple[np.ndarray, Encoding]:
    """Return depth from compressed_depth_image_transport: a 12-byte header, then a png; float as inverse depth."""
    layout = find(encoding)
    if encoding not in ("16UC1", "32FC1", "mono16") or layout is None:
        raise ImageError(f"{what}: compressed depth of {encoding!r}; expected 16UC1 or 32FC1")
    if data.size <= _DEPTH_HEADER.size or data[_DEPTH_HEADER.size :][:8].tobytes() != _PNG:
        raise ImageError(f"{what}: no png behind the depth header (RVL is not read); set the driver's format to png")
    _, quant_a, quant_b = _DEPTH_HEADER.unpack(data[: _DEPTH_HEADER.size].tobytes())
    pixels = _decode_stream(data[_DEPTH_HEADER.size :], what)
    if pixels.dtype != np.uint16 or pixels.ndim != 2:
        raise ImageError(f"{what}: {pixels.dtype} {list(pixels.shape)} inside; expected 16 bits, one channel")
    if encoding == "32FC1":
        with np.errstate(divide="ignore", invalid="ignore"):
            metres = np.float32(quant_a) / (pixels.astype(np.float32) - np.float32(quant_b))
        metres[pixels == 0] = np.nan
        return metres, layout
    return pixels, layout
