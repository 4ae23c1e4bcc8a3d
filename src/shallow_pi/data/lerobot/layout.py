"""Files of a LeRobot dataset (v2.0, v2.1, v3.0), and the episodes and tasks its meta files list.

Version 2 has a parquet file and a video for each episode, listed in JSON lines; version 3 packs
many episodes into a file and lists in parquet where each one starts.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

import polars as pl

from shallow_pi import progress
from shallow_pi.checkpoints import fetch
from shallow_pi.data.lerobot import columns, files

VERSIONS = ("v2.0", "v2.1", "v3.0")
CHUNK_SIZE = 1000
# Default file locations, if info.json gives none, by major version.
PATHS = {
    "v2": {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
        "episode_{episode_index:06d}.mp4",
    },
    "v3": {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    },
}

# Columns that GR00T slices, unless its file names others.
_SLICED = {"state": "observation.state", "action": "action"}

# A row of the table of episodes of version 3, by its columns.
EpisodeRow = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The contents of a dataset's meta files."""

    root: pathlib.Path
    info: Mapping[str, Any]
    # Task texts by index, "" if the text is absent.
    tasks: Mapping[int, str]
    # Frames of every episode, by episode index.
    lengths: Mapping[int, int]
    # Version 3: one row per episode, with columns such as `videos/<key>/from_timestamp`.
    rows: Mapping[int, EpisodeRow]
    # Further columns of the file of tasks, beside index and text.
    task_extras: Sequence[str] = ()
    # Task texts of each episode as the meta files list them, which frames may contradict.
    listed: Mapping[int, Sequence[str]] = dataclasses.field(default_factory=dict)
    # Data files of episodes that the meta files place in others.
    moved: Mapping[int, str] = dataclasses.field(default_factory=dict)

    @property
    def version(self) -> str:
        """One of VERSIONS."""
        return self.info["codebase_version"]

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of the images and videos."""
        features = self.info["features"].items()
        return tuple(key for key, feature in features if feature["dtype"] in columns.IMAGES)

    def data_file(self, episode: int) -> str:
        """The parquet file of an episode, relative to the dataset."""
        return self.moved.get(episode) or self._path("data_path", episode, "data")

    def video(self, episode: int, camera: str) -> tuple[str, float]:
        """An episode's video file, relative to the dataset, and its start in the file (seconds)."""
        start = 0.0
        if self.rows:
            start = self._value(episode, f"videos/{camera}/from_timestamp")
        return self._path("video_path", episode, f"videos/{camera}", video_key=camera), start

    def data_files(self) -> list[str]:
        """The data files that are there, relative to the dataset."""
        found = self.root.glob(self._pattern("data_path"))
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def has_videos(self, camera: str) -> bool:
        """True if there is a video file of this camera."""
        return any(self.root.glob(self._pattern("video_path", video_key=glob.escape(camera))))

    def patterns(self, videos: Sequence[str]) -> list[str]:
        """Patterns (`*`) of all data files, and of all videos of these cameras, sorted.

        For the hub, which compares every file of a repository with every name that it is given.
        """
        found = [self._pattern("video_path", video_key=key) for key in videos]
        return sorted({self._pattern("data_path"), *found})

    def files(self, episodes: Collection[int], videos: Collection[str]) -> list[str]:
        """The data files of these episodes, and their videos of these cameras, sorted."""
        found = set()
        for episode in episodes:
            for key in (None, *videos):
                with contextlib.suppress(ValueError):  # Opening the dataset reports the error.
                    found.add(self.video(episode, key)[0] if key else self.data_file(episode))
        return sorted(found)

    def texts(self, key: str) -> Mapping[int, str]:
        """The texts that a column numbers: `subtask_index` those of `meta/subtasks.parquet`.

        Other columns number the tasks, as GR00T's do.
        """
        name = key.removesuffix("_index")
        if name in (key, "task"):
            return self.tasks
        path = self.root / "meta" / f"{name}s.parquet"
        files.check(path)
        return _by_number(path, _texts_of_table(path, key)[0], key)

    def slices(self, what: str) -> dict[str, dict[str, tuple[int, int]]]:
        """By column, the named slices (first, last + 1) of GR00T's `meta/modality.json`.

        Args:
          what: `state` or `action`.

        Empty where there is no such file, or it says nothing of the kind.
        """
        path = self.root / "meta" / "modality.json"
        content = files.read_json(path) if path.is_file() else {}
        listed = content.get(what) if isinstance(content, dict) else None
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, one in listed.items() if isinstance(listed, dict) else ():
            first, last = map(one.get, ("start", "end")) if isinstance(one, dict) else ("", "")
            if isinstance(first, int) and isinstance(last, int):
                key = str(one.get("original_key") or _SLICED[what])
                found.setdefault(key, {})[name] = first, last
        return found

    def _pattern(self, what: str, **known: str) -> str:
        return re.sub(
            r"\{(\w+)[^}]*\}", lambda match: known.get(match[1], "*"), self._template(what)
        )

    def _template(self, what: str) -> str:
        # Backslashes are Windows separators, not part of a name.
        return (self.info.get(what) or PATHS[self.version[:2]][what]).replace("\\", "/")

    def _path(self, what: str, episode: int, prefix: str, **known: str) -> str:
        size = self.info.get("chunks_size") or CHUNK_SIZE
        place = {"episode_chunk": episode // size, "episode_index": episode}
        template = self._template(what)
        if self.rows and "{episode_index" not in template:
            indices = ("chunk_index", "file_index")
            place = {key: self._value(episode, f"{prefix}/{key}") for key in indices}
        try:
            return template.format(**place, **known)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{self.root / 'meta' / 'info.json'}: {what} is {template!r}, expected a pattern "
                f"of {sorted({**place, **known})}"
            ) from error

    def _value(self, episode: int, key: str) -> Any:
        value = self.rows[episode].get(key)
        if value is None:
            raise ValueError(f"{self.root}/meta/episodes has no {key!r} of episode {episode}")
        return value


