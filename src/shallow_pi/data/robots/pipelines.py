"""A robot's transforms in openpi's order, the same in training and on the robot.

`inputs` turns a robot observation (LeRobot's flat keys, from a simulator, a robot or a dataset),
in training with the robot's `actions`, into one model sample; `outputs` turns normalized model
actions back into the robot's. The order is units, delta actions, normalization.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from shallow_pi import progress, suggestions
from shallow_pi.data.robots import conversions, normalize, tokenizer, transforms
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import vector as vectors
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations


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
    return transforms.Composed(
        (
            transforms.Cameras(cameras, wanted, image_size),
            _Rename(robot),
            *([transforms.Resize(image_size)] if resize else []),
            ToModel(robot),
            transforms.Normalize(stats, kind),
            transforms.TokenizePrompt(tokenizer, discrete_state),
            transforms.PadDimensions(action_dim),
        )
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


@dataclasses.dataclass(frozen=True)
class ToModel:
    """`state` and `actions` of the robot to those the model is trained on, not yet normalized."""

    robot: robots.Robot

    def __call__(self, sample: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        state = conversions.to_model(robot.state_conversion, sample["state"])
        if "actions" not in sample:
            return {**sample, "state": state}
        actions = conversions.to_model(robot.action_conversion, sample["actions"])
        return {**sample, "state": state, "actions": transforms.delta(actions, state, robot.delta)}


@dataclasses.dataclass(frozen=True)
class _Rename:
    """Robot keys to model keys, sizes checked; other keys are dropped.

    `actions`, if there are any, are the robot's vectors already (`robot.actions`).
    """

    robot: robots.Robot

    def __call__(self, sample: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        wanted = [*robot.state_keys, *([] if robot.prompt else [robot.prompt_key])]
        if missing := [key for key in wanted if key not in sample]:
            raise ValueError(f"sample lacks {missing}; expected these keys, got {sorted(sample)}")
        kept = ("image", "image_mask", "actions", "action_is_pad")
        found = {key: sample[key] for key in kept if key in sample}
        found["state"] = robot.state(sample)
        found["prompt"] = robot.prompt or sample[robot.prompt_key]
        for key, vector in (("state", robot.state_vector), ("actions", robot.action_vector)):
            if key in found and found[key].shape[-1] != vector.dim:
                raise ValueError(
                    f"{vector.named} has {found[key].shape[-1]} dimensions, robot {robot.name} "
                    f"has {vector.dim}; is this another robot's data?"
                )
        if "action_is_pad" in found:
            found["action_mask"] = ~found.pop("action_is_pad")
        return found


def outputs(
    robot: robots.Robot, *, stats: Mapping[str, normalize.NormStats], kind: normalize.Kind
) -> transforms.Transform:
    """`{"actions": normalized (*n, ah, ad), "state"}` to `{"actions": the robot's (*n, ah, rd)}`.

    Other keys pass through; `state` is the robot's own (`robot.state(observation)`), neither
    converted nor normalized, from which delta actions were predicted.
    """
    _check_here(robot)
    return _ToRobot(robot, stats["actions"], kind)


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
            "scripts/serve_openpi.py, or describe the robot in a file (--policy.robot, "
            "docs/robots.md)"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _ToRobot:
    """The inverse of `inputs` on `actions`; the robot's own `state` stays beside them."""

    robot: robots.Robot
    stats: normalize.NormStats
    kind: normalize.Kind

    def __call__(self, sample: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        actions = np.asarray(sample["actions"])[..., : robot.action_dim]
        actions = normalize.unnormalize(actions, self.stats, self.kind)
        state = conversions.to_model(robot.state_conversion, sample["state"])
        actions = transforms.delta(actions, -state, robot.delta)
        return {**sample, "actions": conversions.to_robot(robot.action_conversion, actions)}
