"""Sampling actions: Euler integration of the velocity from noise to data, over a prefix cache.

The backbone runs once; then N integration steps run the action expert alone against the cached
prefix keys and values. `x_t` and the time stay in float32. `dt = -1/N`, from t = 1 (noise) to
t = 0 (data), as in openpi (models/pi0.py, sample_actions); here the loop's count is static, so the
device never waits for the host to decide whether to go on.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shallow_pi.models import observation as observations
from shallow_pi.models import pi0


def integration_times(num_steps: int) -> Float[np.ndarray, " n"]:
    """Times at which the velocity is evaluated, accumulated in float32 from 1 like openpi's."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    times = np.empty(num_steps, np.float32)
    time, dt = np.float32(1.0), np.float32(-1.0 / num_steps)
    for index in range(num_steps):
        times[index] = time
        time = np.float32(time + dt)
    return times


def sample_actions(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    noise: Float[Array, "b ah ad"],
    *,
    num_steps: int = 10,
) -> Float[Array, "b ah ad"]:
    """Normalized actions for a batch of observations, float32.

    Jit it with `config` and `num_steps` static.

    Args:
      config: the model.
      params: its parameters.
      observation: batch of b observations.
      noise: the start of the path, standard normal.
      num_steps: integration steps N; openpi uses 10.
    """
    cache, valid = pi0.prefill(config, params, observation)
    dt = jnp.float32(-1.0 / num_steps)

    def integrate(
        x_t: Float[Array, "b ah ad"], time: Float[Array, ""]
    ) -> tuple[Float[Array, "b ah ad"], None]:
        times = jnp.broadcast_to(time, x_t.shape[:1])
        v = pi0.cached_velocity(config, params, observation.state, cache, valid, x_t, times)
        return x_t + dt * v, None

    times = jnp.asarray(integration_times(num_steps))
    actions, _ = jax.lax.scan(integrate, noise.astype(jnp.float32), times)
    return actions
