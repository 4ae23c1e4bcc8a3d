"""Frames of a video file by time, decoded with PyAV exactly as LeRobot's PyAV backend does.

Every thread has its own decoders, because a container shared between threads crashes the process;
pickling leaves them behind. Reading frames in order continues decoding; any other jump seeks to
the key frame before, so videos with short groups of pictures are the fast ones.
"""

import collections
import dataclasses
import os
import threading
from collections.abc import Iterator

import av
import numpy as np
from jaxtyping import UInt8

# Open files per thread; the least recently used one is closed first.
MAX_OPEN = 8
# A target this far ahead (seconds) is reached by decoding on, farther ones by seeking.
_DECODE_ON = 1.0


@dataclasses.dataclass
class _Stream:
    container: av.container.InputContainer
    frames: Iterator[av.VideoFrame] | None = None
    last: float = float("-inf")


class Reader:
    """`frame(path, seconds, tolerance)` for any number of files, from any thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def frame(
        self, path: str | os.PathLike[str], seconds: float, tolerance: float
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The frame shown at `seconds`; raises if none lies within `tolerance` of it."""
        path = os.fspath(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"video file {path} is missing")
        try:
            stream = self._open(path)
            if not 0 < seconds - stream.last <= _DECODE_ON:
                video = stream.container.streams.video[0]
                assert video.time_base is not None, "a video stream has a time base"
                offset = max(0, round((seconds - tolerance) / video.time_base))
                stream.container.seek(offset, stream=video, backward=True)
                stream.frames = stream.container.decode(video)
            assert stream.frames is not None, "the branch above sets frames at the first call"
            for frame in stream.frames:
                stream.last = float(frame.time) if frame.time is not None else float("-inf")
                if abs(stream.last - seconds) <= tolerance:
                    return frame.to_ndarray(format="rgb24")
                if stream.last > seconds:
                    break
        except av.FFmpegError as error:
            self._close(path)
            raise ValueError(f"cannot decode {path} at {seconds:.3f} s: {error}") from error
        self._close(path)
        raise ValueError(
            f"{path} has no frame within {tolerance:.4f} s of {seconds:.3f} s; is it truncated, or "
            "is the dataset's fps wrong?"
        )

    def _open(self, path: str) -> _Stream:
        streams: collections.OrderedDict[str, _Stream]
        streams = self._local.__dict__.setdefault("streams", collections.OrderedDict())
        if path not in streams:
            container = av.open(path)
            container.streams.video[0].thread_type = "NONE"
            streams[path] = _Stream(container)
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
