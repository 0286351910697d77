# SPDX-License-Identifier: Apache-2.0
"""Write an mcap file that `ros2 bag` reads: chunks compressed with zstd, index, and rosbag2's metadata inside."""

import shutil
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any

from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

from deeprob_perception.errors import BagError
from deeprob_perception.messages.cdr import serialize, typestore

# Version 8 of the metadata (Iron) writes QoS as numbers, which every distribution since Humble reads.
_METADATA_VERSION = 8
_FOREVER = QosTime(2147483647, 4294967295)


class BagWriter:
    """A new bag at `path` (`*.mcap`), as a context manager.

    The file appears, whole, when the block ends without an exception; before that and otherwise whatever was at `path`
    stays. Messages may come in any order of time.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.suffix != ".mcap":
            raise BagError(f"cannot write {self.path}: bags are written as .mcap, so let its name end in that")
        self._connections: dict[str, Connection] = {}
        self._types: dict[str, str] = {}
        self._folder: Path | None = None
        self._writer: Writer | None = None

    def __enter__(self) -> "BagWriter":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that the last step is a rename within one file system.
            self._folder = Path(mkdtemp(prefix=f".{self.path.stem}-", suffix=".partial", dir=self.path.parent))
        except OSError as error:
            raise BagError(f"cannot write {self.path}: {error.strerror}") from error
        # rosbags writes a folder, its file named after it; the metadata inside names that file.
        self._writer = Writer(
            self._folder / self.path.stem, version=_METADATA_VERSION, storage_plugin=StoragePlugin.MCAP
        )
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        self._writer.open()
        return self

    def add_topic(self, topic: str, msgtype: str, latched: bool = False) -> None:
        """Announce a topic; `latched` records it as transient local, so that players offer it to late subscribers."""
        if self._writer is None:
            raise BagError(f"{self.path} is not open for writing")
        if topic in self._connections:
            raise BagError(f"{self.path}: topic {topic} was added before")
        if msgtype not in typestore().fielddefs:
            raise BagError(f"{self.path}: message type {msgtype!r} of topic {topic} is not a standard one")
        self._connections[topic] = self._writer.add_connection(
            topic, msgtype, typestore=typestore(), offered_qos_profiles=[_profile(latched)]
        )
        self._types[topic] = msgtype

    def write(self, topic: str, log_time: int, message: Any) -> None:
        """Write a message, an object or its CDR bytes, with its log time in ns."""
        connection = self._connections.get(topic)
        if connection is None or self._writer is None:
            raise BagError(f"{self.path}: topic {topic} was not added, or the bag is not open")
        raw = message if isinstance(message, (bytes, memoryview)) else serialize(message, self._types[topic])
        try:
            self._writer.write(connection, log_time, raw)
        except OSError as error:
            raise BagError(f"cannot write {self.path}: {error.strerror}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._writer is not None and self._folder is not None
        writer, self._writer = self._writer, None
        try:
            if kind is None:
                writer.close()
                (self._folder / self.path.stem / f"{self.path.stem}.mcap").replace(self.path)
            else:
                writer.abort()
        except OSError as failure:
            raise BagError(f"cannot write {self.path}: {failure.strerror}") from failure
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _profile(latched: bool) -> Qos:
    return Qos(
        QosHistory.KEEP_LAST,
        1 if latched else 10,
        QosReliability.RELIABLE,
        QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE,
        _FOREVER,
        _FOREVER,
        QosLiveliness.AUTOMATIC,
        _FOREVER,
        avoid_ros_namespace_conventions=False,
    )
