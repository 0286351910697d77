# SPDX-License-Identifier: Apache-2.0
"""A bag, of one file or a folder of them -> topics, and messages in time order as CDR bytes."""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from heapq import merge
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from deeprob_perception.bags import mending
from deeprob_perception.bags.storage import Damaged, Storage, Warn, open_storage
from deeprob_perception.errors import BagError
from deeprob_perception.messages.cdr import COMPRESSED_IMAGE, IMAGE

_LOG = logging.getLogger(__name__)
_SUFFIXES = (".mcap", ".db3", ".bag", ".mcap.zstd", ".db3.zstd")
# Words in the names of image topics which are no pictures for a colour network.
_NO_PICTURE = (
    "depth",
    "disparity",
    "mask",
    "label",
    "segment",
    "ground_truth",
    "confidence",
    "infra",
    "overlay",
    "feature",
)
_PICTURE = ("color", "colour", "rgb", "bgr")


@dataclass(frozen=True)
class Topic:
    """A topic of a bag; `latched` is transient local durability (ROS 1: latching)."""

    name: str
    msgtype: str
    count: int
    latched: bool = False

    @property
    def is_image(self) -> bool:
        """Whether it carries sensor_msgs/Image or CompressedImage."""
        return self.msgtype in (IMAGE, COMPRESSED_IMAGE)


class BagMessage(NamedTuple):
    """One message: its topic, the time at which it was recorded in ns, and its CDR bytes."""

    topic: Topic
    log_time: int
    raw: bytes


class Bag:
    """An open bag. `topics` is sorted by name; `damage` says what could not be read so far."""

    def __init__(self, path: Path, storages: list[Storage], warn: Warn):
        self.path = path
        self.files = [storage.path for storage in storages]
        self.damage: list[str] = []
        self._storages = storages
        self._warn = warn
        counts: dict[tuple[str, str], int] = {}
        latched: set[tuple[str, str]] = set()
        for storage in storages:
            for channel in storage.channels:
                key = channel.topic, channel.msgtype
                counts[key] = counts.get(key, 0) + channel.count
                if channel.latched:
                    latched.add(key)
        self.topics = [Topic(*key, count, key in latched) for key, count in sorted(counts.items())]

    def messages(self, topics: Collection[str] | None = None) -> Iterator[BagMessage]:
        """Yield the messages of `topics` (names; default all) in the order of their log times.

        A damaged file ends early: that is reported once, and the other files go on.
        Raises BagError if there is damage and not one message could be read.
        """
        known = {(topic.name, topic.msgtype): topic for topic in self.topics}
        read = 0
        for message in merge(*(self._file(s, topics, known) for s in self._storages), key=lambda m: m.log_time):
            read += 1
            yield message
        if not read and self.damage:
            raise BagError(self.damage[-1])

    def _file(
        self, storage: Storage, topics: Collection[str] | None, known: dict[tuple[str, str], Topic]
    ) -> Iterator[BagMessage]:
        channels = {c.key: known[c.topic, c.msgtype] for c in storage.channels if topics is None or c.topic in topics}
        announced = sum(c.count for c in storage.channels if c.key in channels)
        read = 0
        try:
            for key, log_time, raw in storage.messages(list(channels)):
                yield BagMessage(channels[key], log_time, raw)
                read += 1
        except Damaged as error:
            self.report(f"{storage.path} is damaged after {read} messages, the rest is lost: {error}")
        else:
            if read < announced:
                self.report(f"{storage.path} is damaged: of {announced} messages {announced - read} cannot be found")

    def report(self, damage: str) -> None:
        """Note damage, and warn of it the first time."""
        if damage not in self.damage:
            self.damage.append(damage)
            self._warn(damage)

    def image_topics(self) -> list[Topic]:
        """Return the topics with images in them, pictures in colour first and raw before compressed."""

        def rank(topic: Topic) -> tuple[bool, bool, bool, str]:
            name = topic.name.lower()
            return (
                any(word in name for word in _NO_PICTURE),
                not any(word in name for word in _PICTURE),
                topic.msgtype == COMPRESSED_IMAGE,
                topic.name,
            )

        return sorted((topic for topic in self.topics if topic.is_image and topic.count), key=rank)

    def image_topic(self, name: str | None = None) -> Topic:
        """Return the image topic called `name`, or the one to take when none is named.

        The choice depends on the names alone: colour before plain, raw before compressed, then the alphabet; depth,
        masks and the like are never taken unasked. Raises BagError listing the bag's topics.
        """
        candidates = self.image_topics()
        if name is not None:
            found = next((topic for topic in candidates if topic.name == name), None)
            if found is None:
                raise BagError(f"{self.path} has no images on topic {name}; it holds {self.listing()}")
            return found
        pictures = [t for t in candidates if not any(word in t.name.lower() for word in _NO_PICTURE)]
        if not pictures:
            hint = "; name one of its image topics with --topic" if candidates else ""
            raise BagError(
                f"{self.path} has no camera images (sensor_msgs/Image or CompressedImage); "
                f"it holds {self.listing()}{hint}"
            )
        return pictures[0]

    def listing(self) -> str:
        """Return the topics in words: name, type and count."""
        return ", ".join(f"{t.name} ({t.count} {t.msgtype})" for t in self.topics) or "no topics"


