"""Sampling actions: Euler integration of the velocity from noise to data, over a prefix cache.

The backbone runs once; then N integration steps of `dt = -1/N` run the action expert alone against
the cached prefix keys and values, from t = 1 (noise) to t = 0 (data), as in openpi (models/pi0.py,
sample_actions). `x_t` and the time stay in float32. The number of steps is static, so the device
never waits for the host. `tuning` lists the optimizations,
`real_time` says how a chunk continues the previous one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shallow_pi.inference import attention, forward, prepare, real_time, tuning
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
    options: tuning.InferenceOptions | None = None,
    guidance: real_time.Guidance | None = None,
) -> Float[Array, "b ah ad"]:
    """Normalized actions for a batch of observations, float32.

    Jit it with `config`, `num_steps` and `options` static. For repeated calls, prepare the weights
    once (`prepare.prepare`) and call `sample_prepared`.

    The noise, standard normal, is the start of the path. `options` change no result; None is the
    default of this backend. With `guidance` the new chunks continue previous ones.
    """
    options = options or tuning.default()
    prepared = prepare.prepare(config, params, integration_times(num_steps), options)
    return sample_prepared(
        config,
        prepared,
        observation,
        noise,
        num_steps=num_steps,
        options=options,
        guidance=guidance,
    )


def sample_prepared(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    observation: observations.Observation,
    noise: Float[Array, "b ah ad"],
    *,
    num_steps: int = 10,
    options: tuning.InferenceOptions,
    guidance: real_time.Guidance | None = None,
) -> Float[Array, "b ah ad"]:
    """`sample_actions` from weights prepared with the same options and integration times."""
    observations.check(observation, config.cameras, config.image_size, config.action_dim)
    kernel = options.step_attention
    cache, valid = forward.prefill(
        config, prepared, observation, options.prefix_attention, options.tower_attention
    )
    state = None if config.pi05 or options.state_once else observation.state
    if options.state_once:
        given = (observation.state, cache, valid, kernel)
        cache, valid = forward.append_state(config, prepared, *given)
    count = config.action_horizon + (state is not None)
    cache = forward.step_buffers(config, cache, options.step_buffers, count)
    dt = jnp.float32(-1.0 / num_steps)
    if guidance is not None:
        guidance = real_time.for_steps(guidance, num_steps)

    def integrate(
        carry: tuple[Array, attention.Cache], at: tuple[Array, prepare.Tables | None]
    ) -> tuple[tuple[Array, attention.Cache], None]:
        x_t, cache = carry
        t, tables = at
        if tables is None:
            tables = prepare.make_tables(config, prepared.params, t[None])
        else:
            tables = jax.tree.map(lambda leaf: leaf[None], tables)

        def velocity(x: Array, by: attention.Kernel) -> tuple[Array, attention.Cache]:
            return forward.velocity(config, prepared, cache, valid, x, tables, state, kernel=by)

        if guidance is None:
            v, cache = velocity(x_t, kernel)
        else:  # Differentiated, which not every kernel can be; a step is small beside the prefix.
            v = real_time.guided(lambda x: velocity(x, "xla")[0], x_t, t, guidance)
        return (x_t + dt * v, cache), None

    carry = noise.astype(jnp.float32), cache
    steps = jnp.asarray(integration_times(num_steps)), prepared.tables
    if not options.unrolled_steps:
        carry, _ = jax.lax.scan(integrate, carry, steps)
        return carry[0]
    for i in range(num_steps):
        carry, _ = integrate(carry, jax.tree.map(lambda leaf, i=i: leaf[i], steps))
    return carry[0]
