"""The path between noise and data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import flow


def _pair():
    generator = np.random.default_rng(0)
    return (jnp.asarray(generator.standard_normal((2, 3, 5, 4)), jnp.float32) for _ in range(2))


def test_time_zero_is_data_and_time_one_is_noise(strict):
    actions, noise = _pair()
    t = jnp.zeros((2, 3, 1, 1))
    np.testing.assert_array_equal(flow.interpolate(actions, noise, t[..., 0, 0]), actions)
    np.testing.assert_array_equal(flow.interpolate(actions, noise, 1 + t[..., 0, 0]), noise)


def test_every_draw_has_its_own_time(strict):
    actions, noise = _pair()
    t = jnp.linspace(0.1, 0.6, 6).reshape(2, 3)
    x_t = flow.interpolate(actions, noise, t)
    np.testing.assert_allclose(x_t[1, 2], 0.6 * noise[1, 2] + 0.4 * actions[1, 2], atol=1e-6)
    np.testing.assert_allclose(x_t[0, 1], 0.2 * noise[0, 1] + 0.8 * actions[0, 1], atol=1e-6)


def test_the_target_is_the_derivative_of_the_path():
    actions, noise = _pair()
    t = jnp.full((2, 3), 0.5)
    _, derivative = jax.jvp(
        lambda t: flow.interpolate(actions, noise, t), (t,), (jnp.ones_like(t),)
    )
    np.testing.assert_allclose(flow.target_velocity(actions, noise), derivative, atol=1e-6)


def test_euler_from_noise_along_the_target_arrives_at_the_data():
    actions, noise = _pair()
    x_t = noise
    for _ in range(10):
        x_t = x_t - 0.1 * flow.target_velocity(actions, noise)
    np.testing.assert_allclose(x_t, actions, atol=1e-5)


def test_times_follow_the_beta_distribution():
    """Beta(1.5, 1) has the distribution function x^1.5; its mean is 0.6."""
    t = np.sort(flow.sample_time(jax.random.key(0), (20_000,)))
    assert t.min() >= 0.001
    assert t.max() <= 1.0
    np.testing.assert_allclose(t.mean(), 0.001 + 0.999 * 0.6, atol=5e-3)
    steps = (np.arange(20_000) + 0.5) / 20_000
    np.testing.assert_allclose(((t - 0.001) / 0.999) ** 1.5, steps, atol=0.02)


def test_noise_is_standard_normal_and_repeatable():
    noise = flow.sample_noise(jax.random.key(0), (100, 50, 4))
    assert noise.dtype == jnp.float32
    np.testing.assert_allclose([noise.mean(), noise.std()], [0.0, 1.0], atol=0.02)
    np.testing.assert_array_equal(noise, flow.sample_noise(jax.random.key(0), (100, 50, 4)))


@pytest.mark.parametrize("function", [flow.target_velocity, flow.interpolate])
def test_shapes_that_would_broadcast_raise(function):
    actions, noise = jnp.zeros((2, 5, 4)), jnp.zeros((2, 1, 4))
    more = [jnp.zeros(2)] if function is flow.interpolate else []
    with pytest.raises(ValueError, match=r"one shape, got \(2, 5, 4\) and \(2, 1, 4\)"):
        function(actions, noise, *more)
