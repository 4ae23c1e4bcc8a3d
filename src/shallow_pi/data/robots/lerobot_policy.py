"""What the folder of a policy tells that LeRobot trained, beside its parameters.

`config.json` holds some of the model's sizes, `policy_preprocessor.json` the units of the actions
and, in a file it names, the statistics; policies from before LeRobot had processors hold them among
the tensors of `model.safetensors`. LeRobot normalizes by other formulas than openpi; each is an
affine map, and is written here as the mean and deviation or the percentiles of the same map.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder, safetensors_file
from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.models import pi0

PREPROCESSOR = "policy_preprocessor.json"
# The step of our exports that converts units; LeRobot has none.
UNITS_STEP = "shallow_pi_to_model"
# LeRobot's names of our keys.
_FEATURES = {"state": ("observation.state", "STATE"), "actions": ("action", "ACTION")}
# Names of the same statistics among a policy's tensors.
_BUFFERS = {
    "state": "normalize_inputs.buffer_observation_state.",
    "actions": "unnormalize_outputs.buffer_action.",
}
# LeRobot's modes that map two statistics to −1 and 1.
_ENDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
# Fields of `config.json` that tell LeRobot's versions apart: its later π0 and π0.5 lack the one,
# those before 0.5.1 the other.
_FIRST_PI0, _SINCE_0_5_1 = "resize_imgs_with_padding", "use_relative_actions"
# The step that writes the state into the prompts of π0.5.
_STATE_IN_PROMPT = "pi05_prepare_state_tokenizer_processor_step"
# Fields of `config.json`, openpi's or LeRobot's → fields of a `Pi0Config`.
_FIELDS = {
    "action_horizon": "action_horizon",
    "chunk_size": "action_horizon",
    "tokenizer_max_length": "max_token_len",
}


def told(step: pathlib.Path) -> dict[str, int | bool]:
    """Fields of the model that the files of a PyTorch policy hold; empty for other folders."""
    content = _config(step)
    found: dict[str, int | bool] = {
        _FIELDS[k]: _whole(step, content, k) for k in _FIELDS if content.get(k)
    }
    steps = _pipeline(step)
    if steps is not None:
        names = {entry.get("registry_name") for entry in steps}
        found["discrete_state_input"] = _STATE_IN_PROMPT in names
    return found


def names(step: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Names of the actions' dimensions, which LeRobot copies from its dataset; else empty."""
    found = _config(step).get("action_feature_names")
    return {"actions": tuple(map(str, found))} if isinstance(found, list) else {}


def warn_of_tokenizer(step: pathlib.Path) -> None:
    """Warn of a policy whose prompts were tokenized otherwise than by PaliGemma's tokenizer."""
    name = _settings(_entry(_pipeline(step) or [], "tokenizer_processor")).get("tokenizer_name")
    if name and "paligemma" not in str(name).lower():
        progress.warn(
            f"the policy in {step} was trained with the tokenizer {name}: taking PaliGemma's "
            "(--policy.tokenizer FILE gives another SentencePiece model)"
        )


def warn_of_padding(step: pathlib.Path) -> None:
    """Warn of a policy whose images, or states in its prompts, were padded differently.

    LeRobot's first π0 padded images at the left and top. LeRobot 0.4 padded them on both sides as
    openpi does, but with values below black, and filled up the state in a prompt to the model's
    width; its folders look like those of 0.5.0.
    """
    content, steps = _config(step), _pipeline(step) or []
    shapes = [tuple(feature.get("shape") or ()) for feature in _cameras(content).values()]
    is_square = bool(shapes) and all(len(s) == 3 and s[1] == s[2] for s in shapes)
    if content.get(_FIRST_PI0):
        if not is_square:
            progress.warn(
                f"the policy in {step} is of LeRobot's first π0 ({_FIRST_PI0} in "
                f"{run_folder.CONFIG_FILE}), which padded images at the left and top, not on "
                "both sides\nit sees images that are not square shifted: record square ones, or "
                "fine-tune it in a later LeRobot or openpi first"
            )
        return
    is_trained = bool(_entry(steps, "normalizer_processor").get("state_file"))
    if not content or _SINCE_0_5_1 in content or not is_trained:
        return
    padded = ["filled up the state in its prompts"] if _entry(steps, _STATE_IN_PROMPT) else []
    padded += [] if is_square else ["padded images that are not square with less than black"]
    if padded:
        progress.warn(
            f"the policy in {step} is of LeRobot before 0.5.1 ({run_folder.CONFIG_FILE} has no "
            f"{_SINCE_0_5_1}), and LeRobot 0.4 {' and '.join(padded)}; 0.5 and openpi do not\n"
            "if 0.4 trained it, its inputs here differ from those in training, as they do in every "
            "later LeRobot: fine-tune it in one of these or in openpi first"
        )


def num_steps(step: pathlib.Path) -> int | None:
    """Integration steps that the policy samples with; None where its folder does not say."""
    content = _config(step)
    name = "num_steps" if _FIRST_PI0 in content else "num_inference_steps"
    return _whole(step, content, name) if content.get(name) else None


