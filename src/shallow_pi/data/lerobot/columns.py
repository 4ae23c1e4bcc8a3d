"""Columns of a dataset as numpy arrays of the types declared in `info.json`, however stored.

Tools store the same vector as a fixed or variable list, nested lists, a flat list, an extension
type, a plain number (if it has one dimension), and with any width of integer or float. All of these
are cast to the declared type and shape; a value that does not fit is an error that names its row.
"""

import difflib
import math
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

# LeRobot's bookkeeping columns, plain numbers that no robot uses as state or action.
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_PLAIN_TEXTS = ("string", "large_string")
# LeRobot's "language" is text, or a list of annotations that no robot uses.
_TEXTS = (*_PLAIN_TEXTS, "str", "language")
IMAGES = ("image", "video")
# An entry of `features` of info.json: dtype, shape, names, and for videos their codec.
Feature = Mapping[str, Any]


class RowError(ValueError):
    """A value that cannot be read; `row` counts from 0 in the table."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(problem)
        self.row, self.problem = row, problem


class Columns(Mapping[str, np.ndarray]):
    """Columns by key, each read on first use.

    Args:
      keys: of the declared columns.
      load: reads one; raises KeyError if the data files lack it.
      loaded: columns read already.
    """

    def __init__(
        self,
        keys: Collection[str],
        load: Callable[[str], np.ndarray],
        loaded: Mapping[str, np.ndarray],
    ) -> None:
        self._keys = tuple(keys)
        self._load = load
        self.loaded = dict(loaded)
        self._lock = threading.Lock()

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.loaded:
            with self._lock:  # Two threads that need the same column share one read.
                if key not in self.loaded:
                    self.loaded[key] = self._load(key)
        return self.loaded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def is_known(feature: Feature) -> bool:
    """True for numbers and text; other types are kept as they are stored."""
    try:
        _dtype("", feature)
    except ValueError:
        return feature["dtype"] in _PLAIN_TEXTS
    return True


def is_text(feature: Feature) -> bool:
    """True for a column of text."""
    return feature["dtype"] in _TEXTS


def closest(name: str, names: Sequence[str]) -> str:
    """A `; did you mean ...?` if the end of some name is close, else empty.

    Beginnings such as "observation.images." are alike for all.
    """
    ends = {_end(other): other for other in names}
    found = difflib.get_close_matches(_end(name), ends, n=1)
    return f"; did you mean {ends[found[0]]!r}?" if found else ""


def _end(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def to_numpy(series: pl.Series, feature: Feature) -> np.ndarray:
    """A column as declared: numbers (n, *shape), bookkeeping (n,), texts (n,) of str.

    Raises:
      RowError: a row that does not fit the declared shape or type.
      ValueError: a type that cannot be read as the declared one.
    """
    if is_text(feature):
        return texts(series)
    dtype = _dtype(series.name, feature)
    flat, sizes = _flat(series)
    if not (flat.dtype.is_numeric() or flat.dtype in (pl.Boolean, pl.Null)):
        raise ValueError(f"{series.name!r} is stored as {series.dtype}, expected {dtype.name}")
    if flat.dtype.is_decimal() or flat.dtype == pl.Null:
        flat = flat.cast(pl.Float64)
    per_row = int(np.prod(sizes, dtype=int))
    if dtype.kind != "f" and flat.null_count():
        row = int(flat.is_null().arg_max() or 0) // max(per_row, 1)
        raise RowError(row, f"{series.name!r} has no value")
    values = _cast(flat.to_numpy(), dtype, series.name, per_row)
    return values.reshape(len(series), *_shape(series.name, feature, sizes))


def texts(series: pl.Series) -> np.ndarray:
    """A column of text (plain, categorical, bytes, or a list of one), "" for missing values."""
    if isinstance(series.dtype, pl.List | pl.Array):
        if isinstance(series.dtype, pl.Array):
            series = series.arr.to_list()
        series = series.list.first()
    try:
        found = series.cast(pl.String).fill_null("")
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{series.name!r} is stored as {series.dtype}, expected text") from error
    return np.array(found.to_list(), object)


def _dtype(key: str, feature: Feature) -> np.dtype:
    declared = {"bfloat16": "float32"}.get(feature["dtype"], feature["dtype"])
    try:
        dtype = np.dtype(declared)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "fiub":
        raise ValueError(f"{key!r} has dtype {declared!r} in info.json, which is not numbers")
    return dtype


def _flat(series: pl.Series) -> tuple[pl.Series, list[int]]:
    """All values in one series, and the size of each axis below the rows."""
    sizes: list[int] = []
    key, flat = series.name, series
    while isinstance(flat.dtype, pl.List | pl.Array):
        if isinstance(flat.dtype, pl.Array):
            lengths = None
            size = flat.dtype.size
        else:
            lengths = flat.list.len()
            size = int(lengths[0] or 0) if len(lengths) else 0
        odd = flat.is_null() if lengths is None else lengths.ne_missing(size)
        if odd.any():
            row = int(odd.arg_max() or 0)
            got = "no value" if flat[row] is None else f"{len(flat[row])} values"
            before = int(np.prod(sizes, dtype=int))
            raise RowError(row // before, f"{key!r} has {got}, other frames {size}")
        if size == 0 and len(flat):
            raise RowError(0, f"{key!r} is empty")
        sizes.append(size)
        flat = flat.explode()
        if not len(series):
            break
    return flat, sizes


def _shape(key: str, feature: Feature, sizes: list[int]) -> tuple[int, ...]:
    if key in BOOKKEEPING and np.prod(sizes, dtype=int) == 1:
        return ()
    declared = feature.get("shape")
    # LeRobot stores a vector of one element as a plain number.
    stored = tuple(sizes) or (1,)
    if declared is None or declared == []:
        return stored
    shape = tuple(declared)
    if math.prod(shape) != math.prod(stored):
        raise ValueError(
            f"{key!r} has shape {shape} in info.json, the file holds {stored}: declare it as stored"
        )
    return shape


def _cast(values: np.ndarray, dtype: np.dtype, key: str, per_row: int) -> np.ndarray:
    if values.dtype == dtype:
        return np.ascontiguousarray(values)
    with np.errstate(all="ignore"):
        cast = values.astype(dtype)
        same = cast == values if dtype.kind != "f" else True
    if not np.all(same):
        place = int(np.flatnonzero(~same)[0])
        raise RowError(
            place // max(per_row, 1), f"{key!r} is {values[place]}, expected {dtype.name}"
        )
    return cast
