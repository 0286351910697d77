# SPDX-License-Identifier: Apache-2.0
"""bags/: every kind of bag is read to its last whole message, and what cannot be read is named with a remedy."""

import sqlite3
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from deeprob_perception import video
from deeprob_perception.bags import BagWriter, open_bag
from deeprob_perception.bags.from_images import START_NS, write_bag
from deeprob_perception.errors import BagError, DataError
from deeprob_perception.messages import cdr, images

SECOND = 1_000_000_000


def picture(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_mcap(path: Path, frames: int = 12) -> Path:
    with BagWriter(path) as bag:
        bag.add_topic("/names", cdr.STRING, latched=True)
        bag.add_topic("/camera/image_raw", cdr.IMAGE)
        bag.write("/names", SECOND, cdr.make_string("a"))
        for i in range(frames):
            stamp = SECOND + i * SECOND // 10
            bag.write("/camera/image_raw", stamp, images.make_image(picture(i), "bgr8", cdr.make_header(stamp, "cam")))
    return path


def write_folder(path: Path, plugin=StoragePlugin.SQLITE3, mode=CompressionMode.NONE, frames: int = 12, first: int = 0) -> Path:
    writer = Writer(path, version=8, storage_plugin=plugin)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        topic = writer.add_connection("/camera/image_raw", cdr.IMAGE, typestore=cdr.typestore())
        for i in range(first, first + frames):
            stamp = SECOND + i * SECOND // 10
            message = images.make_image(picture(i), "bgr8", cdr.make_header(stamp, "cam"))
            writer.write(topic, stamp, cdr.serialize(message, cdr.IMAGE))
    return path


def frames_of(path: Path) -> tuple[list[int], list[str]]:
    """Return the seeds of the pictures that are read, in order, and the warnings."""
    warnings: list[str] = []
    seeds = []
    with open_bag(path, warn=warnings.append) as bag:
        for message in bag.messages(["/camera/image_raw"]):
            found = cdr.deserialize(message.raw, message.topic.msgtype)
            seed = round((message.log_time - SECOND) * 10 / SECOND)
            assert cdr.stamp_ns(found.header) == message.log_time
            assert np.array_equal(images.to_bgr(found), picture(seed))
            seeds.append(seed)
        assert bag.damage == warnings
    return seeds, warnings


def test_what_is_written_is_read_back(tmp_path):
    path = write_mcap(tmp_path / "deep" / "er" / "new.mcap")
    assert frames_of(path) == (list(range(12)), [])
    assert list(path.parent.iterdir()) == [path], "temporary files are left behind"
    with open_bag(path) as bag:
        assert [(t.name, t.msgtype, t.count, t.latched) for t in bag.topics] == [
            ("/camera/image_raw", cdr.IMAGE, 12, False),
            ("/names", cdr.STRING, 1, True),
        ]
        assert cdr.deserialize(next(bag.messages(["/names"])).raw, cdr.STRING).data == "a"


def test_written_mcap_has_what_ros2_bag_looks_for(tmp_path):
    data = write_mcap(tmp_path / "new.mcap").read_bytes()
    assert data.startswith(b"\x89MCAP0\r\n") and data.endswith(b"\x89MCAP0\r\n")
    assert b"serialized_metadata" in data and b"- new.mcap" in data  # rosbag2's own metadata, naming the file
    assert b"zstd" in data
    summary = struct.unpack_from("<Q", data, len(data) - 28)[0]
    assert b"ros2msg" in data[summary:] and data[summary] == 3  # schemas are repeated in the summary


def test_a_failed_recording_leaves_the_old_file(tmp_path):
    path = write_mcap(tmp_path / "new.mcap")
    before = path.read_bytes()
    with pytest.raises(RuntimeError), BagWriter(path) as bag:
        bag.add_topic("/names", cdr.STRING)
        bag.write("/names", 5, cdr.make_string("b"))
        raise RuntimeError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("act", "says"), [
    (lambda bag: bag.add_topic("/x", "my_msgs/msg/Own"), "my_msgs/msg/Own"),
    (lambda bag: (bag.add_topic("/x", cdr.STRING), bag.add_topic("/x", cdr.STRING)), "/x was added"),
    (lambda bag: bag.write("/y", 0, b""), "/y was not added"),
])  # fmt: skip
def test_misuse_of_the_writer_is_named(tmp_path, act, says):
    with pytest.raises(BagError, match=says), BagWriter(tmp_path / "new.mcap") as bag:
        act(bag)
    with pytest.raises(BagError, match="mcap"):
        BagWriter(tmp_path / "new.db3")


