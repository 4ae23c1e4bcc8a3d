"""Opening of a data config: the samples of a run, and the assets of its policy.

Statistics and tokenizer are the teacher's if its checkpoint has them, because teacher and student
velocities can only be compared in one normalization; the choice is printed. Without a teacher, or
if it has none (with a warning), statistics are computed from the dataset, and the tokenizer has to
be given.
"""

import dataclasses
import itertools
import pathlib
import pkgutil
from collections.abc import Mapping, Sequence

from shallow_pi import progress, user_cache
from shallow_pi.checkpoints import fetch, run_folder
from shallow_pi.data import data_config, fit, frame_cache, sources
from shallow_pi.data.lerobot import hub, layout, reader
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import (
    checkpoint_statistics,
    lerobot_policy,
    normalize,
    statistics,
)
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import tokenizer as prompts
from shallow_pi.models import pi0

# Default limit of `--data.cache memory`, GiB.
MEMORY_GIB = 2.0
# Fields that `open_datasets` does not read.
UNREAD = (
    "data.source data.weights data.num_threads data.num_workers data.cache data.cache_dir "
    "data.cache_gib"
)
# Value of `--data.norm-stats` for statistics of the dataset.
OF_DATASET = "dataset"
# Dimensions that do not fit given statistics, named one by one.
MOST_MISFITS = 6
# Approximate number of frames that are compared with given statistics.
COMPARED_FRAMES = 100_000


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Datasets of one robot, opened and split."""

    robot: robots.Robot
    train: list[reader.Dataset]
    # The held-out episodes of each dataset; empty if none are held out.
    held_out: list[reader.Dataset]


@dataclasses.dataclass(frozen=True)
class Data:
    """The samples of a run, and the assets of its policy."""

    # Samples of the training episodes.
    train: sources.Source
    # Samples of the held-out episodes; None if none are held out.
    held_out: sources.Source | None
    # Files that the policy needs besides its parameters; None for synthetic samples.
    assets: policy_assets.Assets | None


def open_recordings(data: data_config.DataConfig, action_dim: int) -> Recordings | None:
    """Open the datasets of a config, and print their sizes; None for another source.

    Args:
      data: where they are.
      action_dim: of the model, which the robot's vectors must not exceed.

    Raises:
      FileNotFoundError, ValueError: a dataset that is missing, cannot be read, or does not fit.
    """
    if data.source != "lerobot":
        return None
    robot = robots.find(data.robot)
    train, held_out = open_datasets(data, robot)
    fit.check_sizes(train[0], robot, action_dim)
    for number, dataset in enumerate(train):
        kept = held_out[number].episodes if held_out else ()
        progress.say(
            f"Dataset: {dataset.path}, {len(dataset.episodes)} episodes ({len(dataset)} frames) to "
            f"train on, {len(kept)} held out"
        )
    return Recordings(fit.with_sizes(robot, train[0]), train, held_out)


def open_data(
    data: data_config.DataConfig,
    model: pi0.Pi0Config,
    teacher_step: pathlib.Path | None,
    recordings: Recordings | None = None,
) -> Data:
    """The samples of a run, and the assets of its policy.

    Args:
      data: where they come from.
      model: the architecture they are for.
      teacher_step: the teacher's step folder, whose assets are used where it has some.
      recordings: of `open_recordings`, where that was called before.

    Raises:
      FileNotFoundError: dataset, tokenizer or statistics are missing; says which and what to do.
      ValueError: a dataset that does not fit the robot, a tokenizer that does not fit the model, or
        too few episodes to hold some out.
    """
    if ":" in data.source:
        try:
            opens = pkgutil.resolve_name(data.source)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"--data.source {data.source!r} names no function that can be imported ({error}): "
                "expected MODULE:FUNCTION, such as shallow_pi.data.opening:open_data"
            ) from error
        return opens(data, model, teacher_step)
    recordings = recordings or open_recordings(data, model.action_dim)
    if recordings is None:
        made_up = [sources.SyntheticSource(model, seed=seed) for seed in (0, 1)]
        return Data(made_up[0], made_up[1] if data.held_out else None, None)
    train, robot = recordings.train, recordings.robot
    names = _names(train[0], robot)
    if teacher_step is not None:
        lerobot_policy.warn_of_padding(teacher_step)
        theirs = policy_assets.names(teacher_step)
        _compare_names(theirs, f"the teacher in {teacher_step}", names, train[0])
    assets = policy_assets.Assets(
        model=model,
        robot=robot,
        tokenizer=tokenizer_file(data, model, teacher_step),
        stats=_stats(data, train, robot, model, teacher_step),
        asset_id=data.asset_id,
        names=names,
    )
    progress.say(_cameras(robot, model))
    share = _cached_share(data, train, assets)
    return Data(
        _samples(data, train, assets, share),
        _samples(data, recordings.held_out, assets, share) if recordings.held_out else None,
        assets,
    )


def _cameras(robot: robots.Robot, model: pi0.Pi0Config) -> str:
    """One line: the image that each camera of the model sees."""
    seen = (f"{name} ← {robot.cameras.get(name, 'black')}" for name in model.cameras)
    return f"Cameras: {', '.join(seen)}"


def _names(dataset: reader.Dataset, robot: robots.Robot) -> dict[str, tuple[str, ...]]:
    """Names of the robot's dimensions, where the dataset has one for each."""
    found = {}
    for name, of in (("state", robot.state_vector), ("actions", robot.action_vector)):
        # A part of a single number is named by its key.
        parts = [dataset.names(key) or (key,) for key in of.keys]
        names = tuple(itertools.chain.from_iterable(parts))
        if len(names) == sum(dataset.columns[key].shape[1] for key in of.keys) > 1:
            found[name] = of.take(names)
    return found


