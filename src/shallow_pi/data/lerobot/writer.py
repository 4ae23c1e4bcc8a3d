"""Write LeRobot v3.0 datasets (pictures as PNG in parquet, or video) without torch or pyarrow.

Everything goes to `<folder>.partial`, which `finish` renames: a folder that exists is complete.
Statistics are exact over every frame, unlike LeRobot's own, which averages quantiles of episodes.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl

from shallow_pi.data.lerobot import reader, tables, video_writer
from shallow_pi.data.lerobot import stats as lerobot_stats

STATE_KEY, ACTION_KEY, IMAGE_PREFIX = "observation.state", "action", "observation.images."
DATA_FILE_MB, VIDEO_FILE_MB, CHUNK_FILES = 100, 200, 1000
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


class Writer:
    """Adds episodes; `finish` (or leaving a `with` block without error) makes the dataset appear.

    Args:
      folder: of the dataset; must not exist.
      fps: frame rate.
      state_names, action_names: of the dimensions; default `["0", "1", ...]`.
      robot_type: written to `info.json`.
      names: of other columns' dimensions.
      encoding: of video; None keeps pictures as they are, as PNG.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fps: int | float,
        *,
        state_names: Sequence[str] | None = None,
        action_names: Sequence[str] | None = None,
        robot_type: str | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        encoding: video_writer.Encoding | None = None,
    ) -> None:
        self.folder = pathlib.Path(folder)
        if self.folder.exists():
            raise FileExistsError(
                f"{self.folder} exists; remove it to write the dataset anew, or choose another"
            )
        self.fps = fps
        self.robot_type = robot_type
        self.encoding = encoding
        self._names = {STATE_KEY: state_names, ACTION_KEY: action_names, **(names or {})}
        self._encoders: dict[str, video_writer.Encoder] = {}
        self._video_files: dict[str, int] = {}
        self._partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._seen: dict[str, int] = {}
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
            self._close_encoders()
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
        named = {IMAGE_PREFIX + k.removeprefix(IMAGE_PREFIX): v for k, v in images.items()}
        vectors = {STATE_KEY: np.asarray(state), ACTION_KEY: np.asarray(action)}
        vectors = {key: value.astype(np.float32) for key, value in vectors.items()}
        self.add(named, vectors, [task] * len(state))

    def add(
        self,
        images: Mapping[str, np.ndarray],
        vectors: Mapping[str, np.ndarray],
        tasks: Sequence[str],
        *,
        copies: Mapping[str, pathlib.Path] | None = None,
    ) -> None:
        """Append one episode of T frames under any keys.

        Args:
          images: uint8 (T, h, w, 3) by key; of a camera in `copies` any number of its frames, for
            the statistics.
          vectors: (T, dim) by key.
          tasks: T instructions.
          copies: video files of this very episode, which are copied as they are.
        """
        copies = copies or {}
        self._check(images, vectors, tasks, copies)
        length, episode = len(tasks), len(self._episodes)
        index = np.arange(length)
        numbers = [self._tasks.setdefault(task, len(self._tasks)) for task in tasks]
        columns: dict[str, np.ndarray] = {
            **vectors,
            "timestamp": (index / self.fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(length, episode),
            "index": index + self._frames,
            "task_index": np.array(numbers),
        }
        counts = {key: lerobot_stats.histogram(value) for key, value in images.items()}
        stats = {k: lerobot_stats.of_histogram(v, len(images[k])) for k, v in counts.items()}
        stats |= {key: lerobot_stats.of_values(value) for key, value in columns.items()}
        places = {}
        for key, value in images.items():
            if key in copies or self.encoding is not None:
                places[key] = self._add_video(key, value, copies.get(key), length)
        pictures = {
            k: [tables.png(x) for x in value] for k, value in images.items() if k not in places
        }
        self._buffer.append(tables.frames(pictures, columns))
        self._buffer_bytes += sum(len(x) for column in pictures.values() for x in column)
        self._buffer_bytes += sum(value.nbytes for value in columns.values())
        self._episodes.append(
            {
                "episode_index": episode,
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
        self._frames += length
        for key, value in columns.items():
            self._numbers.setdefault(key, []).append(value)
        for key, value in counts.items():
            self._counts[key] = self._counts.get(key, 0) + value
            self._seen[key] = self._seen.get(key, 0) + len(images[key])
        if self._buffer_bytes >= DATA_FILE_MB * 2**20:
            self._flush()

    def _add_video(
        self, key: str, pictures: np.ndarray, copy: pathlib.Path | None, length: int
    ) -> dict[str, Any]:
        """Copy or encode an episode's video; says where it is, as the episodes' table does."""
        file = self._video_files.setdefault(key, 0)
        place = {"chunk_index": file // CHUNK_FILES, "file_index": file % CHUNK_FILES}
        path = self._partial / _VIDEO_PATH.format(video_key=key, **place)
        if copy is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(copy, path)
            self._video_files[key] += 1
            start = 0.0
        else:
            assert self.encoding is not None, "asked for by add"
            if key not in self._encoders:
                shape = (pictures.shape[1], pictures.shape[2])
                self._encoders[key] = video_writer.Encoder(path, self.fps, shape, self.encoding)
            encoder = self._encoders[key]
            start = encoder.count / self.fps
            for picture in pictures:
                encoder.add(picture)
            if encoder.nbytes >= VIDEO_FILE_MB * 2**20:
                self._close_encoder(key)
        return {**place, "from_timestamp": start, "to_timestamp": start + length / self.fps}

    def _close_encoder(self, key: str) -> None:
        self._encoders.pop(key).close()
        self._video_files[key] += 1

    def _close_encoders(self) -> None:
        for key in list(self._encoders):
            self._close_encoder(key)

    def finish(self) -> pathlib.Path:
        """Write what is left and the meta files, then rename; returns the dataset's folder."""
        if not self._episodes:
            raise ValueError(f"no episodes were added to {self.folder}; nothing to finish")
        self._flush()
        self._close_encoders()
        for key in self._video_files:
            first = _VIDEO_PATH.format(video_key=key, chunk_index=0, file_index=0)
            self._features[key]["info"] = video_writer.describe(self._partial / first, self.fps)
        stats = {k: lerobot_stats.of_histogram(v, self._seen[k]) for k, v in self._counts.items()}
        numbers = {key: np.concatenate(value) for key, value in self._numbers.items()}
        stats |= {key: lerobot_stats.of_values(value) for key, value in numbers.items()}
        meta = self._partial / "meta"
        episodes = self._partial / _EPISODES_PATH
        episodes.parent.mkdir(parents=True)
        pl.DataFrame(self._episodes, infer_schema_length=None).write_parquet(episodes)
        tables.write_tasks(meta / "tasks.parquet", self._tasks)
        content = {key: {n: v.tolist() for n, v in value.items()} for key, value in stats.items()}
        (meta / "stats.json").write_text(json.dumps(content, indent=4))
        (meta / "info.json").write_text(json.dumps(self._info(), indent=4))
        os.replace(self._partial, self.folder)
        return self.folder

    def _check(
        self, images: Mapping, vectors: Mapping, tasks: Sequence[str], copies: Mapping
    ) -> None:
        where = f"episode {len(self._episodes)}"
        whole = {key: value for key, value in images.items() if key not in copies}
        lengths = {key: len(value) for key, value in {**whole, **vectors, "task": tasks}.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"{where} needs the same, nonzero number of frames, got {lengths}")
        if not all(task.strip() for task in tasks):
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
        features = self._describe(images, vectors, copies)
        if self._features and features != self._features:
            raise ValueError(f"{where} has features {features}, before {self._features}")
        self._features = features

    def _describe(self, images: Mapping, vectors: Mapping, copies: Mapping) -> dict[str, dict]:
        features: dict[str, dict[str, Any]] = {
            key: {
                "dtype": "image" if self.encoding is None and key not in copies else "video",
                "shape": list(value.shape[1:]),
                "names": ["height", "width", "channels"],
            }
            for key, value in images.items()
        }
        for key, value in vectors.items():
            names = list(self._names.get(key) or map(str, range(value.shape[1])))
            if len(names) != value.shape[1]:
                raise ValueError(f"{key} has {value.shape[1]} dimensions but names {names}")
            features[key] = {"dtype": value.dtype.name, "shape": [value.shape[1]], "names": names}
        for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
            dtype = "float32" if key == "timestamp" else "int64"
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        return features

    def _info(self) -> dict[str, Any]:
        return {
            "codebase_version": reader.VERSION,
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
            "video_path": _VIDEO_PATH if self._video_files else None,
            "features": self._features,
        }

    def _flush(self) -> None:
        if not self._buffer:
            return
        chunk, file = divmod(self._file, CHUNK_FILES)
        path = self._partial / _DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {k: v for k, v in self._features.items() if v["dtype"] != "video"}
        features = {key: tables.hf_type(feature) for key, feature in stored.items()}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pl.concat(self._buffer).write_parquet(path, metadata=metadata)
        self._file += 1
        self._buffer, self._buffer_bytes = [], 0