@pytest.mark.parametrize("plugin", list(StoragePlugin))
@pytest.mark.parametrize("mode", [CompressionMode.NONE, CompressionMode.FILE, CompressionMode.MESSAGE])
def test_folders_of_both_storages_and_compressions_are_read(tmp_path, plugin, mode):
    folder = write_folder(tmp_path / "bag", plugin, mode)
    assert frames_of(folder) == (list(range(12)), [])
    (file,) = (f for f in folder.iterdir() if f.name != "metadata.yaml")
    assert frames_of(file) == (list(range(12)), [])


def test_odd_file_names_and_endings_do_not_matter(tmp_path):
    folder = write_folder(tmp_path / "bag")
    odd = (folder / "bag.db3").rename(tmp_path / "50% #1 ?x=ä.db3.active")
    assert frames_of(odd)[0] == list(range(12))


def test_files_of_a_split_bag_are_merged_by_time(tmp_path):
    whole = tmp_path / "bag"
    whole.mkdir()
    for part in range(11, -1, -1):
        folder = write_folder(tmp_path / f"part{part}", frames=3, first=3 * part)
        (folder / f"part{part}.db3").rename(whole / f"bag_{part}.db3")
    assert frames_of(whole)[0] == list(range(36))


@pytest.mark.parametrize(
    "metadata", [None, "", "{[", "a: 1", "rosbag2_bagfile_information: {relative_file_paths: [x.db3]}", b"\xff\xfe\x00"]
)
def test_metadata_that_lies_does_not_hide_messages(tmp_path, metadata):
    folder = write_folder(tmp_path / "bag")
    file = folder / "metadata.yaml"
    if metadata is None:
        file.unlink()
    else:
        file.write_bytes(metadata if isinstance(metadata, bytes) else metadata.encode())
    seeds, warnings = frames_of(folder)
    assert seeds == list(range(12))
    assert bool(warnings) == (metadata is not None)


def test_metadata_with_other_qos_and_types_is_not_believed(tmp_path):
    folder = write_folder(tmp_path / "bag")
    text = (folder / "metadata.yaml").read_text()
    (folder / "metadata.yaml").write_text(text.replace("sensor_msgs/msg/Image", "std_msgs/msg/String"))
    assert frames_of(folder) == (list(range(12)), [])


def test_a_missing_part_is_said_and_the_rest_read(tmp_path):
    folder = write_folder(tmp_path / "bag")
    text = (folder / "metadata.yaml").read_text()
    (folder / "metadata.yaml").write_text(text.replace("  - bag.db3", "  - bag.db3\n  - bag_1.db3"))
    seeds, (warning,) = frames_of(folder)
    assert seeds == list(range(12)) and "bag_1.db3" in warning and "missing" in warning


def test_a_recording_that_was_never_closed_is_read_from_its_log(tmp_path):
    folder = write_folder(tmp_path / "bag", frames=6)
    live = sqlite3.connect(folder / "bag.db3")
    live.execute("PRAGMA journal_mode=WAL")
    live.execute("PRAGMA wal_autocheckpoint=0")
    stamp = SECOND + 6 * SECOND // 10
    raw = cdr.serialize(images.make_image(picture(6), "bgr8", cdr.make_header(stamp, "cam")), cdr.IMAGE)
    live.execute("INSERT INTO messages (topic_id, timestamp, data) VALUES (1, ?, ?)", (stamp, raw))
    live.commit()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("bag.db3", "bag.db3-wal"):
        (copy / name).write_bytes((folder / name).read_bytes())
    live.close()
    assert frames_of(copy / "bag.db3")[0] == list(range(7))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, -1, -300])
