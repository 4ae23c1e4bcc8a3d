"""The README.md of an exported policy: what it is, what was checked, how to run it."""

from collections.abc import Mapping, Sequence
from typing import Any

from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import lerobot_folder
from shallow_pi.models import pi0

_OPENPI = """\
A step folder of openpi: `params/` and `assets/{asset_id}/norm_stats.json`. openpi's own configs
have {teacher_depth} layers; a config of {depth} is registered by this project's server, which runs
openpi's `serve_policy.py` as it is:

    uv run scripts/serve_openpi.py policy:checkpoint --policy.config={config} --policy.dir={folder}
"""
_PADDED = """\
A step folder for an unchanged openpi: the student's {student_depth} layers stand at the indices
{layers} of {depth}, the others are zeros, which add nothing. The actions are the student's; memory
and time are those of {depth} layers. Give a config of openpi with this model ({kind}, action
horizon {horizon}), this robot's transforms and `asset_id="{asset_id}"`:

    uv run scripts/serve_policy.py policy:checkpoint --policy.config=CONFIG --policy.dir={folder}
"""
_PYTORCH = """\
`model.safetensors` for openpi's PyTorch model, with `assets/{asset_id}/norm_stats.json`. The class
takes its depth from `gemma.get_config`; tell it before it is made (openpi's loader is strict, so a
wrong depth raises):

    import dataclasses
    import openpi.models.gemma as gemma
    from openpi.policies import policy_config

    original = gemma.get_config
    gemma.get_config = lambda name: dataclasses.replace(original(name), depth={depth})
    policy = policy_config.create_trained_policy(train_config, "{folder}")

`train_config` is one of openpi with this model ({kind}, action horizon {horizon}), this robot's
transforms and `asset_id="{asset_id}"`. openpi wants `gemma_expert.lm_head.weight`, which no policy
uses; here it is zeros.
"""
_LEROBOT = """\
A policy folder of LeRobot, of the type `{lerobot_type}`: LeRobot's own {kind} at {depth} layers.
The type comes with the plugin in this project's repository; LeRobot itself has 18 layers built in
and must not be given this file as its own {kind}:

    pip install plugins/lerobot_policy_shallow_pi
    lerobot-eval --policy.path={folder} ...

An observation has {names}.
The plugin raises where the file and `config.json` do not fit each other. Pictures are resized by
LeRobot's function there and by Pillow's here, which differ by a few grey levels; give pictures of
{size} × {size} where that matters.
"""


def text(
    format: str,
    assets: policy_assets.Assets,
    model: pi0.Pi0Config,
    folder: str,
    origin: Mapping[str, Any],
    layers: Sequence[int],
    difference: float,
) -> str:
    """The card.

    Args:
      format: one of `export.Format`.
      assets: the student's.
      model: the exported model, deeper than the student's where it is padded.
      folder: name of the folder.
      origin: name, layer map and teacher depth of the run, as far as they are known.
      layers: teacher layers of the padding.
      difference: of the actions, as measured.
    """
    student, robot = assets.model, assets.robot
    teacher_depth = origin.get("depth", 18)
    kept = origin.get("layer_map") or layers
    words = {
        "asset_id": assets.asset_id,
        "config": origin.get("name", "NAME"),
        "depth": model.depth,
        "folder": folder,
        "horizon": model.action_horizon,
        "kind": model.kind,
        "layers": " ".join(map(str, layers)),
        "names": _lerobot_names(assets),
        "lerobot_type": "shallow_pi05" if model.pi05 else "shallow_pi0",
        "size": model.image_size,
        "student_depth": student.depth,
        "teacher_depth": teacher_depth,
    }
    how = {
        "openpi": _OPENPI,
        "openpi-padded": _PADDED,
        "openpi-pytorch": _PYTORCH,
        "lerobot": _LEROBOT,
    }[format].format(**words)
    source = f" (teacher layers {' '.join(map(str, kept))} of {teacher_depth})" if kept else ""
    cameras = ", ".join(name for name in student.cameras if name in robot.cameras)
    return f"""\
---
pipeline_tag: robotics
tags: [robotics, vision-language-action, shallow_pi, {"pi05" if student.pi05 else "pi0"}]
---

# {student.kind} with {student.depth} layers

A policy of shallow_pi{f" (config {words['config']})" if origin else ""}: {student.depth} layers in
backbone and action expert alike{source}.

| | |
|---|---|
| robot | {robot.name}: {robot.state_dim} state and {robot.action_dim} action dimensions, {robot.fps} Hz |
| cameras | {cameras}, {student.image_size} × {student.image_size} |
| actions | {student.action_horizon} a chunk, model dimension {student.action_dim} |
| prompt | {student.max_token_len} tokens{", with the state in it" if student.discrete_state_input else ""} |
| normalization | {assets.kind.replace("_", "-")}, statistics `{assets.asset_id}` |
| compute | {student.dtype} |

## Run it

{how}
In this project, any of its exports: `shallow_pi.deploy.policy.Policy.from_checkpoint("{folder}")`.

## Checked

Read back after writing: every parameter equal, bit for bit; on the same observation and noise the
largest difference of a normalized action from the student's was {difference:.1e}.

Weights that descend from openpi's contain PaliGemma's, to which Google's Gemma terms of use apply.
"""  # noqa: E501 (rows of a Markdown table)


def _lerobot_names(assets: policy_assets.Assets) -> str:
    """What LeRobot's names mean in the robot's own terms."""
    robot = assets.robot
    keys = [robot.cameras[name] for name in assets.model.cameras if name in robot.cameras]
    pictures = [f"`{lerobot_folder.camera_key(key)}` (`{key}`)" for key in keys]
    state = f"`{lerobot_folder.STATE}` ({robot.state_dim} numbers: "
    state += " then ".join(f"`{key}`" for key in robot.state_keys) + ")"
    prompt = "its prompt is always the same" if robot.prompt else "`task`"
    return ", ".join([*pictures, state, prompt])
