"""The statistics a checkpoint was trained with, wherever its trainer has left them.

Velocities of two models, and a policy's actions, mean something in one normalization only, so a
checkpoint's own statistics are found or their absence is told: openpi's in
`assets/<asset_id>/norm_stats.json`, LeRobot's in the tensors that the normalizer of
`policy_preprocessor.json` names. LeRobot normalizes by other formulas than openpi; each is an
affine map, and is written here as the mean and deviation or the percentiles of the same map.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from shallow_pi import progress
from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots

PREPROCESSOR = "policy_preprocessor.json"
# LeRobot's names of our keys.
_FEATURES = {"state": ("observation.state", "STATE"), "actions": ("action", "ACTION")}
# LeRobot's modes that map two statistics to −1 and 1.
_ENDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Statistics, and where they are from."""

    stats: dict[str, normalize.NormStats]
    # Their name under a checkpoint's `assets`.
    asset_id: str
    # The file they were read from.
    path: pathlib.Path


def find(
    step: pathlib.Path,
    asset_id: str,
    kind: normalize.Kind,
    *,
    options: str,
    exact: bool = False,
) -> Found | None:
    """The statistics of a step folder; None where it has none.

    Args:
      step: the folder.
      asset_id: which of openpi's; the last part of the name is enough.
      kind: the normalization of the model.
      options: how a user gives others, for messages.
      exact: refuse statistics of another name. Otherwise the only ones there are taken, with a
        warning that names them.

    Raises:
      ValueError: several statistics and none of that name, or files that cannot be read.
    """
    there = _openpis(step)
    names = _named(there, asset_id)
    if not names and there:
        names = [] if exact else list(there)
        if len(names) != 1:
            raise ValueError(
                f"{step} has no statistics of {asset_id!r}; it has {sorted(there)}: choose one "
                f"that was made for this robot, or give others ({options})"
            )
        progress.warn(
            f"{step} has no statistics of {asset_id!r}: taking its only ones, {names[0]!r} "
            f"({options} to choose)"
        )
    if len(names) > 1:
        raise ValueError(f"{step} has several statistics of {asset_id!r}, {names}: {options}")
    if names:
        folder = there[names[0]]
        return Found(normalize.load(folder), names[0], folder / normalize.FILE_NAME)
    return _lerobots(step, asset_id, kind)


def warn_of_others(
    step: pathlib.Path,
    asset_id: str,
    kind: normalize.Kind,
    given: Mapping[str, normalize.NormStats],
    dims: Mapping[str, int],
) -> None:
    """Warn where a teacher was trained with other statistics than those given in their place."""
    there = _openpis(step)
    names = _named(there, asset_id) or list(there)
    if len(names) > 1:
        return  # Nothing says which were its own.
    found = find(step, names[0] if names else asset_id, kind, options="")
    for key, dim in dims.items():
        if found is None or key not in found.stats:
            continue
        ends = np.stack([np.zeros(dim), np.ones(dim)])
        own, other = (normalize.normalize(ends, x[key], kind) for x in (found.stats, given))
        if not np.allclose(own, other, rtol=1e-3, atol=1e-3):
            progress.warn(
                f"the teacher was trained with other statistics of {key!r} ({found.path}): its "
                "velocities are compared in a normalization that it does not know"
            )