def read(folder: str | os.PathLike[str]) -> Layout:
    """Read a dataset's meta files.

    Raises:
      FileNotFoundError: the dataset or a meta file is missing; says which.
      ValueError: a version or content that cannot be read.
    """
    # Absolute, because FFmpeg reads `a:` at the start of a relative path as a protocol.
    root = pathlib.Path(os.path.expanduser(folder)).absolute()
    info = _read_info(root)
    rows: dict[int, EpisodeRow] = {}
    if info["codebase_version"] == "v3.0":
        rows = _read_episodes(root)
        lengths = {episode: rows[episode]["length"] for episode in sorted(rows)}
        listed = {episode: row.get("tasks") for episode, row in rows.items()}
    else:
        lengths, listed = _read_lengths(root / "meta" / "episodes.jsonl")
    tasks, extras = _read_tasks(root, info["codebase_version"])
    told = {episode: texts for episode, texts in listed.items() if _are_texts(texts)}
    return Layout(root, info, tasks, lengths, rows, extras, told)


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def _read_info(root: pathlib.Path) -> dict[str, Any]:
    file = root / "meta" / "info.json"
    if not root.exists():
        raise FileNotFoundError(
            f"no LeRobot dataset at {root}: there is no such folder; check the path (a dataset of "
            f"the Hugging Face hub is owner/name){fetch.nearby(root)}"
        )
    if not file.exists():
        raise FileNotFoundError(f"no LeRobot dataset at {root}: {file} is missing{_hint(root)}")
    info = files.read_json(file)
    if not isinstance(info, dict):
        raise ValueError(f"{file} holds {info!r:.100}, expected an object")
    # Written by hand or by other tools too: 3.0 and v3.0.0 are the same version.
    form = re.fullmatch(r"v?(\d+\.\d+)(\.0)?", str(info.get("codebase_version")))
    version = f"v{form[1]}" if form else ""
    if version not in VERSIONS:
        raise ValueError(
            f"{file}: codebase_version is {info.get('codebase_version')!r}, expected one of "
            f"{', '.join(VERSIONS)}; convert an older dataset with LeRobot's own converters first"
        )
    missing = [key for key in ("features", "fps") if info.get(key) is None]
    if missing:
        raise ValueError(f"{file} has no {', '.join(map(repr, missing))}")
    features = info["features"]
    if not isinstance(features, dict):
        raise ValueError(f"{file}: features is {features!r:.100}, expected an object")
    for key, feature in features.items():
        if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
            raise ValueError(f"{file}: feature {key!r} needs a 'dtype', got {feature!r:.100}")
    try:
        fps = float(info["fps"])
    except (TypeError, ValueError):
        fps = math.nan
    if not 0 < fps < math.inf:
        raise ValueError(f"{file}: fps is {info['fps']!r}, expected a positive number")
    for key in ("data_path", "video_path"):
        if not isinstance(info.get(key, ""), str | None):
            raise ValueError(f"{file}: {key} is {info[key]!r:.100}, expected a pattern")
    known = {"codebase_version": version, "fps": fps}
    if size := info.get("chunks_size"):
        known["chunks_size"] = files.whole(size, f"chunks_size of {file}")
    shapes = {key: _shape(feature, key, file) for key, feature in features.items()}
    return {**info, **known, "features": {k: {**f, **shapes[k]} for k, f in features.items()}}