@contextmanager
def open_bag(path: str | Path, warn: Warn = _LOG.warning) -> Iterator[Bag]:
    """Open a bag file or folder: mcap or sqlite3 of ROS 2, whole, split, compressed or damaged, or ROS 1.

    A folder's storage files are opened one by one, since its metadata.yaml may differ from them in details, after
    which rosbags would find no message. `warn` is called with a line for all that is missing or damaged.
    Raises BagError with the path and a remedy if there is nothing to read.
    """
    path = Path(path)
    with ExitStack() as stack:
        damage: list[str] = []

        def note(text: str) -> None:
            damage.append(text)
            warn(text)

        storages: list[Storage] = []
        problems: list[str] = []
        files = _files(path, note)
        for file in files:
            try:
                if mending.is_packed(file):
                    file = mending.unpack_file(file, Path(stack.enter_context(TemporaryDirectory(prefix="deeprob-"))))
                storage = open_storage(file, note)
            except BagError as error:
                # One bad file of a split bag must not hide the others.
                problems.append(str(error))
                continue
            stack.callback(storage.close)
            storages.append(storage)
        if not storages:
            raise BagError("; ".join(problems))
        for problem in problems:
            note(problem)
        bag = Bag(path, storages, warn)
        bag.damage.extend(damage)
        yield bag


def _files(path: Path, warn: Warn) -> list[Path]:
    """Return the storage files of a bag, in their order."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BagError(f"{path}: no such file or folder; give an .mcap, .db3 or .bag file, or a rosbag2 folder")
    listed = _listed_files(path, warn)
    present = [file for file in listed if file.is_file()]
    for file in listed:
        if file not in present:
            warn(f"{file} is named in metadata.yaml, but missing")
    if not present:
        present = sorted((f for f in path.iterdir() if f.is_file() and f.name.endswith(_SUFFIXES)), key=natural_order)
    if not present:
        raise BagError(
            f"{path} is a folder without bag files ({', '.join(_SUFFIXES)}); give the bag's own folder or file"
        )
    return present


def _listed_files(folder: Path, warn: Warn) -> list[Path]:
    """Return the files that metadata.yaml names; nothing if there is none, or it makes no sense."""
    from ruamel.yaml import YAML, YAMLError

    metadata = folder / "metadata.yaml"
    if not metadata.is_file():
        return []
    try:
        content = YAML(typ="safe").load(metadata.read_text())
        names = content["rosbag2_bagfile_information"]["relative_file_paths"]
        # Before version 4 the paths began with the folder's name.
        return [folder / Path(str(name)).name for name in names]
    except (YAMLError, OSError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        warn(
            f"{metadata} is not read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "the bag files beside it are taken as they are"
        )
        return []


def natural_order(file: Path) -> tuple[object, ...]:
    """Return a sort key that puts bag_2 before bag_10."""
    return tuple((not part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", file.name))
