# SPDX-License-Identifier: Apache-2.0
"""Video files by FFmpeg's libraries (PyAV): frames with their own time stamps in, H.264 that browsers play out."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import cv2
import numpy as np

from deeprob_perception.errors import DataError

SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v")
# The usual clock of MPEG time stamps; frame rates from 23.976 to 60 are exact in it.
_CLOCK = 90_000
# A pause longer than this (a clock that was set, a robot that slept) is shortened to one frame's time.
_LONGEST_PAUSE_S = 5


def read_frames(path: str | Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (ns since the first frame, uint8 `[H, W, 3]` BGR) of a video's first picture stream.

    Stamps are the file's own, so a variable frame rate stays one.
    :raises DataError: when it is no video, or damaged before its first frame; later damage ends the frames.
    """
    path = Path(path)
    first: int | None = None
    last = -1
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} has no pictures in it; give a video file ({', '.join(SUFFIXES)})")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    continue
                stamp = int(frame.pts * frame.time_base * 1_000_000_000)
                first = stamp if first is None else first
                if stamp - first <= last:  # a stamp that repeats or goes back belongs to no new picture
                    continue
                last = stamp - first
                yield last, frame.to_ndarray(format="bgr24")
    except (av.FFmpegError, OSError) as error:
        if first is None:
            raise DataError(f"{path} cannot be read as a video: {error}") from error
    if first is None:
        raise DataError(f"{path} holds no frame that can be decoded")


class VideoWriter:
    """An H.264 mp4 (yuv420p, index first, so that it plays in browsers while it loads), as a context manager.

    The size is that of the first frame, made even; later frames of another size are scaled to it. The file appears when
    the block ends without an exception.
    """

    def __init__(self, path: str | Path, fps: float = 30.0, quality: int = 23):
        """:param fps: only for the first frame's duration and for stamps that do not advance.

        :param quality: x264's constant rate factor, 0 (lossless) to 51.
        """
        self.path = Path(path)
        if self.path.suffix != ".mp4":
            raise DataError(f"cannot write {self.path}: videos are written as .mp4, so let its name end in that")
        self._partial = self.path.with_name(f".{self.path.stem}.partial.mp4")
        self._quality = quality
        self._step = max(1, round(_CLOCK / fps))
        self._container: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        self._last_stamp = 0
        self._pts = 0
        self.frames = 0

    def __enter__(self) -> "VideoWriter":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(self._partial), "w", format="mp4", options={"movflags": "+faststart"})
        except (OSError, av.FFmpegError) as error:
            raise DataError(f"cannot write {self.path}: {error}") from error
        return self

    def write(self, bgr: np.ndarray, stamp: int) -> None:
        """Add a frame, uint8 `[H, W, 3]` BGR, shown from `stamp` (ns) on."""
        assert self._container is not None, "write() outside of the with block"
        if self._stream is None:
            self._stream = self._begin(*bgr.shape[:2])
        else:
            elapsed = stamp - self._last_stamp
            if 0 < elapsed <= _LONGEST_PAUSE_S * 1_000_000_000:
                step = max(1, round(elapsed * _CLOCK / 1_000_000_000))
                self._step = step
            else:
                step = self._step
            self._pts += step
        self._last_stamp = stamp
        stream = self._stream
        if bgr.shape[:2] != (stream.height, stream.width):
            bgr = self._fitted(bgr, stream.height, stream.width)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(bgr), format="bgr24")
        frame.pts = self._pts
        frame.time_base = Fraction(1, _CLOCK)
        self._container.mux(stream.encode(frame))
        self.frames += 1

    def _begin(self, height: int, width: int) -> av.VideoStream:
        assert self._container is not None
        rate = Fraction(_CLOCK, self._step)
        options = {"crf": str(self._quality), "preset": "veryfast"}
        stream = self._container.add_stream("libx264", rate=rate, options=options)
        # yuv420p halves the chroma, so both sides are even.
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        stream.codec_context.time_base = Fraction(1, _CLOCK)
        return stream

    @staticmethod
    def _fitted(bgr: np.ndarray, height: int, width: int) -> np.ndarray:
        down, right = height - bgr.shape[0], width - bgr.shape[1]
        if 0 <= down <= 1 and 0 <= right <= 1:
            return cv2.copyMakeBorder(bgr, 0, down, 0, right, cv2.BORDER_REPLICATE)
        return cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._container is not None
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if kind is None and self._stream is not None:
                self._partial.replace(self.path)
        except (OSError, av.FFmpegError) as failure:
            if kind is None:
                raise DataError(f"cannot write {self.path}: {failure}") from failure
        finally:
            self._partial.unlink(missing_ok=True)