def test_a_cut_mcap_is_read_up_to_the_cut(tmp_path, keep):
    # Incompressible pictures of this size make a chunk of every five or six frames.
    path = tmp_path / "bag.mcap"
    with BagWriter(path) as bag:
        bag.add_topic("/camera/image_raw", cdr.IMAGE)
        for i in range(40):
            bag.write("/camera/image_raw", i, images.make_image(picture(i, 240, 320), "bgr8", cdr.make_header(i, "cam")))
    data = path.read_bytes()
    cut = int(len(data) * keep) if isinstance(keep, float) else len(data) + keep
    path.write_bytes(data[:cut])
    warnings: list[str] = []
    with open_bag(path, warn=warnings.append) as bag:
        times = [m.log_time for m in bag.messages()]
        assert [t.count for t in bag.topics] == [len(times)]
    assert times == list(range(len(times)))
    assert len(times) >= 40 * (1.0 if keep in (-1, -300) else keep) - 6
    assert len(warnings) == 1 and str(path) in warnings[0] and "mcap recover" in warnings[0]


def test_topics_of_a_cut_mcap_come_in_time_order_though_written_out_of_it(tmp_path):
    path = tmp_path / "bag.mcap"
    with BagWriter(path) as bag:
        for topic in ("/a", "/b"):
            bag.add_topic(topic, cdr.STRING)
        for i in range(50):
            bag.write("/a", i * 10 + 15, cdr.make_string("a"))
            bag.write("/b", i * 10, cdr.make_string("b"))
    path.write_bytes(path.read_bytes()[:-1])
    with open_bag(path, warn=lambda text: None) as bag:
        times = [m.log_time for m in bag.messages()]
    assert len(times) == 100 and times == sorted(times)


def test_a_corrupt_chunk_ends_the_messages_with_a_warning(tmp_path):
    folder = write_folder(tmp_path / "bag", StoragePlugin.MCAP, CompressionMode.STORAGE, frames=800)
    path = folder / "bag.mcap"
    data = bytearray(path.read_bytes())
    second = data.index(b"\x28\xb5\x2f\xfd", data.index(b"\x28\xb5\x2f\xfd") + 1)  # the zstd frame of the second chunk
    data[second : second + 4] = bytes(4)
    path.write_bytes(bytes(data))
    seeds, (warning,) = frames_of(path)
    assert 400 < len(seeds) < 800 and seeds == list(range(len(seeds)))
    assert str(path) in warning and "damaged" in warning


@pytest.mark.parametrize("keep", [0.35, 0.7, 0.95])
def test_a_cut_database_is_read_up_to_the_cut(tmp_path, keep):
    folder = write_folder(tmp_path / "bag", frames=100)
    path = folder / "bag.db3"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    seeds, warnings = frames_of(path)
    assert seeds == list(range(len(seeds))) and len(seeds) >= 100 * keep - 15
    assert warnings and all(str(path) in warning for warning in warnings)


