"""Read LeRobot datasets (v2.0, v2.1, v3.0) without torch: random access to frames and chunks.

The requested columns are kept in memory as numpy arrays; images are decoded on demand, from PNG
bytes in the parquet files or from video. All methods are thread-safe, and a dataset can be pickled
to another process. Frame `i` counts the frames of the chosen episodes, in order.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from shallow_pi import progress
from shallow_pi.data.lerobot import columns, data_files, files, image_files, images, layout


class Dataset:
    """A LeRobot dataset in a local folder.

    Args:
      path: of the folder, or its meta files if read already.
      episodes: indices of the episodes to read; None reads all. Files of others are not opened.
      skip_bad_episodes: leave out unreadable episodes instead of raising; `skipped` lists them with
        the reasons. Decodes the first and last image of each, with a progress bar.
      keys: of the needed columns, read immediately; None checks all readable columns and reads each
        on first use. Errors in columns that are not needed are ignored.
      cameras: the needed cameras: their videos must exist and have an image for every frame; None
        checks the videos that exist.
      skip_flag: the command's flag for `skip_bad_episodes`, named in errors.

    Raises:
      FileNotFoundError, ValueError: a dataset, file or episode that cannot be read; says which.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | layout.Layout,
        *,
        episodes: Collection[int] | None = None,
        skip_bad_episodes: bool = False,
        keys: Collection[str] | None = None,
        cameras: Collection[str] | None = None,
        skip_flag: str = "--data.skip-bad-episodes",
    ) -> None:
        self._skip_flag = skip_flag
        self._set_up(path, episodes, skip_bad_episodes, keys, cameras, tell=True)
        for episode, reason in self.skipped.items():
            progress.warn(f"episode {episode} of dataset {self.path} is left out: {reason}")
        told, total = self.info.get("total_frames"), sum(self.layout.lengths.values())
        if told is not None and told != total:
            progress.warn(
                f"dataset {self.path}: info.json says {told} frames, its episodes have {total}; "
                "the episodes are taken"
            )

    def _set_up(
        self,
        path: str | os.PathLike[str] | layout.Layout,
        episodes: Collection[int] | None,
        skip: bool,
        keys: Collection[str] | None,
        cameras: Collection[str] | None,
        tell: bool,
    ) -> None:
        self.layout = path if isinstance(path, layout.Layout) else layout.read(path)
        self.path = self.layout.root
        self.info = self.layout.info
        self.features: Mapping[str, columns.Feature] = self.info["features"]
        self.fps = float(self.info["fps"])
        self.cameras = self.layout.cameras
        self.tasks = self.layout.tasks
        # Texts by the column that numbers them.
        self._texts: dict[str, Mapping[int, str]] = {}
        # Episodes left out, and why.
        self.skipped: dict[int, str] = {}
        self._needed = None if keys is None else tuple(keys)
        # Requested cameras; None if unknown.
        self._asked = None if cameras is None else tuple(cameras)
        self.require(self._needed or (), self._asked or ())
        self._images = images.Images(self.layout)
        self._open(self._chosen(episodes), skip, tell)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, object]:
        """All keys of frame `i`, flat: images uint8 (h, w, 3), vectors, `task` as text."""
        return self.read(i)

    def __getstate__(self) -> dict:
        return {
            "path": self.path,
            "episodes": self.episodes,
            "skip": False,
            "keys": tuple(self.columns.loaded),
            "cameras": (),  # The videos have been checked.
            "skip_flag": self._skip_flag,
        }

    def __setstate__(self, state: dict) -> None:
        self._skip_flag = state.pop("skip_flag")
        self._set_up(
            **state, tell=False
        )  # Another process reopens the files, without repeating warnings.

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def read(
        self, i: int, cameras: Collection[str] | None = None, keys: Collection[str] | None = None
    ) -> dict[str, object]:
        """Frame `i` with only the images of `cameras` and the columns `keys` (default: all)."""
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} of a dataset of {len(self)} frames")
        names = self.columns if keys is None else keys
        frame: dict[str, object] = {key: self.columns[key][i] for key in names}
        cameras = self.cameras if cameras is None else cameras
        frame |= {key: self.image(i, key) for key in cameras}
        return frame | {"task": self.task(i)} if keys is None else frame

    def task(self, i: int, key: str = "task_index") -> str:
        """The instruction that a column numbers for frame `i`; "" if the recording has none."""
        number = int(self.columns[key][i].item())
        texts = self._texts.get(key)
        if texts is None:
            texts = self._texts[key] = self.layout.texts(key)
        if number < 0 and texts is not self.tasks:
            return ""  # Annotations such as subtasks need not cover every frame.
        if number not in texts:
            name = "tasks" if texts is self.tasks else f"{key.removesuffix('_index')}s"
            raise ValueError(
                f"{self.where(i)} of dataset {self.path} has {key} {number}, its meta files have "
                f"{sorted(texts)}: add the text to meta/{name}, or give the robot a prompt"
            )
        return texts[number]

    def chunk(
        self, i: int, horizon: int, key: str = "action"
    ) -> tuple[Float[np.ndarray, "ah rd"], Bool[np.ndarray, " ah"]]:
        """Actions from frame `i` on; beyond the episode's end the last one repeats, marked True."""
        frames = np.arange(i, i + horizon)
        return self.columns[key][np.minimum(frames, self.ends[i] - 1)], frames >= self.ends[i]

    def image(self, i: int, camera: str) -> np.ndarray:
        """One decoded image, uint8 (h, w, 3); of a depth camera the numbers stored, (h, w, 1)."""
        if camera not in self.cameras:
            raise ValueError(f"dataset {self.path} has no camera {camera!r}; it has {self.cameras}")
        episode, row = int(self.columns["episode_index"][i]), int(self._rows[i])
        try:
            time = float(self.seconds[i]) if self._images.is_video(camera) else 0.0
            return self._images.read(camera, episode, row, time)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{camera} of {self.where(i)}: {error}") from error

    def encoded(self, i: int, camera: str) -> tuple[bytes, str]:
        """The image of frame `i` in its stored encoding, and a name for it."""
        episode, row = int(self.columns["episode_index"][i]), int(self._rows[i])
        try:
            return self._images.encoded(camera, episode, row)
        except (ValueError, OSError) as error:
            raise ValueError(f"{camera} of {self.where(i)}: {error}") from error

    def stored(self, episode: int, keys: Sequence[str] | None) -> pl.DataFrame:
        """Columns of one episode as stored in its data file; None means all but the images."""
        file = self.path / self.layout.data_file(episode)
        if keys is None:
            keys = [key for key in files.schema(file) if key not in self.cameras]
        rows = self._rows[self.columns["episode_index"] == episode]
        return files.read_table(file, keys)[rows]

    def depth(self, camera: str) -> str:
        """Reason why a camera records depth; empty if it records images."""
        return self._images.depth(camera, self.episodes[0])

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
        names = tuple(map(str, found if isinstance(found, list) else ()))
        numbered = names == tuple(map(str, range(size)))
        return () if numbered or len(names) != size else names

    def where(self, i: int) -> str:
        """`episode 3, frame 17`, for messages."""
        episode, frame = self.columns["episode_index"][i], self.columns["frame_index"][i]
        return f"episode {episode}, frame {frame}"

    def require(self, keys: Collection[str], cameras: Collection[str]) -> None:
        """Raise unless info.json declares these columns and cameras."""
        vectors = [key for key in self.features if key not in self.cameras]
        for kind, needed, there in (
            ("camera ", cameras, self.cameras),
            ("", keys, [*vectors, *columns.BOOKKEEPING]),
        ):
            for key in needed:
                if kind and key in vectors:
                    raise ValueError(
                        f"{key!r} of dataset {self.path} is declared as "
                        f"{self.features[key]['dtype']!r}, a camera as 'image' or 'video': if it "
                        "holds images, correct its dtype in meta/info.json"
                    )
                if key not in there:
                    shown = sorted(set(there) - set(columns.BOOKKEEPING))
                    raise ValueError(
                        f"dataset {self.path} lacks {kind}{key!r}; it has {shown}. The keys are "
                        "the robot's: a policy's own, or that of --data.robot (docs/robots.md)"
                        f"{columns.closest(key, shown)}"
                    )

    def select(self, episodes: Collection[int]) -> "Dataset":
        """This dataset with only some of its episodes, sharing the data already read."""
        unknown = sorted(set(episodes) - set(self.episodes))
        if unknown or not episodes:
            raise ValueError(
                f"no episodes {unknown or 'were chosen'} among the {self.num_episodes} read of "
                f"dataset {self.path}"
            )
        chosen = np.isin(self.columns["episode_index"], list(episodes))
        part = object.__new__(Dataset)
        part.__dict__.update(self.__dict__)
        loaded = {key: column[chosen] for key, column in self.columns.loaded.items()}
        part._keep(sorted(episodes), self._rows[chosen], loaded)
        return part

    def _chosen(self, episodes: Collection[int] | None) -> list[int]:
        """The episodes to read, in order; those without frames are left out."""
        known = self.layout.lengths
        if not sum(known.values()):
            raise ValueError(
                f"dataset {self.path} is empty (no episodes, or none has frames); record episodes, "
                "or check that the download is complete"
            )
        chosen = sorted(known if episodes is None else set(episodes))
        unknown = [episode for episode in chosen if episode not in known]
        if unknown or not chosen:
            raise ValueError(
                f"no episodes {unknown or 'were chosen'} in dataset {self.path}; it has "
                f"{len(known)}, {min(known)} to {max(known)}"
            )
        empty = [episode for episode in chosen if not known[episode]]
        self.skipped |= dict.fromkeys(empty, "it has no frames")
        return [episode for episode in chosen if known[episode]]

    def _open(self, chosen: list[int], skip: bool, tell: bool) -> None:
        """Read the needed columns of the chosen episodes."""
        keys = [key for key in self._wanted(skip) if key not in data_files.INDEX]
        found = data_files.read(self.layout, chosen, keys, bar=tell)
        found |= self._read_elsewhere(found, keys, tell)
        parts = {n: part for n, part in found.items() if isinstance(part, data_files.Episode)}
        wrong = {n: error for n, error in found.items() if isinstance(error, Exception)}
        if skip:
            self.skipped |= {n: str(error) for n, error in wrong.items()}
        elif wrong:
            error = next(iter(wrong.values()))
            same = [n for n, other in wrong.items() if other is error]
            advice = f"; {self._skip_flag} leaves such episodes out" if parts else ""
            said = f"{_name(same)} of dataset {self.path}: {self._short(error)}{advice}"
            raise type(error)(said) from error
        self._join(parts)
        stored = [camera for camera in self._asked or () if not self._images.is_video(camera)]
        absent = image_files.without_column(self.layout, stored, self.episodes)
        self._check_forms(absent)
        self._check_videos(parts, skip)
        self._check_files(parts, absent, skip)
        if skip:
            self._skip_unreadable(parts)

    def _short(self, error: object) -> str:
        """An error without the dataset's folder, for messages that name it themselves."""
        return str(error).replace(f"{self.path}{os.sep}", "")

    def _read_elsewhere(
        self, found: Mapping[int, data_files.Found], keys: Sequence[str], tell: bool
    ) -> dict[int, data_files.Found]:
        """Look in all data files for episodes that converters and merges of LeRobot misplaced."""
        kinds = (data_files.AbsentError, FileNotFoundError)
        absent = [n for n, part in found.items() if isinstance(part, kinds)]
        if not absent or not self.layout.rows:
            return {}
        moved = data_files.find(self.layout, absent)
        if not moved:
            return {}
        self.layout = dataclasses.replace(self.layout, moved={**self.layout.moved, **moved})
        self._images = images.Images(self.layout)
        if tell:
            progress.warn(
                f"dataset {self.path}: meta/episodes places {_name(sorted(moved))} in data files "
                "that do not hold them; they are read where they are"
            )
        return data_files.read(self.layout, sorted(moved), keys)

    def _check_forms(self, absent: Mapping[str, Collection[int]]) -> None:
        """Raise if a requested camera is stored in another form than info.json declares."""
        file = self.layout.data_file(self.episodes[0])
        for camera in self._asked or ():
            if self._images.is_video(camera):
                if camera not in self._stored or self.layout.has_videos(camera):
                    continue
                there, form = f"its images are in {file}", "image"
            else:
                if len(absent[camera]) < self.num_episodes:
                    continue
                there, form = f"{file} has no such column", "video"
                if not self.layout.has_videos(camera):
                    there, form = f"{there}, and there are no videos of it", ""
            advice = f": declare it as {form} in meta/info.json" if form else ""
            raise ValueError(
                f"camera {camera!r} of dataset {self.path} is declared as "
                f"{self.features[camera]['dtype']}, but {there}{advice}"
            )

    def _check_videos(self, parts: Mapping[int, data_files.Episode], skip: bool) -> None:
        """Raise for, or leave out, episodes with frames that have no image at their time."""
        if not self._timed:
            return
        starts = np.flatnonzero(np.diff(self.ends, prepend=0))
        bounds = zip(starts.tolist(), self.ends[starts].tolist(), strict=True)
        spans = dict(zip(self.columns["episode_index"][starts].tolist(), bounds, strict=True))
        problems = self._images.unmatched(
            spans, self.seconds, self._timed, missing_ok=self._asked is None
        )
        if not problems:
            return
        if not skip:
            worst = max(problems.values(), key=lambda found: found.away).problem
            advice = (
                f"leave them out ({self._skip_flag})"
                if len(problems) < len(spans)
                else "so the videos are not theirs, or 'timestamp' is not in seconds since the "
                "start of an episode"
            )
            raise ValueError(
                f"{self._short(worst)}; {len(problems)} of {len(spans)} episodes of dataset "
                f"{self.path}: {advice}"
            )
        self.skipped |= {episode: found.problem for episode, found in problems.items()}
        self._join({e: part for e, part in parts.items() if e not in problems})

    def _check_files(
        self,
        parts: Mapping[int, data_files.Episode],
        absent: Mapping[str, Mapping[int, image_files.Absent]],
        skip: bool,
    ) -> None:
        """Raise for, or leave out, episodes without images of a camera that others have."""
        rows = {episode: parts[episode].rows for episode in self.episodes}
        for camera in self._asked or ():
            if self._images.is_video(camera):
                continue
            lacking = {n: found for n, found in absent[camera].items() if n in rows}
            having = {n: own for n, own in rows.items() if n not in lacking}
            if having and self._images.is_beside(camera, min(having)):
                lacking |= image_files.absent(self.layout, camera, having)
            if lacking and not skip:
                episode, first = min(lacking.items())
                count = sum(found.count for found in lacking.values())
                raise ValueError(
                    f"{camera} of episode {episode}, frame {first.frame}: "
                    f"{self._short(first.problem)}\n"
                    f"{count} of {len(self)} frames have no image of it, in {len(lacking)} of "
                    f"{len(rows)} episodes of dataset {self.path}: leave them out "
                    f"({self._skip_flag})"
                )
            self.skipped |= {n: f"{camera}: {found.problem}" for n, found in lacking.items()}
        if self.skipped.keys() & rows.keys():
            self._join({n: parts[n] for n in rows if n not in self.skipped})

    def _wanted(self, skip: bool) -> tuple[str, ...]:
        """Columns to read immediately: all of them if bad episodes are to be skipped."""
        keys = self._needed
        if keys is None:
            keys = tuple(key for key in self.features if key not in self.cameras) if skip else ()
        return tuple(dict.fromkeys([*keys, "timestamp"] if self._timed else keys))

    @property
    def asked(self) -> tuple[str, ...]:
        """The cameras that were asked for; all, if nobody said which."""
        return self.cameras if self._asked is None else self._asked

    @property
    def _timed(self) -> list[str]:
        """The requested cameras that are stored as video."""
        return [camera for camera in self.asked if self._images.is_video(camera)]

    def _join(self, parts: Mapping[int, data_files.Episode]) -> None:
        if not parts:
            reasons = "; ".join(list(self.skipped.values())[:2])
            raise ValueError(f"no episode of dataset {self.path} can be read: {reasons}")
        order = sorted(parts)
        chosen = [parts[episode] for episode in order]
        lengths = [len(part.rows) for part in chosen]
        loaded = {
            "episode_index": np.repeat(order, lengths),
            "frame_index": np.concatenate([np.arange(length) for length in lengths]),
        }
        for key in chosen[0].values:
            loaded[key] = data_files.join(self.layout, key, [part.values[key] for part in chosen])
        held = self._stored = set(files.schema(self.path / self.layout.data_file(order[0])))
        # A column of info.json that the data files lack is an error only if it is requested.
        self._held = [k for k in self.features if k in held and k not in self.cameras]
        self._keep(order, np.concatenate([part.rows for part in chosen]), loaded)

    def _keep(self, order: list[int], rows: np.ndarray, loaded: Mapping[str, np.ndarray]) -> None:
        self.episodes, self._rows = order, rows
        keys = dict.fromkeys([*data_files.INDEX, *self._held])
        self.columns = columns.Columns(list(keys), self._load, loaded)
        # For every frame, the end index of its episode.
        index = loaded["episode_index"]
        self.ends = np.searchsorted(index, index, "right")
        self._times: np.ndarray | None = None

    @property
    def seconds(self) -> np.ndarray:
        """Time of each frame since its episode's start."""
        if self._times is None:
            recorded, frames = self.columns["timestamp"], self.columns["frame_index"]
            self._times = images.times(recorded, frames, self.fps)
        return self._times

    def _load(self, key: str) -> np.ndarray:
        """Read a column requested later: every file is read again."""
        if key not in self.features and key not in columns.BOOKKEEPING:
            raise KeyError(key)
        starts = np.searchsorted(self.columns["episode_index"], self.episodes)
        rows = np.split(self._rows, starts[1:])
        return data_files.column(self.layout, key, dict(zip(self.episodes, rows, strict=True)))

    def _skip_unreadable(self, parts: Mapping[int, data_files.Episode]) -> None:
        """Leave out episodes with numbers that are not finite, or undecodable images."""
        starts = np.flatnonzero(np.diff(self.ends, prepend=0))
        with progress.bar("Check episodes", len(starts)) as advance:
            for start in map(int, starts):
                problem = self._unreadable(start, int(self.ends[start]) - 1)
                if problem:
                    self.skipped[int(self.columns["episode_index"][start])] = problem
                advance(1)
        kept = {episode: part for episode, part in parts.items() if episode not in self.skipped}
        if len(kept) < len(parts):
            self._join(kept)

    def _unreadable(self, first: int, last: int) -> str:
        for key, column in self.columns.loaded.items():
            if column.dtype.kind == "f" and not np.isfinite(column[first : last + 1]).all():
                return f"{key!r} is not finite in {self.where(first).partition(',')[0]}"
        cameras = self.cameras if self._asked is None else self._asked
        try:
            for camera, frame in itertools.product(cameras, (first, last)):
                self.image(frame, camera)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return ""


def split(episodes: Sequence[int], validation: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Episodes to train on, and the share `validation` that is held out, at least one.

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


def _name(episodes: Sequence[int]) -> str:
    first, *others = episodes
    if not others:
        return f"episode {first}"
    to = "to" if others[-1] - first == len(others) else "and others up to"
    return f"episodes {first} {to} {others[-1]}"
