"""Read LeRobot datasets (v2.0, v2.1, v3.0) without torch: random access to frames and chunks.

Numeric columns live in memory as numpy; pictures are decoded when asked for, from PNG bytes in the
parquet files or from video. All methods may be called from several threads at once, and a dataset
can be pickled to another process. Frame `i` runs over the frames of the chosen episodes, in order.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from shallow_pi import progress
from shallow_pi.data.lerobot import layout, pictures
from shallow_pi.data.robots import normalize, statistics
from shallow_pi.data.robots import robot as robots

# Written by lerobot_writer.
VERSION = layout.VERSIONS[-1]


class Dataset:
    """A LeRobot dataset in a local folder.

    Args:
      path: of the folder.
      episodes: to read, by their index; None is all of them. Files of others are not opened.
      cameras: whose pictures will be read, so that their videos must be there and show a picture at
        the time of every frame; None checks the videos that are there.
      skip_bad_episodes: leave out episodes that cannot be read, instead of raising: `skipped` then
        says which and why. Looks at the first and last picture of each, with a progress bar.

    Raises:
      FileNotFoundError, ValueError: a dataset, file or episode that cannot be read; says which.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        episodes: Collection[int] | None = None,
        cameras: Collection[str] | None = None,
        skip_bad_episodes: bool = False,
    ) -> None:
        # Absolute, because FFmpeg takes `a:` before a relative path for a protocol.
        self.path = pathlib.Path(os.path.expanduser(path)).absolute()
        self.layout = layout.read(self.path)
        self.info = self.layout.info
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.fps = float(self.info["fps"])
        self.cameras = tuple(
            key for key, feature in self.features.items() if feature["dtype"] in ("image", "video")
        )
        self.tasks = self.layout.tasks
        # Episodes left out, and why.
        self.skipped: dict[int, str] = {}
        self._pictures = pictures.Pictures(self.layout)
        # Cameras that were asked for; None is not known.
        self._asked = None if cameras is None else tuple(cameras)
        self._open(self._chosen(episodes), skip_bad_episodes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """All keys of frame `i`, flat: pictures uint8 (h, w, 3), vectors, `task` as text."""
        return self.read(i)

    def __getstate__(self) -> dict:
        # Its videos have been checked.
        return {"path": self.path, "episodes": self.episodes, "cameras": ()}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]  # another process opens the files anew

    @property
    def num_episodes(self) -> int:
        """How many episodes are read."""
        return len(self.episodes)

    def read(self, i: int, cameras: Collection[str] | None = None) -> dict[str, Any]:
        """Frame `i` with only the pictures named by `cameras` (default: all)."""
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} of a dataset of {len(self)} frames")
        frame: dict[str, Any] = {key: column[i] for key, column in self.columns.items()}
        cameras = self.cameras if cameras is None else cameras
        return frame | {key: self.picture(i, key) for key in cameras} | {"task": self.task(i)}

    def task(self, i: int) -> str:
        """The instruction of frame `i`."""
        task = int(self.columns["task_index"][i])
        if task not in self.tasks:
            raise ValueError(
                f"{self.where(i)} of dataset {self.path} has task {task}; there are "
                f"{sorted(self.tasks)} in its meta files"
            )
        return self.tasks[task]

    def chunk(
        self, i: int, horizon: int, key: str = "action"
    ) -> tuple[Float[np.ndarray, "ah rd"], Bool[np.ndarray, " ah"]]:
        """Actions from frame `i` on; beyond the episode's end its last one, marked True."""
        frames = np.arange(i, i + horizon)
        return self.columns[key][np.minimum(frames, self.ends[i] - 1)], frames >= self.ends[i]

    def picture(self, i: int, camera: str) -> np.ndarray:
        """One decoded picture, uint8 (h, w, 3); of a depth camera the numbers stored, (h, w, 1)."""
        if camera not in self.cameras:
            raise ValueError(f"dataset {self.path} has no camera {camera!r}; it has {self.cameras}")
        episode, row = int(self.columns["episode_index"][i]), int(self._rows[i])
        try:
            return self._pictures.read(camera, episode, row, float(self._seconds[i]))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{camera} of {self.where(i)}: {error}") from error

    def depth(self, camera: str) -> str:
        """How a camera is known to record depth instead of a picture; empty if it is a picture."""
        return self._pictures.depth(camera, self.episodes[0])

    def names(self, key: str) -> tuple[str, ...]:
        """Names of a vector's dimensions as `info.json` gives them; empty if it gives none."""
        feature = self.features[key]
        found = feature.get("names")
        if isinstance(found, dict):
            # {"motors": [...]}, or a name for each index.
            lists = [value for value in found.values() if isinstance(value, list)]
            found = lists[0] if len(lists) == 1 else list(found)
        if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
            found = found[0]
        size = math.prod(feature.get("shape") or ())
        names = tuple(map(str, found or ()))
        numbered = names == tuple(map(str, range(size)))
        return () if numbered or len(names) != size else names

    def where(self, i: int) -> str:
        """`episode 3, frame 17`, for messages."""
        episode, frame = self.columns["episode_index"][i], self.columns["frame_index"][i]
        return f"episode {episode}, frame {frame}"

    def select(self, episodes: Collection[int]) -> "Dataset":
        """This dataset with only some of its episodes; nothing is read again."""
        chosen = np.isin(self.columns["episode_index"], list(episodes))
        part = object.__new__(Dataset)
        part.__dict__.update(self.__dict__)
        columns = {key: column[chosen] for key, column in self.columns.items()}
        part._keep(sorted(episodes), self._rows[chosen], columns)
        return part

    def norm_stats(
        self, robot: robots.Robot, horizon: int, advance: progress.Advance | None = None
    ) -> dict[str, normalize.NormStats]:
        """Exact statistics of state and action chunks as the model sees them (`statistics`)."""
        state, actions = robot.state(self.columns), robot.actions(self.columns)
        return statistics.compute(state, actions, self.ends, robot, horizon, advance)

    def validate(self, robot: robots.Robot) -> None:
        """Raise unless this dataset can train a policy of `robot`."""
        for camera, key in robot.cameras.items():
            if key not in self.cameras:
                raise ValueError(
                    f"dataset {self.path} lacks camera {key!r} (for {camera}); it has "
                    f"{list(self.cameras)}"
                )
            if reason := self.depth(key):
                raise ValueError(
                    f"camera {key!r} (for {camera}) of dataset {self.path} records depth "
                    f"({reason}); a policy sees 8-bit colour: name a colour camera in the robot's "
                    "cameras"
                )
        vectors = sorted(set(self.columns) & set(self.features) - _BOOKKEEPING)
        for key in (*robot.state_keys, *robot.action_keys):
            if key not in self.columns:
                raise ValueError(f"dataset {self.path} lacks {key!r}; it has {vectors}")
        state, actions = robot.state(self.columns), robot.actions(self.columns)
        for key, column, dim in (
            (" + ".join(map(repr, robot.state_keys)), state, robot.state_dim),
            (" + ".join(map(repr, robot.action_keys)), actions, robot.action_dim),
        ):
            if column.shape[1:] != (dim,):
                raise ValueError(
                    f"{key} of dataset {self.path} has shape {column.shape[1:]}, robot "
                    f"{robot.name} expects ({dim},)"
                )
            bad = np.flatnonzero(~np.isfinite(column).all(axis=1))
            if len(bad):
                raise ValueError(
                    f"{key} of dataset {self.path} is not finite in {self.where(int(bad[0]))}: "
                    f"{column[bad[0]].tolist()} ({len(bad)} such frames); repair or leave out "
                    "the episode"
                )
        if self.fps != robot.fps:
            raise ValueError(
                f"dataset {self.path} is recorded at {self.fps:g} fps, robot {robot.name} runs at "
                f"{robot.fps:g}; resample the recording or set the robot's fps"
            )

    def _chosen(self, episodes: Collection[int] | None) -> list[int]:
        if not self.layout.lengths or not self.info.get("total_frames"):
            raise ValueError(
                f"dataset {self.path} is empty (no episodes, or total_frames is 0); record "
                "episodes, or check that the download is complete"
            )
        known, frames = sorted(self.layout.lengths), sum(self.layout.lengths.values())
        if frames != self.info["total_frames"]:
            raise ValueError(
                f"dataset {self.path} lists {len(known)} episodes with {frames} frames but "
                f"info.json says {self.info['total_frames']}; a file is of another version of it"
            )
        if episodes is None:
            return known
        unknown = sorted(set(episodes) - set(known))
        if unknown or not episodes:
            raise ValueError(
                f"no episodes {unknown or 'were chosen'} in dataset {self.path}; it has "
                f"{len(known)}, {known[0]} to {known[-1]}"
            )
        return sorted(set(episodes))

    def _open(self, chosen: list[int], skip: bool) -> None:
        """Read every numeric column of the chosen episodes, file by file."""
        keys = [key for key, f in self.features.items() if f["dtype"] in _NUMERIC]
        missing = _BOOKKEEPING - set(keys)
        if missing:
            raise ValueError(f"dataset {self.path} lacks the features {sorted(missing)}")
        files: dict[str, list[int]] = {}
        for episode in chosen:
            files.setdefault(self.layout.data_file(episode), []).append(episode)
        parts: dict[int, pl.DataFrame] = {}
        for file, wanted in files.items():
            try:
                table = layout.read_table(self.path / file, keys).with_row_index("row")
            except (ValueError, FileNotFoundError) as error:
                if not skip:
                    raise type(error)(f"{_name(wanted)} of dataset {self.path}: {error}") from error
                self.skipped |= dict.fromkeys(wanted, str(error))
                continue
            by_episode = table.partition_by("episode_index", as_dict=True)
            for episode in wanted:
                part = by_episode.get((episode,), table.clear())
                problem = self._problem(part, file, episode)
                if problem and not skip:
                    raise ValueError(problem)
                if problem:
                    self.skipped[episode] = problem
                else:
                    parts[episode] = part
        self._join(parts, keys)
        self._check_videos(parts, keys, skip)
        if skip:
            self._skip_unreadable(parts, keys)

    def _check_videos(self, parts: dict[int, pl.DataFrame], keys: list[str], skip: bool) -> None:
        """Raise for, or leave out, episodes with frames at whose time no picture is shown."""
        starts = np.flatnonzero(np.diff(self.ends, prepend=0))
        bounds = zip(starts.tolist(), self.ends[starts].tolist(), strict=True)
        spans = dict(zip(self.columns["episode_index"][starts].tolist(), bounds, strict=True))
        cameras = self.cameras if self._asked is None else self._asked
        problems = self._pictures.unmatched(
            spans,
            self._seconds,
            [camera for camera in cameras if camera in self.cameras],
            missing_ok=self._asked is None,
        )
        if not problems:
            return
        if not skip:
            raise ValueError(
                f"{max(problems.values(), key=lambda found: found.away).problem}. {len(problems)} "
                f"of {len(spans)} episodes of dataset {self.path} have such frames: record them "
                "again, or leave them out (--data.skip-bad-episodes)"
            )
        self.skipped |= {episode: found.problem for episode, found in problems.items()}
        self._join({e: part for e, part in parts.items() if e not in problems}, keys)

    def _problem(self, part: pl.DataFrame, file: str, episode: int) -> str:
        """What is wrong with an episode's rows, or nothing."""
        expected = self.layout.lengths[episode]
        if len(part) != expected:
            return (
                f"{self.path / file} has {len(part)} frames of episode {episode}, the meta files "
                f"say {expected}; it was cut off, or is of another version of the dataset"
            )
        index = part["frame_index"].to_numpy()
        wrong = np.flatnonzero(index != np.arange(expected))
        if len(wrong):
            return (
                f"{self.path / file}: row {wrong[0]} of episode {episode} is frame "
                f"{index[wrong[0]]}; frames must be in order and complete"
            )
        return ""

    def _join(self, parts: dict[int, pl.DataFrame], keys: list[str]) -> None:
        if not parts:
            reasons = "; ".join(list(self.skipped.values())[:2])
            raise ValueError(f"no episode of dataset {self.path} can be read: {reasons}")
        table = pl.concat([parts[episode] for episode in sorted(parts)])
        columns = {key: _to_numpy(table[key], self.features[key]) for key in keys}
        self._keep(sorted(parts), table["row"].to_numpy(), columns)

    def _keep(self, episodes: list[int], rows: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        self.episodes, self.columns, self._rows = episodes, columns, rows
        # For every frame the index after its episode's last frame.
        self.ends = np.searchsorted(columns["episode_index"], columns["episode_index"], "right")
        self._seconds = pictures.times(columns["timestamp"], columns["frame_index"], self.fps)

    def _skip_unreadable(self, parts: dict[int, pl.DataFrame], keys: list[str]) -> None:
        """Leave out episodes with a number that is not finite, or pictures that do not decode."""
        starts = np.flatnonzero(np.diff(self.ends, prepend=0))
        with progress.bar("Check episodes", len(starts)) as advance:
            for start in map(int, starts):
                problem = self._unreadable(start, int(self.ends[start]) - 1)
                if problem:
                    self.skipped[int(self.columns["episode_index"][start])] = problem
                advance(1)
        kept = {episode: part for episode, part in parts.items() if episode not in self.skipped}
        if len(kept) < len(parts):
            self._join(kept, keys)

    def _unreadable(self, first: int, last: int) -> str:
        for key, column in self.columns.items():
            if column.dtype.kind == "f" and not np.isfinite(column[first : last + 1]).all():
                return f"{key!r} is not finite in {self.where(first).partition(',')[0]}"
        try:
            for camera, frame in itertools.product(self.cameras, (first, last)):
                self.picture(frame, camera)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return ""


def split(episodes: Sequence[int], validation: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Episodes to train on, and a share `validation` of them, at least one, held out.

    Raises:
      ValueError: nothing would be left for one of the two.
    """
    held_out = max(1, round(validation * len(episodes)))
    if not 0 < validation < 1 or held_out >= len(episodes):
        raise ValueError(
            f"cannot hold out {validation:g} of {len(episodes)} episodes: the share must lie "
            "between 0 and 1 and leave at least one episode on each side"
        )
    order = np.random.default_rng(seed).permutation(np.asarray(sorted(episodes)))
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


_BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
_NUMERIC = {"float32", "float64", "int32", "int64", "uint8", "int8", "int16", "bool"}


def _name(episodes: Sequence[int]) -> str:
    first, *others = episodes
    return f"episodes {first} to {others[-1]}" if others else f"episode {first}"


def _to_numpy(series: pl.Series, feature: dict[str, Any]) -> np.ndarray:
    if isinstance(series.dtype, pl.List):
        series = series.list.to_array(feature["shape"][0])
    column = np.ascontiguousarray(series.to_numpy()).astype(feature["dtype"], copy=False)
    # LeRobot stores a vector of one element as a plain number; bookkeeping is meant to be one.
    is_vector = series.name not in _BOOKKEEPING and column.ndim == 1
    return column[:, None] if is_vector else column
