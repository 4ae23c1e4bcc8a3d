"""Between a robot and its model, on the host: observations to the model's batch, actions back.

An observation is checked, then transformed as in training. What is left of the chunk that the robot
executes goes the same way and becomes what the model would predict for this observation: relative
actions are the difference from the state of now.

Targets of real-time chunking are then clipped to the range of the training actions, mean ± 10 std,
which holds at least 99 % of any distribution (Chebyshev). This matters where a relative dimension
never moved in training: it is divided by next to nothing (1e-6), so that the noise of a sensor
between two observations becomes a target of thousands. Its range is a point, the constant that the
model predicts from any x, and the error is zero. So is exact guidance in such a dimension: it is
the error times ∂Â/∂x, and a constant Â has no derivative.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from shallow_pi import progress
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize, pipelines, tokenizer, transforms
from shallow_pi.deploy import robot_observation, state_check
from shallow_pi.inference import real_time
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations

# Sizes of a robot's images that a program on the device is compiled for.
MAX_SIZES = 8
# Standard deviations from the mean of the training actions to which targets are clipped.
_RANGE = 10.0


class ModelInput(NamedTuple):
    """One observation as the model sees it, and what its answer needs."""

    # The robot's observation, cleaned.
    cleaned: dict[str, object]
    # Without a batch axis; `actions` are the previous chunk, if there is one.
    sample: transforms.Sample
    # Number of actions of the previous chunk; the new chunk is free if there are none.
    left: int
    # Those of them that will be executed before the new chunk arrives.
    delay: int
    # That the state is far from the training data, or that the prompt was cut.
    warnings: tuple[str, ...]


class RobotTransforms:
    """The checks and transforms of one robot and its model.

    Args:
      assets: the model's sizes, robot, tokenizer and statistics.
      prompt: the instruction where an observation has none.
      resize: bring images to the model's size here; without, the device does.
      state_warn: as of `state_check.StateCheck`.
      state_refuse: as of `state_check.StateCheck`.
    """

    def __init__(
        self,
        assets: policy_assets.Assets,
        *,
        prompt: str | None,
        resize: bool,
        state_warn: float,
        state_refuse: float,
    ) -> None:
        if prompt and assets.robot.prompt:
            progress.warn(
                f"robot {assets.robot.name} always has the prompt {assets.robot.prompt!r}: the "
                f"policy's {prompt!r} is not used"
            )
        self._model, self._robot, self._prompt = assets.model, assets.robot, prompt
        self._inputs, self._outputs = assets.inputs(resize=resize), assets.outputs()
        self._tokenizer = tokenizer.Tokenizer(assets.tokenizer, self._model.max_token_len)
        self._known: set[tuple[tuple[int, ...], ...]] = set()
        self.check_state = state_check.StateCheck.create(
            assets.robot,
            assets.stats["state"],
            names=assets.names.get("state", ()),
            warn=state_warn,
            refuse=state_refuse,
        )
        stats, dims = assets.stats["actions"], self._robot.action_dim
        ends = stats.mean + np.multiply.outer([-_RANGE, _RANGE], stats.std)
        ends = normalize.normalize(ends[:, :dims], stats, assets.kind)
        pad = transforms.PadDimensions(self._model.action_dim)
        self._low, self._high = pad({"actions": ends})["actions"]

    def to_model(
        self,
        observation: Mapping[str, object],
        previous: Float[np.ndarray, "n rd"] | None = None,
        delay: int = 0,
    ) -> ModelInput:
        """Check and transform one observation; arguments as of `Policy.infer`.

        Raises:
          ValueError: the policy cannot be asked with it; names the key.
        """
        model, robot = self._model, self._robot
        cleaned = robot_observation.clean(robot, model.cameras, observation, self._prompt)
        far, delay = self.check_state(robot.state(cleaned)), real_time.check_delay(delay)
        if previous is None:
            sample = self._inputs(dict(cleaned))
            return ModelInput(cleaned, sample, 0, delay, self._warnings(far, sample))
        chunk = real_time.pad_previous(previous, (model.action_horizon, robot.action_dim))
        sample = self._inputs({**cleaned, "actions": chunk})
        sample["actions"] = np.clip(sample["actions"], self._low, self._high)
        return ModelInput(cleaned, sample, len(previous), delay, self._warnings(far, sample))

    def _warnings(self, far: str | None, sample: transforms.Sample) -> tuple[str, ...]:
        """The warning of the state, and of words that the model does not read."""
        with_state = self._model.discrete_state_input
        tokens, mask = sample["tokenized_prompt"], sample["tokenized_prompt_mask"]
        cut = None
        if self._tokenizer.is_cut(tokens, mask, with_state):
            cut = f"the prompt is cut to the {len(tokens)} tokens that the model reads" + (
                ", and the state behind it with it" if with_state else ""
            )
        return tuple(filter(None, (far, cut)))

    def stack(
        self, inputs: Sequence[ModelInput], max_weight: float = real_time.MAX_WEIGHT
    ) -> tuple[observations.Observation, real_time.Guidance | None]:
        """The model's batch, and the guidance towards the previous chunks; None without any."""
        samples, lengths = [one.sample for one in inputs], [one.left for one in inputs]
        guidance = None
        if any(lengths):
            nothing = np.zeros((self._model.action_horizon, self._model.action_dim), np.float32)
            actions = np.stack([sample.get("actions", nothing) for sample in samples])
            delays = [one.delay for one in inputs]
            guidance = real_time.make_guidance(actions, lengths, delays, max_weight)
        if not self._resized_together(samples):
            samples = list(map(transforms.Resize(self._model.image_size), samples))
        return batches.stack([pipelines.to_observation(sample) for sample in samples]), guidance

    def _resized_together(self, samples: Sequence[transforms.Sample]) -> bool:
        """True for images that are the model's size, or that a program of few resizes at once."""
        sizes = {_sizes(sample) for sample in samples}
        if len(sizes) > 1:  # Robots with different cameras.
            return False
        if sizes <= self._known or len(self._known) < MAX_SIZES:
            self._known |= sizes
            return True
        progress.warn(
            f"images came in more than {MAX_SIZES} sizes; Pillow resizes those in others, because "
            "each would be compiled for: let cameras keep their sizes"
        )
        return False

    def to_robot(
        self, inputs: Sequence[ModelInput], normalized: Float[np.ndarray, "b ah ad"]
    ) -> Float[np.ndarray, "b ah rd"]:
        """The model's actions for these inputs in the robot's units."""
        state = np.stack([self._robot.state(one.cleaned) for one in inputs])
        return self._outputs({"actions": normalized, "state": state})["actions"]


def _sizes(sample: transforms.Sample) -> tuple[tuple[int, ...], ...]:
    return tuple(image.shape for image in sample["image"].values())
