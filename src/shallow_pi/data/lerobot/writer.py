"""Write LeRobot v3.0 datasets (images as PNG in parquet, or video) without torch or pyarrow.

Everything is written to `<folder>.partial`, locked against other processes, which `finish` renames:
an existing folder is complete.
Statistics are exact over all frames, unlike LeRobot's, which average quantiles of episodes; copied
images are sampled, and depth has no statistics.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data.lerobot import layout, tables, video_writer
from shallow_pi.data.lerobot import stats as lerobot_stats
from shallow_pi.data.lerobot.columns import BOOKKEEPING

STATE_KEY, ACTION_KEY, IMAGE_PREFIX = "observation.state", "action", "observation.images."
VERSION, CHUNK_FILES = layout.VERSIONS[-1], layout.CHUNK_SIZE
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200
_PATHS = layout.PATHS[VERSION[:2]]
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
# Entries of info.json that version 3 no longer has.
_OLD_INFO = ("total_videos", "total_chunks")


@dataclasses.dataclass(frozen=True)
class Film:
    """A video file to copy unchanged, with one or more episodes in it."""

    path: pathlib.Path
    # Start of the episode, seconds.
    start: float = 0.0
    # Some of its images, for the statistics.
    sample: Sequence[np.ndarray] = ()


@dataclasses.dataclass(frozen=True)
class Files:
    """Encoded images to copy unchanged, and their names."""

    content: Sequence[tuple[bytes, str]]
    # Some of them decoded, for the statistics.
    sample: Sequence[np.ndarray] = ()


# One camera in one episode: images to encode, uint8 (h, w, 3) each, or to copy.
Images = Iterable[np.ndarray] | Film | Files


class Writer:
    """Adds episodes; `finish` (or leaving a `with` block without error) makes the dataset appear.

    Args:
      folder: of the dataset; must not exist.
      fps: frame rate.
      robot_type: written to `info.json`.
      names: of a column's dimensions; default `["0", "1", ...]`.
      encoding: of video; None writes images as PNG.
      source: `info.json` of a dataset being converted: its entries and features are kept, and its
        numbers are not checked.
      tasks: instructions to number first, in this order.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fps: int | float,
        *,
        robot_type: str | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        encoding: video_writer.Encoding | None = None,
        source: Mapping[str, Any] | None = None,
        tasks: Sequence[str] = (),
    ) -> None:
        self.folder = run_folder.check_output(folder, "choose another folder", is_new=True)
        self.fps = int(fps) if fps == int(fps) else fps
        self.robot_type = robot_type
        self.encoding = encoding
        self._source = source
        self._names = dict(names or {})
        self._encoders: dict[str, video_writer.Encoder] = {}
        self._video_files: dict[str, int] = {}
        self._copied: dict[tuple[str, pathlib.Path], int] = {}
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        self._lock = contextlib.ExitStack()
        self._start()
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
        self._episodes: list[dict[str, Any]] = []
        # Further entries of each episode.
        self._extras: list[dict[str, Any]] = []
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._histograms: dict[str, lerobot_stats.Histogram] = {}
        self._frames = 0
        self._file = 0
        self._buffer: list[pl.DataFrame] = []
        self._buffer_bytes = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self._abandon(kind, error, trace)

    def _abandon(self, *error: Any) -> None:
        """Remove what was written, after an error."""
        with contextlib.suppress(OSError):  # A full disk, again.
            self._close_encoders()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._lock.__exit__(*error)

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
        named = {IMAGE_PREFIX + k.removeprefix(IMAGE_PREFIX): v for k, v in images.items()}
        vectors = {STATE_KEY: np.asarray(state), ACTION_KEY: np.asarray(action)}
        vectors = {key: value.astype(np.float32) for key, value in vectors.items()}
        self.add(named, vectors, [task] * len(state))

    def add(
        self,
        images: Mapping[str, Images],
        columns: Mapping[str, np.ndarray | pl.Series],
        tasks: Sequence[str],
        *,
        seconds: Float[np.ndarray, " T"] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one episode of T frames under any keys.

        Args:
          images: by camera.
          columns: T rows each, such as numbers (T, dim).
          tasks: T instructions.
          seconds: time of each frame; default frame number / fps.
          extra: of the episode, for the table of episodes.
        """
        where, length, index = f"episode {len(self._episodes)}", len(tasks), np.arange(len(tasks))
        self._check(where, images, columns, tasks)
        self._describe(where, images, columns)
        times: np.ndarray = index / self.fps if seconds is None else np.asarray(seconds, np.float64)
        numbers = [self._tasks.setdefault(task, len(self._tasks)) for task in tasks]
        everything: dict[str, np.ndarray | pl.Series] = {
            **columns,
            "timestamp": columns.get("timestamp", times.astype(np.float32)),
            "frame_index": index,
            "episode_index": np.full(length, len(self._episodes)),
            "index": index + self._frames,
            "task_index": np.array(numbers),
        }
        places: dict[str, dict[str, Any]] = {}
        files: dict[str, list[tuple[bytes, str]]] = {}
        stats: dict[str, dict[str, np.ndarray]] = {}
        for key, value in images.items():
            histogram = lerobot_stats.Histogram()
            if isinstance(value, Film):
                places[key] = self._copy(key, value, times)
            elif isinstance(value, Files):
                files[key] = list(value.content)
            else:
                seen = self._seen(f"{key} of {where}", value, histogram, length)
                if self.encoding is None:
                    encoded = enumerate(map(tables.png, seen))
                    files[key] = [(data, f"frame-{i:06d}.png") for i, data in encoded]
                else:
                    video_writer.check_times(f"{key} of {where}", times)
                    places[key] = self._encode(key, seen, times)
            if isinstance(value, Film | Files):
                for image in value.sample:
                    histogram.add(image)
            if histogram.frames:
                stats[key] = histogram.stats()
                self._histograms.setdefault(key, lerobot_stats.Histogram()).merge(histogram)
        for key, column in everything.items():
            if isinstance(column, np.ndarray):
                self._numbers.setdefault(key, []).append(column)
                if np.isfinite(column).all():
                    stats[key] = lerobot_stats.of_values(column)
        self._buffer.append(tables.frames(files, everything))
        self._buffer_bytes += int(self._buffer[-1].estimated_size())
        self._episodes.append(
            {
                "episode_index": len(self._episodes),
                "tasks": list(dict.fromkeys(tasks)),
                "length": length,
                "data/chunk_index": self._file // CHUNK_FILES,
                "data/file_index": self._file % CHUNK_FILES,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + length,
                **{f"videos/{k}/{n}": v for k, place in places.items() for n, v in place.items()},
                **{f"stats/{k}/{n}": v.tolist() for k in stats for n, v in stats[k].items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self._extras.append(dict(extra or {}))
        self._frames += length
        if self._buffer_bytes >= DATA_FILE_MB * 2**20:
            self._flush()

    def _check(
        self,
        where: str,
        images: Mapping[str, Images],
        columns: Mapping[str, np.ndarray | pl.Series],
        tasks: Sequence[str],
    ) -> None:
        counted = {key: value for key, value in images.items() if isinstance(value, np.ndarray)}
        lengths = {k: len(v) for k, v in {**counted, **columns, "task": tasks}.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"{where} needs the same, nonzero number of frames, got {lengths}")
        if self._source is not None:
            return
        if not all(task.strip() for task in tasks):
            raise ValueError(f"{where} has an empty task")
        for key, value in counted.items():
            if value.dtype != np.uint8 or value.ndim != 4 or value.shape[-1] != 3:
                raise ValueError(
                    f"{key} of {where} must be uint8 (T, h, w, 3), got {value.dtype} {value.shape}"
                )
        for key, column in columns.items():
            if not isinstance(column, np.ndarray) or column.ndim != 2:
                raise ValueError(f"{key} of {where} must be (T, dim), got {column.shape}")
            if not np.isfinite(column).all():
                frame = np.argwhere(~np.isfinite(column))[0][0]
                raise ValueError(f"{key} of {where}, frame {frame} is not finite: {column[frame]}")

    def _seen(
        self,
        where: str,
        images: Iterable[np.ndarray],
        histogram: lerobot_stats.Histogram,
        length: int,
    ) -> Iterator[np.ndarray]:
        """Iterate over the images, checking and counting them."""
        for i, image in enumerate(images):
            shape = histogram.shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"{where}, frame {i} is {image.shape[0]} by {image.shape[1]}, before "
                    f"{shape[0]} by {shape[1]}: encoding needs one size, --images copy takes any"
                )
            histogram.add(image)
            yield image
        if histogram.frames != length:
            raise ValueError(f"{where} has {histogram.frames} images for {length} frames")

    def _copy(self, key: str, film: Film, times: Float[np.ndarray, " T"]) -> dict[str, Any]:
        """Copy an episode's video, once; returns its location for the episode table."""
        if (key, film.path) not in self._copied:
            file = self._video_files.get(key, 0)
            path = self._video(key, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(film.path, path)
            self._copied[key, film.path], self._video_files[key] = file, file + 1
        return self._place(self._copied[key, film.path], film.start, times)

    def _encode(
        self, key: str, images: Iterator[np.ndarray], times: Float[np.ndarray, " T"]
    ) -> dict[str, object]:
        """Encode an episode's images, each at its time; returns their location."""
        assert self.encoding is not None, "`add` requires an encoding"
        file = self._video_files.setdefault(key, 0)
        for i, image in enumerate(images):
            if key not in self._encoders:
                path, shape = self._video(key, file), (image.shape[0], image.shape[1])
                self._encoders[key] = video_writer.Encoder(path, self.fps, shape, self.encoding)
            if not i:
                # Episodes follow each other without a gap, even if their times start late.
                start = self._encoders[key].end - times[0]
            with self._writing():
                self._encoders[key].add(image, start + times[i])
        if self._encoders[key].nbytes >= VIDEO_FILE_MB * 2**20:
            with self._writing():
                self._close_encoder(key)
        return self._place(file, start, times)

    def _video(self, key: str, file: int) -> pathlib.Path:
        chunk, number = divmod(file, CHUNK_FILES)
        return self._partial / _PATHS["video_path"].format(
            video_key=key, chunk_index=chunk, file_index=number
        )

    def _place(self, file: int, start: float, times: Float[np.ndarray, " T"]) -> dict[str, object]:
        chunk, number = divmod(file, CHUNK_FILES)
        end = start + float(times[-1]) + 1 / self.fps
        span = {"from_timestamp": float(start), "to_timestamp": end}
        return {"chunk_index": chunk, "file_index": number, **span}

    def _close_encoder(self, key: str) -> None:
        self._encoders.pop(key).close()
        self._video_files[key] += 1

    def _close_encoders(self) -> None:
        for key in list(self._encoders):
            self._close_encoder(key)

    def finish(self) -> pathlib.Path:
        """Write the remaining data and the meta files, then rename; returns the folder."""
        try:
            with self._writing():
                self._complete()
        except BaseException:
            self._abandon(*sys.exc_info())
            raise
        if os.path.lexists(self.folder):
            raise FileExistsError(
                f"{self.folder} has appeared meanwhile and is not replaced: the new dataset is in "
                f"{self._partial}, complete"
            )
        os.rename(self._partial, self.folder)
        # Not before: another process would take the files for those of an interrupted run.
        (self.folder / run_folder.LOCK_FILE).unlink()
        self._lock.close()
        return self.folder

    def _complete(self) -> None:
        if not self._episodes:
            raise ValueError(f"no episodes were added to {self.folder}; nothing to finish")
        self._flush()
        self._close_encoders()
        for key in self._video_files:
            described = video_writer.describe(self._video(key, 0), self.fps)
            copied = any(name == key for name, _ in self._copied)
            known = self._features[key].get("info") if copied else None
            # The file's own description wins; entries it cannot have, such as depth, are kept.
            true = {k: v for k, v in described.items() if k in video_writer.OF_THE_FILE}
            kept = known and {**known, **{k: v for k, v in true.items() if k in known}}
            self._features[key]["info"] = kept or described
        stats = {key: histogram.stats() for key, histogram in self._histograms.items()}
        for key, parts in self._numbers.items():
            numbers = np.concatenate(parts)
            if np.isfinite(numbers).all():
                stats[key] = lerobot_stats.of_values(numbers)
            else:
                progress.warn(f"{key} is not finite everywhere: it gets no statistics")
        meta = self._partial / "meta"
        episodes = self._partial / _EPISODES_PATH
        episodes.parent.mkdir(parents=True, exist_ok=True)
        table = pl.DataFrame(self._episodes, infer_schema_length=None, strict=False)
        for key in dict.fromkeys(key for extra in self._extras for key in extra):
            own, is_text = tables.entries(key, [extra.get(key) for extra in self._extras])
            table = table.with_columns(own)
            if is_text:
                progress.warn(f"{key!r} of the episodes has values of several types: kept as JSON")
        tables.write(episodes, table)
        tables.write_tasks(meta / "tasks.parquet", self._tasks)
        content = {key: {n: v.tolist() for n, v in value.items()} for key, value in stats.items()}
        (meta / "stats.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
        info = json.dumps(self._info(), indent=4, ensure_ascii=False)
        (meta / "info.json").write_text(info, encoding="utf-8")

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return run_folder.writing(self.folder, "repeat the command, or choose another folder")

    def attach(self, place: pathlib.Path, content: bytes) -> None:
        """Write another file into the dataset."""
        with self._writing():
            (self._partial / place).parent.mkdir(parents=True, exist_ok=True)
            (self._partial / place).write_bytes(content)

    def _start(self) -> None:
        """Lock the partial folder, and remove the files of an interrupted run, and nothing else."""
        ours = {"data", "meta", "videos", "README.md", run_folder.LOCK_FILE}
        if os.path.lexists(self._partial) and (
            not self._partial.is_dir() or {path.name for path in self._partial.iterdir()} - ours
        ):
            raise FileExistsError(
                f"{self._partial} is in the way, and is not what an interrupted run leaves; move it"
            )
        self._lock.enter_context(atomic.parents(self.folder))
        self._partial.mkdir(exist_ok=True)
        self._lock.enter_context(run_folder.held(self._partial, "folder"))
        for path in self._partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != run_folder.LOCK_FILE:
                path.unlink()

    def _declared(self, key: str) -> dict[str, object]:
        return dict(self._source["features"].get(key, {})) if self._source is not None else {}

    def _describe(
        self,
        where: str,
        images: Mapping[str, Images],
        columns: Mapping[str, np.ndarray | pl.Series],
    ) -> None:
        """Record an episode's features, which must equal those of the others."""
        features: dict[str, dict[str, object]] = {}
        for key, value in images.items():
            kept = self._declared(key)
            if not kept:
                some = value.sample if isinstance(value, Film | Files) else value
                shape = np.asarray(some).shape[1:]
                kept = {"dtype": "", "shape": list(shape), "names": ["height", "width", "channels"]}
            is_copied = isinstance(value, Film | Files)
            is_video = isinstance(value, Film) or (self.encoding is not None and not is_copied)
            features[key] = {**kept, "dtype": "video" if is_video else "image"}
            if not is_copied:
                features[key].pop("info", None)
        for key, value in columns.items():
            features[key] = self._declared(key) or self._described(key, value)
            if features[key].get("shape") is None:
                stored = value.shape[1:] if isinstance(value, np.ndarray) else ()
                features[key]["shape"] = list(stored) or [1]
        for key in BOOKKEEPING:
            dtype = "float32" if key == "timestamp" else "int64"
            features[key] = self._declared(key) or {"dtype": dtype, "shape": [1], "names": None}
        if self._source is not None:
            own = list(self._source["features"])
            features = dict(sorted(features.items(), key=lambda item: own.index(item[0])))
        if self._features and features != self._features:
            raise ValueError(f"{where} has features {features}, before {self._features}")
        self._features = features

    def _described(self, key: str, value: np.ndarray | pl.Series) -> dict[str, object]:
        assert isinstance(value, np.ndarray), "of a recording, which was checked"
        size = value.shape[1]
        names = list(self._names.get(key) or map(str, range(size)))
        if len(names) != size:
            raise ValueError(f"{key} has {size} dimensions but names {names}")
        return {"dtype": value.dtype.name, "shape": [size], "names": names}

    def _info(self) -> dict[str, object]:
        info: dict[str, object] = {
            "codebase_version": VERSION,
            "robot_type": self.robot_type,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": _PATHS["data_path"],
            "video_path": _PATHS["video_path"] if self._video_files else None,
            "features": self._features,
        }
        source = dict(self._source or {})
        if source.get("total_episodes") == len(self._episodes) and source.get("splits"):
            info["splits"] = source["splits"]
        return info | {k: v for k, v in source.items() if k not in info and k not in _OLD_INFO}

    def _flush(self) -> None:
        if not self._buffer:
            return
        chunk, file = divmod(self._file, CHUNK_FILES)
        path = self._partial / _PATHS["data_path"].format(chunk_index=chunk, file_index=file)
        table = tables.joined(self._buffer)
        stored = {k: v for k, v in self._features.items() if v["dtype"] != "video"}
        features = {key: tables.hf_type(f, table.schema[key]) for key, f in stored.items()}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            tables.write(path, table.select(list(stored)), metadata)
        self._file += 1
        self._buffer, self._buffer_bytes = [], 0