def _compare_names(
    expected: Mapping[str, tuple[str, ...]],
    whose: str,
    names: Mapping[str, tuple[str, ...]],
    dataset: reader.Dataset,
) -> None:
    """Warn of joints of a dataset in another order, or of other joints, than expected."""
    for key in expected.keys() & names.keys():
        if expected[key] != names[key]:
            progress.warn(
                f"{key} of dataset {dataset.path} are {list(names[key])}, those of {whose} "
                f"{list(expected[key])}: dimensions that differ are learned as one"
            )


def open_datasets(
    data: data_config.DataConfig, robot: robots.Robot, *, images: bool = True
) -> tuple[list[reader.Dataset], list[reader.Dataset]]:
    """Each dataset's training episodes, and its held-out ones (no dataset if none are held out).

    Args:
      data: where they are.
      robot: they have to fit.
      images: fetch the videos of a dataset on the hub too, and check the images.

    Raises:
      FileNotFoundError, ValueError: a dataset that is missing, cannot be read, or does not fit.
    """
    if not data.path:
        raise ValueError("no dataset: name the folder of a LeRobot dataset (--data.path)")
    cameras = tuple(robot.cameras.values()) if images else ()
    found: list[reader.Dataset] = []
    for number, path in enumerate((data.path, *data.more)):
        chosen = data.selection(number)
        if "gs://" in path:
            folder = fetch.locate(path)
        else:
            folder = hub.locate(path, episodes=chosen, cameras=cameras)
        meta = layout.read(folder)
        dataset = reader.Dataset(
            meta,
            episodes=chosen.of(meta.lengths),
            keys=fit.keys(robot, meta),
            cameras=cameras,
            skip_bad_episodes=data.skip_bad_episodes,
        )
        fit.check(dataset, robot, images=images)
        fit.warn(dataset, robot)
        if found:
            first, own = _names(found[0], robot), _names(dataset, robot)
            _compare_names(first, str(found[0].path), own, dataset)
            _warn_of_repeats(found, dataset)
        robot = fit.with_sizes(robot, dataset)  # Further datasets have the same.
        found.append(dataset)
    if not data.held_out:
        return found, []
    train, held_out = [], []
    for dataset in found:
        try:
            parts = reader.split(dataset.episodes, data.held_out)
        except ValueError as error:
            raise ValueError(f"--data.held-out, dataset {dataset.path}: {error}") from error
        train.append(dataset.select(parts[0]))
        held_out.append(dataset.select(parts[1]))
    return train, held_out


def _warn_of_repeats(before: Sequence[reader.Dataset], dataset: reader.Dataset) -> None:
    """Warn of episodes that another of the datasets has already given."""
    for other in before:
        twice = set(dataset.episodes) & set(other.episodes)
        if twice and dataset.path.resolve() == other.path.resolve():
            progress.warn(
                f"dataset {dataset.path} is given twice (--data.path, --data.more), and "
                f"{len(twice)} of its episodes count twice; --data.weights sets shares"
            )


