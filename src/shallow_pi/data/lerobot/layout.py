"""Where a LeRobot dataset (v2.0, v2.1, v3.0) keeps what: episodes, data files, videos, tasks.

Version 2 has a parquet file and a video for each episode and says so in JSON lines; version 3 packs
many episodes into a file and says in parquet where each one starts.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

VERSIONS = ("v2.0", "v2.1", "v3.0")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A dataset's meta files, read."""

    root: pathlib.Path
    info: Mapping[str, Any]
    # Task texts by index.
    tasks: Mapping[int, str]
    # Frames of every episode, by episode index.
    lengths: Mapping[int, int]
    # Version 3: a row for each episode of columns such as `videos/<key>/from_timestamp`.
    rows: Mapping[int, Mapping[str, Any]]

    @property
    def version(self) -> str:
        """One of VERSIONS."""
        return self.info["codebase_version"]

    def data_file(self, episode: int) -> str:
        """The parquet file of an episode, relative to the dataset."""
        return self.info["data_path"].format(**self._place(episode, "data"))

    def video(self, episode: int, camera: str) -> tuple[str, float]:
        """An episode's video file, relative to the dataset, and where in it it starts (seconds)."""
        place = self._place(episode, f"videos/{camera}")
        start = self.rows[episode][f"videos/{camera}/from_timestamp"] if self.rows else 0.0
        return self.info["video_path"].format(video_key=camera, **place), start

    def _place(self, episode: int, what: str) -> dict[str, int]:
        if not self.rows:
            size = self.info.get("chunks_size", 1000)
            return {"episode_chunk": episode // size, "episode_index": episode}
        row = self.rows[episode]
        return {key: row[f"{what}/{key}"] for key in ("chunk_index", "file_index")}

    def files(self, episodes: Sequence[int], cameras: Sequence[str]) -> list[str]:
        """Every file these episodes and cameras need, meta files excepted, relative and sorted."""
        found = {self.data_file(episode) for episode in episodes}
        for camera in cameras:
            if self.info["features"].get(camera, {}).get("dtype") == "video":
                found |= {self.video(episode, camera)[0] for episode in episodes}
        return sorted(found)


def read(root: pathlib.Path) -> Layout:
    """Read a dataset's meta files.

    Raises:
      FileNotFoundError: there is no dataset, or a meta file is missing; says which.
      ValueError: a version or content that cannot be read.
    """
    info = _read_info(root)
    meta = root / "meta"
    if info["codebase_version"] != "v3.0":
        tasks = {row["task_index"]: row["task"] for row in _lines(meta / "tasks.jsonl")}
        lengths = {row["episode_index"]: row["length"] for row in _lines(meta / "episodes.jsonl")}
        return Layout(root, info, tasks, lengths, {})
    files = sorted((meta / "episodes").glob("*/*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"dataset {root} has no meta/episodes/*/*.parquet; is the download complete?"
        )
    columns = pl.selectors.matches("^(episode_index|length|data/.*|videos/.*)$")
    table = pl.concat([read_table(file, None).select(columns) for file in files])
    rows = {row["episode_index"]: row for row in table.iter_rows(named=True)}
    lengths = {episode: rows[episode]["length"] for episode in sorted(rows)}
    return Layout(root, info, _read_tasks(meta / "tasks.parquet"), lengths, rows)


def read_table(path: pathlib.Path, keys: list[str] | None) -> pl.DataFrame:
    """A parquet file, or an error that names it and what was wanted of it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is the download complete?")
    try:
        # A path is no pattern: folders may have brackets in their names.
        return pl.read_parquet(path, columns=keys, glob=False, hive_partitioning=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"cannot read {keys or 'all columns'} from {path}: {error}") from error


def _read_info(root: pathlib.Path) -> dict[str, Any]:
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no LeRobot dataset at {root}: {file} is missing (was writing it interrupted?)"
        )
    try:
        info = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"dataset {root} has LeRobot format {version}, expected one of {', '.join(VERSIONS)}; "
            "convert it with LeRobot's own converters first"
        )
    missing = [key for key in ("features", "fps", "data_path") if key not in info]
    if missing:
        raise ValueError(f"{file} has no {', '.join(map(repr, missing))}")
    return info


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; is the download complete?")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return found


def _read_tasks(path: pathlib.Path) -> dict[int, str]:
    """Task texts; they are the unnamed pandas index, whose column name varies by writer."""
    table = read_table(path, None)
    (text,) = (name for name, kind in table.schema.items() if kind == pl.String)
    return dict(zip(table["task_index"].to_list(), table[text].to_list(), strict=True))
