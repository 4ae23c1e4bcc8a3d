"""Write video for fast random access: frequent key frames, one stream, no B frames.

An image is decoded from the key frame before it, so a key frame every second image costs at most
two decodes; LeRobot writes AV1 this way. H.264 is larger but supported everywhere.
"""

import contextlib
import dataclasses
import fractions
import math
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Literal

import av
import numpy as np
from jaxtyping import Float, UInt8

_ENCODERS = {"av1": "libsvtav1", "h264": "libx264"}


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Encoding of images as video."""

    codec: Literal["av1", "h264"] = "av1"
    # Distance between key frames, in images.
    group: int = 2
    # Constant rate factor: 0 is best, 63 (AV1) or 51 (H.264) smallest.
    crf: int = 30

    def __post_init__(self) -> None:
        if self.codec not in _ENCODERS:
            raise ValueError(f"unknown codec {self.codec!r}; expected one of {sorted(_ENCODERS)}")
        if self.group < 1 or not 0 <= self.crf <= 63:
            raise ValueError(
                f"video needs group >= 1 and crf in 0…63, got {self.group} and {self.crf}"
            )


# Image times are rounded to this resolution, seconds.
_TICK = fractions.Fraction(1, 90_000)
# Entries of a video's `info` that can be read from its file.
OF_THE_FILE = ("video.height", "video.width", "video.codec", "video.pix_fmt")


class Encoder:
    """Images, one by one, to a file; `close` completes it.

    `nbytes` counts the bytes written so far; encoders buffer some images.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: float, shape: tuple[int, int], encoding: Encoding
    ) -> None:
        height, width = shape
        if height % 2 or width % 2:
            raise ValueError(
                f"video needs even sizes, got images of {height} by {width}: crop or pad them, "
                "or write images"
            )
        self.nbytes = 0
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        rate = fractions.Fraction(fps).limit_denominator(1001)
        options = {"g": str(encoding.group), "crf": str(encoding.crf)}
        if encoding.codec == "h264":
            # No B frames, and no extra key frames at scene changes.
            options |= {"bf": "0", "sc_threshold": "0"}
        else:
            options |= {"preset": "8"}
            # Only log errors (1); by default the library prints its settings.
            os.environ.setdefault("SVT_LOG", "1")
        self._container = av.open(os.fspath(path), "w")
        stream = self._container.add_stream(_ENCODERS[encoding.codec], rate=rate, options=options)
        assert isinstance(stream, av.VideoStream), "both encoders are of video"
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        self._stream = stream
        # A frame at the nominal rate is a whole number of ticks.
        self._ticks_per_frame = math.ceil(1 / rate / _TICK)
        self._tick = 1 / rate / self._ticks_per_frame
        self._last = -self._ticks_per_frame
        self._stream.codec_context.time_base = self._tick
        with _usual_priority():
            self._stream.codec_context.open()

    @property
    def end(self) -> float:
        """Time at which the next image follows, at the nominal rate, in seconds."""
        return float((self._last + self._ticks_per_frame) * self._tick)

    def add(self, image: UInt8[np.ndarray, "h w 3"], seconds: float | None = None) -> None:
        """Append one image, shown at `seconds`; default `end`."""
        ticks = round((self.end if seconds is None else seconds) / self._tick)
        if ticks <= self._last:
            raise ValueError(
                f"images must follow each other in time, got {seconds} s after "
                f"{float(self._last * self._tick)} s"
            )
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts, frame.time_base = ticks, self._tick
        packets = self._stream.encode(frame)
        self._container.mux(packets)
        self._last = ticks
        self.nbytes += sum(packet.size for packet in packets)

    def close(self) -> None:
        """Flush the encoder, and write the file's index."""
        self._container.mux(self._stream.encode())
        self._container.close()


@contextlib.contextmanager
def _usual_priority() -> Iterator[None]:
    """Take back the real-time priority that SVT-AV1, run by root, gives this thread and its own.

    The thread would keep it, and hand it to its children: a training that wrote a dataset would
    keep everything else off the processor.
    """
    if not hasattr(os, "sched_setscheduler"):  # Not on macOS.
        yield
        return
    tasks = pathlib.Path("/proc/self/task")
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    others = {task.name for task in tasks.iterdir()} - {str(threading.get_native_id())}
    yield
    for task in tasks.iterdir():
        if task.name not in others:
            with contextlib.suppress(ProcessLookupError):  # It has ended.
                os.sched_setscheduler(int(task.name), policy, parameters)


def check_times(where: str, times: Float[np.ndarray, " T"]) -> None:
    """Raise if the times of an episode's images, seconds, do not rise, as a video's must."""
    still = np.flatnonzero(np.diff(times) <= 0)
    if len(still):
        i = int(still[0])
        raise ValueError(
            f"{where}, frame {i + 1}: recorded at {times[i + 1]:.4f} s, the frame before it at "
            f"{times[i]:.4f} s; in a video times must rise: correct the timestamps, or keep "
            "single images"
        )


def describe(path: str | os.PathLike[str], fps: float) -> dict[str, object]:
    """A video file as LeRobot's `info.json` describes it."""
    with av.open(os.path.abspath(path)) as container:
        context = container.streams.video[0].codec_context
        return {
            "video.height": context.height,
            "video.width": context.width,
            # PyAV names the decoder ("libdav1d"), LeRobot the format.
            "video.codec": context.codec.canonical_name,
            "video.pix_fmt": context.pix_fmt,
            "video.is_depth_map": False,
            "video.fps": int(fps) if fps == int(fps) else fps,
            "video.channels": 1 if (context.pix_fmt or "").startswith("gray") else 3,
            "has_audio": bool(container.streams.audio),
        }
