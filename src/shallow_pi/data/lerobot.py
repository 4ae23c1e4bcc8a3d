"""Read LeRobot v3.0 datasets without torch: random access to frames and action chunks.

Numeric columns live in memory as numpy; pictures are decoded when asked for, from PNG bytes in the
parquet files or from video. All methods may be called from several threads at once, and a dataset
can be pickled to another process. Frame `i` runs over the whole dataset, episodes in order.
"""

import functools
import io
import json
import os
import pathlib
import threading
from collections.abc import Collection
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float
from PIL import Image

from shallow_pi.data import normalize, robots, transforms, video

VERSION = "v3.0"


class Dataset:
    """A LeRobot v3.0 dataset in a local folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.info = _read_info(self.path)
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        if "fps" not in self.info:
            raise ValueError(
                f"{self.path}/meta/info.json has no 'fps'; add the frame rate of the recording"
            )
        self.fps = float(self.info["fps"])
        self.cameras = tuple(
            key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")
        )
        self._files = sorted(self.path.glob("data/*/*.parquet"))
        self.columns = self._read_columns()
        episode = self.columns["episode_index"]
        self.num_episodes = len(np.unique(episode))
        self._ends = np.searchsorted(episode, episode, side="right")
        self.tasks = _read_tasks(self.path)
        self._videos = video.Reader()
        self._lock = threading.Lock()
        self._pictures: dict[tuple[int, str], pl.Series] = {}

    def __len__(self) -> int:
        return len(self.columns["episode_index"])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """All keys of frame `i`, flat: pictures uint8 (h, w, 3), vectors, `task` as text."""
        return self.read(i)

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]  # another process opens the files anew

    def read(self, i: int, cameras: Collection[str] | None = None) -> dict[str, Any]:
        """Frame `i` with only the pictures named by `cameras` (default: all)."""
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} of a dataset of {len(self)} frames")
        frame: dict[str, Any] = {key: column[i] for key, column in self.columns.items()}
        for camera in self.cameras if cameras is None else cameras:
            frame[camera] = self.picture(i, camera)
        frame["task"] = self.task(i)
        return frame

    def task(self, i: int) -> str:
        """The instruction of frame `i`."""
        return self.tasks[int(self.columns["task_index"][i])]

    def chunk(
        self, i: int, horizon: int, key: str = "action"
    ) -> tuple[Float[np.ndarray, "ah rd"], Bool[np.ndarray, " ah"]]:
        """Actions from frame `i` on; beyond the episode's end its last one, marked True."""
        frames = np.arange(i, i + horizon)
        return self.columns[key][np.minimum(frames, self._ends[i] - 1)], frames >= self._ends[i]

    def picture(self, i: int, camera: str) -> np.ndarray:
        """One decoded picture, uint8 (h, w, 3)."""
        if camera not in self.cameras:
            raise ValueError(f"dataset {self.path} has no camera {camera!r}; it has {self.cameras}")
        if self.features[camera]["dtype"] == "video":
            return self._video_frame(i, camera)
        file = int(np.searchsorted(self._starts, i, side="right")) - 1
        data = self._png_column(file, camera)[i - int(self._starts[file])]
        try:
            if data is None:
                raise ValueError("no picture bytes in the parquet file")
            with Image.open(io.BytesIO(data)) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot decode {camera} of {self.where(i)} in {self._files[file]}: {error}"
            ) from error

    def where(self, i: int) -> str:
        """`episode 3, frame 17`, for messages."""
        episode, frame = self.columns["episode_index"][i], self.columns["frame_index"][i]
        return f"episode {episode}, frame {frame}"

    def norm_stats(self, robot: robots.Robot, horizon: int) -> dict[str, normalize.NormStats]:
        """Exact statistics of state and action chunks as the model sees them.

        Delta actions are taken against the state at the chunk's start, so the horizon matters. No
        picture is decoded.
        """
        state = self.columns[robot.state_key]
        frames = np.arange(len(self))[:, None] + np.arange(horizon)
        chunks = self.columns[robot.action_key][np.minimum(frames, self._ends[:, None] - 1)]
        return {
            "state": normalize.compute(state),
            "actions": normalize.compute(transforms.delta(chunks, state, robot.delta)),
        }

    def validate(self, robot: robots.Robot) -> None:
        """Raise unless this dataset can train a policy of `robot`."""
        for camera, key in robot.cameras.items():
            if key not in self.cameras:
                raise ValueError(
                    f"dataset {self.path} lacks camera {key!r} (for {camera}); it has "
                    f"{list(self.cameras)}"
                )
        vectors = sorted(set(self.columns) & set(self.features) - _BOOKKEEPING)
        expected = ((robot.state_key, robot.state_dim), (robot.action_key, robot.action_dim))
        for key, dim in expected:
            if key not in self.columns:
                raise ValueError(f"dataset {self.path} lacks {key!r}; it has {vectors}")
            column = self.columns[key]
            if column.shape[1:] != (dim,):
                raise ValueError(
                    f"{key!r} of dataset {self.path} has shape {column.shape[1:]}, robot "
                    f"{robot.name} expects ({dim},)"
                )
            bad = np.flatnonzero(~np.isfinite(column).all(axis=1))
            if len(bad):
                raise ValueError(
                    f"{key!r} of dataset {self.path} is not finite in {self.where(int(bad[0]))}: "
                    f"{column[bad[0]].tolist()} ({len(bad)} such frames); repair or leave out "
                    "the episode"
                )
        if self.fps != robot.fps:
            raise ValueError(
                f"dataset {self.path} is recorded at {self.fps:g} fps, robot {robot.name} runs at "
                f"{robot.fps:g}; resample the recording or set the robot's fps"
            )

    def _read_columns(self) -> dict[str, np.ndarray]:
        """Every numeric column over all data files; also sets where each file starts."""
        if not self._files or not self.info.get("total_frames"):
            raise ValueError(
                f"dataset {self.path} is empty (no data file, or total_frames is 0); record "
                "episodes, or check that the download is complete"
            )
        keys = [key for key, f in self.features.items() if f["dtype"] in _NUMERIC]
        missing = _BOOKKEEPING - set(keys)
        if missing:
            raise ValueError(f"dataset {self.path} lacks the features {sorted(missing)}")
        tables = [_read_table(path, keys) for path in self._files]
        self._starts = np.cumsum([0, *(len(table) for table in tables)])[:-1]
        table = pl.concat(tables)
        if len(table) != self.info["total_frames"]:
            raise ValueError(
                f"dataset {self.path} has {len(table)} frames in {len(tables)} data files but "
                f"info.json says {self.info['total_frames']}; a file is missing or extra"
            )
        columns = {key: _to_numpy(table[key], self.features[key]) for key in keys}
        if (np.diff(columns["episode_index"]) < 0).any():
            raise ValueError(f"dataset {self.path}: episodes are not in order in the data files")
        return columns

    def _png_column(self, file: int, camera: str) -> pl.Series:
        """The encoded pictures of one file, read at first use and kept."""
        if (file, camera) not in self._pictures:
            with self._lock:
                if (file, camera) not in self._pictures:
                    table = _read_table(self._files[file], [camera])
                    self._pictures[file, camera] = table[camera].struct.field("bytes")
        return self._pictures[file, camera]

    @functools.cached_property
    def _episodes(self) -> dict[str, list]:
        """Where each episode's videos lie: columns `videos/<key>/<what>`, by episode index."""
        files = sorted(self.path.glob("meta/episodes/*/*.parquet"))
        columns = pl.selectors.matches("^episode_index$|^videos/")
        table = pl.concat([pl.scan_parquet(path).select(columns) for path in files])
        return table.sort("episode_index").collect().to_dict(as_series=False)

    def _video_frame(self, i: int, camera: str) -> np.ndarray:
        episode, frame = (int(self.columns[k][i]) for k in ("episode_index", "frame_index"))
        row = self._episodes["episode_index"].index(episode)
        where = {
            what: self._episodes[f"videos/{camera}/{what}"][row]
            for what in ("chunk_index", "file_index", "from_timestamp")
        }
        path = self.path / self.info["video_path"].format(
            video_key=camera, chunk_index=where["chunk_index"], file_index=where["file_index"]
        )
        try:
            seconds = where["from_timestamp"] + frame / self.fps
            return self._videos.frame(path, seconds, tolerance=0.4 / self.fps)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{camera} of {self.where(i)}: {error}") from error


_BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
_NUMERIC = {"float32", "float64", "int32", "int64", "uint8", "int8", "int16", "bool"}


def _read_info(path: pathlib.Path) -> dict[str, Any]:
    file = path / "meta" / "info.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no LeRobot dataset at {path}: {file} is missing (was writing it interrupted?)"
        )
    try:
        info = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    version = info.get("codebase_version")
    if version != VERSION:
        raise ValueError(
            f"dataset {path} has LeRobot format {version}, expected {VERSION}; convert it with "
            "LeRobot's own converter first"
        )
    if "features" not in info:
        raise ValueError(f"{file} has no 'features'")
    return info


def _read_table(path: pathlib.Path, keys: list[str] | None) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=keys)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"cannot read {keys} from {path}: {error}") from error


def _read_tasks(path: pathlib.Path) -> dict[int, str]:
    """Task texts; they are the unnamed pandas index, whose column name varies by writer."""
    table = _read_table(path / "meta" / "tasks.parquet", None)
    (text,) = (name for name, kind in table.schema.items() if kind == pl.String)
    return dict(zip(table["task_index"].to_list(), table[text].to_list(), strict=True))


def _to_numpy(series: pl.Series, feature: dict[str, Any]) -> np.ndarray:
    if isinstance(series.dtype, pl.List):
        series = series.list.to_array(feature["shape"][0])
    column = np.ascontiguousarray(series.to_numpy()).astype(feature["dtype"], copy=False)
    # LeRobot stores a vector of one element as a plain number; bookkeeping is meant to be one.
    is_vector = series.name not in _BOOKKEEPING and column.ndim == 1
    return column[:, None] if is_vector else column
