"""A policy: observations of a robot in, action chunks of that robot out.

`Policy.from_checkpoint(step)` needs nothing but a step folder written by training; depth, model,
robot, tokenizer and statistics are in it. Inference is batched; the starting noise is given by the
caller, so that the same noise always gives the same actions.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from shallow_pi.data import assets as policy_assets
from shallow_pi.models import observation, pi0, prepare, sampler, weights


class Policy:
    """A model with its robot's transforms around it.

    Args:
      assets: the model's sizes, robot, tokenizer and statistics.
      params: the model's parameters.
      num_steps: integration steps of the sampler.
    """

    def __init__(
        self, assets: policy_assets.Assets, params: PyTree, *, num_steps: int = 10
    ) -> None:
        self.assets = assets
        self._inputs, self._outputs = assets.inputs(), assets.outputs()
        times, savings = sampler.integration_times(num_steps), prepare.best()
        self.weights = jax.jit(
            functools.partial(prepare.prepare, assets.model, times=times, savings=savings)
        )(params)
        self._sample = jax.jit(
            functools.partial(sampler.sample_prepared, num_steps=num_steps, savings=savings),
            static_argnums=0,
        )

    @classmethod
    def from_checkpoint(cls, step: str | os.PathLike[str], *, num_steps: int = 10) -> "Policy":
        """The policy of a step folder, its parameters in the model's compute dtype.

        Raises:
          FileNotFoundError, ValueError: not a complete step folder, or parameters that do not fit
            the model described in its assets.
        """
        assets = policy_assets.load(step)
        expected = pi0.abstract_params(assets.model)
        dtype = np.dtype(jnp.dtype(assets.model.dtype))
        params = weights.load_params(step, expected, dtype=dtype, what="policy")
        return cls(assets, params, num_steps=num_steps)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the noise of one observation: (action horizon, action dim)."""
        return self.assets.model.action_horizon, self.assets.model.action_dim

    def infer(
        self, observations: Sequence[Mapping[str, Any]], noise: Float[np.ndarray, "b ah ad"]
    ) -> Float[np.ndarray, "b ah rd"]:
        """Action chunks in the robot's units.

        Args:
          observations: b observations with the robot's (LeRobot's flat) keys.
          noise: standard normal, one chunk an observation.
        """
        if np.shape(noise) != (len(observations), *self.noise_shape):
            raise ValueError(
                f"noise must have shape {(len(observations), *self.noise_shape)} for "
                f"{len(observations)} observations, got {np.shape(noise)}"
            )
        actions = self.sample(self.prepare(observations), noise)
        state = np.stack([self.assets.robot.state(o) for o in observations])
        return self._outputs({"actions": np.asarray(actions), "state": state})["actions"]

    def prepare(self, observations: Sequence[Mapping[str, Any]]) -> observation.Observation:
        """The model's batch of observations."""
        samples = [self._inputs(dict(o)) for o in observations]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *samples)
        return observation.Observation.from_batch(batch)

    def sample(
        self, batch: observation.Observation, noise: Float[np.ndarray, "b ah ad"]
    ) -> jax.Array:
        """Normalized actions on device: what a latency measurement calls."""
        config, batch = prepare.trim(self.assets.model, batch)
        return self._sample(config, self.weights, batch, jnp.asarray(noise))
