"""Tables of a LeRobot v3.0 dataset as pandas, pyarrow and `datasets` expect to find them."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from PIL import Image

from shallow_pi.data.lerobot import columns
from shallow_pi.data.lerobot.columns import Feature


def frames(
    images: Mapping[str, Sequence[tuple[bytes, str]]],
    values: Mapping[str, np.ndarray | pl.Series],
) -> pl.DataFrame:
    """A row for each frame: encoded images and their names, then the columns."""
    series = []
    for key, encoded in images.items():
        data, names = zip(*encoded, strict=True)
        series.append(pl.DataFrame({"bytes": data, "path": names}).to_struct(key))
    for key, value in values.items():
        if isinstance(value, pl.Series):
            series.append(value.alias(key))
            continue
        # LeRobot stores a vector of one element as a plain number.
        column = pl.Series(key, value.squeeze(1) if value.shape[1:] == (1,) else value)
        if value.ndim > 2:  # `datasets` keeps arrays of two axes and more as lists of lists.
            kind: pl.DataType | type[pl.DataType] = pl.Series(value.ravel()[:1]).dtype
            for _ in range(value.ndim - 1):
                kind = pl.List(kind)
            column = column.cast(kind)
        series.append(column)
    return pl.DataFrame(series)


def joined(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Tables of the same columns, one after the other; types that differ become a common one."""
    try:
        return pl.concat(parts, how="vertical_relaxed")
    except pl.exceptions.PolarsError:
        return pl.DataFrame([_joined([part[key] for part in parts]) for key in parts[0].columns])


def _joined(parts: Sequence[pl.Series]) -> pl.Series:
    """Columns of types that have none in common, such as structs of other fields."""
    try:
        return pl.concat([part.to_frame() for part in parts], how="vertical_relaxed").to_series()
    except pl.exceptions.PolarsError:
        own, _ = entries(parts[0].name, [value for part in parts for value in part.to_list()])
        return own


def entries(key: str, values: Sequence[object]) -> tuple[pl.Series, bool]:
    """Values of any types as a column; and whether they had to be written as JSON."""
    try:
        own = pl.Series(key, values, strict=False)
        if _bare(own.to_list()) == _bare(list(values)) and own.dtype != pl.Object:
            own.to_frame().write_parquet(io.BytesIO())  # Which takes no struct without fields.
            return own, False
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, OverflowError):
        pass
    texts = [None if value is None else json.dumps(value, default=str) for value in values]
    return pl.Series(key, texts, pl.String), True


def _bare(value: object) -> object:
    """Nested values without entries that are None, which a column of structs adds."""
    if isinstance(value, dict):
        return {key: _bare(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_bare(inner) for inner in value]
    return (isinstance(value, bool), "nan" if value != value else value)


def png(image: np.ndarray) -> bytes:
    """An image as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="PNG", compress_level=1)
    return data.getvalue()


def write(
    path: pathlib.Path, table: pl.DataFrame, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a parquet file; what polars raises of a full disk is no `OSError`."""
    data = io.BytesIO()
    table.write_parquet(data, metadata=None if metadata is None else dict(metadata))
    path.write_bytes(data.getvalue())


def hf_type(feature: Feature, stored: pl.DataType) -> dict[str, object]:
    """A feature as the `datasets` library describes it in parquet metadata.

    A type that it does not know is described as it is stored.
    """
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    if not columns.is_known(feature):
        return _stored_type(stored)
    value = {"dtype": feature["dtype"], "_type": "Value"}
    shape = feature.get("shape") or []
    if len(shape) > 1:
        return {"shape": shape, "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}
    size = shape[0] if shape else 1
    return value if size == 1 else {"feature": value, "length": size, "_type": "List"}


def _stored_type(stored: object) -> dict[str, object]:
    if isinstance(stored, pl.List | pl.Array):
        return {"feature": _stored_type(stored.inner), "_type": "List"}
    if isinstance(stored, pl.Struct):
        return {field.name: _stored_type(field.dtype) for field in stored.fields}
    if isinstance(stored, pl.String | pl.Categorical):
        return {"dtype": "string", "_type": "Value"}
    name = "bool" if isinstance(stored, pl.Boolean) else str(stored).lower()
    return {"dtype": name, "_type": "Value"}


def write_tasks(path: pathlib.Path, tasks: Mapping[str, int]) -> None:
    """LeRobot looks tasks up by a pandas index, so the file says which column is the index.

    pyarrow ignores this metadata if the file also has an Arrow schema, which polars always writes;
    that schema's key is renamed in place (same length), so that the parquet schema applies.
    """
    index = "__index_level_0__"
    description = [
        {
            "name": name,
            "field_name": field,
            "pandas_type": kind,
            "numpy_type": numpy,
            "metadata": None,
        }
        for name, field, kind, numpy in (
            ("task_index", "task_index", "int64", "int64"),
            (None, index, "unicode", "object"),
        )
    ]
    pandas = {"index_columns": [index], "column_indexes": [], "columns": description}
    pandas |= {"attributes": {}, "pandas_version": "2.2.0"}
    table = pl.DataFrame({"task_index": list(tasks.values()), index: list(tasks)})
    data = io.BytesIO()
    table.write_parquet(data, metadata={"pandas": json.dumps(pandas)})
    path.write_bytes(data.getvalue().replace(b"ARROW:schema", b"polars:types"))
