"""Sampling from a prefix cache equals integrating the velocity without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.models import pi0, sampler


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_cached_sampling_equals_euler_on_the_velocity(
    pi05, tiny_config, tiny_params, tiny_observation
):
    config = tiny_config(pi05=pi05)
    params, observation = tiny_params(config), tiny_observation(config)
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)
    sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps"))
    velocity = jax.jit(functools.partial(pi0.velocity, config))
    actions = sample(config, params, observation, noise, num_steps=4)
    x_t = noise
    for t in (1.0, 0.75, 0.5, 0.25):
        v, _ = velocity(params, observation, x_t, jnp.full(2, t))
        x_t = x_t - 0.25 * v
    assert actions.dtype == jnp.float32
    scale = float(jnp.abs(x_t).max())
    np.testing.assert_allclose(actions / scale, x_t / scale, atol=1e-5)
    assert np.abs(actions - noise).max() > 0.1


def test_cached_velocity_equals_velocity_at_any_time(tiny_config, tiny_params, tiny_observation):
    config = tiny_config()
    params, observation = tiny_params(config), tiny_observation(config)
    x_t = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)

    @jax.jit
    def both(t):
        cache, valid = pi0.prefill(config, params, observation)
        cached = pi0.cached_velocity(config, params, observation.state, cache, valid, x_t, t)
        return cached, pi0.velocity(config, params, observation, x_t, t)[0]

    for t in (jnp.array([1.0, 0.001]), jnp.array([0.4, 0.6])):
        cached, whole = both(t)
        np.testing.assert_allclose(cached, whole, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 3, 10, 64])
def test_times_are_those_of_openpi_s_loop(num_steps):
    """openpi goes on while t >= -dt/2, in float32."""
    dt, t, times = np.float32(-1.0 / num_steps), np.float32(1.0), []
    while t >= -dt / 2:
        times.append(t)
        t = t + dt
    assert sampler.integration_times(num_steps).dtype == np.float32
    np.testing.assert_array_equal(sampler.integration_times(num_steps), times)


def test_no_steps_raise():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        sampler.integration_times(0)
