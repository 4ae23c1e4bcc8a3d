"""Layer scores, on a teacher with one layer that does nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import gates, layer_map, layer_scores, student
from shallow_pi.models import pi0, prefixes

T = np.array([0.2, 0.7], np.float32)
IDLE = 1
_similarity = jax.jit(layer_scores.similarity, static_argnums=0)
_sensitivity = jax.jit(layer_scores.sensitivity, static_argnums=0)
_measure = jax.jit(layer_scores.measure, static_argnums=(0, 1))
_cut = jax.jit(student.cut, static_argnums=(0, 2))


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
    valid = np.asarray(prefixes.valid(config, observation))
    assert 0 < valid.sum() < valid.size
    prefix, suffix = (np.asarray(stream, np.float64) for stream in hidden)

    def cosines(x, y):
        return (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)

    expected = [
        np.concatenate(
            [cosines(prefix[i], prefix[i + 1])[valid], cosines(suffix[i], suffix[i + 1]).ravel()]
        ).mean()
        for i in range(3)
    ]
    np.testing.assert_allclose(_similarity(*arguments), expected, atol=1e-5)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_a_layer_that_does_nothing_has_cka_one_and_no_gradient_by_its_gate(pi05, teacher):
    arguments = teacher(pi05)
    u = jnp.ones_like(arguments[3])
    alike, missed = _measure("cka", *arguments, u), _measure("gate", *arguments, u)
    assert alike[0] == 0.0  # No layer comes before it.
    np.testing.assert_allclose(alike[IDLE], 1.0, atol=1e-5)
    assert 0 < alike[2] < 0.99
    np.testing.assert_allclose(missed[IDLE], 0.0, atol=1e-8)
    assert min(missed[0], missed[2]) > 1e-4
    for strategy, scores in (("cka", alike), ("gate", missed)):
        assert layer_map.measured(strategy, 2, np.asarray(scores)).layers == (0, 2)


@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_cka_is_that_of_the_valid_rows(teacher, scale):
    """Also where its sums of squares come near the largest number of float32."""
    config, params, observation, x_t, t = teacher()
    wide = jax.tree.map(lambda leaf: scale * leaf, params["action_in_proj"])
    arguments = config, params | {"action_in_proj": wide}, observation, x_t, t
    hidden = jax.jit(pi0.hidden_states, static_argnums=0)(*arguments)
    valid = np.asarray(prefixes.valid(config, observation))

    def centred_gram(rows):
        rows = np.asarray(rows, np.float64)
        return (rows - rows.mean(0)) @ (rows - rows.mean(0)).T

    def cka(x, y):  # By Gram matrices, as in Kornblith et al., 1905.00414.
        x, y = centred_gram(x), centred_gram(y)
        return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)

    expected = [
        np.mean(
            [
                cka(hidden.prefix[i][valid], hidden.prefix[i + 1][valid]),
                cka(*(hidden.suffix[j].reshape(-1, 16) for j in (i, i + 1))),
            ]
        )
        for i in (1, 2)
    ]
    np.testing.assert_allclose(_measure("cka", *arguments, arguments[3])[1:], expected, rtol=1e-4)


def test_the_gradient_by_a_gate_is_a_difference_of_losses(teacher):
    config, params, observation, x_t, t = teacher()
    u = jnp.asarray(np.random.default_rng(1).standard_normal(x_t.shape), jnp.float32)

    @jax.jit
    def loss(opened):
        prefix = gates.embed(config, params, observation)
        given = (prefix, observation.state, x_t[:, None], t[:, None], opened)
        return jnp.mean((gates.velocity(config, params, *given)[:, 0] - u) ** 2, axis=(1, 2))

    expected = []
    for layer in range(3):
        step = jnp.zeros((3, 2)).at[layer].set(0.01)
        expected.append(np.mean(np.abs(loss(1 + step) - loss(1 - step)) / 0.02))
    found = _measure("gate", config, params, observation, x_t, t, u)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_gates_of_zero_skip_a_layer_of_one_observation_alone(pi05, teacher, tiny_params):
    config, _, observation, x_t, t = teacher(pi05)
    params = tiny_params(config)
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    whole, _ = velocity(config, params, observation, x_t, t)
    cut = _cut(config, params, layer_map.explicit([0, 2], 3))
    without, _ = velocity(pi0.at_depth(config, 2), cut, observation, x_t, t)

    @jax.jit
    def gated(opened):
        prefix = gates.embed(config, params, observation)
        given = (prefix, observation.state, x_t[:, None], t[:, None], opened)
        return gates.velocity(config, params, *given)[:, 0]

    for opened in (None, jnp.ones((3, 2))):
        np.testing.assert_allclose(gated(opened), whole, rtol=1e-4, atol=1e-5)
    mixed = gated(jnp.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    np.testing.assert_allclose(mixed, np.stack([whole[0], without[1]]), rtol=1e-4, atol=1e-5)


def test_sensitivity_is_that_of_the_teacher_cut_without_the_layer(teacher):
    config, params, observation, x_t, t = teacher()
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    full, _ = velocity(config, params, observation, x_t, t)
    changes = []
    for skipped in range(3):
        kept = layer_map.explicit([i for i in range(3) if i != skipped], 3)
        shallow = _cut(config, params, kept)
        v, _ = velocity(pi0.at_depth(config, 2), shallow, observation, x_t, t)
        changes.append(np.mean((v - full) ** 2))
    np.testing.assert_allclose(_sensitivity(*teacher()), changes, rtol=1e-3, atol=1e-6)


def test_the_only_layer_cannot_be_skipped(teacher):
    config, params, *rest = teacher()
    with pytest.raises(ValueError, match="at least 2 layers, got 1"):
        layer_scores.sensitivity(pi0.at_depth(config, 1), params, *rest)