def _hint(root: pathlib.Path) -> str:
    """A guess at the intended folder."""
    if root.is_file():
        return "; it is a file, a dataset is a folder: unpack it, or convert it to LeRobot's format"
    if (root / "info.json").exists():
        return f"; did you mean {root.parent}?"
    # A folder of datasets, or one of the caches of huggingface_hub and LeRobot.
    levels = ([*root.glob(f"{above}/meta/info.json")] for above in ("*", "*/*"))
    below = sorted(path.parent.parent for path in next(filter(None, levels), []))
    if below:
        more = f", or another of the {len(below)} datasets in it" if len(below) > 1 else ""
        return f"; did you mean {below[0]}{more}?"
    if not (root / "meta").is_dir() and (inside := sorted(os.listdir(root))):
        some = ", ".join(inside[:3]) + (" ..." if len(inside) > 3 else "")
        return f"; it holds {some}: convert what is not in LeRobot's format"
    return " (was writing it interrupted?)"


def _shape(feature: Mapping[str, object], key: str, file: pathlib.Path) -> dict[str, list[int]]:
    """The shape of a feature as a list, if it has one: some tools write a plain number."""
    shape = feature.get("shape")
    if shape is None:
        return {}
    sizes = shape if isinstance(shape, list) else [shape]
    return {"shape": [files.whole(size, f"shape of {key!r} in {file}") for size in sizes]}


def _read_lengths(path: pathlib.Path) -> tuple[dict[int, int], dict[int, Any]]:
    """Frames of every episode of version 2, and its tasks."""
    if not path.exists() and (path.parent / "episodes").is_dir():
        raise FileNotFoundError(
            f"{path} is missing; meta/episodes/ is there: is codebase_version of info.json v3.0?"
        )
    lengths, tasks = dict[int, int](), dict[int, Any]()
    for row in files.json_rows(path, ("episode_index", "length")):
        episode = files.whole(row["episode_index"], f"episode_index of {path}")
        length = files.whole(row["length"], f"length of episode {episode} of {path}")
        if lengths.setdefault(episode, length) != length:
            raise ValueError(
                f"{path} has episode {episode} twice, with {lengths[episode]} and {length} frames; "
                "remove the line that is not true"
            )
        tasks[episode] = row.get("tasks")
    return dict(sorted(lengths.items())), tasks


def episode_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Version 3's episode tables, without the `._` files that macOS adds."""
    paths = sorted((root / "meta" / "episodes").glob("*/[!.]*.parquet"))
    if not paths:
        hint = "is the download complete, and did the recorder end without an error?"
        if (root / "meta" / "episodes.jsonl").exists():
            hint = "meta/episodes.jsonl is there: is codebase_version of info.json v2.1?"
        raise FileNotFoundError(f"dataset {root} has no meta/episodes/*/*.parquet; {hint}")
    return paths


def _read_episodes(root: pathlib.Path) -> dict[int, EpisodeRow]:
    """The rows of version 3's episode tables, without statistics."""
    found: dict[int, EpisodeRow] = {}
    for path in episode_files(root):
        keys = [key for key in files.schema(path) if re.fullmatch(_EPISODE_COLUMNS, key)]
        if "episode_index" not in keys:
            raise ValueError(f"{path} has no column 'episode_index'; it has {keys}")
        for row in files.read_table(path, keys).iter_rows(named=True):
            episode = files.whole(row["episode_index"], f"episode_index of {path}")
            what = f"of episode {episode} of {path}"
            if episode in found:
                raise ValueError(f"{path} has episode {episode} a second time; remove one of them")
            for key, value in row.items():
                if value is None or key == "tasks":
                    continue
                if not key.endswith("timestamp"):
                    row[key] = files.whole(value, f"{key} {what}")
                elif not isinstance(value, int | float):
                    raise ValueError(f"{key} {what} is {value!r:.100}, expected seconds")
            if row.get("length") is None:
                first, end = (row.get(f"dataset_{end}_index") for end in ("from", "to"))
                if first is None or end is None:
                    raise ValueError(f"there is no length {what}")
                row["length"] = end - first
            found[episode] = row
    return found


