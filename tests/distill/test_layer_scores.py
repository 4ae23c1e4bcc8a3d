"""Layer scores, on a teacher with one layer that does nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import layer_map, layer_scores, student
from shallow_pi.models import pi0

T = np.array([0.2, 0.7], np.float32)
IDLE = 1
_similarity = jax.jit(layer_scores.similarity, static_argnums=0)
_sensitivity = jax.jit(layer_scores.sensitivity, static_argnums=0)


def _without_effect(path, leaf):
    """Zero what layer IDLE adds to either stream."""
    name = "/".join(key.key for key in path)
    if "llm/layers" in name and ("attn_vec_einsum" in name or "linear" in name):
        return leaf.at[IDLE].set(0.0)
    return leaf


@pytest.fixture(scope="module")
def teacher(tiny_config, tiny_params, tiny_observation):
    @functools.cache
    def make(pi05=True):
        config = tiny_config(pi05=pi05)
        params = jax.tree_util.tree_map_with_path(_without_effect, tiny_params(config))
        x_t = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
        return config, params, tiny_observation(config), jnp.asarray(x_t), jnp.asarray(T)

    return make


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_a_layer_that_does_nothing_has_cosine_one_and_no_sensitivity(pi05, teacher):
    cosine = _similarity(*teacher(pi05))
    increase = _sensitivity(*teacher(pi05))
    assert cosine.shape == increase.shape == (3,)
    np.testing.assert_allclose(cosine[IDLE], 1.0, atol=1e-5)
    np.testing.assert_allclose(increase[IDLE], 0.0, atol=1e-8)
    for other in (0, 2):
        assert cosine[other] < 0.99
        assert increase[other] > 1e-4
    assert IDLE not in layer_map.similarity(2, np.asarray(cosine)).layers
    assert IDLE not in layer_map.sensitivity(2, np.asarray(increase)).layers


def test_similarity_counts_valid_prefix_tokens_and_the_suffix(teacher):
    arguments = teacher()
    config, _, observation, _, _ = arguments
    hidden = jax.jit(pi0.hidden_states, static_argnums=0)(*arguments)
    valid = np.asarray(pi0.prefix_valid(config, observation))
    assert 0 < valid.sum() < valid.size
    prefix, suffix = (np.asarray(stream, np.float64) for stream in hidden)

    def cosines(x, y):
        return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)

    expected = [
        np.concatenate(
            [
                cosines(prefix[i], prefix[i + 1])[valid],
                cosines(suffix[i], suffix[i + 1]).ravel(),
            ]
        ).mean()
        for i in range(3)
    ]
    np.testing.assert_allclose(_similarity(*arguments), expected, atol=1e-5)


def test_sensitivity_is_that_of_the_teacher_cut_without_the_layer(teacher):
    config, params, observation, x_t, t = teacher()
    u = jnp.asarray(np.random.default_rng(1).standard_normal(x_t.shape), jnp.float32)
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    full, _ = velocity(config, params, observation, x_t, t)
    against_full, against_data = [], []
    for skipped in range(3):
        kept = layer_map.explicit([i for i in range(3) if i != skipped], 3)
        shallow = student.cut(config, params, kept)
        v, _ = velocity(pi0.at_depth(config, 2), shallow, observation, x_t, t)
        against_full.append(np.mean((v - full) ** 2))
        against_data.append(np.mean((v - u) ** 2) - np.mean((full - u) ** 2))
    np.testing.assert_allclose(_sensitivity(*teacher()), against_full, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(_sensitivity(*teacher(), u), against_data, rtol=1e-3, atol=1e-5)


def test_the_only_layer_cannot_be_skipped(teacher):
    config, params, *rest = teacher()
    with pytest.raises(ValueError, match="at least 2 layers, got 1"):
        layer_scores.sensitivity(pi0.at_depth(config, 1), params, *rest)