def _openpis(step: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name of statistics in openpi's layout → their folder."""
    root = step / "assets"
    return {
        path.parent.relative_to(root).as_posix(): path.parent
        for path in sorted(root.rglob(normalize.FILE_NAME))
    }


def _named(there: Mapping[str, pathlib.Path], asset_id: str) -> list[str]:
    exact = [name for name in there if name == asset_id]
    return exact or [name for name in there if name.rpartition("/")[2] == asset_id]


def at(folder: pathlib.Path, asset_id: str) -> Found:
    """The statistics of a folder named by hand: in it, in its folder `asset_id` or in its only one.

    Raises:
      FileNotFoundError: there are none, or several of other names.
    """
    if folder.name == normalize.FILE_NAME:
        folder = folder.parent
    for inside in (folder, folder / asset_id):
        if (inside / normalize.FILE_NAME).is_file():
            return Found(normalize.load(inside), asset_id, inside / normalize.FILE_NAME)
    found = sorted(folder.rglob(normalize.FILE_NAME)) if folder.is_dir() else []
    if len(found) != 1:
        names = [path.parent.relative_to(folder).as_posix() for path in found]
        raise FileNotFoundError(
            f"no {normalize.FILE_NAME} in {folder}"
            + (f"; there are several below it: name one of {names}" if names else "")
            + "; scripts/compute_norm_stats.py makes one from a dataset"
        )
    return Found(normalize.load(found[0].parent), asset_id, found[0])


def check_robot(step: pathlib.Path, robot: robots.Robot) -> None:
    """Raise where a checkpoint says that its robot has other units than this one.

    A step folder of ours holds its robot, a policy of LeRobot's which actions are relative to the
    state. One of openpi's says nothing.
    """
    pipeline = step / PREPROCESSOR
    if not pipeline.is_file():
        return
    relative = _step(_json(pipeline), "relative_actions_processor")
    names = [str(name).lower() for name in relative.get("action_names") or ()]
    absolute = [str(name).lower() for name in relative.get("exclude_joints") or () if name]
    mask = [bool(relative.get("enabled"))] * robot.action_dim
    for dim, name in enumerate(names[: robot.action_dim]):
        mask[dim] = mask[dim] and not any(part in name for part in absolute)
    delta = [*robot.delta, *[False] * robot.action_dim][: robot.action_dim]
    if mask != delta:
        raise ValueError(
            f"the policy in {step} predicts actions relative to the state in the dimensions "
            f"{np.flatnonzero(mask).tolist()} ({PREPROCESSOR}), robot {robot.name} in "
            f"{np.flatnonzero(delta).tolist()}: give a robot file with delta={tuple(mask)}"
        )


def state_in_prompt(step: pathlib.Path) -> bool | None:
    """True if a policy of LeRobot's reads its state in the prompt; None for any other folder."""
    pipeline = step / PREPROCESSOR
    if not pipeline.is_file():
        return None
    names = {entry.get("registry_name") for entry in _json(pipeline)["steps"]}
    return "pi05_prepare_state_tokenizer_processor_step" in names


def _lerobots(step: pathlib.Path, asset_id: str, kind: normalize.Kind) -> Found | None:
    """The statistics of a policy that LeRobot trained; None where it has no pipeline or no file."""
    pipeline = step / PREPROCESSOR
    if not pipeline.is_file():
        return None
    content = _json(pipeline)
    settings = _step(content, "normalizer_processor")
    names = [
        entry.get("state_file")
        for entry in content["steps"]
        if entry.get("registry_name") == "normalizer_processor"
    ]
    if not names or not names[0]:
        return None
    path = step / str(names[0])
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{pipeline} keeps its statistics in {path}, which cannot be read "
            f"({type(error).__name__}: {error}): copy the policy's whole folder again"
        ) from error
    only = settings.get("normalize_observation_keys")
    stats = {}
    for key, (feature, group) in _FEATURES.items():
        values = {
            name.rpartition(".")[2]: np.asarray(value, np.float64)
            for name, value in tensors.items()
            if name.rpartition(".")[0] == feature
        }
        if not values:
            return None
        mode = (settings.get("norm_map") or {}).get(group, "IDENTITY")
        if key == "state" and only is not None and feature not in only:
            mode = "IDENTITY"
        stats[key] = _same_map(f"{feature} in {path}", values, mode, settings, kind)
    return Found(stats, asset_id, path)


def _same_map(
    what: str,
    values: Mapping[str, np.ndarray],
    mode: str,
    settings: Mapping[str, Any],
    kind: normalize.Kind,
) -> normalize.NormStats:
    """Our statistics whose normalization is LeRobot's of these.

    `(x − shift) / scale` is LeRobot's map: of two ends, shift is their middle and scale half their
    distance.
    """
    eps = float(settings.get("eps", 1e-8))  # LeRobot's default.
    wanted = ("mean", "std") if mode == "MEAN_STD" else _ENDS.get(mode, ())
    absent = [name for name in wanted if name not in values]
    if absent or not (wanted or mode == "IDENTITY"):
        raise ValueError(
            f"{what} is normalized by {mode}, which is "
            + (f"impossible without {absent}" if absent else "not known here")
            + f"; there are {sorted(values)}"
        )
    size = np.shape(next(iter(values.values())))
    shift, scale = np.zeros(size), np.ones(size)
    if mode == "MEAN_STD":
        shift, scale = values["mean"], values["std"] + eps
    elif wanted:
        low, high = (values[name] for name in wanted)
        width = np.where(high == low, eps, high - low)
        shift, scale = low + width / 2, width / 2
    if mode != {"quantile": "QUANTILES", "z_score": "MEAN_STD"}[kind]:
        progress.warn(f"{what} is normalized by {mode}: written as statistics of the same map")
    if kind == "quantile":
        mean, std = values.get("mean", shift), values.get("std", scale)
        return normalize.NormStats(mean, std, shift - scale, shift + scale - normalize.EPSILON)
    ends = (values["q01"], values["q99"]) if {"q01", "q99"} <= values.keys() else (None, None)
    return normalize.NormStats(shift, scale - normalize.EPSILON, *ends)


def _json(path: pathlib.Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(step, dict) for step in content["steps"]):
            raise TypeError("a step is no object")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a pipeline of LeRobot's ({error!r}): copy the policy's folder again"
        ) from error
    return content


def _step(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings of a pipeline's step; empty where it has none of that name."""
    for entry in content["steps"]:
        if entry.get("registry_name") == name:
            return entry.get("config") or {}
    return {}
