"""Columns of chosen episodes out of the data files, file by file, in threads.

An unreadable episode does not stop the others: its error is returned in its place, and names file,
episode and frame as far as known.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import polars as pl

from shallow_pi import progress
from shallow_pi.data.lerobot import columns, files
from shallow_pi.data.lerobot import layout as layouts

T = TypeVar("T")
R = TypeVar("R")
# Reading releases the GIL.
_THREADS = min(8, (os.cpu_count() or 1) + 2)
# Above this number reading takes seconds and gets a progress bar.
_MANY = 2000
# Files read in parallel.
_BATCH = 128
INDEX = ("episode_index", "frame_index")
_INDEX_FEATURE: dict[str, object] = {"dtype": "int64", "shape": [1]}


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode: its rows in the data file, and its columns."""

    rows: np.ndarray
    values: dict[str, np.ndarray]


class AbsentError(ValueError):
    """The meta files place an episode in no data file, or in one that has none of its frames."""


Found = Episode | ValueError | FileNotFoundError


def read(
    layout: layouts.Layout, episodes: Sequence[int], keys: Sequence[str], *, bar: bool = False
) -> dict[int, Found]:
    """Every episode with these columns, or its error.

    Args:
      layout: of the dataset.
      episodes: to read.
      keys: of the columns, in addition to the indices of episode and frame.
      bar: whether many files get a progress bar.
    """
    by_file, found = _by_file(layout, episodes)
    batches = [dict(batch) for batch in _batched(by_file.items(), _BATCH)]
    shown = progress.bar("Read episodes", len(by_file)) if bar and len(by_file) > _MANY else None
    with shown or contextlib.nullcontext() as advance:
        for batch, part in zip(
            batches,
            _in_threads(lambda batch: _read_batch(layout, batch, keys), batches),
            strict=True,
        ):
            found |= part
            if advance is not None:
                advance(len(batch))
    return found


def column(layout: layouts.Layout, key: str, rows: Mapping[int, np.ndarray]) -> np.ndarray:
    """One column of these rows of the data files, by episode, one episode after the other."""

    def read_batch(batch: dict[str, list[int]]) -> dict[int, np.ndarray]:
        together = _read_together(layout, batch, (key,))
        if together is not None:
            return {episode: part.values[key] for episode, part in together.items()}
        found: dict[int, np.ndarray] = {}
        for file, wanted in batch.items():
            series = files.read_table(layout.root / file, [key])[key]
            found |= {n: _values(layout, series, rows[n], file, n) for n in wanted}
        return found

    batches = map(dict, _batched(_by_file(layout, rows)[0].items(), _BATCH))
    whole: dict[int, np.ndarray] = {}
    for part in _in_threads(read_batch, batches):
        whole |= part
    return join(layout, key, [whole[episode] for episode in rows])


def join(layout: layouts.Layout, key: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The column of several episodes."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"{key!r} of dataset {layout.root} has several shapes: {sorted(shapes)}; name the true "
            "one in meta/info.json"
        )
    return np.concatenate(parts)


def find(layout: layouts.Layout, episodes: Collection[int]) -> dict[int, str]:
    """The data files that hold these episodes whole, wherever the meta files place them."""
    found: dict[int, str] = {}

    def counts(file: str) -> dict[int, int]:
        try:
            column = files.read_table(layout.root / file, ["episode_index"])["episode_index"]
            own = columns.to_numpy(column, _INDEX_FEATURE)
        except (ValueError, FileNotFoundError):
            return {}  # Reading an episode of it reports the error.
        return dict(
            zip(*(part.tolist() for part in np.unique(own, return_counts=True)), strict=True)
        )

    names = layout.data_files()
    for file, held in zip(names, _in_threads(counts, names), strict=True):
        for episode in episodes:
            if held.get(episode) == layout.lengths[episode]:
                found.setdefault(episode, file)
    return found


def _by_file(
    layout: layouts.Layout, episodes: Iterable[int]
) -> tuple[dict[str, list[int]], dict[int, Found]]:
    """Episodes by their data file; and the errors of those that the meta files give none."""
    found: dict[str, list[int]] = {}
    wrong: dict[int, Found] = {}
    for episode in episodes:
        try:
            found.setdefault(layout.data_file(episode), []).append(episode)
        except ValueError as error:
            wrong[episode] = AbsentError(str(error))
    return found, wrong


