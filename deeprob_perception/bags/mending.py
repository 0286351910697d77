# SPDX-License-Identifier: Apache-2.0
"""mcap files that were cut or corrupted: find the part that is whole and give it an end, so that rosbags reads it.

mcap is a list of records (one byte of kind, eight of length, the content) between two magic strings; a summary and a
footer at the end are an index that is not needed (https://mcap.dev/spec). A recording that lost its power lacks them.
"""

import io
import struct
from pathlib import Path
from typing import Any, Protocol

from rosbags.rosbag2 import Reader

from deeprob_perception.errors import BagError

MCAP_MAGIC = b"\x89MCAP0\r\n"
_RECORD = struct.Struct("<BQ")
_FOOTER, _DATA_END = 0x02, 0x0F
# Data end (no checksum), a footer that says "no summary", and the closing magic.
_TAIL = _RECORD.pack(_DATA_END, 4) + bytes(4) + _RECORD.pack(_FOOTER, 20) + bytes(20) + MCAP_MAGIC
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Source(Protocol):
    """What rosbags' storage readers need of a path."""

    def open(self, mode: str) -> Any: ...


def open_mcap(source: Source) -> Any:
    """Return rosbags' reader of one mcap file, opened; any exception means that the file is damaged or foreign."""
    reader: Any = Reader.STORAGE_PLUGINS[".mcap"](source)  # type: ignore[arg-type]
    reader.open()
    return reader


def open_damaged_mcap(path: Path, why: Exception) -> tuple[Any, Source, int]:
    """Return a reader of the part of the file before its damage, that part, and its length in bytes.

    Raises BagError if no such part can be read; `why` is what was wrong with the file as a whole.
    """
    ends = _record_ends(path)
    # A file that was only cut is whole up to its last record. In a corrupt one some record before is bad, and every
    # longer part is too, so the longest good part is found by halving.
    low, high, best = 0, len(ends), None
    attempt = high
    while low < high:
        source = _Spliced(path, ends[attempt - 1])
        try:
            best = open_mcap(source), source, ends[attempt - 1]
        except Exception:
            high = attempt - 1
        else:
            low = attempt
        attempt = (low + high + 1) // 2
    if best is None:
        raise BagError(
            f"{path} cannot be read as an mcap file: {why}; if it is damaged, `mcap recover` may save the rest"
        )
    return best


def unpacked(raw: bytes) -> bytes:
    """Return a message's CDR bytes, also from a bag recorded with `--compression-mode message`.

    CDR begins with a zero byte, so that the first bytes of a zstd frame are no CDR.
    """
    if not raw.startswith(_ZSTD_MAGIC):
        return raw
    return _zstd().decompress(raw)


def unpack_file(packed: Path, folder: Path) -> Path:
    """Decompress `x.db3.zstd` or `x.mcap.zstd` (rosbag2's `--compression-mode file`) into `folder`."""
    import shutil

    target = folder / packed.stem
    zstd = _zstd()
    try:
        with zstd.open(packed, "rb") as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (OSError, EOFError, zstd.ZstdError) as error:
        raise BagError(f"{packed} cannot be decompressed: {error}") from error
    return target


def is_packed(path: Path) -> bool:
    """Tell whether the file is a zstd stream."""
    try:
        with path.open("rb") as file:
            return file.read(4) == _ZSTD_MAGIC
    except OSError:
        return False


def _zstd() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found]  # Python 3.14
    except ImportError:
        from backports import zstd  # rosbags depends on it before 3.14
    return zstd


def _record_ends(path: Path) -> list[int]:
    """Return the offsets where whole records of the data section end."""
    size = path.stat().st_size
    ends: list[int] = []
    at = len(MCAP_MAGIC)
    with path.open("rb") as file:
        while at + _RECORD.size <= size:
            file.seek(at)
            kind, length = _RECORD.unpack(file.read(_RECORD.size))
            at += _RECORD.size + length
            if at > size or kind in (0, _FOOTER, _DATA_END):
                break
            ends.append(at)
    return ends


class _Spliced:
    """The first `end` bytes of a file followed by the end of an mcap file, as something that can be opened."""

    def __init__(self, path: Path, end: int):
        self._path, self._end = path, end

    def __str__(self) -> str:
        return str(self._path)

    def open(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_SplicedFile(self._path, self._end))


class _SplicedFile(io.RawIOBase):
    def __init__(self, path: Path, end: int):
        self._file = path.open("rb")
        self._end = end
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end + len(_TAIL)}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._at < self._end:
            self._file.seek(self._at)
            data = self._file.read(min(len(view), self._end - self._at))
        else:
            data = _TAIL[self._at - self._end :][: len(view)]
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
