"""A robot's transforms in openpi's order, the same in training and on the robot.

`inputs` turns a robot observation (LeRobot's flat keys, from a simulator, a robot or a dataset),
in training with the robot's `actions`, into one model sample; `outputs` turns normalized model
actions back into the robot's. The order is units, delta actions, normalization.
"""

import dataclasses
from collections.abc import Mapping

from shallow_pi import progress, suggestions
from shallow_pi.data.robots import conversions, normalize, tokenizer, transforms
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import vector as vectors
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations

# Of a sample in training, and of one that goes on from a previous chunk.
_ACTIONS = ("actions", "action_is_pad")


def inputs(
    robot: robots.Robot,
    *,
    cameras: tuple[str, ...],
    image_size: int,
    action_dim: int,
    tokenizer: tokenizer.Tokenizer,
    stats: Mapping[str, normalize.NormStats],
    kind: normalize.Kind,
    discrete_state: bool = False,
    resize: bool = True,
) -> transforms.Composed:
    """Robot observation to model sample (see `to_observation`, `to_batch`).

    Args:
      robot: the source of the observation.
      cameras: the model's cameras in order; one the robot lacks becomes black with mask False.
      image_size: side of the model's images.
      action_dim: the model's action dimension, to which state and actions are padded.
      tokenizer: of the prompt.
      stats: statistics of `state` and `actions` in the robot's dimensions.
      kind: z-score (π0) or quantile (π0.5).
      discrete_state: write the state into the prompt (π0.5).
      resize: bring images to the model's size; without, whoever takes the sample does.
    """
    _check_here(robot)
    if not set(cameras) & set(robot.cameras):
        raise ValueError(
            f"robot {robot.name} has cameras for {sorted(robot.cameras)}, the model wants "
            f"{list(cameras)}: none in common"
        )
    check_size(robot.state_vector, action_dim)
    check_size(robot.action_vector, action_dim)
    normalize.check(stats, {"state": robot.state_dim, "actions": robot.action_dim}, kind)
    for camera in robot.cameras:
        if camera not in cameras:
            hint = suggestions.closest(camera, set(cameras) - set(robot.cameras))
            progress.warn(
                f"{robot.cameras[camera]!r} of robot {robot.name} is not used: the model has no "
                f"camera {camera!r}, only {list(cameras)}{hint}"
            )
    wanted = {camera: key for camera, key in robot.cameras.items() if camera in cameras}
    return transforms.compose(
        transforms.Cameras(cameras, wanted, image_size),
        _Rename(robot),
        *([transforms.Resize(image_size)] if resize else []),
        to_model(robot),
        transforms.Normalize(stats, kind),
        transforms.TokenizePrompt(tokenizer, discrete_state),
        transforms.PadDimensions(action_dim),
    )


def to_observation(sample: transforms.Sample) -> observations.Observation:
    """The observation of a model sample, as `inputs` gives it."""
    return observations.Observation(
        images=sample["image"],
        image_masks=sample["image_mask"],
        state=sample["state"],
        tokenized_prompt=sample["tokenized_prompt"],
        tokenized_prompt_mask=sample["tokenized_prompt_mask"],
    )


def to_batch(sample: transforms.Sample) -> batches.Batch:
    """A model sample with its actions, without the batch's leading axis."""
    return batches.Batch(to_observation(sample), sample["actions"], sample["action_mask"])


def to_model(robot: robots.Robot) -> transforms.Transform:
    """`state` and `actions` of the robot to those the model is trained on, not yet normalized."""
    return transforms.compose(
        conversions.ToModel(robot.state_conversion, robot.action_conversion),
        transforms.DeltaActions(robot.delta),
    )


@dataclasses.dataclass(frozen=True)
class _Rename:
    """Robot keys to model keys, sizes checked; other keys are dropped.

    `actions`, if there are any, are the robot's vectors already (`robot.actions`).
    """

    robot: robots.Robot

    def __call__(self, sample: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        keys = {key: key for key in ("image", "image_mask", *_ACTIONS, *robot.state_keys)}
        if not robot.prompt:
            keys["prompt"] = robot.prompt_key
        found = transforms.Repack(keys, _ACTIONS)(sample)
        sample = {key: value for key, value in found.items() if key not in robot.state_keys}
        sample["state"] = robot.state(found)
        sample.setdefault("prompt", robot.prompt)
        for key, vector in (("state", robot.state_vector), ("actions", robot.action_vector)):
            if key in sample and sample[key].shape[-1] != vector.dim:
                raise ValueError(
                    f"{vector.named} has {sample[key].shape[-1]} dimensions, robot {robot.name} "
                    f"has {vector.dim}; is this another robot's data?"
                )
        if "action_is_pad" in sample:
            sample["action_mask"] = ~sample.pop("action_is_pad")
        return sample


def outputs(
    robot: robots.Robot, *, stats: Mapping[str, normalize.NormStats], kind: normalize.Kind
) -> transforms.Transform:
    """`{"actions": normalized (*n, ah, ad), "state"}` to `{"actions": the robot's (*n, ah, rd)}`.

    Other keys pass through; `state` is the robot's own (`robot.state(observation)`), neither
    converted nor normalized, from which delta actions were predicted.
    """
    _check_here(robot)
    return transforms.compose(
        transforms.CutDimensions(robot.action_dim),
        transforms.Unnormalize({"actions": stats["actions"]}, kind),
        _ToRobot(robot),
    )


def check_size(of: vectors.Vector, action_dim: int, advice: str = "") -> None:
    """Raise if the model's vectors are too short for the robot's state or actions."""
    if of.dim > action_dim:
        raise ValueError(
            f"robot {of.robot} has {of.what} dimension {of.dim}, more than the model's action_dim "
            f"{action_dim} (--model.action-dim, as the teacher's): take some with its "
            f"{of.what}_indices{advice or ' (docs/robots.md)'}"
        )


def _check_here(robot: robots.Robot) -> None:
    if robot.elsewhere:
        raise ValueError(
            f"robot {robot.name} has the transforms of openpi's config {robot.elsewhere}: use "
            "scripts/serve_openpi.py, or describe the robot in a file (docs/robots.md)"
        )


@dataclasses.dataclass(frozen=True)
class _ToRobot:
    """The inverse of `to_model` on `actions`; the robot's own `state` stays beside them."""

    robot: robots.Robot

    def __call__(self, sample: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        convert = conversions.ToModel(robot.state_conversion, None)
        found = transforms.AbsoluteActions(robot.delta)(convert(sample))
        return {**sample, "actions": conversions.ToRobot(robot.action_conversion)(found)["actions"]}
