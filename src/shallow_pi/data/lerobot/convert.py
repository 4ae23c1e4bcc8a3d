"""Convert a LeRobot dataset of any version to v3.0; anything that is not kept is reported.

Videos and encoded images are copied bit for bit unless re-encoding is requested; depth cameras
are always copied, because colour video and 8-bit PNG would lose their values.
"""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl

from shallow_pi import progress
from shallow_pi.data.lerobot import columns, files, layout, reader, video, video_writer
from shallow_pi.data.lerobot import writer as lerobot_writer

# Images per episode that are decoded for the statistics of a copied camera.
SAMPLED = 20
# Columns that are numbered anew; times stay.
_NUMBERED = columns.BOOKKEEPING[1:]
# Columns of the episode table that are rewritten.
_EPISODE = re.compile(
    "episode_index|tasks|length|dataset_from_index|dataset_to_index|(data|videos|stats|meta)/.*"
)
# Meta files of any version that are rewritten; others are copied.
_META = re.compile(r"(info|stats)\.json|(episodes|episodes_stats|tasks)(\.jsonl|\.parquet)?")


def convert(
    source: reader.Dataset,
    target: str | os.PathLike[str],
    images: Literal["copy", "png"] | video_writer.Encoding,
) -> pathlib.Path:
    """Write the converted dataset, episode by episode.

    Args:
      source: the dataset; of its cameras those are kept that were asked for.
      target: folder to create; must not exist.
      images: "copy" keeps videos and encoded images unchanged, "png" and an encoding
        re-encode them.

    Raises:
      FileExistsError: the target exists.
      ValueError: unreadable or unwritable data; says where.
    """
    keys, stored = _columns(source)
    extras = _extras(source)
    tasks = [source.tasks[number] for number in sorted(source.tasks)]
    _tell_numbers(source, tasks)
    kept = [camera for camera in source.cameras if camera in source.asked]
    if left_out := [camera for camera in source.cameras if camera not in kept]:
        progress.say(f"Cameras: {', '.join(kept)}, without {', '.join(left_out)}")
    copied = {camera for camera in kept if images == "copy" or _depth(source, camera)}
    encoding = None if isinstance(images, str) else images
    _tell_losses(source, [camera for camera in kept if camera not in copied], encoding)
    if source.episodes != list(range(len(source.layout.lengths))):
        progress.warn(
            f"{source.num_episodes} of {len(source.layout.lengths)} episodes of {source.path} are "
            "written, renumbered from 0"
        )
    writer = lerobot_writer.Writer(
        target,
        source.fps,
        robot_type=source.info.get("robot_type"),
        encoding=encoding,
        source=source.info,
        tasks=tasks,
    )
    with writer, progress.bar("Convert episodes", source.num_episodes) as advance:
        for episode in source.episodes:
            rows = np.flatnonzero(source.columns["episode_index"] == episode)
            values: dict[str, np.ndarray | pl.Series]
            values = {key: source.columns[key][rows] for key in keys}
            if stored:
                table = source.stored(episode, stored)
                values |= {key: table[key] for key in stored}
            writer.add(
                {key: _images(source, episode, rows, key, key in copied) for key in kept},
                values,
                [source.task(int(i)) for i in rows],
                seconds=source.seconds[rows],
                extra=extras.get(episode),
            )
            advance(1)
        _tell_left_out(source)
        for file in _others(source.path):
            writer.attach(file.relative_to(source.path), file.read_bytes())
    return writer.folder


def _columns(source: reader.Dataset) -> tuple[list[str], list[str]]:
    """Columns to read as numbers, and columns to copy as stored."""
    there = source.stored(source.episodes[0], None).columns
    declared = [key for key in source.features if key not in (*source.cameras, *_NUMBERED)]
    lost = [key for key in declared if key not in there]
    undeclared = [key for key in there if key not in source.features]
    if lost:
        progress.warn(f"{lost} of {source.path} are in info.json alone; they are left out")
    if source.layout.task_extras:
        progress.warn(
            f"{list(source.layout.task_extras)} of the tasks of {source.path} are left out: v3.0 "
            "keeps a task's text and number"
        )
    if undeclared:
        progress.warn(
            f"columns {undeclared} of {source.path} are not in info.json; they are left out"
        )
    numbers, stored = [], []
    for key in declared:
        if key not in there:
            continue
        try:
            if not columns.is_text(source.features[key]):
                source.columns[key]
                numbers.append(key)
                continue
        except ValueError as error:
            progress.warn(f"{key} is copied as it is stored, without statistics: {error}")
        stored.append(key)
    return numbers, stored


