"""Samples from openpi's datasets and transforms; needs openpi and its version of LeRobot.

`--openpi.config NAME` trains on exactly the samples of openpi's data loader for that config: its
dataset, repacking, robot transforms, normalization and prompt. Order, batches, held-out episodes
and exact resume are our loader's. `--data.source lerobot --data.path FOLDER` reads the recordings
with our reader instead, which is faster.
"""

import dataclasses
import importlib
import pathlib

import numpy as np

from shallow_pi import progress
from shallow_pi.checkpoints import fetch
from shallow_pi.data import data_config, opening
from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import checkpoint_statistics, normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.interop import openpi
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

# The name of this module's `open_data` in `data.source`.
SOURCE = "shallow_pi.interop.openpi_data:open_data"
# Prefix of a config's name if none of our robots has its transforms.
PREFIX = "openpi:"


class Source:
    """Model samples of one of openpi's training configs.

    Args:
      data: openpi's `DataConfig`, with statistics.
      model: openpi's model config.
      dataset: the result of `create_torch_dataset` for them.
      frames: which of its frames; None is all.
    """

    def __init__(
        self,
        data: openpi.OpenpiObject,
        model: openpi.OpenpiObject,
        dataset: openpi.OpenpiObject,
        frames: np.ndarray | None = None,
    ) -> None:
        self.data = data
        self.model = model
        self.dataset = dataset
        self.frames = np.arange(len(dataset)) if frames is None else frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> batches.Batch:
        from openpi.training import data_loader

        item = self.dataset[int(self.frames[i])]
        # openpi's function on a dataset of this item: openpi's transforms, in openpi's order.
        (key, *_) = self.data.action_sequence_keys
        if f"{key}_is_pad" not in item:
            progress.warn(
                f"openpi's dataset does not tell which of {key!r} lie beyond an episode's end: all "
                "are trained on"
            )
        is_pad = item.get(f"{key}_is_pad", np.zeros(self.model.action_horizon, bool))
        found = data_loader.transform_dataset([item], self.data)[0]
        return batches.Batch(
            observation=observations.Observation(
                images={name: np.asarray(image) for name, image in found["image"].items()},
                image_masks={name: np.bool_(mask) for name, mask in found["image_mask"].items()},
                state=np.asarray(found["state"], np.float32),
                tokenized_prompt=np.asarray(found["tokenized_prompt"], np.int32),
                tokenized_prompt_mask=np.asarray(found["tokenized_prompt_mask"], bool),
            ),
            actions=np.asarray(found["actions"], np.float32),
            # Read by --losses.mask-padded-actions alone: openpi trains on the repeated last action.
            action_mask=~np.asarray(is_pad, bool),
        )


def open_data(
    data: data_config.DataConfig, model: pi0.Pi0Config, teacher_step: pathlib.Path | None
) -> opening.Data:
    """The samples of the openpi config named by `data.path`, and the assets of its policy.

    Statistics are those of `data.norm_stats`, else the teacher's, else the config's own.

    Raises:
      ModuleNotFoundError: openpi, or the LeRobot it reads datasets with, is not installed.
      FileNotFoundError: there are no statistics; says where they were looked for.
      ValueError: a config without recordings, one that only TensorFlow's RLDS reads, or fields of
        `data` that only our reader follows.
    """
    name = data.path
    if data.more or data.weights:
        raise ValueError(
            f"{name} is one dataset of openpi's: mixtures (--data.more) need --data.source lerobot"
        )
    if data.episodes or data.exclude_episodes:
        raise ValueError(
            f"openpi's loader reads every episode of {name}: to choose some (--data.episodes, "
            "--data.exclude-episodes) give --data.source lerobot --data.path FOLDER"
        )
    if data.norm_stats == opening.OF_DATASET:
        raise ValueError(
            f"openpi's loader computes no statistics of {name} (--data.norm-stats "
            f"{data.norm_stats}): run openpi's scripts/compute_norm_stats.py and give the folder "
            "it writes, or give --data.source lerobot --data.path FOLDER"
        )
    openpi.require()
    from openpi.training import config as configs
    from openpi.training import data_loader

    try:
        source = configs.get_config(name)
    except ValueError as error:
        raise ValueError(
            f"{error} Here --data.path names a config of openpi's; for a folder of recordings, add "
            "--data.source lerobot and --data.robot"
        ) from error
    if not available(source):
        raise ValueError(
            f"openpi's loader cannot read {name} here (it takes LeRobot's package and a LeRobot "
            "dataset): give --data.source lerobot --data.path FOLDER"
        )
    # Statistics at another address are in data.norm_stats already.
    local = dataclasses.replace(source.data.assets, assets_dir=None)
    factory = dataclasses.replace(source.data, assets=local)
    found = factory.create(source.assets_dirs, source.model)
    stats = _stats(data, found, model, teacher_step)
    robot = _robot(data.robot, model, stats)
    found = dataclasses.replace(found, norm_stats=_openpis(stats))
    dataset = data_loader.create_torch_dataset(found, source.model.action_horizon, source.model)
    assets = policy_assets.Assets(
        model=model,
        robot=robot,
        tokenizer=opening.tokenizer_file(data, model, teacher_step),
        stats=stats,
        asset_id=data.asset_id,
    )
    parts: list[Source | None] = [Source(found, source.model, dataset), None]
    if data.held_out:
        episodes = _episodes(dataset)
        chosen = reader.split(np.unique(episodes).tolist(), data.held_out)
        frames = (np.flatnonzero(np.isin(episodes, which)) for which in chosen)
        parts = [Source(found, source.model, dataset, these) for these in frames]
    train, held_out = (part and opening.cached(data, part) for part in parts)
    assert train is not None, "the first part holds the training episodes"
    return opening.Data(train, held_out, assets)


