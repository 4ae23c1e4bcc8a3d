"""A disk cache of model-sized images, shared by all processes and later runs.

Each camera of a dataset has one file, named by a hash of everything that determines its bytes: the
dataset's files (names, sizes, modification times), its layout, the camera, the size, and the
versions of the decoder and resizer. A record is an image after its checksum. Files are sparse at
first; records are written whole on demand and are valid only if their checksum holds, so a crash,
or two processes that write the same record, do no harm. Delete the folder to free the space.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
import struct
import threading
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from shallow_pi import progress, user_cache
from shallow_pi.data.lerobot import image_files, images, reader
from shallow_pi.data.robots import transforms

# Bytes to leave free on the disk.
RESERVE = 2**30
# Header of a record: a mark and the checksum. Holes in a file read as zeros.
_HEADER = struct.Struct("<II")
_THERE = 1
# Raise it when the format of the files changes.
_FORMAT = 2


class FrameCache:
    """The cached, resized images of a dataset's cameras; `image` replaces the dataset's method.

    After pickling to another process it opens the same files.

    Args:
      dataset: the dataset; a part of a dataset shares its files with the whole.
      cameras: keys of the dataset's cameras.
      size: side of the model's images, to which images are resized with padding.
      folder: the cache folder.
      share: share of the dataset's frames to cache; the others are decoded each time.

    Raises:
      OSError: the folder cannot be written; names the flags that choose another.
    """

    def __init__(
        self,
        dataset: reader.Dataset,
        cameras: Sequence[str],
        size: int,
        folder: pathlib.Path,
        share: float = 1.0,
    ) -> None:
        self._dataset = dataset
        self._size = size
        lengths = dataset.layout.lengths
        starts = itertools.accumulate((lengths[e] for e in sorted(lengths)), initial=0)
        self._starts = dict(zip(sorted(lengths), starts, strict=False))
        self._kept = int(share * sum(lengths.values()))
        self._paths = {camera: folder / f"{key(dataset, camera, size)}.u8" for camera in cameras}
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._open()

    def image(self, i: int, camera: str) -> UInt8[np.ndarray, "s s 3"]:
        """The image of frame `i` from the cache, or decoded and then cached."""
        columns = self._dataset.columns
        number = self._starts[int(columns["episode_index"][i])] + int(columns["frame_index"][i])
        if number >= self._kept:
            return self._decoded(i, camera)
        found = self._read(camera, number)
        if found is None:
            found = self._decoded(i, camera)
            self._write(camera, number, found)
        return found

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _decoded(self, i: int, camera: str) -> np.ndarray:
        return transforms.resize_with_pad(self._dataset.image(i, camera), self._size)

    @property
    def _record(self) -> int:
        return _HEADER.size + 3 * self._size**2

    def _read(self, camera: str, number: int) -> np.ndarray | None:
        record = os.pread(self._files[camera], self._record, number * self._record)
        if len(record) < self._record:
            return None
        there, checksum = _HEADER.unpack_from(record)
        data = memoryview(record)[_HEADER.size :]
        if there != _THERE or zlib.crc32(data) != checksum:
            return None
        return np.frombuffer(data, np.uint8).reshape(self._size, self._size, 3)

    def _write(self, camera: str, number: int, image: np.ndarray) -> None:
        data = image.tobytes()
        record = _HEADER.pack(_THERE, zlib.crc32(data)) + data
        try:
            os.pwrite(self._files[camera], record, number * self._record)
        except OSError as error:
            with self._lock:
                if self._kept:
                    progress.console.print(
                        f"warning: the frame cache {self._paths[camera]} accepts no more images: "
                        f"{error.strerror}; those it lacks are decoded every time",
                        highlight=False,
                    )
                # Stops reading it too, so that a full disk is noticed.
                self._kept = 0

    def _open(self) -> None:
        for camera, path in self._paths.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[camera] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise OSError(
                    f"no place for the frame cache at {path.parent}: {error}; choose another "
                    f"folder with --data.cache-dir or ${user_cache.VARIABLE}, or --data.cache none"
                ) from error

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_files", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _files={})
        self._open()


def key(dataset: reader.Dataset, camera: str, size: int) -> str:
    """The file name of a camera's images, a hash of everything that determines their bytes."""
    layout = dataset.layout
    is_video = layout.info["features"][camera]["dtype"] == "video"
    places: dict[int, tuple[str, float]] = {}
    numbers = set()
    for episode in sorted(layout.lengths):
        with contextlib.suppress(ValueError):  # An episode without a place, which is left out.
            # Data files too: their timestamps say which image of a video belongs to a frame.
            numbers.add(layout.data_file(episode))
            own = layout.video(episode, camera) if is_video else (layout.data_file(episode), 0.0)
            places[episode] = own
    files: dict[str, tuple[int, int] | None] = {}
    for file in sorted(numbers.union(file for file, _ in places.values())):
        found = (dataset.path / file).stat() if (dataset.path / file).exists() else None
        files[file] = found and (found.st_size, found.st_mtime_ns)
    if not is_video and images.Images(layout).is_beside(camera, dataset.episodes[0]):
        files |= image_files.stamps(layout, camera, places)
    content = {
        "format": _FORMAT,
        "versions": [importlib.metadata.version(name) for name in ("av", "pillow")],
        "camera": camera,
        "size": size,
        "fps": dataset.fps,
        "episodes": [(n, layout.lengths[n], *place) for n, place in places.items()],
        "files": files,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def share(
    datasets: Sequence[reader.Dataset],
    cameras: Sequence[str],
    size: int,
    folder: pathlib.Path,
    max_bytes: int | None = None,
) -> float:
    """The share of all images that the cache may hold, 0 to 1; warns if it is below 1.

    Args:
      datasets: the datasets to cache; parts of one dataset count once.
      cameras: keys of their cameras.
      size: side of the images.
      folder: the cache folder.
      max_bytes: size limit of the cache; None is the free space of the disk, less a reserve.
    """
    frames = {dataset.path: sum(dataset.layout.lengths.values()) for dataset in datasets}
    wanted = sum(frames.values()) * len(cameras) * (_HEADER.size + 3 * size**2)
    allowed, why = max_bytes, "--data.cache-gib"
    if allowed is None:
        paths = {folder / f"{key(d, camera, size)}.u8" for d in datasets for camera in cameras}
        there = sum(512 * path.stat().st_blocks for path in paths if path.exists())
        nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
        allowed = there + max(0, shutil.disk_usage(nearest).free - RESERVE)
        why = "the disk has free"
    if wanted <= allowed:
        return 1.0
    progress.console.print(
        f"warning: the frame cache at {folder} holds {allowed / wanted:.0%} of the images: all "
        f"need {wanted / 2**30:.1f} GiB, {allowed / 2**30:.1f} GiB are allowed ({why}); the others "
        "are decoded each time",
        highlight=False,
        soft_wrap=True,
    )
    return allowed / wanted
