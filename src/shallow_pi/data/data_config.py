"""`DataConfig`: the part of an experiment that describes its data; `opening` reads them.

Imports neither readers nor decoders, so that a config loads without them. A command puts `strict`
into effect (`flags.parse`); a program calls `progress.be_strict`.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from shallow_pi import flags
from shallow_pi.data.lerobot import selection
from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The dataset, its robot, and how samples are read."""

    # "lerobot" reads a dataset; "synthetic" generates random samples for a trial; "MODULE:FUNCTION"
    # names a function with the interface of `open_data`.
    source: str = "lerobot"
    # The LeRobot dataset: a folder, owner/name as LeRobot keeps it on this machine or else on the
    # Hugging Face hub, or gs://; empty in a config with a simulated task, which records its own.
    path: str = ""
    # More datasets of the same robot, mixed with the first.
    more: tuple[str, ...] = ()
    # Relative weight of each dataset in the mixture, `path` first; empty weights them by their
    # number of frames.
    weights: tuple[float, ...] = ()
    # Share of each dataset's episodes that is held out for validation; 0 holds out none.
    held_out: float = 0.0
    # Episodes to use: numbers (7), ranges (0:50, without 50; 100:) or a file of these; empty uses
    # all. With several datasets, prefix the dataset's number, from 0: 1/0:50.
    episodes: tuple[str, ...] = ()
    # Episodes to leave out, in the same form.
    exclude_episodes: tuple[str, ...] = ()
    # Leave out unreadable episodes, and list them.
    skip_bad_episodes: bool = False
    # Treat warnings as errors.
    strict: Annotated[bool, tyro.conf.arg(prefix_name=False)] = False
    # The robot that recorded the data: a name, or a Python file with a ROBOT.
    robot: str = "turntable"
    # SentencePiece model, local or gs://; empty uses the teacher's.
    tokenizer: str = ""
    # Folder of the norm_stats.json to use; empty uses the teacher's, or computes it if the
    # teacher has none; "dataset" computes it from the dataset.
    norm_stats: str = ""
    # Name of the statistics' folder in a checkpoint's assets; openpi's may have a
    # slash (physical-intelligence/libero).
    asset_id: str = "turntable"
    # Threads that prefetch batches; sufficient if decoding dominates.
    num_threads: int = 1
    # Processes that prefetch instead of the threads; 0 uses threads. They take seconds to start and
    # need more memory; on many cores they are faster than the same number of threads.
    num_workers: int = 0
    # Cache of decoded, resized images: none, all samples in memory, or the images on
    # disk, for all processes and later runs.
    cache: Literal["none", "memory", "disk"] = "none"
    # Folder of the cache on disk; empty is $SHALLOW_PI_CACHE/frames,
    # or else ~/.cache/shallow_pi/frames.
    cache_dir: str = ""
    # Maximum size of the cache in GiB. In memory, 0 means 2, and larger data are refused. On
    # disk, 0 means all but 1 GiB of the free space, and images that do not fit are decoded every
    # time.
    cache_gib: float = 0.0

    def __post_init__(self) -> None:
        if ":" not in self.source and self.source not in ("lerobot", "synthetic"):
            raise ValueError(
                f"--data.source must be lerobot, synthetic or MODULE:FUNCTION, got {self.source!r}"
            )
        flags.at_least(self, 0, "num_threads", "num_workers", "cache_gib", prefix="data.")
        if self.cache not in ("none", "memory", "disk"):
            raise ValueError(f"--data.cache must be none, memory or disk, got {self.cache!r}")
        if self.num_workers and self.cache == "memory":
            raise ValueError(
                "--data.cache memory is for one process, --data.num-workers are several: take "
                "--data.cache disk, or threads (--data.num-workers 0)"
            )
        if not 0 <= self.held_out < 1:
            raise ValueError(
                "--data.held-out is a share of the episodes, from 0 to below 1, got "
                f"{self.held_out}"
            )
        check_weights(self.weights, 1 + len(self.more))
        for number in range(1 + len(self.more)):
            self.selection(number)
        if ":" not in self.source:
            robots.find(self.robot)
        normalize.check_asset_id(self.asset_id, "--data.asset-id")

    def selection(self, number: int) -> selection.Selection:
        """The episodes to use of a dataset; 0 is `path`, 1 the first of `more`."""
        return selection.Selection(
            self._words("episodes", number), self._words("exclude_episodes", number)
        )

    def _words(self, field: str, number: int) -> tuple[str, ...]:
        words: tuple[str, ...] = getattr(self, field)
        if not self.more:
            return words
        parts = [re.fullmatch(r"(\d+)/(.+)", word) for word in words]
        for word, match in zip(words, parts, strict=True):
            if match is None or int(match[1]) > len(self.more):
                raise ValueError(
                    f"{flags.as_flag(f'data.{field}')}: {word!r} does not say which of the "
                    f"{1 + len(self.more)} datasets it means: write its number and a slash in "
                    "front, from 0 (1/0:50)"
                )
        return tuple(match[2] for match in parts if match and int(match[1]) == number)


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raise unless there is a positive weight for each of `count` datasets, or none at all."""
    if weights and len(weights) != count:
        raise ValueError(
            f"got {len(weights)} weights {list(weights)} for {count} datasets: give one for each, "
            "in their order, or none to mix by number of frames"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"weights must be positive and finite, got {list(weights)}; leave out the dataset that "
            "is not wanted"
        )