@pytest.mark.parametrize(("content", "says"), [
    (b"", "empty"),
    (b"hello, world, I am a text", "not a bag"),
    (b"\x89MCAP0\r\n", "mcap"),
    (b"SQLite format 3\0" + bytes(200), "database"),
    (b"#ROSBAG V2.0\n", "reindex"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["bag.mcap", "bag.db3", "bag.bag"])
def test_foreign_and_empty_files_are_named(tmp_path, content, says, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BagError, match=says) as caught, open_bag(path) as bag:
        list(bag.messages())
    assert str(path) in str(caught.value)


def test_missing_paths_and_folders_without_bags_are_named(tmp_path):
    with pytest.raises(BagError, match="no such file"), open_bag(tmp_path / "gone"):
        pass
    with pytest.raises(BagError, match="without bag files"), open_bag(tmp_path):
        pass


def test_one_bad_part_does_not_hide_the_others(tmp_path):
    folder = write_folder(tmp_path / "bag")
    (folder / "bag_1.db3").write_bytes(b"")
    (folder / "metadata.yaml").unlink()
    seeds, (warning,) = frames_of(folder)
    assert seeds == list(range(12)) and "bag_1.db3" in warning and "empty" in warning


def topics_bag(path: Path, topics: dict[str, str]) -> Path:
    with BagWriter(path) as bag:
        for i, (topic, msgtype) in enumerate(topics.items()):
            bag.add_topic(topic, msgtype)
            bag.write(
                topic,
                i,
                cdr.make_string("x")
                if msgtype == cdr.STRING
                else images.make_image(picture(0), "bgr8", cdr.make_header(0, ""))
                if msgtype == cdr.IMAGE
                else images.make_compressed(picture(0), cdr.make_header(0, "")),
            )
    return path


@pytest.mark.parametrize(("topics", "chosen"), [
    (["/camera/depth/image_raw", "/camera/image_raw/compressed", "/ground_truth/mask/compressed"], 1),
    (["/a/image", "/z/color/image_raw"], 1),
    (["/b/image/compressed", "/b/image"], 1),
    (["/b/image", "/a/image"], 1),
    (["/infra/image", "/segmentation/overlay/compressed", "/right"], 2),
])  # fmt: skip
def test_the_camera_is_chosen_by_the_topics_names(tmp_path, topics, chosen):
    kinds = {t: cdr.COMPRESSED_IMAGE if t.endswith("compressed") else cdr.IMAGE for t in topics}
    for i, order in enumerate((topics, topics[::-1])):
        with open_bag(topics_bag(tmp_path / f"{i}.mcap", {t: kinds[t] for t in order})) as bag:
            assert bag.image_topic().name == topics[chosen]
            assert bag.image_topic(topics[0]).name == topics[0]


def test_a_bag_without_a_camera_lists_its_topics(tmp_path):
    with open_bag(topics_bag(tmp_path / "a.mcap", {"/chatter": cdr.STRING})) as bag:
        with pytest.raises(BagError, match=r"/chatter \(1 std_msgs/msg/String\)"):
            bag.image_topic()
        with pytest.raises(BagError, match=r"/nope.*/chatter"):
            bag.image_topic("/nope")
    with open_bag(topics_bag(tmp_path / "b.mcap", {"/depth": cdr.IMAGE})) as bag, pytest.raises(BagError, match="--topic"):
        bag.image_topic()


@pytest.fixture(scope="module")
def small_bags(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("small")
    sqlite = write_folder(folder / "a", frames=4) / "a.db3"
    chunked = write_folder(folder / "b", StoragePlugin.MCAP, CompressionMode.STORAGE, frames=4) / "b.mcap"
    plain = write_folder(folder / "c", StoragePlugin.MCAP, frames=4) / "c.mcap"
    return {".db3": sqlite, ".mcap": chunked, ".plain.mcap": plain}


@pytest.mark.parametrize("kind", [".db3", ".mcap", ".plain.mcap"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_damage_ends_in_another_error(tmp_path_factory, small_bags, kind, data):
    whole = small_bags[kind].read_bytes()
    broken = bytearray(whole)
    # Headers and indices are at the ends, so damage is aimed there as often as anywhere.
    places = st.one_of(st.integers(0, len(whole) - 1), st.integers(0, 300), st.integers(len(whole) - 900, len(whole) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        broken[place] = value
    if data.draw(st.booleans()):
        del broken[data.draw(places) :]
    path = tmp_path_factory.mktemp("broken") / f"bag{kind}"
    path.write_bytes(bytes(broken))
    warnings: list[str] = []
    try:
        with open_bag(path, warn=warnings.append) as bag:
            read = sum(1 for _ in bag.messages())
            listed = sum(topic.count for topic in bag.topics)
    except BagError as error:
        assert str(path) in str(error)
        return
    if read < 4 and listed >= 4:
        assert warnings, f"{4 - read} messages are missing without a word"
    path.unlink()


def test_bags_written_by_others_are_read_to_the_last_message(shared):
    bags = shared / "data" / "bags"
    expected = {
        "rosbag2js_sample_crystal": 5,
        "rosbag2js_sample_crystal/sample.db3": 5,
        "ros2_rosbag2_tests/sqlite3/talker": 20,
        "ros2_rosbag2_tests/mcap/talker": 20,
        "ros2_rosbag2_tests/sqlite3/wbag": 6074,
        "ros2_rosbag2_tests/sqlite3/cdr_test": 7,
        "ros2_rosbag2_tests/mcap/cdr_test": 7,
        "ros1_roboto_tiny": 7,
        "ros1_roboto_tiny/tiny.bag": 7,
    }
    warnings: list[str] = []
    for name, count in expected.items():
        with open_bag(bags / name, warn=warnings.append) as bag:
            times = [message.log_time for message in bag.messages()]
            assert (len(times), sum(topic.count for topic in bag.topics)) == (count, count), name
            assert times == sorted(times)
    assert not warnings


@pytest.mark.parametrize(("name", "topic", "shape", "frame_id"), [
    ("rosbag2js_sample_crystal", "/image", (480, 640, 3), ""),
    ("rosbag2js_sample_crystal", "/image/compressed", (480, 640, 3), ""),
    ("ros1_roboto_tiny", "/dvs/image_raw", (260, 346, 3), ""),
])  # fmt: skip
def test_pictures_of_bags_written_by_others_are_converted(shared, name, topic, shape, frame_id):
    with open_bag(shared / "data" / "bags" / name) as bag:
        chosen = bag.image_topic(topic)
        found = [cdr.deserialize(m.raw, m.topic.msgtype) for m in bag.messages([topic])]
    assert len(found) == chosen.count > 0
    for message in found:
        bgr = images.to_bgr(message)
        assert bgr.shape == shape and bgr.std() > 20 and message.header.frame_id == frame_id


def test_ros1_types_and_pixels_equal_those_of_rosbags(shared):
    from rosbags.highlevel import AnyReader

    path = shared / "data" / "bags" / "ros1_roboto_tiny" / "tiny.bag"
    with AnyReader([path]) as reader, open_bag(path) as bag:
        for (connection, log_time, raw), message in zip(reader.messages(), bag.messages(), strict=True):
            theirs = reader.deserialize(raw, connection.msgtype)
            ours = cdr.deserialize(message.raw, message.topic.msgtype)
            assert (connection.topic, log_time) == (message.topic.name, message.log_time)
            assert cdr.stamp_ns(ours.header) == cdr.stamp_ns(theirs.header) > SECOND
            assert np.array_equal(ours.data, theirs.data) and ours.encoding == theirs.encoding


def test_a_bag_of_a_folder_of_images_holds_their_bytes_and_labels(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(11):
        cv2.imwrite(str(tmp_path / "images" / f"f{i}.{'png' if i % 2 else 'jpg'}"), picture(i))
        label = Image.fromarray(np.full((24, 32), i, np.uint8), mode="P")
        label.putpalette([255, 0, 0] * 256)
        label.save(tmp_path / "labels" / f"f{i}.png")
    out = tmp_path / "out.mcap"
    assert write_bag(tmp_path / "images", out, fps=4, labels=tmp_path / "labels", frame_id="eye") == 11
    with open_bag(out) as bag:
        assert bag.image_topic().name == "/camera/image_raw/compressed"
        for i, message in enumerate(bag.messages(["/camera/image_raw/compressed"])):
            found = cdr.deserialize(message.raw, message.topic.msgtype)
            file = tmp_path / "images" / f"f{i}.{'png' if i % 2 else 'jpg'}"
            assert found.data.tobytes() == file.read_bytes() and found.header.frame_id == "eye"
            assert cdr.stamp_ns(found.header) == message.log_time == START_NS + i * SECOND // 4
        for i, message in enumerate(bag.messages(["/ground_truth/mask/compressed"])):
            assert (images.to_array(cdr.deserialize(message.raw, message.topic.msgtype)) == i).all()


def test_raw_frames_and_a_frame_limit(tmp_path):
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.png"), picture(i))
    assert write_bag(tmp_path, tmp_path / "o.mcap", fps=10, topic="/cam", compressed=False, max_frames=3) == 3
    with open_bag(tmp_path / "o.mcap") as bag:
        (topic,) = bag.topics
        assert (topic.name, topic.msgtype, topic.count) == ("/cam", cdr.IMAGE, 3)
        assert np.array_equal(images.to_bgr(cdr.deserialize(next(bag.messages()).raw, cdr.IMAGE)), picture(0))


@pytest.mark.parametrize(("fault", "says"), [
    ("empty", "no images"), ("no fps", "--fps"), ("fps", "no sense"), ("broken", "1.png"), ("missing", "no such"),
    ("label", "labels"), ("not a video", "video"),
])  # fmt: skip
def test_bad_sources_of_pictures_are_named_and_leave_no_bag(tmp_path, fault, says):
    source, fps, labels = tmp_path / "images", 10.0, None
    source.mkdir()
    if fault != "empty":
        cv2.imwrite(str(source / "0.png"), picture(0))
    if fault == "broken":
        (source / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    if fault == "label":
        labels = tmp_path / "labels"
    if fault == "missing":
        source = tmp_path / "gone"
    if fault == "not a video":
        source = source / "0.mp4"
        source.write_bytes(b"no video at all")
    with pytest.raises(DataError, match=says):
        write_bag(source, tmp_path / "out.mcap", {"no fps": None, "fps": -1.0}.get(fault, fps), labels=labels)
    assert not (tmp_path / "out.mcap").exists()


def test_videos_keep_their_uneven_stamps(tmp_path):
    path = tmp_path / "clip.mp4"
    stamps = [0, 40, 80, 200, 240, 500]  # ms
    with video.VideoWriter(path, fps=25) as writer:
        for i, stamp in enumerate(stamps):
            writer.write(np.full((31, 45, 3), 40 * i + 10, np.uint8), 5 * SECOND + stamp * 1_000_000)
    assert list(tmp_path.iterdir()) == [path]
    found = list(video.read_frames(path))
    assert [round(stamp / 1e6) for stamp, _ in found] == stamps
    for i, (_, bgr) in enumerate(found):
        assert bgr.shape == (32, 46, 3) and abs(bgr.mean() - (40 * i + 10)) < 4
    assert write_bag(path, tmp_path / "v.mcap") == 6
    with open_bag(tmp_path / "v.mcap") as bag:
        assert [round((m.log_time - START_NS) / 1e6) for m in bag.messages()] == stamps


def test_a_video_survives_odd_stamps_and_sizes_and_is_playable(tmp_path):
    import av

    path = tmp_path / "clip.mp4"
    with video.VideoWriter(path, fps=10) as writer:
        for stamp, size in ((7, (64, 48)), (7, (64, 48)), (3, (128, 96)), (10**18, (20, 20))):
            writer.write(np.full((*size, 3), 128, np.uint8), stamp)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.frames == 4 and container.duration / 1e6 < 1
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first for browsers"


def test_a_failed_video_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), video.VideoWriter(tmp_path / "clip.mp4") as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8), 0)
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="mp4"):
        video.VideoWriter(tmp_path / "clip.gif")


def test_robot_clips_become_bags_with_their_own_timing(shared, tmp_path):
    for name, fps in (("rtx_bridge", 10), ("rtx_jaco_play", 20), ("umi_cup_in_the_wild/observation.image_episode_000000", 10)):
        out = tmp_path / "clip.mcap"
        assert write_bag(shared / "data" / "robot_video" / f"{name}.mp4", out, max_frames=12) == 12
        with open_bag(out) as bag:
            times = [m.log_time for m in bag.messages()]
        assert np.allclose(np.diff(times), SECOND / fps, atol=2e6)
