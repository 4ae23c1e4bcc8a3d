"""From a data config to samples and assets: what a run trains on, and what its policy will need.

Statistics and tokenizer are the teacher's wherever its checkpoint has them, because teacher and
student velocities can only be compared in one normalization. Otherwise statistics are computed from
the dataset, and the tokenizer has to be named.
"""

import dataclasses
import pathlib
from typing import Literal

from shallow_pi import progress
from shallow_pi.data import assets as policy_assets
from shallow_pi.data import hub, lerobot, loader, normalize, robots, statistics
from shallow_pi.models import fetch, pi0

PALIGEMMA_TOKENIZER = "gs://big_vision/paligemma_tokenizer.model"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where batches come from."""

    # "lerobot" reads a dataset; "synthetic" makes samples up, to try things out.
    source: Literal["lerobot", "synthetic"] = "lerobot"
    # The LeRobot dataset: a folder, its address on the Hugging Face hub (owner/name) or gs://;
    # empty in a config with a simulated task, which then makes it.
    path: str = ""
    # Leave out episodes that cannot be read, and say which.
    skip_bad_episodes: bool = False
    # The robot that made it: a name, or a Python file with a ROBOT.
    robot: str = "turntable"
    # SentencePiece model, local or gs://; empty takes the teacher's.
    tokenizer: str = ""
    # Folder of the norm_stats.json to use; empty takes the teacher's, or computes it.
    norm_stats: str = ""
    # Name of the statistics' folder in a checkpoint's assets.
    asset_id: str = "turntable"
    # Threads that read samples ahead.
    num_threads: int = 1
    # Keep decoded samples in memory (at most 2 GiB).
    cache: bool = False

    def __post_init__(self) -> None:
        if self.num_threads < 0:
            raise ValueError(f"data.num_threads must be 0 or more, got {self.num_threads}")
        robots.find(self.robot)
        if not self.asset_id:
            raise ValueError("data.asset_id must name a folder, got an empty string")


def check(data: DataConfig) -> None:
    """Raise unless the dataset is there and fits its robot."""
    if data.source == "lerobot":
        _dataset(data)


def open_source(
    data: DataConfig, model: pi0.Pi0Config, teacher_step: pathlib.Path | None
) -> tuple[loader.Source, policy_assets.Assets | None]:
    """The samples of a run, and the assets of its policy (None for synthetic samples).

    Args:
      data: where they come from.
      model: the architecture they are for.
      teacher_step: the teacher's step folder, whose assets are used where it has some.

    Raises:
      FileNotFoundError: dataset, tokenizer or statistics are missing; says which and what to do.
      ValueError: a dataset that does not fit the robot, or a tokenizer that does not fit the model.
    """
    if data.source == "synthetic":
        made_up = loader.SyntheticSource(
            cameras=model.cameras,
            image_size=model.image_size,
            action_dim=model.action_dim,
            action_horizon=model.action_horizon,
            max_token_len=model.max_token_len,
            vocab_size=model.vocab_size,
        )
        return made_up, None
    dataset, robot = _dataset(data)
    for episode, reason in dataset.skipped.items():
        progress.console.print(f"episode {episode} is left out: {reason}", highlight=False)
    assets = policy_assets.Assets(
        model=model,
        robot=robot,
        tokenizer=_tokenizer(data, model, teacher_step),
        stats=_stats(data, dataset, robot, model, teacher_step),
        asset_id=data.asset_id,
    )
    samples = loader.DatasetSource(dataset, robot, model.action_horizon, assets.inputs())
    return loader.Cached(samples) if data.cache else samples, assets


def _dataset(data: DataConfig) -> tuple[lerobot.Dataset, robots.Robot]:
    if not data.path:
        raise ValueError("data.path is empty: name the folder of a LeRobot dataset (--data.path)")
    robot = robots.find(data.robot)
    if data.path.startswith("gs://"):
        folder = fetch.locate(data.path)
    else:
        folder = hub.locate(data.path, cameras=tuple(robot.cameras.values()))
    dataset = lerobot.Dataset(folder, skip_bad_episodes=data.skip_bad_episodes)
    dataset.validate(robot)
    return dataset, robot


def _tokenizer(
    data: DataConfig, model: pi0.Pi0Config, teacher_step: pathlib.Path | None
) -> pathlib.Path:
    if data.tokenizer:
        return fetch.locate(data.tokenizer)
    if teacher_step is not None:
        own = teacher_step / "assets" / policy_assets.TOKENIZER_NAME
        if own.is_file():
            return own
    if model.vocab_size == pi0.PALIGEMMA_VOCAB_SIZE:
        return fetch.locate(PALIGEMMA_TOKENIZER)
    raise FileNotFoundError(
        f"no tokenizer for a vocabulary of {model.vocab_size}: the teacher's checkpoint has none "
        f"({policy_assets.TOKENIZER_NAME} in its assets); name one with --data.tokenizer"
    )


def _stats(
    data: DataConfig,
    dataset: lerobot.Dataset,
    robot: robots.Robot,
    model: pi0.Pi0Config,
    teacher_step: pathlib.Path | None,
) -> dict[str, normalize.NormStats]:
    if data.norm_stats:
        given = normalize.load(fetch.locate(data.norm_stats))
        found = dataset.norm_stats(robot, model.action_horizon)
        for line in statistics.misfits(given, found, normalize.kind_of(model.pi05)):
            progress.console.print(f"warning: {line}", highlight=False)
        return given
    if teacher_step is not None:
        own = teacher_step / "assets" / data.asset_id
        if (own / normalize.FILE_NAME).is_file():
            return normalize.load(own)
    return dataset.norm_stats(robot, model.action_horizon)
