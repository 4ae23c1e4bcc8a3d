"""Tables of a LeRobot v3.0 dataset as pandas, pyarrow and `datasets` expect to find them."""

import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from PIL import Image


def frames(pictures: Mapping[str, list], columns: Mapping[str, np.ndarray]) -> pl.DataFrame:
    """A row for each frame: encoded pictures, then numbers."""
    series = []
    for key, encoded in pictures.items():
        names = [f"frame-{i:06d}.png" for i in range(len(encoded))]
        struct = pl.DataFrame({"bytes": encoded, "path": names}).to_struct(key)
        series.append(struct)
    for key, value in columns.items():
        # LeRobot stores a vector of one element as a plain number.
        series.append(pl.Series(key, value.squeeze(1) if value.shape[1:] == (1,) else value))
    return pl.DataFrame(series)


def png(picture: np.ndarray) -> bytes:
    """A picture as a PNG file."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG", compress_level=1)
    return data.getvalue()


def hf_type(feature: Mapping[str, Any]) -> dict[str, Any]:
    """A feature as the `datasets` library describes it in parquet metadata."""
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    size = feature["shape"][0]
    return value if size == 1 else {"feature": value, "length": size, "_type": "List"}


def write_tasks(path: pathlib.Path, tasks: Mapping[str, int]) -> None:
    """LeRobot looks tasks up by a pandas index, so the file says which column is the index.

    pyarrow ignores that note where the file also holds an Arrow schema, which polars always
    writes: its key is renamed in place (same length), which leaves the parquet schema in force.
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
