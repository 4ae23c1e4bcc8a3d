"""Two pipeline steps that LeRobot lacks: a robot's units and signs to the model's, and back.

`model = factor · robot + offset` by dimension; in the dimensions listed in `crank` the robot's
number is the relative position of a gripper's fingers, and is first converted to the angle of the
servo that moves them through a crank. The numbers, including the crank's lengths (metres), come
from the pipelines' JSON files in the exported folder.
"""

import dataclasses
from typing import Any

import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.constants import OBS_STATE

Features = dict[PipelineFeatureType, dict[str, PolicyFeature]]
# factor, offset: one number per dimension; crank: dimensions; closed, open, arm, horn: metres.
Units = dict[str, Any]


def to_model(values: torch.Tensor, units: Units) -> torch.Tensor:
    """The robot's numbers (..., d) to the model's, in their dtype."""
    _check(values, units)
    converted = values.to(torch.float64, copy=True)
    for dim in units["crank"]:
        low, high, arm, horn = (units[name] for name in ("closed", "open", "arm", "horn"))
        fingers = converted[..., dim] * (high - low) + low
        sine = (horn**2 + fingers**2 - arm**2) / (2 * horn * fingers)
        converted[..., dim] = torch.asin(sine.clamp(-1, 1))
    factor, offset = _vectors(converted, units)
    return (converted * factor + offset).to(values.dtype)


def to_robot(values: torch.Tensor, units: Units) -> torch.Tensor:
    """The model's numbers (..., d) to the robot's, in their dtype: the inverse of `to_model`."""
    _check(values, units)
    factor, offset = _vectors(values.to(torch.float64), units)
    converted = (values.to(torch.float64) - offset) / factor
    for dim in units["crank"]:
        low, high, arm, horn = (units[name] for name in ("closed", "open", "arm", "horn"))
        angle = converted[..., dim]
        fingers = horn * torch.sin(angle) + torch.sqrt(arm**2 - (horn * torch.cos(angle)) ** 2)
        converted[..., dim] = (fingers - low) / (high - low)
    return converted.to(values.dtype)


def _vectors(values: torch.Tensor, units: Units) -> list[torch.Tensor]:
    return [values.new_tensor(units[name]) for name in ("factor", "offset")]


def _check(values: torch.Tensor, units: Units) -> None:
    if values.shape[-1] != len(units["factor"]):
        raise ValueError(
            f"this policy's robot has {len(units['factor'])} dimensions, got {values.shape[-1]}: "
            "is this another robot's observation or action?"
        )


@ProcessorStepRegistry.register("shallow_pi_to_model")
@dataclasses.dataclass
class ToModelStep(ProcessorStep):
    """State and any actions to the model's units; sets a fixed prompt if there is one."""

    # None leaves the numbers as they are.
    state: Units | None = None
    action: Units | None = None
    # Replaces every task; empty leaves them unchanged.
    prompt: str = ""

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Convert one transition, batched or not."""
        new = transition.copy()
        observation = new.get(TransitionKey.OBSERVATION)
        if self.state is not None and observation and OBS_STATE in observation:
            state = to_model(observation[OBS_STATE], self.state)
            new[TransitionKey.OBSERVATION] = {**observation, OBS_STATE: state}
        action = new.get(TransitionKey.ACTION)
        if self.action is not None and action is not None:
            new[TransitionKey.ACTION] = to_model(action, self.action)
        if self.prompt:
            more = new.get(TransitionKey.COMPLEMENTARY_DATA) or {}
            task = more.get("task")
            fixed = [self.prompt] * len(task) if isinstance(task, list) else self.prompt
            if task is None and observation and OBS_STATE in observation:
                fixed = [self.prompt] * len(observation[OBS_STATE])
            new[TransitionKey.COMPLEMENTARY_DATA] = {**more, "task": fixed}
        return new

    def get_config(self) -> dict[str, Any]:
        """The settings of this step in a pipeline's JSON file."""
        return {"state": self.state, "action": self.action, "prompt": self.prompt}

    def transform_features(self, features: Features) -> Features:
        """No feature changes its shape."""
        return features


@ProcessorStepRegistry.register("shallow_pi_to_robot")
@dataclasses.dataclass
class ToRobotStep(ProcessorStep):
    """Actions back to the robot's units."""

    # None leaves the numbers as they are.
    action: Units | None = None

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Convert one transition, batched or not."""
        action = transition.get(TransitionKey.ACTION)
        if self.action is None or action is None:
            return transition
        new = transition.copy()
        new[TransitionKey.ACTION] = to_robot(action, self.action)
        return new

    def get_config(self) -> dict[str, Any]:
        """The settings of this step in a pipeline's JSON file."""
        return {"action": self.action}

    def transform_features(self, features: Features) -> Features:
        """No feature changes its shape."""
        return features