def _samples(
    data: data_config.DataConfig,
    datasets: Sequence[reader.Dataset],
    assets: policy_assets.Assets,
    share: float,
) -> sources.Source:
    model, robot = assets.model, assets.robot
    transform, cameras = assets.inputs(), tuple(robot.cameras.values())
    parts: list[sources.Source] = []
    for dataset in datasets:
        images = None
        if data.cache == "disk":
            folder = _cache_folder(data)
            kept = frame_cache.FrameCache(dataset, cameras, model.image_size, folder, share)
            images = kept.image
        parts.append(sources.DatasetSource(dataset, robot, model.action_horizon, transform, images))
    return cached(data, parts[0] if len(parts) == 1 else sources.Mixture(parts, data.weights))


def cached(data: data_config.DataConfig, source: sources.Source) -> sources.Source:
    """The source itself, or kept in memory if the config says so."""
    if data.cache != "memory":
        return source
    return sources.Cached(source, int((data.cache_gib or MEMORY_GIB) * 2**30))


def _cached_share(
    data: data_config.DataConfig, datasets: Sequence[reader.Dataset], assets: policy_assets.Assets
) -> float:
    if data.cache != "disk":
        return 1.0
    limit = int(data.cache_gib * 2**30) if data.cache_gib else None
    cameras = tuple(assets.robot.cameras.values())
    return frame_cache.share(datasets, cameras, assets.model.image_size, _cache_folder(data), limit)


def _cache_folder(data: data_config.DataConfig) -> pathlib.Path:
    return pathlib.Path(data.cache_dir or user_cache.folder("frames")).expanduser()


def tokenizer_file(
    data: data_config.DataConfig, model: pi0.Pi0Config, teacher_step: pathlib.Path | None
) -> pathlib.Path:
    """The SentencePiece model: the one named, else the teacher's, else PaliGemma's."""
    if data.tokenizer:
        return fetch.locate(data.tokenizer)
    if teacher_step is not None:
        own = teacher_step / run_folder.ASSETS / policy_assets.TOKENIZER_NAME
        if own.is_file():
            return own
    if model.vocab_size == pi0.PALIGEMMA_VOCAB_SIZE:
        return fetch.locate(prompts.PALIGEMMA)
    raise FileNotFoundError(
        f"no tokenizer for a vocabulary of {model.vocab_size}: the teacher's checkpoint has none "
        f"({policy_assets.TOKENIZER_NAME} in its assets); name one with --data.tokenizer"
    )


def _stats(
    data: data_config.DataConfig,
    datasets: list[reader.Dataset],
    robot: robots.Robot,
    model: pi0.Pi0Config,
    teacher_step: pathlib.Path | None,
) -> dict[str, normalize.NormStats]:
    kind, found = normalize.kind_of(model.pi05), None
    if data.norm_stats and data.norm_stats != OF_DATASET:
        found = checkpoint_statistics.at(fetch.locate(data.norm_stats), data.asset_id)
    elif teacher_step is not None and not data.norm_stats:
        found = policy_assets.teacher_statistics(teacher_step, data.asset_id, robot, model)
        if found is None:
            progress.warn(
                f"the teacher in {teacher_step} has no statistics: using the dataset's, which is "
                "right only if it was trained with them (--data.norm-stats FOLDER uses others)"
            )
    dims = {"state": robot.state_dim, "actions": robot.action_dim}
    if found is None:
        progress.say("Statistics: computed from the dataset")
        stats = sources.norm_stats(datasets, robot, model.action_horizon)
    else:
        progress.say(f"Statistics: {found.path}")
        stats = found.stats
        normalize.check(stats, dims, kind)
    for line in statistics.one_valued(stats) if kind == "quantile" else ():
        progress.warn(line)
    if teacher_step is not None and data.norm_stats:
        checkpoint_statistics.warn_of_others(teacher_step, data.asset_id, kind, stats, dims)
    if found is None:
        return stats
    compared = [_part(dataset) for dataset in datasets]
    lines = statistics.misfits(
        stats, sources.norm_stats(compared, robot, model.action_horizon), kind
    )
    for line in lines[:MOST_MISFITS]:
        progress.warn(line)
    if len(lines) > MOST_MISFITS:
        progress.warn(f"{len(lines) - MOST_MISFITS} more dimensions do not fit the statistics")
    return stats


def _part(dataset: reader.Dataset) -> reader.Dataset:
    """A dataset, or of a large one so many of its episodes as show whether statistics fit."""
    every = -(-len(dataset) // COMPARED_FRAMES)
    return dataset if every == 1 else dataset.select(dataset.episodes[::every])
