# SPDX-License-Identifier: Apache-2.0
"""One bag file -> its channels and messages. Each kind of file is a class with the same three members.

`channels` lists what the file holds, `messages(keys)` yields `(key, log_time_ns, cdr_bytes)` in time order and may
raise Damaged in the middle, `close()` ends it. What a file lacks or hides is told through `warn`.
"""

import re
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from heapq import merge
from pathlib import Path
from typing import Any, Protocol

from deeprob_perception.bags import mending
from deeprob_perception.errors import BagError
from deeprob_perception.messages.cdr import typestore

Warn = Callable[[str], None]
StoredMessage = tuple[int, int, bytes]


class Damaged(Exception):
    """The rest of a file cannot be read; the message says why."""


@dataclass(frozen=True)
class Channel:
    """A topic as one file knows it. `key` is the file's own number for it."""

    key: int
    topic: str
    msgtype: str
    count: int
    latched: bool


class Storage(Protocol):
    """What reader.py needs of a bag file."""

    path: Path
    channels: list[Channel]

    def messages(self, keys: Collection[int]) -> Iterator[StoredMessage]: ...

    def close(self) -> None: ...


def open_storage(path: Path, warn: Warn) -> Storage:
    """Open the bag file at `path`, whose kind is taken from its first bytes and not from its name.

    Raises BagError, naming the file and what to do, if nothing can be read from it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise BagError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise BagError(f"{path} is an empty file; the recording left no data in it, so record it again")
    if head.startswith(mending.MCAP_MAGIC):
        return McapFile(path, warn)
    if head.startswith(b"SQLite format 3\0"):
        return SqliteFile(path, warn)
    if head.startswith(b"#ROSBAG V2.0"):
        return Ros1File(path, warn)
    raise BagError(
        f"{path} is not a bag: it starts with {head[:8].hex(' ')}; expected an .mcap or .db3 file of ROS 2 "
        "or a ROS 1 .bag (version 2.0)"
    )


def _full_type(name: str) -> str:
    """Return `pkg/msg/Type`; bags of ROS 2 Crystal (2018) have `pkg/Type`."""
    package, _, kind = name.partition("/")
    return f"{package}/msg/{kind}" if kind and "/" not in kind else name


class McapFile:
    """An mcap file, read by rosbags; a cut or corrupt one as far as its records are whole."""

    def __init__(self, path: Path, warn: Warn):
        self.path = path
        self._source: mending.Source = path
        try:
            reader = mending.open_mcap(path)
        # rosbags checks most of a file but not all of it: a flipped byte may end in a KeyError or a struct.error.
        except Exception as error:
            reader, self._source, whole = mending.open_damaged_mcap(path, error)
            warn(
                f"{path} is damaged ({error}): the first {whole} bytes, up to the damage, are read; "
                "`mcap recover` can rewrite it"
            )
        self._indexed = bool(reader.chunks)
        self.channels = [
            Channel(c.id, c.topic, _full_type(c.msgtype), c.msgcount, _latched(c.ext.offered_qos_profiles))
            for c in reader.connections
            if c.ext.serialization_format == "cdr"
        ]
        for c in reader.connections:
            if c.ext.serialization_format != "cdr":
                warn(f"{path}: topic {c.topic} is left out, its messages are encoded as {c.ext.serialization_format!r}")
        self._readers = [reader]

    def messages(self, keys: Collection[int]) -> Iterator[StoredMessage]:
        if self._indexed:
            yield from self._read(self._readers[0], keys)
            return
        # Without an index rosbags reads in the order of the file and gives up where time goes back, which happens
        # between topics; so each topic is read by a reader of its own, and their streams are merged.
        streams = []
        for key in keys:
            reader = mending.open_mcap(self._source)
            self._readers.append(reader)
            streams.append(self._read(reader, [key]))
        yield from merge(*streams, key=lambda item: item[1])

    @staticmethod
    def _read(reader: Any, keys: Collection[int]) -> Iterator[StoredMessage]:
        connections = [c for c in reader.connections if c.id in set(keys)]
        try:
            for connection, log_time, raw in reader.messages(connections):
                yield connection.id, log_time, mending.unpacked(raw)
        except Exception as error:
            raise Damaged(str(error) or type(error).__name__) from error

    def close(self) -> None:
        for reader in self._readers:
            with suppress(Exception):
                reader.close()


class SqliteFile:
    """A sqlite3 file of any rosbag2 schema since 2018: the tables `topics` and `messages` have not changed."""

    def __init__(self, path: Path, warn: Warn):
        self.path = path
        log = path.with_name(path.name + "-wal")
        unfinished = log.exists() and log.stat().st_size > 0
        # immutable: no lock or journal file is made beside the bag, so read-only folders work. The write-ahead log of
        # a recording which was never closed is only read without it.
        uri = f"{path.absolute().as_uri()}?mode=ro{'' if unfinished else '&immutable=1'}"
        try:
            self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
        except sqlite3.Error as error:
            raise BagError(f"cannot open {path}: {error}") from error
        try:
            # Otherwise SQLite refuses a file that is shorter than its header says. Nothing can be written here.
            self._database.execute("PRAGMA writable_schema=ON")
            topics = self._topics()
        except (sqlite3.Error, OverflowError) as error:
            self._database.close()
            raise BagError(
                f"{path} cannot be read as a rosbag2 database: {error}; if it is damaged, "
                "`sqlite3 FILE .recover` may save the rest"
            ) from error
        self._rows: list[tuple[int, int, int]] = []  # time, row, topic
        damage = self._index({key for key, *_ in topics})
        if damage:
            warn(
                f"{path} is damaged ({damage}): the first {len(self._rows)} messages, up to the damage, are read; "
                "`sqlite3 FILE .recover` may save more"
            )
        counts: dict[int, int] = {}
        for _, _, key in self._rows:
            counts[key] = counts.get(key, 0) + 1
        self.channels = [
            Channel(key, name, _full_type(kind), counts.get(key, 0), _latched_text(qos))
            for key, name, kind, qos in topics
        ]

    def _topics(self) -> list[tuple[int, str, str, str]]:
        columns = {row[1] for row in self._database.execute("PRAGMA table_info(topics)")}
        if not {"id", "name", "type"} <= columns:
            raise sqlite3.DatabaseError("it has no table of topics")
        qos = "offered_qos_profiles" if "offered_qos_profiles" in columns else "''"
        rows = self._database.execute(f"SELECT id, name, type, {qos} FROM topics ORDER BY id").fetchall()
        return [
            (row[0], row[1], row[2], str(row[3]))
            for row in rows
            if isinstance(row[0], int) and isinstance(row[1], str) and isinstance(row[2], str)
        ]

    def _index(self, keys: set[int]) -> str:
        """List the rows in time order; return why it stopped early, or nothing."""
        damage = ""
        # NOT INDEXED: the pages of the time index lie between the messages, and may be the ones that are missing.
        query = "SELECT timestamp, id, topic_id FROM messages NOT INDEXED ORDER BY id"
        try:
            for row in self._database.execute(query):
                if not all(isinstance(value, int) for value in row) or row[2] not in keys:
                    damage = "a message row makes no sense"
                    break
                self._rows.append(row)
        except (sqlite3.Error, OverflowError) as error:
            damage = str(error)
        self._rows.sort()
        return damage

    def messages(self, keys: Collection[int]) -> Iterator[StoredMessage]:
        wanted = set(keys)
        for log_time, row, key in self._rows:
            if key not in wanted:
                continue
            try:
                found = self._database.execute("SELECT data FROM messages WHERE id = ?", (row,)).fetchone()
                if found is None or not isinstance(found[0], bytes):
                    raise ValueError(f"message {row} has no data")
                raw = mending.unpacked(found[0])
            except Exception as error:  # SQLite's and zstd's errors
                raise Damaged(str(error)) from error
            yield key, log_time, raw

    def close(self) -> None:
        self._database.close()


class Ros1File:
    """A ROS 1 bag, its messages converted to their ROS 2 types and CDR, so that nothing downstream knows of ROS 1."""

    def __init__(self, path: Path, warn: Warn):
        from rosbags.rosbag1 import Reader

        self.path = path
        try:
            self._reader = Reader(path)
            self._reader.open()
        except Exception as error:
            raise BagError(f"{path} cannot be read as a ROS 1 bag: {error}; `rosbag reindex` may mend it") from error
        self._convert: dict[int, Callable[[bytes], memoryview]] = {}
        self.channels = []
        counts: dict[int, int] = {}
        for chunk in self._reader.chunk_infos:
            for key, count in chunk.connection_counts.items():
                counts[key] = counts.get(key, 0) + count
        for connection in self._reader.connections:
            try:
                self._convert[connection.id] = _ros1_converter(connection)
            except Exception as error:
                warn(
                    f"{path}: topic {connection.topic} is left out, its type {connection.msgtype} has no ROS 2 "
                    f"counterpart here ({error})"
                )
                continue
            self.channels.append(
                Channel(
                    connection.id,
                    connection.topic,
                    connection.msgtype,
                    counts.get(connection.id, 0),
                    bool(getattr(connection.ext, "latching", 0)),
                )
            )

    def messages(self, keys: Collection[int]) -> Iterator[StoredMessage]:
        connections = [c for c in self._reader.connections if c.id in set(keys)]
        if not connections:
            return
        try:
            for connection, log_time, raw in self._reader.messages(connections):
                yield connection.id, log_time, bytes(self._convert[connection.id](raw))
        except Exception as error:
            raise Damaged(str(error) or type(error).__name__) from error

    def close(self) -> None:
        with suppress(Exception):
            self._reader.close()


def _ros1_converter(connection: Any) -> Callable[[bytes], memoryview]:
    from rosbags.convert.converter import generate_message_converter
    from rosbags.typesys import Stores, get_types_from_msg, get_typestore

    if connection.msgtype not in typestore().fielddefs:
        raise BagError("not a standard message")
    source = get_typestore(Stores.EMPTY)
    source.register(get_types_from_msg(connection.msgdef.data, connection.msgtype))
    kind = connection.msgtype
    return generate_message_converter(source, typestore(), kind, kind, {}, src_is2=False, dst_is2=True)


def _latched(profiles: Any) -> bool:
    return any(profile.durability.name == "TRANSIENT_LOCAL" for profile in profiles)


def _latched_text(profiles: str) -> bool:
    """Tell whether a publisher was latched, from the YAML in the topics table (durability 1, or its name)."""
    return re.search(r"durability:\s*(1|transient_local)\b", profiles) is not None