def available(source: openpi.OpenpiObject) -> bool:
    """True if openpi's loader can read the data of this openpi training config here."""
    try:
        importlib.import_module("lerobot")
    except ModuleNotFoundError:
        return False
    # openpi marks a missing repository with an object, RLDS with a separate folder.
    return isinstance(source.data.repo_id, str) and not hasattr(source.data, "rlds_data_dir")


def _robot(name: str, model: pi0.Pi0Config, stats: dict[str, normalize.NormStats]) -> robots.Robot:
    """The robot of that name; for transforms only openpi has, one that names their config."""
    if not name.startswith(PREFIX):
        return robots.find(name)
    return robots.Robot(
        name=name,
        cameras={camera: camera for camera in model.cameras},
        state_dim=len(stats["state"].mean),
        action_dim=len(stats["actions"].mean),
        fps=1,
        elsewhere=name.removeprefix(PREFIX),
    )


def _stats(
    data: data_config.DataConfig,
    source: openpi.OpenpiObject,
    model: pi0.Pi0Config,
    teacher_step: pathlib.Path | None,
) -> dict[str, normalize.NormStats]:
    found = None
    if data.norm_stats:
        found = checkpoint_statistics.at(fetch.locate(data.norm_stats), data.asset_id)
    elif teacher_step is not None:
        kind = normalize.kind_of(model.pi05)
        options = "--data.asset-id NAME, or --data.norm-stats FOLDER"
        found = checkpoint_statistics.find(teacher_step, data.asset_id, kind, options=options)
    if found is not None:
        progress.say(f"Statistics: {found.path}")
        return found.stats
    if source.norm_stats is None:
        raise FileNotFoundError(
            f"no statistics for {data.path} in the teacher's checkpoint or openpi's folder: run "
            "openpi's scripts/compute_norm_stats.py, or give --data.norm-stats FOLDER"
        )
    if teacher_step is not None:
        progress.warn(
            f"the teacher in {teacher_step} has no statistics: using those of openpi's config, "
            "which is right only if it was trained with them (--data.norm-stats FOLDER uses others)"
        )
    return {
        key: normalize.NormStats(value.mean, value.std, value.q01, value.q99)
        for key, value in source.norm_stats.items()
    }


def _openpis(stats: dict[str, normalize.NormStats]) -> dict[str, openpi.OpenpiObject]:
    from openpi.shared import normalize as openpi_normalize

    return {
        key: openpi_normalize.NormStats(**dataclasses.asdict(value)) for key, value in stats.items()
    }


def _episodes(dataset: openpi.OpenpiObject) -> np.ndarray:
    """The episode of every frame; openpi wraps LeRobot's dataset if prompts come from it."""
    while hasattr(dataset, "_dataset"):
        dataset = dataset._dataset
    return np.asarray(dataset.hf_dataset["episode_index"])