def _in_threads(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in order; nothing new is started after an error."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            yield from pool.map(call, items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    rest = iter(items)
    while batch := tuple(itertools.islice(rest, size)):
        yield batch


def _read_batch(
    layout: layouts.Layout, batch: Mapping[str, Sequence[int]], keys: Sequence[str]
) -> dict[int, Found]:
    together = _read_together(layout, batch, keys)
    if together is not None:
        return dict(together)
    found: dict[int, Found] = {}
    for file, wanted in batch.items():
        found |= _read_file(layout, file, wanted, keys)
    return found


def _read_together(
    layout: layouts.Layout, batch: Mapping[str, Sequence[int]], keys: Sequence[str]
) -> dict[int, Episode] | None:
    """Files of one episode each, read together; None if their types differ or one is invalid."""
    if len(batch) == 1 or any(len(wanted) > 1 for wanted in batch.values()):
        return None
    episodes = [wanted[0] for wanted in batch.values()]
    lengths = [layout.lengths[episode] for episode in episodes]
    table = files.read_alike([layout.root / file for file in batch], [*INDEX, *keys])
    if table is None or len(table) != sum(lengths):
        return None
    try:
        own, frames = (columns.to_numpy(table[key], _INDEX_FEATURE) for key in INDEX)
        values = {key: columns.to_numpy(table[key], _feature(layout, key)) for key in keys}
    except ValueError:
        return None
    rows = [np.arange(length) for length in lengths]
    ends = np.cumsum(lengths)
    counted = frames - np.repeat(frames[ends - lengths], lengths)
    if (own != np.repeat(episodes, lengths)).any() or (counted != np.concatenate(rows)).any():
        return None
    return {
        episode: Episode(own, {key: value[end - len(own) : end] for key, value in values.items()})
        for episode, own, end in zip(episodes, rows, ends, strict=True)
    }


def _read_file(
    layout: layouts.Layout, file: str, wanted: Sequence[int], keys: Sequence[str]
) -> dict[int, Found]:
    try:
        table = _table(layout, file, keys)
        rows = _rows(table, wanted)
    except FileNotFoundError as error:
        return dict.fromkeys(wanted, error)
    except ValueError as error:
        return dict.fromkeys(wanted, ValueError(str(error)))
    found: dict[int, Found] = {}
    for episode in wanted:
        own = rows[episode]
        try:
            _check_frames(layout, table, own, file, episode)
            values = {key: _values(layout, table[key], own, file, episode) for key in keys}
            found[episode] = Episode(own, values)
        except AbsentError as error:
            found[episode] = error
        except ValueError as error:
            found[episode] = ValueError(str(error))
    return found


def _table(layout: layouts.Layout, file: str, keys: Sequence[str]) -> pl.DataFrame:
    """These columns of a data file, and its episode and frame indices if present."""
    path = layout.root / file
    try:
        return files.read_table(path, [*INDEX, *keys])
    except ValueError:
        # A file of version 2 holds one episode, in order: the indices are optional.
        held = list(files.schema(path))
        there = [key for key in INDEX if key in held]
        if len(there) == len(INDEX) or layout.rows:
            raise
        # A table without a column would be one without rows.
        return files.read_table(path, [*there, *keys] or held[:1])


def _rows(table: pl.DataFrame, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    """The rows of each episode of a data file, in order."""
    if "episode_index" not in table.columns:
        return dict.fromkeys(wanted, np.arange(len(table)))
    own = columns.to_numpy(table["episode_index"], _INDEX_FEATURE)
    order = np.argsort(own, kind="stable")
    left, right = (np.searchsorted(own[order], wanted, side) for side in ("left", "right"))
    return {n: order[a:b] for n, a, b in zip(wanted, left, right, strict=True)}


def _check_frames(
    layout: layouts.Layout, table: pl.DataFrame, rows: np.ndarray, file: str, episode: int
) -> None:
    """Raise unless the episode's frames are all there, in order; a cut start is no gap."""
    path, expected = layout.root / file, layout.lengths[episode]
    if len(rows) != expected:
        counted = (
            f"{path} has {len(rows)} frames of episode {episode}, the meta files say {expected}"
        )
        if len(table) > len(rows) == 0:
            there = table["episode_index"].unique().to_list()
            raise AbsentError(f"{counted}; its episode_index says {there[:5]}")
        raise ValueError(f"{counted}; it was cut off, or is of another version of the dataset")
    if "frame_index" not in table.columns:
        return
    index = columns.to_numpy(table["frame_index"][rows], _INDEX_FEATURE)
    wrong = np.flatnonzero(np.diff(index) != 1)
    if len(wrong):
        before, after = index[wrong[0]], index[wrong[0] + 1]
        raise ValueError(
            f"{path}: frame {after} of episode {episode} follows frame {before}; frames must be in "
            "order and complete"
        )


def _values(
    layout: layouts.Layout, series: pl.Series, rows: np.ndarray, file: str, episode: int
) -> np.ndarray:
    """One column of one episode."""
    # Rows without a gap are not copied.
    is_slice = rows[-1] - rows[0] == len(rows) - 1
    own = series.slice(int(rows[0]), len(rows)) if is_slice else series[rows]
    place = f"{layout.root / file}, episode {episode}"
    try:
        return columns.to_numpy(own, _feature(layout, series.name))
    except columns.RowError as error:
        raise ValueError(f"{place}, frame {error.row}: {error.problem}") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _feature(layout: layouts.Layout, key: str) -> Mapping[str, object]:
    if key in layout.info["features"]:
        return layout.info["features"][key]
    return {**_INDEX_FEATURE, "dtype": "float32" if key == "timestamp" else "int64"}
