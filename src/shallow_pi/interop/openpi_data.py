"""Samples from openpi's datasets and transforms; needs openpi and its version of LeRobot.

`--openpi.config NAME` trains on exactly the samples of openpi's data loader for that config: its
dataset, repacking, robot transforms, normalization and prompt. Order, batches, held-out episodes
and exact resume are our loader's. `--data.source lerobot --data.path FOLDER` reads the recordings
with our reader instead, which is faster.
"""

import dataclasses
import importlib.util
import pathlib

import numpy as np
import tyro

from shallow_pi import flags, progress
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

        frame, item = int(self.frames[i]), {}
        try:
            item = self.dataset[frame]
            # openpi's function on a dataset of this item: openpi's transforms, in openpi's order.
            found = data_loader.transform_dataset([item], self.data)[0]
        except Exception as error:  # Whatever the config's own transforms raise.
            has = f"; the frame has {', '.join(sorted(item))}" if item else ""
            raise ValueError(
                f"openpi's config does not fit frame {frame} of {self.data.repo_id} "
                f"({type(error).__name__}: {error}){has}: check the keys of its repack_transforms, "
                "its action_sequence_keys and prompt_from_task"
            ) from error
        (key, *_) = self.data.action_sequence_keys
        if f"{key}_is_pad" not in item:
            progress.warn(
                f"openpi's dataset does not tell which of {key!r} lie beyond an episode's end: all "
                "are trained on"
            )
        is_pad = item.get(f"{key}_is_pad", np.zeros(self.model.action_horizon, bool))
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
    try:
        source = openpi.own_config(name)
    except ValueError as error:
        raise ValueError(
            f"{error}\nHere --data.path names a config of openpi's; for a folder of recordings, "
            "add --data.source lerobot and --data.robot"
        ) from error
    if reason := obstacle(source):
        raise ValueError(
            f"openpi's loader cannot read the data of {name} here ({reason}): give --data.source "
            "lerobot --data.path FOLDER"
        )
    _check_model(name, source.model, model)
    from openpi.training import data_loader

    # Statistics at another address are in data.norm_stats already.
    local = dataclasses.replace(source.data.assets, assets_dir=None)
    factory = dataclasses.replace(source.data, assets=local)
    found = factory.create(source.assets_dirs, source.model)
    stats = _stats(data, found, model, teacher_step)
    found = dataclasses.replace(found, norm_stats=_openpis(stats))
    try:
        dataset = data_loader.create_torch_dataset(found, source.model.action_horizon, source.model)
    except Exception as error:  # Whatever LeRobot raises, on the hub or on disk.
        raise ValueError(
            f"LeRobot cannot open {found.repo_id}, the dataset of openpi's config {name} "
            f"({type(error).__name__}: {error}): check the config's repo_id, a name on the hub or "
            "a folder in $HF_LEROBOT_HOME; or give --data.source lerobot --data.path FOLDER"
        ) from error
    recordings = _recordings(dataset)
    assets = policy_assets.Assets(
        model=model,
        robot=_robot(data.robot, model, stats, recordings.fps),
        tokenizer=opening.tokenizer_file(data, model, teacher_step),
        stats=stats,
        asset_id=data.asset_id,
    )
    parts: list[Source | None] = [Source(found, source.model, dataset), None]
    if data.held_out:
        episodes = np.asarray(recordings.hf_dataset["episode_index"])
        chosen = reader.split(np.unique(episodes).tolist(), data.held_out)
        frames = (np.flatnonzero(np.isin(episodes, which)) for which in chosen)
        parts = [Source(found, source.model, dataset, these) for these in frames]
    train, held_out = (part and opening.cached(data, part) for part in parts)
    assert train is not None, "the first part holds the training episodes"
    _ = train[0]  # A config that does not fit its recordings raises here.
    return opening.Data(train, held_out, assets)


def obstacle(source: openpi.OpenpiObject) -> str:
    """The reason why openpi's loader cannot read a training config's data here; empty if it can."""
    if hasattr(source.data, "rlds_data_dir"):
        return "they are in RLDS, not in LeRobot's format"
    repo_id = source.data.repo_id
    if repo_id is None or repo_id is tyro.MISSING:
        return "the config has no repo_id, for it is for inference"
    if not isinstance(repo_id, str):
        return f"its repo_id must be the name of one dataset, got {repo_id!r}"
    if importlib.util.find_spec("lerobot") is None:
        return "the package lerobot is not installed"
    return ""


def _check_model(name: str, source: openpi.OpenpiObject, model: pi0.Pi0Config) -> None:
    """Raise if the run's model wants other samples than openpi's config gives."""
    fields = ["pi05", "action_dim", "action_horizon", "max_token_len"]
    fields += ["discrete_state_input"] * model.pi05
    for field in fields:
        own, theirs = getattr(model, field), getattr(source, field)
        if own != theirs:
            raise ValueError(
                f"openpi's loader gives samples of the {field} in its config {name}, {theirs}, and "
                f"{flags.as_flag(f'model.{field}')} is {own}: change openpi's config, or leave it "
                "out"
            )


def _robot(
    name: str, model: pi0.Pi0Config, stats: dict[str, normalize.NormStats], fps: float
) -> robots.Robot:
    """The robot of that name; for transforms only openpi has, one that names their config."""
    if not name.startswith(PREFIX):
        return robots.find(name)
    return robots.Robot(
        name=name,
        cameras={camera: camera for camera in model.cameras},
        state_dim=len(stats["state"].mean),
        action_dim=len(stats["actions"].mean),
        fps=fps,
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


def _recordings(dataset: openpi.OpenpiObject) -> openpi.OpenpiObject:
    """LeRobot's dataset, which openpi wraps if prompts come from it."""
    while hasattr(dataset, "_dataset"):
        dataset = dataset._dataset
    return dataset
