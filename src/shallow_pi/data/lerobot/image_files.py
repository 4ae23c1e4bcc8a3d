"""Image files beside the data files, whose parquet columns hold names instead of images."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import posixpath
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import polars as pl

from shallow_pi.data.lerobot import files
from shallow_pi.data.lerobot import layout as lerobot_layout

_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Absent:
    """Images of a camera that an episode lacks."""

    # The first of its frames without one, and the number of such frames.
    frame: int
    count: int
    # Names the file in which it is absent, or which is.
    problem: str


def find(
    layout: lerobot_layout.Layout, camera: str, episode: int, file: str, name: str
) -> pathlib.Path:
    """The image that a data file names.

    Raises:
      ValueError: it is not there.
    """
    inside, base = _split(name)
    folders = _folders(layout, camera, episode, file, inside)
    for folder in folders:
        with contextlib.suppress(OSError):  # Of text that is too long for a path.
            if (folder / base).is_file():
                return folder / base
    raise ValueError(f"its file {name!r:.100} is missing, in {folders[-1]} too")


def without_column(
    layout: lerobot_layout.Layout, cameras: Collection[str], episodes: Collection[int]
) -> dict[str, dict[int, Absent]]:
    """By camera, the episodes whose data file has no column of it: it may have been added later."""
    file_of = {episode: layout.data_file(episode) for episode in episodes if cameras}
    held = {file: files.schema(layout.root / file) for file in set(file_of.values())}
    return {
        camera: {
            n: Absent(0, layout.lengths[n], f"{file} has no such column")
            for n, file in file_of.items()
            if camera not in held[file]
        }
        for camera in cameras
    }


def absent(
    layout: lerobot_layout.Layout, camera: str, rows: Mapping[int, np.ndarray]
) -> dict[int, Absent]:
    """Episodes that lack image files which their data files name.

    Lists each folder once, and opens no image. A data file that cannot be read is passed over:
    reading its images reports that.

    Args:
      layout: of the dataset.
      camera: to check.
      rows: of each episode in its data file.
    """
    by_file: dict[str, list[int]] = {}
    for episode in rows:
        by_file.setdefault(layout.data_file(episode), []).append(episode)

    @functools.cache
    def listed(folder: pathlib.Path) -> frozenset[str]:
        with contextlib.suppress(OSError):
            return frozenset(os.listdir(folder))
        return frozenset()

    def check(file: str) -> list[tuple[int, Absent]]:
        found: list[tuple[int, Absent]] = []
        with contextlib.suppress(ValueError, FileNotFoundError):
            column = _names(files.read_table(layout.root / file, [camera])[camera])
            for episode in by_file[file]:
                chosen = column.gather(rows[episode]).to_list()
                parts = [None if name is None else _split(name) for name in chosen]
                there = {
                    inside: [*map(listed, _folders(layout, camera, episode, file, inside))]
                    for inside in {part[0] for part in parts if part}
                }
                wrong = [
                    i
                    for i, part in enumerate(parts)
                    if part and not any(part[1] in names for names in there[part[0]])
                ]
                if wrong:
                    try:  # A file system may find more than it lists, such as names in capitals.
                        find(layout, camera, episode, file, chosen[wrong[0]])
                    except ValueError as error:
                        found.append((episode, Absent(wrong[0], len(wrong), str(error))))
        return found

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return dict(itertools.chain.from_iterable(pool.map(check, by_file)))


def stamps(
    layout: lerobot_layout.Layout, camera: str, episodes: Iterable[int]
) -> dict[str, tuple[int, int]]:
    """Size and modification time (ns) of all files in the folders of a camera's images.

    Data files that cannot be read name none. Keys are relative to the dataset.
    """
    folders: set[pathlib.Path] = set()
    insides: dict[str, set[str]] = {}
    for episode in episodes:
        file = layout.data_file(episode)
        if file not in insides:
            insides[file] = set()
            with contextlib.suppress(ValueError, FileNotFoundError):
                names = _names(files.read_table(layout.root / file, [camera])[camera])
                insides[file] = {_split(name)[0] for name in names.drop_nulls()}
        for inside in insides[file]:
            folders |= {*_folders(layout, camera, episode, file, inside)}
    found = {}
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    status = entry.stat()
                    path = os.path.relpath(entry.path, layout.root)
                    found[path] = (status.st_size, status.st_mtime_ns)
    return found


def _split(name: str) -> tuple[str, str]:
    """Folder and name of a path that a computer of any kind has written."""
    return posixpath.split(name.replace("\\", "/"))


def _folders(
    layout: lerobot_layout.Layout, camera: str, episode: int, file: str, inside: str
) -> tuple[pathlib.Path, ...]:
    """The folders where an image may be that a data file names in a folder."""
    root = layout.root
    # A path of the recording computer ends like the path here.
    own = root / f"images/{camera}/episode_{episode:06d}"
    return root / inside, (root / file).parent / inside, own


def _names(column: pl.Series) -> pl.Series:
    """The file that each image of a data file is in; null for images in the data file."""
    if column.dtype == pl.String:
        return column
    nothing = pl.Series([None] * len(column), dtype=pl.String)
    if not isinstance(column.dtype, pl.Struct):
        return nothing
    parts = column.struct.unnest()
    names = parts["path"].cast(pl.String) if "path" in parts.columns else nothing
    if "bytes" not in parts.columns:
        return names
    return names.zip_with(parts["bytes"].is_null(), nothing)
