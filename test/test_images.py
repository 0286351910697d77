# SPDX-License-Identifier: Apache-2.0
"""messages/: pixels come out right for every encoding, and whatever is wrong ends in an ImageError."""

from array import array as byte_array
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeprob_perception.errors import ImageError, MessageError
from deeprob_perception.messages import cdr, images
from deeprob_perception.messages.encodings import ENCODINGS, Colour

HEADER = cdr.make_header(1_234_567_890_123_456_789, "camera_color_optical_frame")
COLOURS = sorted(ENCODINGS)
QUICK = settings(max_examples=60, deadline=None)


def picture(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """A smooth colour picture, so that chroma at half size loses little."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack((40 + 8 * x, 50 + 10 * y, 220 - 6 * x - 3 * y + seed), -1).clip(0, 255).astype(np.uint8)


def image(encoding: str, height: int, width: int, step: int, data: np.ndarray, big: int = 0):
    return cdr.message(cdr.IMAGE, HEADER, height, width, encoding, big, step, data)


def lines_of(encoding: str, height: int) -> int:
    layout = ENCODINGS[encoding]
    if layout.colour is not Colour.SEMIPLANAR:
        return height
    return height * 3 // 2 if layout.half_chroma else height * 3


def random_image(encoding: str, height: int, width: int, padding: int = 0, seed: int = 0):
    layout = ENCODINGS[encoding]
    step = width * layout.pixel_bytes + padding
    data = np.random.default_rng(seed).integers(0, 256, lines_of(encoding, height) * step, dtype=np.uint8)
    return image(encoding, height, width, step, data)


def encode(bgr: np.ndarray, encoding: str) -> np.ndarray:
    """Write `bgr` in an encoding by plain arithmetic: BT.601 with video range for YUV."""
    rgb = bgr[..., ::-1]
    if encoding in ("mono8", "8UC1"):
        return bgr[..., 1]
    if encoding == "mono16":
        return bgr[..., 1].astype(np.uint16) * 257
    if encoding.endswith("16") and not encoding.startswith("bayer"):
        return encode(bgr, encoding[:-2] + "8").astype(np.uint16) * 257
    if encoding in ("bgr8", "8UC3"):
        return bgr
    if encoding == "rgb8":
        return rgb
    if encoding in ("rgba8", "bgra8", "8UC4"):
        return np.dstack((rgb if encoding == "rgba8" else bgr, np.full(bgr.shape[:2], 77, np.uint8)))
    if encoding.startswith("bayer"):
        mosaic = np.empty(bgr.shape[:2], np.uint8)
        for i, colour in enumerate(encoding[len("bayer_") :][:4]):
            mosaic[i // 2 :: 2, i % 2 :: 2] = bgr[i // 2 :: 2, i % 2 :: 2, "bgr".index(colour)]
        return mosaic.astype(np.uint16) * 257 if encoding.endswith("16") else mosaic
    r, g, b = (rgb[..., i].astype(np.float64) for i in range(3))
    luma = 16 + (65.738 * r + 129.057 * g + 25.064 * b) / 256
    cb = 128 + (-37.945 * r - 74.494 * g + 112.439 * b) / 256
    cr = 128 + (112.439 * r - 94.154 * g - 18.285 * b) / 256
    luma, cb, cr = (plane.round().clip(0, 255).astype(np.uint8) for plane in (luma, cb, cr))
    if encoding in ("yuv422", "uyvy", "yuv422_yuy2", "yuyv"):
        chroma = luma.copy()
        chroma[:, 0::2], chroma[:, 1::2] = cb[:, 0::2], cr[:, 0::2]
        return np.dstack((chroma, luma) if encoding in ("yuv422", "uyvy") else (luma, chroma))
    if encoding == "nv24":
        return np.concatenate((luma, np.dstack((cb, cr)).reshape(2 * luma.shape[0], -1)))
    pair = (cb, cr) if encoding == "nv12" else (cr, cb)
    return np.concatenate((luma, np.dstack([p[::2, ::2] for p in pair]).reshape(luma.shape[0] // 2, -1)))


def message_of(pixels: np.ndarray, encoding: str, height: int, width: int, padding: int = 0, big: int = 0):
    rows = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"), copy=False)
    rows = np.ascontiguousarray(rows).view(np.uint8).reshape(lines_of(encoding, height), -1)
    step = rows.shape[1] + padding
    if encoding == "nv24":  # a row of its chroma takes two lines, and the padding of both comes at its end
        luma, chroma = rows[:height], rows[height:].reshape(height, -1)
        planes = (np.pad(luma, ((0, 0), (0, padding))), np.pad(chroma, ((0, 0), (0, 2 * padding))))
        return image(encoding, height, width, step, np.concatenate([plane.reshape(-1) for plane in planes]))
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    return image(encoding, height, width, step, rows.reshape(-1), big)


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("encoding", COLOURS)
def test_every_encoding_gives_the_picture_back(encoding, padding):
    height, width = 12, 16
    bgr = picture(height, width)
    found = images.to_bgr(message_of(encode(bgr, encoding), encoding, height, width, padding))
    assert found.dtype == np.uint8 and found.shape == (height, width, 3)
    if ENCODINGS[encoding].channels == 1 and ENCODINGS[encoding].to_bgr == cv2.COLOR_GRAY2BGR:
        assert np.array_equal(found, bgr[..., [1, 1, 1]])
    elif encoding.startswith("bayer"):
        assert np.abs(found.astype(int) - bgr)[2:-2, 2:-2].max() <= 10  # neighbours were interpolated
    elif ENCODINGS[encoding].colour is Colour.SEMIPLANAR or "yu" in encoding or encoding == "uyvy":
        assert np.abs(found.astype(int) - bgr).max() <= (3 if encoding == "nv24" else 16)
    else:
        assert np.array_equal(found, bgr)


@pytest.mark.parametrize("encoding", [e for e in COLOURS if ENCODINGS[e].dtype.itemsize == 2])
def test_big_endian_values_are_swapped(encoding):
    pixels = encode(picture(), encoding)
    little, big = (message_of(pixels, encoding, 12, 16, 4, big) for big in (0, 1))
    assert np.array_equal(images.to_bgr(little), images.to_bgr(big))
    assert np.array_equal(images.to_array(big), pixels) and images.to_array(big).dtype.isnative


@pytest.mark.parametrize("encoding", COLOURS)
def test_results_equal_rosbags_image(encoding):
    reference = pytest.importorskip("rosbags.image", reason="rosbags-image is not installed")
    message = random_image(encoding, 12, 16, seed=5)
    if ENCODINGS[encoding].colour is Colour.SEMIPLANAR:
        # rosbags-image takes the rows of luma and chroma together for the height.
        theirs = image(encoding, lines_of(encoding, 12), 16, 16, message.data)
    else:
        theirs = message
    try:
        expected = reference.message_to_cvimage(theirs, "bgr8")
    except reference.ImageError:
        assert encoding in ("8UC1", "8UC4", "nv24"), "rosbags-image reads one more encoding now: compare it"
        return
    difference = np.abs(images.to_bgr(message).astype(int) - expected)
    # It cuts 16-bit values down to 8 bits, OpenCV's convertTo (cv_bridge, ours) rounds.
    assert difference.max() <= (1 if ENCODINGS[encoding].dtype.itemsize == 2 else 0)


@pytest.mark.parametrize("encoding", [e for e in COLOURS if not e.startswith(("nv", "8U"))])
def test_results_equal_cv_bridge(encoding):
    bridge = pytest.importorskip("cv_bridge", reason="cv_bridge is not installed (it comes with a ROS distribution)")
    sensor_msgs = pytest.importorskip("sensor_msgs.msg", reason="sensor_msgs is not installed")
    message = images.fill_image(sensor_msgs.Image(), images.to_array(random_image(encoding, 12, 16, seed=5)), encoding)
    try:
        expected = bridge.CvBridge().imgmsg_to_cv2(message, "bgr8")
    except bridge.CvBridgeError:
        assert encoding in ("uyvy", "yuyv"), "the older names of the two, yuv422 and yuv422_yuy2, are all that it knows"
        return
    assert np.array_equal(images.to_bgr(message), expected)


@pytest.mark.parametrize("padding", [0, 5])
def test_bgr8_is_a_read_only_view_of_the_message_bytes(padding):
    bgr = picture()
    raw = cdr.serialize(message_of(bgr, "bgr8", 12, 16, padding), cdr.IMAGE)
    found = images.to_bgr(cdr.deserialize(raw, cdr.IMAGE))
    assert np.array_equal(found, bgr)
    assert np.shares_memory(found, np.frombuffer(raw, np.uint8)) and not found.flags.writeable


@pytest.mark.parametrize("container", [bytes, bytearray, memoryview, list, lambda d: byte_array("B", d), np.array])
def test_any_container_of_bytes_is_read(container):
    bgr = picture()
    message = SimpleNamespace(
        encoding="bgr8",
        height=12,
        width=16,
        step=48,
        is_bigendian=0,
        data=container(bgr.tobytes()) if container is not np.array else bgr.reshape(-1),
    )
    assert np.array_equal(images.to_bgr(message), bgr)


@pytest.mark.parametrize(("encoding", "array"), [
    ("mono8", picture()[..., 0]),
    ("16UC1", picture()[..., 0].astype(np.uint16) * 200),
    ("32FC1", picture()[..., 0].astype(np.float32) / 7),
    ("32FC5", np.arange(60, dtype=np.float32).reshape(3, 4, 5)),
    ("bgr8", picture()[:, ::2]),
])  # fmt: skip
def test_arrays_survive_the_way_through_messages_and_bytes(encoding, array):
    raw = cdr.serialize(images.make_image(array, encoding, HEADER), cdr.IMAGE)
    message = cdr.deserialize(raw, cdr.IMAGE)
    found = images.to_array(message)
    assert found.dtype == array.dtype and np.array_equal(found, array)
    assert (cdr.stamp_ns(message.header), message.header.frame_id) == (1_234_567_890_123_456_789, HEADER.frame_id)


def test_rclpy_messages_are_filled_read_and_serialised_alike():
    sensor_msgs = pytest.importorskip("sensor_msgs.msg", reason="sensor_msgs is not installed (extra `ros`)")
    serialization = pytest.importorskip("rclpy.serialization", reason="rclpy is not installed (extra `ros`)")
    message = images.fill_image(sensor_msgs.Image(), picture(), "bgr8")
    message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id = 7, 8, "camera"
    assert isinstance(message.data, byte_array)
    assert np.array_equal(images.to_bgr(message), picture())
    theirs = cdr.deserialize(serialization.serialize_message(message), cdr.IMAGE)
    assert np.array_equal(images.to_bgr(theirs), picture()) and cdr.stamp_ns(theirs.header) == 7_000_000_008
    back = serialization.deserialize_message(cdr.serialize(message, cdr.IMAGE), sensor_msgs.Image)
    assert back == message
    packed = cdr.serialize(images.make_compressed(picture(), HEADER, "png"), cdr.COMPRESSED_IMAGE)
    back = serialization.deserialize_message(packed, sensor_msgs.CompressedImage)
    assert back.format == "bgr8; png compressed bgr8" and np.array_equal(images.to_bgr(back), picture())


def compressed(text: str, data: np.ndarray):
    return cdr.message(cdr.COMPRESSED_IMAGE, HEADER, text, data)


def stream(array: np.ndarray, kind: str) -> np.ndarray:
    return cv2.imencode(f".{kind}", array)[1].reshape(-1)


@pytest.mark.parametrize("text", ["jpeg", "bgr8; jpeg compressed bgr8", "rgb8; jpeg compressed bgr8", "jpg", ""])
def test_jpeg_is_read_whatever_the_driver_calls_it(text):
    bgr = picture(48, 64)
    found = images.to_bgr(compressed(text, stream(bgr, "jpg")))
    assert np.abs(found.astype(int) - bgr).mean() < 3


def test_a_stream_that_was_encoded_as_rgb_is_swapped():
    found = images.to_bgr(compressed("rgb8; png compressed rgb8", stream(picture()[..., ::-1], "png")))
    assert np.array_equal(found, picture())


@pytest.mark.parametrize(("text", "array", "expected"), [
    ("png", picture(), picture()),
    ("bgr8; png compressed bgr8", picture(), picture()),
    ("mono8; png compressed", picture()[..., 0], picture()[..., [0, 0, 0]]),
    ("bgra8; png compressed bgra8", encode(picture(), "bgra8"), picture()),
    ("mono16; png compressed", encode(picture(), "mono16"), picture()[..., [1, 1, 1]]),
])  # fmt: skip
def test_png_is_exact(text, array, expected):
    message = compressed(text, stream(array, "png"))
    assert np.array_equal(images.to_array(message), array)
    assert np.array_equal(images.to_bgr(message), expected)


def test_compressed_depth_and_masks_are_exact():
    depth = (picture()[..., 0].astype(np.uint16) * 37).astype(np.uint16)
    message = images.make_compressed(depth, HEADER, "png")
    assert message.format == "16UC1; png compressed" and np.array_equal(images.to_array(message), depth)
    mask = picture()[..., 1] % 7
    message = images.make_compressed(mask, HEADER, "png")
    assert message.format == "mono8; png compressed" and np.array_equal(images.to_array(message), mask)


def test_depth_of_the_compressed_depth_transport_is_read():
    depth = picture()[..., 0].astype(np.uint16) * 37
    header = np.frombuffer(np.array([0], "<i4").tobytes() + np.array([100.0, -1.0], "<f4").tobytes(), np.uint8)
    data = np.concatenate((header, stream(depth, "png")))
    assert np.array_equal(images.to_array(compressed("16UC1; compressedDepth png", data)), depth)
    metres = images.to_array(compressed("32FC1; compressedDepth png", data))
    assert metres.dtype == np.float32 and np.allclose(metres, 100.0 / (depth + 1.0))
    with pytest.raises(ImageError, match="RVL"):
        images.to_array(compressed("16UC1; compressedDepth rvl", np.zeros(40, np.uint8)))


@pytest.mark.parametrize("encoding", COLOURS)
@pytest.mark.parametrize("fault", ["truncated", "too long", "step", "zero", "empty"])
def test_every_wrong_size_is_named(encoding, fault):
    message = random_image(encoding, 12, 16)
    expected = f"{len(message.data)} bytes"
    if fault == "truncated":
        message.data = message.data[:-1]
    elif fault == "too long":
        message.data = np.append(message.data, np.uint8(0))
    elif fault == "step":
        message.step = 16 * ENCODINGS[encoding].pixel_bytes - 1
        expected = f"step of at least {16 * ENCODINGS[encoding].pixel_bytes}"
    elif fault == "zero":
        message.width, expected = 0, "above 0"
    else:
        message.data = message.data[:0]
    for convert in (images.to_bgr, images.to_array):
        with pytest.raises(ImageError, match=expected) as caught:
            convert(message)
        text = str(caught.value)
        assert encoding in text and f"{message.width}x12" in text and f"step {message.step}" in text
        assert f"{len(message.data)} bytes of data" in text


@pytest.mark.parametrize(
    ("encoding", "says"), [("rgb9", "unknown"), ("", "unknown"), ("8UC0", "unknown"), ("rgb8 ", "unknown")]
)
def test_unknown_encodings_are_refused_with_a_list(encoding, says):
    with pytest.raises(ImageError, match=says) as caught:
        images.to_array(image(encoding, 2, 2, 6, np.zeros(12, np.uint8)))
    assert "bayer_rggb8" in str(caught.value)


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1", "32FC3"])
def test_depth_is_no_picture(encoding):
    channels = 3 if encoding == "32FC3" else 1
    array = np.zeros((4, 5, channels) if channels > 1 else (4, 5), np.uint16 if encoding == "16UC1" else np.float32)
    with pytest.raises(ImageError, match="to_array"):
        images.to_bgr(images.make_image(array, encoding, HEADER))
    with pytest.raises(ImageError, match="to_array"):
        images.to_bgr(images.make_compressed(np.zeros((4, 5), np.uint16), HEADER, "png"))


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("keep", [0, 1, 3, 10, 100, 0.5, 0.99])
def test_a_cut_stream_is_refused(kind, keep):
    message = images.make_compressed(picture(120, 160), HEADER, kind)
    size = int(len(message.data) * keep) if isinstance(keep, float) else keep
    message.data = message.data[:size]
    with pytest.raises(ImageError, match=f"{size} bytes"):
        images.to_bgr(message)


def test_a_png_with_a_flipped_bit_is_refused():
    message = images.make_compressed(picture(120, 160), HEADER, "png")
    message.data = message.data.copy()
    message.data[len(message.data) // 2] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        images.to_bgr(message)


def test_a_jpeg_with_padding_behind_its_end_is_read():
    message = images.make_compressed(picture(48, 64), HEADER, "jpeg")
    whole = images.to_bgr(message)
    message.data = np.concatenate((message.data, np.zeros(500, np.uint8)))
    assert np.array_equal(images.to_bgr(message), whole)


def test_a_stream_that_claims_gigapixels_is_refused_unread():
    message = images.make_compressed(picture(), HEADER, "jpeg")
    data = bytearray(message.data.tobytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageError, match="65535x65535"):
        images.to_bgr(compressed("jpeg", np.frombuffer(bytes(data), np.uint8)))


@pytest.mark.parametrize("array", [
    np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5), np.float32), np.zeros((0, 5, 3), np.uint8), np.zeros(5, np.uint8),
])  # fmt: skip
def test_arrays_that_do_not_fit_are_not_written(array):
    with pytest.raises(ImageError, match="expected"):
        images.make_image(array, "bgr8", HEADER)
    with pytest.raises(ImageError, match="expected"):
        images.make_compressed(array, HEADER, "jpeg")


@pytest.mark.parametrize("cut", [0, 3, 4, 20, 60, -1])
def test_cut_messages_are_refused_by_name(cut):
    raw = cdr.serialize(images.make_image(picture(), "bgr8", HEADER), cdr.IMAGE)
    with pytest.raises(MessageError, match="sensor_msgs/msg/Image"):
        cdr.deserialize(raw[:cut], cdr.IMAGE)


@st.composite
def sizes(draw):
    return draw(st.integers(1, 40)), draw(st.integers(1, 40))


@QUICK
@given(
    encoding=st.sampled_from(["bgr8", "rgb8", "bgra8", "rgba8", "mono8", "mono16", "8UC2", "16UC1", "32FC1", "32FC7", "64FC1"]),
    size=sizes(),
    padding=st.integers(0, 9),
    big=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_array_of_any_size_and_step_comes_back_exactly(encoding, size, padding, big, seed):
    from deeprob_perception.messages.encodings import find

    layout = find(encoding)
    shape = size if layout.channels == 1 else (*size, layout.channels)
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(layout.dtype)
    rows = np.ascontiguousarray(array.astype(layout.dtype.newbyteorder(">" if big else "<"))).view(np.uint8)
    rows = np.pad(rows.reshape(size[0], -1), ((0, 0), (0, padding)))
    message = image(encoding, *size, rows.shape[1], rows.reshape(-1), int(big))
    raw = cdr.serialize(message, cdr.IMAGE)
    assert np.array_equal(images.to_array(cdr.deserialize(raw, cdr.IMAGE)), array)


@QUICK
@given(
    encoding=st.sampled_from([*COLOURS, "16UC1", "32FC1", "8UC9", "rgb", "", "32FC99999"]),
    height=st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)),
    width=st.one_of(st.integers(0, 20), st.integers(0, 2**32 - 1)),
    step=st.one_of(st.integers(0, 200), st.integers(0, 2**32 - 1)),
    data=st.binary(max_size=400),
    big=st.integers(0, 255),
)
def test_no_message_ends_in_another_error(encoding, height, width, step, data, big):
    message = image(encoding, height, width, step, np.frombuffer(data, np.uint8), big)
    for convert in (images.to_bgr, images.to_array):
        try:
            found = convert(message)
        except ImageError as error:
            assert repr(encoding) in str(error)
        else:
            assert found.size and found.shape[1] in (width, step)


@QUICK
@given(size=sizes(), encoding=st.sampled_from(COLOURS), fault=st.integers(-300, 300))
def test_only_the_right_amount_of_data_is_taken(size, encoding, fault):
    height, width = size
    message = random_image(encoding, height, width)
    message.data = message.data[:fault] if fault < 0 else np.concatenate((message.data, np.zeros(fault, np.uint8)))
    odd = ENCODINGS[encoding].half_chroma and (height % 2 or width % 2)
    if fault == 0 and not odd:
        try:
            assert images.to_bgr(message).shape == (height, width, 3)
        except ImageError as error:  # OpenCV wants whole Bayer cells and chroma pairs
            assert "OpenCV" in str(error) and (encoding.startswith("bayer") or width % 2)
    else:
        with pytest.raises(ImageError):
            images.to_bgr(message)


@QUICK
@given(
    kind=st.sampled_from(["jpeg", "png"]),
    text=st.sampled_from(["jpeg", "rgb8; jpeg compressed rgb8", "16UC1; compressedDepth", "mono16; png", "", ";;"]),
    flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8),
    keep=st.one_of(st.none(), st.integers(0, 5000)),
)
def test_no_corrupt_stream_ends_in_another_error(kind, text, flips, keep):
    broken = images.make_compressed(picture(24, 32), HEADER, kind).data.copy()
    for place, value in flips:
        broken[place % len(broken)] = value
    broken = broken[:keep]
    for convert in (images.to_bgr, images.to_array):
        try:
            found = convert(compressed(text, broken))
        except ImageError:
            continue
        assert found.size


@QUICK
@given(raw=st.binary(max_size=300))
def test_no_bytes_end_in_another_error_than_a_message_error(raw):
    for msgtype in (cdr.IMAGE, cdr.COMPRESSED_IMAGE):
        try:
            images.to_bgr(cdr.deserialize(raw, msgtype))
        except MessageError:
            continue
