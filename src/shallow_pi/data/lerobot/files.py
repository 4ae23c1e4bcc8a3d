"""Read a dataset's JSON and parquet files as any tool may have written them.

Every failure is a `FileNotFoundError` or `ValueError` that names the file, the line or columns, and
the remedy; no error of polars or json leaves this module.
"""

import codecs
import json
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import polars as pl

from shallow_pi.checkpoints import fetch

# Whitespace between JSON values, including characters that str.splitlines treats as line ends.
_BETWEEN = " \t\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029\ufeff\0"


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file."""
    text = _text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}{fetch.lfs_advice(path)}") from error


def json_rows(path: pathlib.Path, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, with any separators; each must have `keys`."""
    text, decoder, place = _text(path), json.JSONDecoder(), 0

    def line(start: int) -> str:
        return f"{path}, line {text.count(chr(10), 0, start) + 1}"

    while (start := _skip(text, place)) < len(text):
        try:
            row, place = decoder.raw_decode(text, start)
        except ValueError as error:
            raise ValueError(
                f"{line(start)} is not JSON: {error}{fetch.lfs_advice(path)}"
            ) from error
        if not isinstance(row, dict) or not set(keys) <= set(row):
            raise ValueError(
                f"{line(start)}: expected an object with {sorted(keys)}, got {row!r:.200}"
            )
        yield row


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BETWEEN:
        place += 1
    return place


def whole(value: Any, what: str) -> int:
    """A whole number, also if it is stored as 3.0 or "3"; `what` names it in the error."""
    try:
        number = int(value)
        if number == float(value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{what} is {value!r}, expected a whole number")


def schema(path: pathlib.Path) -> dict[str, pl.DataType]:
    """Columns of a parquet file and their types."""
    check(path)
    try:
        return dict(pl.scan_parquet(path, glob=False, hive_partitioning=False).collect_schema())
    except _ERRORS as error:
        raise _unreadable(path, "its columns", error) from error


def read_table(path: pathlib.Path, keys: Collection[str] | None) -> pl.DataFrame:
    """These columns of a parquet file (None: all), extension types as their storage types."""
    check(path)
    try:
        # Not a glob pattern: folder names may have brackets.
        table = pl.read_parquet(
            path, columns=None if keys is None else list(keys), glob=False, hive_partitioning=False
        )
    except pl.exceptions.ColumnNotFoundError as error:
        there = list(schema(path))
        lacks = sorted(set(keys or ()) - set(there))
        raise ValueError(f"{path} has no column {lacks}; it has {there}") from error
    except _ERRORS as error:
        raise _unreadable(path, f"{sorted(keys)}" if keys else "all columns", error) from error
    return _storage(table)


def read_alike(paths: Sequence[pathlib.Path], keys: Collection[str]) -> pl.DataFrame | None:
    """The rows of several parquet files of the same types; None if they cannot be read together.

    Takes a fifth of the time of one call for each file.
    """
    try:
        scan = pl.scan_parquet(list(paths), glob=False, hive_partitioning=False)
        return _storage(scan.select(list(keys)).collect())
    except _ERRORS:
        return None  # `read_table` names the file and the problem.


def _storage(table: pl.DataFrame) -> pl.DataFrame:
    extensions = [s.ext.storage() for s in table if isinstance(s.dtype, _EXTENSION)]
    return table.with_columns(extensions) if extensions else table


def check(path: pathlib.Path) -> None:
    """Raise unless the file can be opened."""
    try:
        with path.open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} is missing; is the download complete?") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check its permissions") from error


# Polars before 1.36 reads extension types as their storage by itself.
_EXTENSION: Any = getattr(pl, "BaseExtension", ())
# A panic of polars (a damaged file) is not an Exception.
_ERRORS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError)


def _unreadable(path: pathlib.Path, what: str, error: BaseException) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    others = "mend it" if "meta" in path.parts[-4:-1] else "leave its episodes out"
    hint = fetch.lfs_advice(path) or f"; fetch it again, or {others}"
    return ValueError(f"cannot read {what} from {path}: {_cut(path) or reason:.100}{hint}")


def _cut(path: pathlib.Path) -> str:
    """A parquet file's lack of its beginning or end, if that is the reason it is unreadable."""
    with path.open("rb") as file:
        begin = file.read(4)
        file.seek(max(-4, -file.seek(0, 2)), 2)
        end = file.read(4)
    if begin != b"PAR1":
        return "it is no parquet file"
    return "" if end == b"PAR1" else "its end is missing (was recording or copying it cut off?)"


def _text(path: pathlib.Path) -> str:
    check(path)
    data = path.read_bytes()
    is_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is {data[error.start]:#x}; save it as "
            "UTF-8"
        ) from error
