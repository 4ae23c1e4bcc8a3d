"""Frames of a video file by time, decoded with PyAV exactly as LeRobot's PyAV backend does.

The frame nearest to a time is found in the file's index (`video_times`), then decoded. Every thread
has its own decoders, because a container shared between threads crashes the process; they are not
pickled. A jump seeks to the last key frame at or before the frame, a short step forward continues
decoding, so videos with frequent key frames are fast. Decoders are single threaded, because a
multithreaded one decodes images ahead that are not needed.
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
from jaxtyping import Float, UInt

from shallow_pi.data.lerobot import video_times

# Open files per thread; the least recently used one is closed first.
MAX_OPEN = 8
# To RGB on the calling thread; before PyAV 17 there was no other way.
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
# Seconds between key frames, until measured for a file.
_GROUP = 1.0
# Allowed rounding difference between the decoder's and the index's frame time, seconds.
_ROUNDING = 1e-6


@dataclasses.dataclass
class _Stream:
    container: av.container.InputContainer
    video: av.VideoStream
    # Times of all frames, seconds.
    shown: Float[np.ndarray, " n"]
    frames: Iterator[av.VideoFrame] = dataclasses.field(default_factory=lambda: iter(()))
    # Times of the last frame decoded and of the last key frame, seconds.
    last: float = math.inf
    key: float = math.inf
    # Between key frames, seconds.
    group: float = _GROUP
    # Kept, because setup costs more than use.
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
        """Continue decoding to the first frame at or after `seconds`; None if there is none."""
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
        self, path: str | os.PathLike[str], seconds: float, tolerance: float, deep: bool = False
    ) -> UInt[np.ndarray, "h w c"]:
        """The frame shown nearest to `seconds`: uint8 RGB, or numbers of one channel as stored.

        Args:
          path: of the file.
          seconds: since the file's start.
          tolerance: largest allowed difference from the frame's time, in seconds.
          deep: return the first plane as stored (uint16 above 8 bits), for depth, instead of RGB.

        Raises:
          FileNotFoundError, ValueError: no file, no frame close enough, or a damaged one.
        """
        path = os.path.abspath(path)
        stream = self._open(path)
        nearest = stream.shown[video_times.nearest(stream.shown, np.asarray(seconds))]
        if abs(nearest - seconds) > tolerance:
            raise ValueError(
                f"{path} has no frame within {tolerance:.4f} s of {seconds:.4f} s (nearest "
                f"{nearest:.4f} s, last {stream.shown[-1]:.4f} s); is it cut off, or of another "
                "clock?"
            )
        try:
            for start in self._starts(stream, nearest):
                if start is not None:
                    stream.seek(start)
                frame = stream.decode_to(nearest - _ROUNDING)
                # Decoders invent missing reference frames, after a seek also earlier ones.
                if frame is None or frame.is_corrupt or abs(stream.last - nearest) > _ROUNDING:
                    continue
                if deep:
                    return _upright(_first_plane(frame), frame.rotation)
                rgb = stream.to_rgb.reformat(frame, format="rgb24", **_ONE_THREAD)
                return _upright(rgb.to_ndarray(), frame.rotation)
        # PyAV's errors, and Python's for formats that PyAV does not know.
        except (av.FFmpegError, ValueError, IndexError, NotImplementedError) as error:
            self._close(path)
            raise ValueError(
                f"cannot decode {path} at {nearest:.4f} s: {_reason(error)}{video_times.hint(path)}"
            ) from error
        self._close(path)
        raise ValueError(
            f"cannot decode {path} at {nearest:.4f} s: its index lists a frame there, the decoder "
            "gives none that is whole; was the recording or the download cut off?"
        )

    @staticmethod
    def _starts(stream: _Stream, seconds: float) -> Iterator[float | None]:
        """Start times to try until the frame is found; None continues from the current position."""
        if 0 < seconds - stream.last <= stream.group:
            yield None
        else:
            yield seconds
        # Seeking uses decoding time: with B frames the key frame found may be shown later.
        yield seconds - _GROUP
        yield 0.0

    def _open(self, path: str) -> _Stream:
        streams: collections.OrderedDict[str, _Stream]
        streams = self._local.__dict__.setdefault("streams", collections.OrderedDict())
        if path not in streams:
            shown = video_times.of(path)
            try:
                container = av.open(path)
                video = container.streams.video[0]
            except (av.FFmpegError, IndexError) as error:
                hint = video_times.hint(path)
                raise ValueError(f"cannot read {path}: {_reason(error)}{hint}") from error
            video.thread_type = "NONE"
            # dav1d starts threads regardless of the thread type.
            video.codec_context.thread_count = 1
            streams[path] = _Stream(container, video, shown)
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


def pixel_format(path: str | os.PathLike[str]) -> str:
    """FFmpeg's name of a file's pixel format, such as `yuv420p` or `gray12le`.

    Raises:
      ValueError: a file that cannot be read.
    """
    path = os.path.abspath(path)
    try:
        with av.open(path) as container:
            return container.streams.video[0].codec_context.pix_fmt or "unknown"
    except (av.FFmpegError, IndexError) as error:
        reason = f"{_reason(error)}{video_times.hint(path)}"
        raise ValueError(f"cannot read {path}: {reason}") from error


def _reason(error: Exception) -> str:
    """An error's reason; FFmpeg's without its number and the path."""
    return str(getattr(error, "strerror", None) or error)


def is_deep_grey(pixels: str) -> bool:
    """True for one channel above 8 bits: numbers such as depth, not an image."""
    return pixels.startswith("gray") and pixels not in ("gray", "gray8")


def _upright(image: UInt[np.ndarray, "h w c"], degrees: float) -> UInt[np.ndarray, "h2 w2 c"]:
    """The image as players show it, rotated by the angle that phones store."""
    quarters = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarters)) if quarters else image


def _first_plane(frame: av.VideoFrame) -> UInt[np.ndarray, "h w 1"]:
    """Numbers of the first plane as stored: depth, or the brightness of a colour format."""
    component = frame.format.components[0]
    order = ">" if frame.format.is_big_endian else "<"
    kind = np.dtype(f"{order}u2" if component.bits > 8 else "u1")
    plane = frame.planes[0]
    numbers = np.frombuffer(bytes(plane), kind)
    rows = numbers.reshape(-1, plane.line_size // kind.itemsize)[: frame.height]
    return rows[:, : frame.width, None].astype(kind.newbyteorder("="))
