"""Frames of a video file by time, decoded with PyAV exactly as LeRobot's PyAV backend does.

Every thread has its own decoders, because a container shared between threads crashes the process;
pickling leaves them behind. A jump seeks to the last key frame at or before the frame, a short step
ahead decodes on, so videos with short groups of pictures are the fast ones. A decoder is single
threaded: with threads of its own it would decode pictures ahead that nobody asked for.
"""

import collections
import dataclasses
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.video import reformatter
from jaxtyping import UInt8

# Open files per thread; the least recently used one is closed first.
MAX_OPEN = 8
# To RGB on the calling thread; before PyAV 17 there was no other way.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
# Seconds between key frames, until a file has shown its own.
_GROUP = 1.0


@dataclasses.dataclass
class _Stream:
    container: av.container.InputContainer
    video: av.VideoStream
    frames: Iterator[av.VideoFrame] = dataclasses.field(default_factory=lambda: iter(()))
    # Times of the last frame decoded and of the last key frame, seconds.
    last: float = math.inf
    key: float = math.inf
    # Between key frames, seconds.
    group: float = _GROUP
    # Kept, because to set one up costs more than to use it.
    to_rgb: reformatter.VideoReformatter = dataclasses.field(
        default_factory=reformatter.VideoReformatter
    )

    def seek(self, seconds: float) -> None:
        """Go to the last key frame at or before `seconds`."""
        assert self.video.time_base is not None, "a video stream has a time base"
        offset = max(0, round(seconds / self.video.time_base))
        self.container.seek(offset, stream=self.video, backward=True)
        self.frames, self.key = self.container.decode(self.video), math.inf

    def decode_to(self, seconds: float) -> av.VideoFrame | None:
        """Decode on to the first frame at or after `seconds`; None if there is none."""
        for frame in self.frames:
            if frame.time is None:
                continue
            self.last = float(frame.time)
            if frame.key_frame:
                if self.last > self.key:
                    self.group = self.last - self.key
                self.key = self.last
            if self.last >= seconds:
                return frame
        self.last = math.inf
        return None


class Reader:
    """`frame(path, seconds, tolerance)` for any number of files, from any thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def frame(
        self, path: str | os.PathLike[str], seconds: float, tolerance: float
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The frame shown at `seconds`; raises if none lies within `tolerance` of it."""
        path = os.fspath(path)
        try:
            stream = self._open(path)
            for start in self._starts(stream, seconds, tolerance):
                if start is not None:
                    stream.seek(start)
                frame = stream.decode_to(seconds - tolerance)
                if frame is not None and abs(stream.last - seconds) <= tolerance:
                    rgb = stream.to_rgb.reformat(frame, format="rgb24", **_ONE_THREAD)
                    return rgb.to_ndarray()
        except av.FFmpegError as error:
            self._close(path)
            raise ValueError(f"cannot decode {path} at {seconds:.3f} s: {error}") from error
        self._close(path)
        raise ValueError(
            f"{path} has no frame within {tolerance:.4f} s of {seconds:.3f} s; is it truncated, or "
            "is the dataset's fps wrong?"
        )

    @staticmethod
    def _starts(stream: _Stream, seconds: float, tolerance: float) -> Iterator[float | None]:
        """Where to decode from, the next one if a frame was not found: None is to go on."""
        if 0 < seconds - stream.last <= stream.group:
            yield None
        else:
            yield seconds + tolerance
        # Key frames are found by decoding time: with B frames the one found may be shown later.
        yield seconds - _GROUP
        yield 0.0

    def _open(self, path: str) -> _Stream:
        streams: collections.OrderedDict[str, _Stream]
        streams = self._local.__dict__.setdefault("streams", collections.OrderedDict())
        if path not in streams:
            if not os.path.exists(path):
                raise FileNotFoundError(f"video file {path} is missing")
            container = av.open(path)
            video = container.streams.video[0]
            video.thread_type = "NONE"
            # dav1d starts threads whatever the type says.
            video.codec_context.thread_count = 1
            streams[path] = _Stream(container, video)
            if len(streams) > MAX_OPEN:
                streams.popitem(last=False)[1].container.close()
        streams.move_to_end(path)
        return streams[path]

    def _close(self, path: str) -> None:
        stream = self._local.__dict__.get("streams", {}).pop(path, None)
        if stream is not None:
            stream.container.close()

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self._local = threading.local()
