"""Image tokens pooled in cells, and attention over them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.models import pi0, pooling


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(256, (1, 1)), (128, (1, 2)), (64, (2, 2)), (32, (2, 4)), (16, (4, 4)), (1, (16, 16))],
)
def test_cells_are_as_near_to_squares_as_there_are(tokens, shape):
    assert pooling.cell(16, tokens) == shape


def test_tokens_that_do_not_divide_raise():
    with pytest.raises(
        ValueError,
        match=r"100 image tokens a camera cannot be pooled .* 16 × 16 .*: give one of 256, 128, 64",
    ):
        pooling.cell(16, 100)
    with pytest.raises(ValueError, match=r"grid of 6 × 6 .*: give one of 36, 18, 12, 9, 6, 4, 3"):
        pooling.cell(6, 5)


def test_a_cell_is_the_mean_of_its_neighbours_in_each_camera():
    """A grid of 4 × 4 whose values are 10 · row + column, and a camera of 100 more."""
    rows, columns = np.mgrid[:4, :4]
    grid = (10 * rows + columns).reshape(-1)
    tokens = jnp.asarray(np.concatenate([grid, grid + 100])[None, :, None], jnp.float32)
    squares = np.array([5.5, 7.5, 25.5, 27.5])
    found = pooling.pool(tokens, 4, 4)
    np.testing.assert_allclose(found[0, :, 0], np.concatenate([squares, squares + 100]))
    pairs = pooling.pool(tokens, 4, 8)[0, :4, 0]
    np.testing.assert_allclose(pairs, [0.5, 2.5, 10.5, 12.5])
    np.testing.assert_array_equal(pooling.pool(tokens, 4, 16), tokens)


def test_attention_over_cells_is_the_sum_over_their_patches():
    """Two cameras of 4 × 4 patches and three words; the second camera is absent."""
    logits = np.random.default_rng(0).standard_normal((2, 5, 35)).astype(np.float32)
    valid = np.repeat([True, False, True], [16, 16, 3])
    seen = np.where(valid, logits, -np.inf)
    probabilities = np.array(jax.nn.softmax(seen, axis=-1))
    cells = probabilities[..., :32].reshape(2, 5, 2, 2, 2, 2, 2).sum(axis=(4, 6)).reshape(2, 5, 8)
    expected = np.concatenate([cells, probabilities[..., 32:]], axis=-1)
    pooled = pooling.pool_logits(jnp.asarray(logits), 2, 4, 4)
    kept = np.repeat([True, False, True], [4, 4, 3])
    found = jax.nn.softmax(np.where(kept, pooled, -np.inf), axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_model_that_pools_sees_fewer_tokens(tiny_config, tiny_params, tiny_observation):
    """Its prefix is that of means given as tokens."""
    config = tiny_config()
    params, observation = tiny_params(config), tiny_observation(config)
    pooled = dataclasses.replace(config, pooled_tokens=1)
    assert (config.prefix_tokens, pooled.prefix_tokens) == (2 * 4 + 7, 2 * 1 + 7)
    assert pi0.abstract_params(pooled) == pi0.abstract_params(config)
    assert dataclasses.replace(config, pooled_tokens=4) == config
    given = observation, jnp.ones((2, 5, 6)), jnp.array([0.2, 0.7])
    velocity = jax.jit(pi0.velocity, static_argnums=0, static_argnames="attention_layer")
    v, attention = velocity(pooled, params, *given, attention_layer=1)
    assert attention.logits.shape == (2, 1, 4, 5, 9)
    means = np.repeat(
        pi0.embed_images(config, params, observation).reshape(2, 2, 4, -1).mean(axis=2), 4, axis=1
    )
    same, _ = velocity(pooled, params, *given, image_tokens=jnp.asarray(means))
    np.testing.assert_allclose(v, same, atol=1e-5)
    whole, _ = velocity(config, params, *given)
    assert np.abs(v - whole).max() > 1e-3