def _tell_numbers(source: reader.Dataset, tasks: list[str]) -> None:
    """Warn of tasks whose number changes: other columns may refer to it."""
    new = {text: number for number, text in enumerate(dict.fromkeys(tasks))}
    changed = {old: new[text] for old, text in source.tasks.items() if new[text] != old}
    if changed:
        progress.warn(
            f"tasks of {source.path} are renumbered ({str(changed)[1:-1]:.60}): other columns "
            "that number tasks, such as GR00T's annotations, keep the old numbers"
        )


def _extras(source: reader.Dataset) -> dict[int, dict[str, object]]:
    """Entries of the meta files for each episode beyond LeRobot's own."""
    meta = source.path / "meta"
    if source.layout.version != "v3.0":
        rows = files.json_rows(meta / "episodes.jsonl", ["episode_index"])
        return {
            int(row["episode_index"]): {k: v for k, v in row.items() if not _EPISODE.fullmatch(k)}
            for row in rows
        }
    found: dict[int, dict[str, object]] = {}
    for file in layout.episode_files(source.path):
        kept = [key for key in files.schema(file) if not _EPISODE.fullmatch(key)]
        if kept:
            for row in files.read_table(file, ["episode_index", *kept]).iter_rows(named=True):
                found[int(row.pop("episode_index"))] = row
    return found


def _depth(source: reader.Dataset, camera: str) -> bool:
    """True for a depth camera; reports that it is copied."""
    if reason := source.depth(camera):
        progress.warn(f"{camera} of {source.path} records depth ({reason}); it is copied as it is")
    return bool(reason)


def _tell_losses(
    source: reader.Dataset, cameras: list[str], encoding: video_writer.Encoding | None
) -> None:
    if cameras and encoding is not None:
        progress.warn(
            f"{cameras} are encoded as {encoding.codec} (crf {encoding.crf}), which loses detail; "
            "--images copy and png lose none"
        )
    for camera in cameras:
        if source.features[camera]["dtype"] == "video":
            file, _ = source.layout.video(source.episodes[0], camera)
            pixels = video.pixel_format(source.path / file)
            if re.search(r"(9|10|12|14|16)[bl]e$", pixels):
                progress.warn(f"{camera} has more than 8 bits ({pixels}), of which 8 are kept")


def _images(
    source: reader.Dataset, episode: int, rows: np.ndarray, camera: str, is_copied: bool
) -> lerobot_writer.Images:
    if not is_copied:
        return _decoded(source, rows, camera)
    sample: list[np.ndarray] = []
    if not source.depth(camera):
        places = np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows)))
        sample = list(_decoded(source, rows[np.round(places).astype(int)], camera))
    if source.features[camera]["dtype"] == "video":
        file, start = source.layout.video(episode, camera)
        return lerobot_writer.Film(source.path / file, start, sample)
    return lerobot_writer.Files([source.encoded(int(i), camera) for i in rows], sample)


def _decoded(source: reader.Dataset, rows: np.ndarray, camera: str) -> Iterator[np.ndarray]:
    return (source.image(int(i), camera) for i in rows)


def _others(root: pathlib.Path) -> list[pathlib.Path]:
    """Files unknown to LeRobot, such as a dataset card or another tool's meta files."""
    own = [path for path in (root / "meta").glob("[!.]*") if not _META.fullmatch(path.name)]
    found = [file for path in own for file in (path.rglob("*") if path.is_dir() else [path])]
    card = root / "README.md"
    return sorted(file for file in [*found, card] if file.is_file())


def _tell_left_out(source: reader.Dataset) -> None:
    """Warn of what lies beside the dataset, hidden files excepted."""
    known = {"data", "meta", "videos", "images", "README.md"}
    others = {path.name for path in source.path.iterdir() if not path.name.startswith(".")} - known
    if others:
        progress.warn(f"{sorted(others)} of {source.path} are left out: they are no part of v3.0")
