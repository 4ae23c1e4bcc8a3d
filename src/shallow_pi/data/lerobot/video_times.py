"""Times at which a video file shows its frames, read from its index: nothing is decoded.

The index of an MP4 file (its `moov` box) takes a tenth of a millisecond to read, however long the
video is. Fragmented files, other containers and unusual edit lists are left to FFmpeg, which reads
the complete file.
"""

import functools
import io
import os
import struct
from collections.abc import Iterator

import av
import numpy as np
from jaxtyping import Float, Int

from shallow_pi.checkpoints import fetch

# Files kept in memory; the least recently used are dropped first.
_KEPT = 64


def of(path: str) -> Float[np.ndarray, " n"]:
    """Times of a file's frames in seconds, in order.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: the file is not a video, or is damaged; says which.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise FileNotFoundError(f"video file {path} is missing; is the download complete?") from (
            error
        )
    return _read(path, found.st_size, found.st_mtime_ns)


def nearest(shown: Float[np.ndarray, " n"], seconds: Float[np.ndarray, "*q"]) -> np.ndarray:
    """Index of the frame shown nearest to each of `seconds`."""
    after = np.searchsorted(shown, seconds).clip(1, max(1, len(shown) - 1))
    before = after - 1
    after = np.minimum(after, len(shown) - 1)
    return np.where(seconds - shown[before] <= shown[after] - seconds, before, after)


@functools.lru_cache(_KEPT)
def _read(path: str, size: int, changed: int) -> Float[np.ndarray, " n"]:
    del size, changed  # A rewritten file is read again.
    try:
        times = _of_mp4(path)
    except (_UnusualError, struct.error, ValueError, LookupError, OSError):
        times = _demuxed(path)
    if not len(times):
        raise ValueError(f"video file {path} has no frames{hint(path)}")
    times = np.sort(times)
    times.setflags(write=False)
    return times


def hint(path: str) -> str:
    """A guess at the reason a file is unreadable, to append to an error; may be empty."""
    try:
        with open(path, "rb") as file:
            head = file.read(40)
    except OSError:
        return ""
    if advice := fetch.lfs_advice(path):
        return advice
    if not head.strip(b"\0"):
        return " (it is empty: is the download complete?)"
    if head[4:8] == b"ftyp":
        return " (was the recording or the download cut off?)"
    return ""


def _demuxed(path: str) -> Float[np.ndarray, " n"]:
    """Times of the packets, in any container."""
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            ticks = [p.pts for p in packets if p.pts is not None]
            if len(ticks) < len(packets):
                raise ValueError(f"{path} does not say when its frames are shown")
            return np.array(ticks, float) * float(stream.time_base or 0)
    except av.FFmpegError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}{hint(path)}") from error


class _UnusualError(Exception):
    """An MP4 feature that is left to FFmpeg."""


def _of_mp4(path: str) -> Float[np.ndarray, " n"]:
    with open(path, "rb") as file:
        moov = _moov(file, os.fstat(file.fileno()).st_size)
    boxes = dict(_boxes(moov))
    if b"mvex" in boxes:
        raise _UnusualError("fragments")
    movie_scale = _header(boxes[b"mvhd"])[0]
    for kind, trak in _boxes(moov):
        if kind != b"trak":
            continue
        parts = dict(_boxes(trak))
        media = dict(_boxes(parts[b"mdia"]))
        if media[b"hdlr"][8:12] == b"vide":
            tables = dict(_boxes(dict(_boxes(media[b"minf"]))[b"stbl"]))
            scale = _header(media[b"mdhd"])[0]
            edits = dict(_boxes(parts[b"edts"]))[b"elst"] if b"edts" in parts else None
            return _edited(_shown(tables), edits, movie_scale, scale)
    raise _UnusualError("no video track")


def _moov(file: io.BufferedReader, size: int) -> memoryview:
    at, found = 0, memoryview(b"")
    while at + 8 <= size:
        file.seek(at)
        head = file.read(16)
        length, kind = struct.unpack_from(">I4s", head)
        start = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", head, 8)
            start = 16
        elif length == 0:
            length = size - at
        if length < start or at + length > size:
            raise _UnusualError("cut off")
        if kind == b"moov":
            file.seek(at + start)
            found = memoryview(file.read(length - start))
        at += length
    return found


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if length < 8 or at + length > len(data):
            raise _UnusualError("damaged")
        yield kind, data[at + 8 : at + length]
        at += length


def _header(box: memoryview) -> tuple[int, int]:
    """Timescale and duration of a movie or of a medium."""
    return struct.unpack_from(">IQ" if box[0] else ">II", box, 20 if box[0] else 12)


def _pairs(box: memoryview) -> Int[np.ndarray, "n 2"]:
    (count,) = struct.unpack_from(">I", box, 4)
    return np.frombuffer(box, ">u4", 2 * count, 8).reshape(count, 2).astype(np.int64)


def _shown(tables: dict[bytes, memoryview]) -> Int[np.ndarray, " n"]:
    """Composition time of each frame, in ticks of the medium."""
    runs = _pairs(tables[b"stts"])
    lengths = np.repeat(runs[:, 1], runs[:, 0])
    decoded = np.cumsum(lengths) - lengths
    if b"ctts" not in tables:
        return decoded
    runs = _pairs(tables[b"ctts"])
    if (runs[:, 1] >= 2**31).any():
        raise _UnusualError("frames shown before they are decoded")
    delays = np.repeat(runs[:, 1], runs[:, 0])
    if len(delays) != len(decoded):
        raise _UnusualError("damaged")
    return decoded + delays


def _edited(
    ticks: Int[np.ndarray, " n"], edits: memoryview | None, movie_scale: int, scale: int
) -> Float[np.ndarray, " n"]:
    """Times in seconds: an edit list may cut a track's start and end, and shift it."""
    if edits is None:
        return ticks / scale
    (count,) = struct.unpack_from(">I", edits, 4)
    entry = ">QqHH" if edits[0] else ">IiHH"
    rows = [struct.unpack_from(entry, edits, 8 + i * struct.calcsize(entry)) for i in range(count)]
    wait = 0
    while rows and rows[0][1] == -1:
        wait += rows.pop(0)[0]
    if len(rows) != 1 or rows[0][2:] != (1, 0):
        raise _UnusualError("several edits")
    length, start = rows[0][:2]
    kept = ticks >= start
    if length:
        kept &= (ticks - start) * movie_scale < length * scale
    # FFmpeg rounds the shift to whole ticks.
    shift = round(wait * scale / movie_scale) - start
    return (ticks[kept] + shift) / scale
