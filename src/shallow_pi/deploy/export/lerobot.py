"""A policy folder of LeRobot: `model.safetensors`, the policy's config and its two pipelines.

The types `shallow_pi0` and `shallow_pi05` come from the plugin `lerobot_policy_shallow_pi`
(plugins/ in this repository), which reads the depth from the config and raises if the file does not
fit. The pipelines consist of LeRobot's steps with this policy's statistics, set up to compute the
same as `data.robots`, but for `normalize.steady`: openpi's epsilon, relative actions if the robot
has any, and two steps of the plugin for a robot with different units or signs or a fixed prompt.
LeRobot has one state, `observation.state`, one `task`, and images under `observation.images.`:
other keys of a robot are renamed to these (`camera_key`), and a state in parts becomes one.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from shallow_pi.checkpoints import run_folder, safetensors_file, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import conversions, lerobot_policy, normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy.export import openpi
from shallow_pi.deploy.export import student as students

_USAGE = """\
A LeRobot policy folder of type `{type}`: LeRobot's {kind} with {depth} layers. A plugin in the
repository of shallow_pi provides the type; LeRobot's standard {kind} has a fixed depth of 18 layers
and must not load this file. With the Python of LeRobot:

    pip install /path/to/a/clone/of/shallow_pi/plugins/lerobot_policy_shallow_pi
    lerobot-eval --policy.path=/path/to/{folder} ...