_EPISODE_COLUMNS = (
    r"episode_index|length|tasks|dataset_(from|to)_index"
    r"|(data|videos/.*)/(chunk_index|file_index|(from|to)_timestamp)"
)


def _read_tasks(root: pathlib.Path, version: str) -> tuple[dict[int, str], list[str]]:
    """Task texts by index, and the names of other task columns, from either version's file.

    Both are empty if there is no file.
    """
    lines, table = root / "meta" / "tasks.jsonl", root / "meta" / "tasks.parquet"
    for path in (table, lines) if version == "v3.0" else (lines, table):
        if path.exists():
            key = "task_index"
            is_table = path == table
            rows, extras = _texts_of_table(path, key) if is_table else _tasks_of_lines(path)
            return _by_number(path, rows, key), extras
    return {}, []


def _by_number(path: pathlib.Path, rows: Sequence[tuple[Any, str]], key: str) -> dict[int, str]:
    """Texts by their number; two texts of one number are an error."""
    what, found = key.removesuffix("_index"), dict[int, str]()
    for number, text in rows:
        index = files.whole(number, f"{key} of {text!r} in {path}")
        if found.setdefault(index, text) != text:
            raise ValueError(
                f"{path} has {what} {index} twice, {found[index]!r} and {text!r}: renumber "
                f"the {what}s, here and in the data files"
            )
    return found


# Index, as stored, and text of each task; and other keys.
_Tasks = tuple[list[tuple[Any, str]], list[str]]


def _tasks_of_lines(path: pathlib.Path) -> _Tasks:
    tasks, keys = [], dict[str, None]()
    for row in files.json_rows(path, ("task_index", "task")):
        text = row["task"]
        if text is None or (isinstance(text, float) and math.isnan(text)):
            text = ""
        if not isinstance(text, str):
            raise ValueError(f"{path}: the task of {row!r} is no text")
        tasks.append((row["task_index"], text))
        keys |= dict.fromkeys(row)
    return tasks, [key for key in keys if key not in ("task_index", "task")]


def _texts_of_table(path: pathlib.Path, key: str) -> _Tasks:
    """The column of the texts that `key` numbers: the pandas index, as its writer named it."""
    what = key.removesuffix("_index")
    table = files.read_table(path, None)
    texts = [name for name, kind in table.schema.items() if kind in _TEXT_TYPES]
    usual = [*_pandas_index(path), "__index_level_0__", what]
    chosen = [name for name in usual if name in texts] or texts
    if not chosen or (len(texts) > 1 and chosen[0] not in usual):
        raise ValueError(
            f"{path} has {len(texts)} columns of text {texts}, expected the {what}s in its index "
            f"or in a column {what!r}"
        )
    found = columns.texts(table[chosen[0]]).tolist()
    if key in table.columns:
        numbers = table[key].to_list()
    else:
        progress.warn(f"{path} has no column {key!r}: its rows are taken in their order")
        numbers = list(range(len(table)))
    others = [name for name in table.columns if name not in (key, chosen[0])]
    return list(zip(numbers, found, strict=True)), others


_TEXT_TYPES = (pl.String, pl.Categorical, pl.Enum, pl.Binary, pl.Null)


def _pandas_index(path: pathlib.Path) -> list[str]:
    """Names of the columns that form the pandas index."""
    try:
        with path.open("rb") as file:  # A path would be read as a glob pattern.
            described = json.loads(pl.read_parquet_metadata(file).get("pandas", "{}"))
        return [name for name in described.get("index_columns", ()) if isinstance(name, str)]
    except (ValueError, AttributeError, pl.exceptions.PolarsError):
        return []  # Metadata that not every tool writes.