def check_robot(step: pathlib.Path, robot: robots.Robot) -> None:
    """Raise where a checkpoint says that its robot has other units than this one.

    A step folder of ours holds its robot, a policy of LeRobot's which actions are relative to the
    state, and statistics in the units of its recordings. One of openpi's says nothing.
    """
    _compare_cameras(step, robot)
    steps = _pipeline(step)
    if steps is None:
        return
    converts = robot.state_conversion is not None or robot.action_conversion is not None
    is_raw = bool(_entry(steps, "normalizer_processor").get("state_file"))
    if converts and is_raw and not _entry(steps, UNITS_STEP):
        raise ValueError(
            f"the policy in {step} was trained in the units of its recordings ({PREPROCESSOR}), "
            f"robot {robot.name} converts them to openpi's\n"
            "give a robot file with state_conversion=None and action_conversion=None"
        )
    relative = _settings(_entry(steps, "relative_actions_processor"))
    names = [str(name).lower() for name in relative.get("action_names") or ()]
    absolute = [str(name).lower() for name in relative.get("exclude_joints") or () if name]
    mask = [bool(relative.get("enabled"))] * robot.action_dim
    for dim, name in enumerate(names[: robot.action_dim]):
        mask[dim] = mask[dim] and not any(part in name for part in absolute)
    delta = [*robot.delta, *[False] * robot.action_dim][: robot.action_dim]
    if mask != delta:
        raise ValueError(
            f"the policy in {step} predicts dimensions {np.flatnonzero(mask).tolist()} relative to "
            f"the state ({PREPROCESSOR}), robot {robot.name} {np.flatnonzero(delta).tolist()}\n"
            f"give a robot file with delta={tuple(mask)}"
        )


def _compare_cameras(step: pathlib.Path, robot: robots.Robot) -> None:
    """Warn where the model would see a camera's image in another place than in training."""
    theirs = [name.rpartition(".")[2] for name in _cameras(_config(step))]
    ours = [robot.cameras[name].rpartition(".")[2] for name in pi0.CAMERAS if name in robot.cameras]
    if any(name in theirs and theirs.index(name) != place for place, name in enumerate(ours)):
        progress.warn(
            f"the policy in {step} was trained with cameras in the order {theirs}, robot "
            f"{robot.name} gives {ours}: a robot file can reorder them"
        )


def statistics(
    step: pathlib.Path, kind: normalize.Kind
) -> tuple[dict[str, normalize.NormStats], pathlib.Path] | None:
    """The statistics that the policy was trained with, and their file; None where it has none.

    Args:
      step: the folder.
      kind: the normalization they are written for.

    Raises:
      ValueError: a file that cannot be read, or a normalization that is not known here.
    """
    steps = _pipeline(step)
    if steps is None:
        return _from_buffers(step, kind)
    entry = _entry(steps, "normalizer_processor")
    settings = _settings(entry)
    if not entry.get("state_file"):
        return None
    path = step / str(entry["state_file"])
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{step / PREPROCESSOR} keeps its statistics in {path}, which cannot be read "
            f"({type(error).__name__}: {error}): copy the policy's whole folder again"
        ) from error
    only = settings.get("normalize_observation_keys")
    stats = {}
    for key, (feature, group) in _FEATURES.items():
        values = _values(tensors, f"{feature}.")
        if not values:
            if tensors:
                progress.warn(
                    f"{path} has no statistics of {feature!r}, only of "
                    f"{sorted({name.rpartition('.')[0] for name in tensors})}: not used"
                )
            return None
        mode = (settings.get("norm_map") or {}).get(group, "IDENTITY")
        if key == "state" and only is not None and feature not in only:
            mode = "IDENTITY"
        stats[key] = _same_map(f"{feature} in {path}", values, mode, settings, kind)
    return stats, path


def _from_buffers(
    step: pathlib.Path, kind: normalize.Kind
) -> tuple[dict[str, normalize.NormStats], pathlib.Path] | None:
    """The same of a policy that holds them among its tensors."""
    path = step / safetensors_file.NAME
    if not path.is_file():
        return None
    tensors = safetensors_file.statistics(path)
    modes = _config(step).get("normalization_mapping") or {}
    stats = {}
    for key, start in _BUFFERS.items():
        values = _values(tensors, start)
        # LeRobot fills them with infinity until it sees a dataset.
        if not values or not all(np.isfinite(value).all() for value in values.values()):
            return None
        feature, group = _FEATURES[key]
        mode = modes.get(group) or ("MEAN_STD" if "std" in values else "MIN_MAX")
        stats[key] = _same_map(f"{feature} in {path}", values, mode, {}, kind)
    return stats, path


def _values(tensors: Mapping[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    """The statistics of each dimension whose names are `start` and one more part."""
    names = {name.removeprefix(start): name for name in tensors if name.startswith(start)}
    return {
        part: np.asarray(tensors[name], np.float64)
        for part, name in names.items()
        if "." not in part and part != "count"  # Of frames: one number for all dimensions.
    }


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


def _config(step: pathlib.Path) -> Mapping[str, Any]:
    """The content of `config.json`; empty where there is none."""
    path = step / run_folder.CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(type(content).__name__)
        return content
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a policy's config ({error!r}): copy it again") from error


def _cameras(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The images among the features of a `config.json`, in their order."""
    return {
        name: feature
        for name, feature in (content.get("input_features") or {}).items()
        if isinstance(feature, Mapping) and feature.get("type") == "VISUAL"
    }


def _whole(step: pathlib.Path, content: Mapping[str, Any], name: str) -> int:
    try:
        return int(content[name])
    except (TypeError, ValueError) as error:
        path = step / run_folder.CONFIG_FILE
        raise ValueError(f"{path} is not a policy's config ({error!r}): copy it again") from error


def _pipeline(step: pathlib.Path) -> list[Mapping[str, Any]] | None:
    """The steps of the policy's preprocessor; None where it has none."""
    path = step / PREPROCESSOR
    if not path.is_file():
        return None
    try:
        steps: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["steps"]
        if not all(isinstance(entry, dict) for entry in steps):
            raise TypeError("a step is no object")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a pipeline of LeRobot's ({error!r}): copy the policy's folder again"
        ) from error
    return steps


def _entry(steps: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The first step of that name; empty where there is none."""
    return next((entry for entry in steps if entry.get("registry_name") == name), {})


def _settings(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return entry.get("config") or {}