An observation has {names}.
{relative}The plugin raises an error if the file and `config.json` do not match. Send images of
{size} × {size}, as Pillow resizes them (`resize_with_pad` of openpi's client): LeRobot shrinks
larger ones without smoothing, which differs by ten grey levels and more where there is fine detail.
"""
_RELATIVE = """\
Actions of this robot are relative to its state. LeRobot adds the state of the moment at which it
executes an action, not the one the action was predicted from, so `n_action_steps` is 1 here: a
larger number would move every later action of a chunk by as far as the robot has come meanwhile.
"""
_CONVERTED = """\
Do not use LeRobot's real-time chunking (`--inference.type=rtc`): it goes on from the rest of a
chunk in the robot's units, which are not the model's here.
"""
TOKENIZER = "google/paligemma-3b-pt-224"
STATE, ACTION, PROMPT = "observation.state", "action", "task"
IMAGES = "observation.images."
# An object of the JSON that LeRobot reads.
Json = Mapping[str, object]


# Cameras, image size and action dimension are in the policy's config.
DTYPES, BUILT_IN, verify = openpi.DTYPES, students.BUILT_IN, openpi.verify


def check(student: students.Student) -> None:
    """Raise for a robot that LeRobot's pipelines cannot hold, and for fewer image tokens."""
    students.check_image_tokens(student.model)
    robot = student.assets.robot
    if robot.elsewhere:
        raise ValueError(
            f"the robot's transforms are those of openpi's config {robot.elsewhere}, which "
            "LeRobot's pipelines cannot hold: give --format openpi, openpi-padded or openpi-pytorch"
        )
    if robot.taken:
        raise ValueError(
            f"robot {robot.name} selects values from its columns ({robot.taken}), and LeRobot "
            "passes whole columns in their own order: the policy would read and move other joints\n"
            "serve it with shallow-pi serve, give --format onnx, or train on a dataset whose "
            "columns are these values in this order"
        )
    _inputs(student.assets)


def prepare(student: students.Student) -> students.Student:
    """The student in whole layers, and with an image tower of the depth that the class has."""
    return students.filled(student)


def write(folder: pathlib.Path, student: students.Student) -> None:
    """Write the tensors under LeRobot's names, the config and the pipelines."""
    model = student.model
    safetensors_file.write(
        folder / safetensors_file.NAME,
        weights.leaves(student.params),
        num_kv_heads=model.backbone.num_kv_heads,
        num_image_heads=model.image.num_heads,
        prefix="model.",
    )
    write_pipelines(folder, student.assets)


def usage(folder: str, student: students.Student) -> str:
    """The required plugin, LeRobot's command, and the keys of an observation."""
    return _USAGE.format(
        depth=student.model.depth,
        folder=folder,
        kind=student.model.kind,
        names=_names(student.assets),
        relative=_relative_text(student.assets.robot),
        size=student.model.image_size,
        type=config(student.assets)["type"],
    )


def _relative_text(robot: robots.Robot) -> str:
    """Warnings of what LeRobot does to actions relative to the state, if this robot has any."""
    if not any(robot.delta):
        return ""
    return _RELATIVE + (_CONVERTED if robot.action_conversion else "")


def write_pipelines(folder: pathlib.Path, assets: policy_assets.Assets) -> None:
    """Write `config.json`, `policy_preprocessor.json` and `policy_postprocessor.json`."""
    _dump(folder / run_folder.CONFIG_FILE, config(assets))
    for name, steps in (
        ("policy_preprocessor", _before(assets)),
        ("policy_postprocessor", _after(assets)),
    ):
        for number, step in enumerate(steps):
            if step["registry_name"] in ("normalizer_processor", "unnormalizer_processor"):
                file = f"{name}_step_{number}_{step['registry_name']}.safetensors"
                safetensors_file.save(statistics(assets), folder / file)
                step["state_file"] = file
        _dump(folder / f"{name}.json", {"name": name, "steps": steps})


def camera_key(key: str) -> str:
    """LeRobot's name of a robot's camera."""
    if key.startswith(IMAGES):
        return key
    return IMAGES + key.removeprefix("observation.").replace(".", "_")


def config(assets: policy_assets.Assets) -> Json:
    """The policy's config; other fields keep LeRobot's defaults."""
    model = assets.model
    relative, absolute, names = _relative(assets)
    return {
        "type": "shallow_pi05" if model.pi05 else "shallow_pi0",
        "depth": model.depth,
        "n_obs_steps": 1,
        "input_features": _inputs(assets),
        "output_features": _outputs(assets),
        "push_to_hub": False,
        "dtype": model.dtype,
        "chunk_size": model.action_horizon,
        # `_RELATIVE` gives the reason.
        "n_action_steps": 1 if relative else model.action_horizon,
        "max_state_dim": model.action_dim,
        "max_action_dim": model.action_dim,
        "num_inference_steps": assets.num_steps,
        "use_relative_actions": relative,
        "relative_exclude_joints": absolute,
        "action_feature_names": names,
        "image_resolution": [model.image_size, model.image_size],
        "normalization_mapping": _modes(assets),
        "tokenizer_max_length": model.max_token_len,
    }


def statistics(assets: policy_assets.Assets) -> dict[str, np.ndarray]:
    """LeRobot's tensors of statistics, in the robot's dimensions.

    openpi divides by q99 − q01 + 1e-6 and LeRobot by q99 − q01, so the 1e-6 goes into q99.
    """
    found = {}
    for key, name, dim in (
        ("state", STATE, assets.robot.state_dim),
        ("actions", ACTION, assets.robot.action_dim),
    ):
        for kind, value in assets.stats[key].items():
            value = value + normalize.EPSILON if kind == "q99" else value
            found[f"{name}.{kind}"] = np.ascontiguousarray(value[:dim], np.float32)
    return found


def _before(assets: policy_assets.Assets) -> list[dict[str, object]]:
    relative, absolute, names = _relative(assets)
    make_relative = {"enabled": relative, "exclude_joints": absolute, "action_names": names}
    prompt: tuple[str, Json] = ("pi0_new_line_processor", {})
    if assets.model.discrete_state_input:
        dim = {"max_state_dim": assets.model.action_dim}
        prompt = ("pi05_prepare_state_tokenizer_processor_step", dim)
    tokenize = {
        "max_length": assets.model.max_token_len,
        "task_key": PROMPT,
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": TOKENIZER,
    }
    features = _inputs(assets) | _outputs(assets)
    return [
        _step("rename_observations_processor", {"rename_map": {}}),
        _step("to_batch_processor", {}),
        *_to_model(assets),
        _step("relative_actions_processor", make_relative),
        _step("normalizer_processor", _normalizer(assets, features)),
        _step(*prompt),
        _step("tokenizer_processor", tokenize),
        _step("device_processor", {"device": "cpu", "float_dtype": None}),
    ]


def _after(assets: policy_assets.Assets) -> list[dict[str, object]]:
    return [
        _step("unnormalizer_processor", _normalizer(assets, _outputs(assets))),
        _step("absolute_actions_processor", {"enabled": _relative(assets)[0]}),
        *_to_robot(assets),
        _step("device_processor", {"device": "cpu", "float_dtype": None}),
    ]


def _to_model(assets: policy_assets.Assets) -> list[dict[str, object]]:
    """The plugin's step before differences are computed, if this robot needs it."""
    robot = assets.robot
    units = {
        "state": _units(robot.state_conversion),
        "action": _units(robot.action_conversion),
        "prompt": robot.prompt,
    }
    return [_step(lerobot_policy.UNITS_STEP, units)] if any(units.values()) else []


def _to_robot(assets: policy_assets.Assets) -> list[dict[str, object]]:
    """Its inverse on the actions."""
    units = _units(assets.robot.action_conversion)
    return [_step("shallow_pi_to_robot", {"action": units})] if units else []


def _units(conversion: conversions.Conversion | None) -> Json | None:
    if conversion is None:
        return None
    return {
        "factor": list(conversion.factor),
        "offset": list(conversion.offset or (0.0,) * len(conversion.factor)),
        "crank": list(conversion.crank),
        "closed": conversions.FINGERS_CLOSED,
        "open": conversions.FINGERS_OPEN,
        "arm": conversions.ARM,
        "horn": conversions.HORN,
    }


def _step(name: str, settings: Json) -> dict[str, object]:
    return {"registry_name": name, "config": settings}


def _normalizer(assets: policy_assets.Assets, features: Json) -> Json:
    return {"eps": normalize.EPSILON, "features": features, "norm_map": _modes(assets)}


def _modes(assets: policy_assets.Assets) -> dict[str, str]:
    mode = {"quantile": "QUANTILES", "z_score": "MEAN_STD"}[assets.kind]
    return {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}


def _inputs(assets: policy_assets.Assets) -> dict[str, Json]:
    """Images in the model's order (cameras the robot lacks are left out), and the state."""
    size, robot = assets.model.image_size, assets.robot
    own = [robot.cameras[name] for name in assets.seen.cameras]
    seen = [camera_key(key) for key in own]
    if len(set(seen)) < len(seen):
        raise ValueError(
            f"robot {robot.name} has cameras {own}, which LeRobot would know by the same name "
            f"({seen}): give one of them another key in a robot file"
        )
    images: dict[str, Json] = {key: {"type": "VISUAL", "shape": [3, size, size]} for key in seen}
    return images | {STATE: {"type": "STATE", "shape": [robot.state_dim]}}


def _outputs(assets: policy_assets.Assets) -> dict[str, Json]:
    return {ACTION: {"type": "ACTION", "shape": [assets.robot.action_dim]}}


def _relative(assets: policy_assets.Assets) -> tuple[bool, list[str], list[str]]:
    """True if any action is relative to the state; the names of those that are not, and of all."""
    dim = assets.robot.action_dim
    delta = (*assets.robot.delta, *(False,) * dim)[:dim]
    names = [f"action_{index:03d}" for index in range(dim)]
    absolute = [name for name, relative in zip(names, delta, strict=True) if not relative]
    return any(delta), absolute, names


def _dump(path: pathlib.Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _names(assets: policy_assets.Assets) -> str:
    """LeRobot's keys, with the robot's names for them."""
    robot = assets.robot
    keys = [robot.cameras[name] for name in assets.seen.cameras]
    images = [f"`{camera_key(key)}`" + f" (`{key}`)" * (camera_key(key) != key) for key in keys]
    state = f"`{STATE}` ({robot.state_dim} numbers: "
    state += " then ".join(f"`{key}`" for key in robot.state_keys) + ")"
    prompt = "its prompt is always the same" if robot.prompt else "`task`"
    if not (robot.prompt or assets.model.discrete_state_input):
        # LeRobot replaces underscores in the prompts of π0.5 with the state alone.
        prompt += " (with spaces for underscores, as it was trained)"
    return ", ".join([*images, state, prompt])
