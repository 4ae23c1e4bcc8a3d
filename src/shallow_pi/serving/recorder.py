"""Recordings of a server: one file a connection, a stream of msgpack records.

`Recorder` writes in its own thread from a bounded queue, so that a slow or full disk costs records
and never delays an inference. Messages are kept byte for byte; `read` gives them back:

    for record in recorder.read("recordings/20260131-120000-1.msgpack"):
        record.observation["observation.state"], record.answer["actions"]
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import BinaryIO, TypedDict

import msgpack

from shallow_pi.serving import protocol

FORMAT = "shallow_pi recording 1"
SUFFIX = ".msgpack"
# Bytes that may wait for the disk; records beyond them are dropped.
BACKLOG = 256 * 2**20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Record:
    """One observation and its answer."""

    # Arrival of the observation, seconds since 1970.
    time: float
    # As sent by the client.
    observation: dict[str, object]
    # As sent to the client: "actions" (ah, rd) and timings.
    answer: dict[str, object]


class _Packed(TypedDict):
    """A record as it is written, its messages still packed."""

    time: float
    observation: bytes
    answer: bytes


class Recorder:
    """Writes connections to a folder; `close` completes the files.

    Args:
      folder: made if it does not exist.
      metadata: the server's, repeated at the head of every file.
      limit_bytes: recording ends there, with a warning.

    Raises:
      ValueError, OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        metadata: Mapping[str, object],
        *,
        limit_bytes: int = 20 * 10**9,
    ) -> None:
        self.folder = pathlib.Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"cannot write recordings to {self.folder}: give another --record")
        # Number of records not written: the disk was slow or full, or the limit reached.
        self.dropped = 0
        self._metadata, self._left = dict(metadata), limit_bytes
        self._queue: queue.SimpleQueue[tuple[str, _Packed | None] | None]
        self._queue = queue.SimpleQueue()
        self._waiting, self._lock = 0, threading.Lock()
        self._files: dict[str, BinaryIO] = {}
        self._thread = threading.Thread(target=self._write_all, name="recorder", daemon=True)
        self._thread.start()

    def begin(self, client: int) -> str:
        """Name of the file for a connection's records."""
        return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{client}{SUFFIX}"

    def add(self, name: str, arrived: float, observation: bytes, answer: bytes) -> None:
        """Queue an observation that arrived then (`Record.time`) and its answer, both packed."""
        size = len(observation) + len(answer)
        with self._lock:
            if self._left < size or self._waiting + size > BACKLOG:
                if not self.dropped:
                    is_full = self._left < size
                    why = "--record-limit-gb is reached" if is_full else "the disk is too slow"
                    _log.warning("not everything is recorded to %s: %s", self.folder, why)
                self.dropped += 1
                return
            self._left -= size
            self._waiting += size
        record: _Packed = {"time": arrived, "observation": observation, "answer": answer}
        self._queue.put((name, record))

    def end(self, name: str) -> None:
        """Close a connection's file once its records are written."""
        self._queue.put((name, None))

    def close(self) -> None:
        """Write the waiting records and close the files."""
        self._queue.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        failed = False
        while (item := self._queue.get()) is not None:
            name, record = item
            if record is None:
                if name in self._files:
                    _close(self._files.pop(name))
                continue
            with self._lock:
                self._waiting -= len(record["observation"]) + len(record["answer"])
            try:
                if not failed:
                    self._write(name, msgpack.packb(record))
            except OSError as error:
                # Part of a record may be written: nothing may follow it.
                failed = True
                _log.warning("recording to %s ends: %s", self.folder, error)
            if failed:
                with self._lock:
                    self._left, self.dropped = 0, self.dropped + 1
        for file in self._files.values():
            _close(file)

    def _write(self, name: str, record: bytes) -> None:
        if name not in self._files:
            # It is closed when its client leaves, or at the end.
            self._files[name] = (self.folder / name).open("xb")
            head = {"format": FORMAT, "metadata": self._metadata}
            self._files[name].write(protocol.pack(head))
        self._files[name].write(record)
        self._files[name].flush()


def _close(file: BinaryIO) -> None:
    # Writes what is left of a record that did not fit the disk, and fails as before.
    with contextlib.suppress(OSError):
        file.close()


def read(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of one file in order, without a last one that was cut off.

    Raises:
      FileNotFoundError, ValueError: no such file, or no recording.
    """
    with pathlib.Path(path).open("rb") as file:
        stream = msgpack.Unpacker(file, max_buffer_size=2**32 - 1)
        head = None
        with contextlib.suppress(msgpack.UnpackException, ValueError):
            head = next(stream, None)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"{path} is no recording of this server ({FORMAT!r})")
        for found in stream:
            yield Record(
                found["time"],
                protocol.unpack(found["observation"]),
                protocol.unpack(found["answer"]),
            )
