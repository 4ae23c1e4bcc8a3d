"""Tables of a LeRobot v3.0 dataset as pandas, pyarrow and `datasets` expect to find them."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from PIL import Image

from shallow_pi.data.lerobot.columns import Feature


def frames(
    pictures: Mapping[str, Sequence[tuple[bytes, str]]],
    columns: Mapping[str, np.ndarray | pl.Series],
) -> pl.DataFrame:
    """A row for each frame: encoded pictures and their names, then the columns."""
    series = []
    for key, encoded in pictures.items():
        data, names = zip(*encoded, strict=True)
        series.append(pl.DataFrame({"bytes": data, "path": names}).to_struct(key))
    for key, value in columns.items():
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


def png(picture: np.ndarray) -> bytes:
    """A picture as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG", compress_level=1)
    return data.getvalue()


def hf_type(feature: Feature) -> dict[str, object]:
    """A feature as the `datasets` library describes it in parquet metadata."""
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    shape = feature["shape"]
    if len(shape) > 1:
        return {"shape": shape, "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}
    size = shape[0] if shape else 1
    return value if size == 1 else {"feature": value, "length": size, "_type": "List"}


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
