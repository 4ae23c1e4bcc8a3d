"""Write LeRobot v3.0 datasets (pictures as PNG in parquet) without torch or pyarrow.

Everything goes to `<folder>.partial`, which `finish` renames: a folder that exists is complete.
Statistics are exact over every frame, unlike LeRobot's own, which averages quantiles of episodes.
"""

import io
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from shallow_pi.data import lerobot

STATE_KEY, ACTION_KEY, IMAGE_PREFIX = "observation.state", "action", "observation.images."
DATA_FILE_MB, VIDEO_FILE_MB, CHUNK_FILES = 100, 200, 1000
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


class Writer:
    """Adds episodes; `finish` (or leaving a `with` block without error) makes the dataset appear.

    Args:
      folder: of the dataset; must not exist.
      fps: frame rate.
      state_names, action_names: of the dimensions; default `["0", "1", ...]`.
      robot_type: written to `info.json`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fps: int,
        *,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
        robot_type: str | None = None,
    ) -> None:
        self.folder = pathlib.Path(folder)
        if self.folder.exists():
            raise FileExistsError(
                f"{self.folder} exists; remove it to write the dataset anew, or choose another"
            )
        self.fps = fps
        self.robot_type = robot_type
        self._names = {STATE_KEY: state_names, ACTION_KEY: action_names}
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._frames = 0
        self._file = 0
        self._buffer: list[pl.DataFrame] = []
        self._buffer_bytes = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add_episode(
        self,
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        action: np.ndarray,
        task: str,
    ) -> None:
        """Append one episode of T frames; shapes and types are checked.

        Args:
          images: uint8 (T, h, w, 3) by camera, with or without `observation.images.` before it.
          state: float (T, sd).
          action: float (T, rd).
          task: the instruction.
        """
        images = {IMAGE_PREFIX + k.removeprefix(IMAGE_PREFIX): v for k, v in images.items()}
        vectors = {STATE_KEY: np.asarray(state), ACTION_KEY: np.asarray(action)}
        self._check(images, vectors, task)
        length, episode = len(state), len(self._episodes)
        index = np.arange(length)
        columns: dict[str, np.ndarray] = {
            **{key: value.astype(np.float32) for key, value in vectors.items()},
            "timestamp": (index / self.fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(length, episode),
            "index": index + self._frames,
            "task_index": np.full(length, self._tasks.setdefault(task, len(self._tasks))),
        }
        counts = {key: _histogram(value) for key, value in images.items()}
        stats = {key: _image_stats(value, length) for key, value in counts.items()}
        stats |= {key: _stats(value) for key, value in columns.items()}
        pictures = {key: [_png(picture) for picture in value] for key, value in images.items()}
        self._buffer.append(_frames_table(pictures, columns))
        self._buffer_bytes += sum(len(x) for column in pictures.values() for x in column)
        self._episodes.append(
            {
                "episode_index": episode,
                "tasks": [task],
                "length": length,
                "data/chunk_index": self._file // CHUNK_FILES,
                "data/file_index": self._file % CHUNK_FILES,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
                **{f"stats/{k}/{n}": v.tolist() for k in stats for n, v in stats[k].items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._frames += length
        for key, value in columns.items():
            self._numbers.setdefault(key, []).append(value)
        for key, value in counts.items():
            self._counts[key] = self._counts.get(key, 0) + value
        if self._buffer_bytes >= DATA_FILE_MB * 2**20:
            self._flush()

    def finish(self) -> pathlib.Path:
        """Write what is left and the meta files, then rename; returns the dataset's folder."""
        if not self._episodes:
            raise ValueError(f"no episodes were added to {self.folder}; nothing to finish")
        self._flush()
        stats = {key: _image_stats(value, self._frames) for key, value in self._counts.items()}
        stats |= {key: _stats(np.concatenate(value)) for key, value in self._numbers.items()}
        meta = self._partial / "meta"
        episodes = self._partial / _EPISODES_PATH
        episodes.parent.mkdir(parents=True)
        pl.DataFrame(self._episodes, infer_schema_length=None).write_parquet(episodes)
        _write_tasks(meta / "tasks.parquet", self._tasks)
        content = {key: {n: v.tolist() for n, v in value.items()} for key, value in stats.items()}
        (meta / "stats.json").write_text(json.dumps(content, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        os.replace(self._partial, self.folder)
        return self.folder

    def _check(self, images: Mapping[str, np.ndarray], vectors: Mapping, task: str) -> None:
        where = f"episode {len(self._episodes)}"
        lengths = {key: len(value) for key, value in {**images, **vectors}.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"{where} needs the same, nonzero number of frames, got {lengths}")
        if not task.strip():
            raise ValueError(f"{where} has an empty task")
        for key, value in images.items():
            if value.dtype != np.uint8 or value.ndim != 4 or value.shape[-1] != 3:
                raise ValueError(
                    f"{key} of {where} must be uint8 (T, h, w, 3), got {value.dtype} {value.shape}"
                )
        for key, value in vectors.items():
            if value.ndim != 2:
                raise ValueError(f"{key} of {where} must be (T, dim), got {value.shape}")
            if not np.isfinite(value).all():
                frame = np.argwhere(~np.isfinite(value))[0][0]
                raise ValueError(f"{key} of {where}, frame {frame} is not finite: {value[frame]}")
        features = self._describe(images, vectors)
        if self._features and features != self._features:
            raise ValueError(f"{where} has features {features}, before {self._features}")
        self._features = features

    def _describe(self, images: Mapping[str, np.ndarray], vectors: Mapping) -> dict[str, dict]:
        features: dict[str, dict[str, Any]] = {
            key: {
                "dtype": "image",
                "shape": list(value.shape[1:]),
                "names": ["height", "width", "channels"],
            }
            for key, value in images.items()
        }
        for key, value in vectors.items():
            names = list(self._names[key] or map(str, range(value.shape[1])))
            if len(names) != value.shape[1]:
                raise ValueError(f"{key} has {value.shape[1]} dimensions but names {names}")
            features[key] = {"dtype": "float32", "shape": [value.shape[1]], "names": names}
        for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            dtype = "float32" if key == "timestamp" else "int64"
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        return features

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": lerobot.VERSION,
            "robot_type": self.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _DATA_PATH,
            "video_path": None,
            "features": self._features,
        }

    def _flush(self) -> None:
        if not self._buffer:
            return
        chunk, file = divmod(self._file, CHUNK_FILES)
        path = self._partial / _DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        features = {key: _hf_type(feature) for key, feature in self._features.items()}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pl.concat(self._buffer).write_parquet(path, metadata=metadata)
        self._file += 1
        self._buffer, self._buffer_bytes = [], 0


def _frames_table(pictures: Mapping[str, list], columns: Mapping[str, np.ndarray]) -> pl.DataFrame:
    series = []
    for key, encoded in pictures.items():
        names = [f"frame-{i:06d}.png" for i in range(len(encoded))]
        struct = pl.DataFrame({"bytes": encoded, "path": names}).to_struct(key)
        series.append(struct)
    for key, value in columns.items():
        # LeRobot stores a vector of one element as a plain number.
        series.append(pl.Series(key, value.squeeze(1) if value.shape[1:] == (1,) else value))
    return pl.DataFrame(series)


def _png(picture: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG", compress_level=1)
    return data.getvalue()


def _hf_type(feature: Mapping[str, Any]) -> dict[str, Any]:
    """A feature as the `datasets` library describes it in parquet metadata."""
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    size = feature["shape"][0]
    return value if size == 1 else {"feature": value, "length": size, "_type": "List"}


def _stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """Exact statistics over frames, as LeRobot shapes them."""
    rows = values.reshape(len(values), -1)
    exact = rows.astype(np.float64)
    quantiles = np.quantile(exact, list(_QUANTILES.values()), axis=0)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": exact.mean(0),
        "std": exact.std(0),
        "count": np.array([len(rows)]),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
    }


def _histogram(images: np.ndarray) -> np.ndarray:
    """How often each of 256 values occurs, by channel: statistics of pictures come from it."""
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])


def _image_stats(counts: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """Exact statistics of pixels in [0, 1], shape (3, 1, 1), from a histogram by channel."""
    value = np.arange(256) / 255
    total = counts.sum(1)
    mean = counts @ value / total
    std = np.sqrt(np.maximum(counts @ value**2 / total - mean**2, 0))
    cumulative = counts.cumsum(1)

    def quantile(q: float) -> np.ndarray:
        rank = q * (total - 1)
        low, high = (
            [
                np.searchsorted(row, k, side="right")
                for row, k in zip(cumulative, ranks, strict=True)
            ]
            for ranks in (np.floor(rank), np.ceil(rank))
        )
        return value[low] + (value[high] - value[low]) * (rank - np.floor(rank))

    by_name = {"min": quantile(0.0), "max": quantile(1.0), "mean": mean, "std": std}
    by_name |= {name: quantile(q) for name, q in _QUANTILES.items()}
    shaped = {name: np.asarray(x).reshape(3, 1, 1) for name, x in by_name.items()}
    head = {name: shaped.pop(name) for name in ("min", "max", "mean", "std")}
    return {**head, "count": np.array([frames]), **shaped}


def _write_tasks(path: pathlib.Path, tasks: Mapping[str, int]) -> None:
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
