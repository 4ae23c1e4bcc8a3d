"""CogVLA's direction: the queries start as mean pooling, and the prompt moves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import gates
from shallow_pi.evaluation.rivals import cogvla, rival

# Compiled for each rival, and of use to who works on rivals alone.
pytestmark = pytest.mark.slow


def _own(config, film=True):
    own = cogvla.init(config, jax.random.key(0))
    generator = np.random.default_rng(1)
    for name in ("value", "film") if film else ("value",):
        own[name] = jax.tree.map(
            lambda leaf: 0.3 * jnp.asarray(generator.standard_normal(leaf.shape), jnp.float32),
            own[name],
        )
    return own


def test_the_mean_is_that_of_two_by_two_windows(setting):
    config, params, observation, _ = setting(image_size=48)
    whole = gates.embed(config, params, observation)
    found = cogvla.reduce("mean", config, {}, whole)
    images = np.asarray(whole.tokens[:, :32]).reshape(2, 2, 2, 2, 2, 2, 24)
    expected = images.mean(axis=(3, 5)).reshape(2, 8, 24)  # b, camera, row, in it, column, in it
    np.testing.assert_allclose(found.tokens[:, :8], expected, atol=1e-5)
    np.testing.assert_array_equal(found.tokens[:, 8:], whole.tokens[:, 32:])
    # Camera 1 of sample 0 is absent.
    assert found.valid[:, :8].tolist() == [[True] * 4 + [False] * 4, [True] * 8]
    np.testing.assert_array_equal(found.valid[:, 8:], whole.valid[:, 32:])


def test_queries_are_an_attention_that_the_prompt_moves(setting):
    config, params, observation, _ = setting(image_size=48)
    whole, own = gates.embed(config, params, observation), _own(config)
    found = cogvla.reduce("film", config, own, whole)
    words, valid = (np.asarray(x[:, 32:]) for x in (whole.tokens, whole.valid))
    for b in range(2):
        film = words[b][valid[b]].mean(axis=0) @ own["film"]["kernel"] + own["film"]["bias"]
        queries = own["queries"] * (1 + film[:24]) + film[24:]
        for camera in range(2):
            x = np.asarray(whole.tokens[b, 16 * camera : 16 * (camera + 1)])
            logits = queries @ (x @ own["key"]).T / np.sqrt(24) + own["bias"]
            maps = np.exp(logits - logits.max(axis=1, keepdims=True))
            out = (maps / maps.sum(axis=1, keepdims=True)) @ (x + x @ own["value"])
            rows = slice(4 * camera, 4 * (camera + 1))
            np.testing.assert_allclose(found.tokens[b, rows], out, rtol=1e-3, atol=1e-4)
    plain = cogvla.reduce("plain", config, own, whole)
    assert np.abs(plain.tokens - found.tokens).max() > 1e-2
    still = _own(config, film=False)
    np.testing.assert_allclose(
        cogvla.reduce("film", config, still, whole).tokens,
        cogvla.reduce("plain", config, still, whole).tokens,
        atol=1e-6,
    )


@pytest.mark.parametrize(("pi05", "kind"), [(False, "film"), (True, "mean")])
def test_sampling_sees_the_tokens_of_training(pi05, kind, setting, weights, euler):
    config, params, observation, noise = setting(pi05)
    own = _own(config)
    prefix = cogvla.reduce(kind, config, own, gates.embed(config, params, observation))
    given = (config, params, prefix, observation.state)
    expected = euler(lambda x_t, t: gates.velocity(*given, x_t, t), noise)
    run = jax.jit(cogvla.CogVLA(kind=kind).sample, static_argnums=0)
    found = run(config, weights(config, params, own), observation, noise)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_it_is_trained_and_cut(own, params, tiny_batch, tmp_path):
    def feed():
        return iter([tiny_batch(own.model, 4, seed) for seed in range(2)])

    material = rival.Material(own, params, feed)
    made = cogvla.CogVLA(layers=1, steps=2).make(material, tmp_path)
    assert made.assets.model.depth == 1
    noise = np.zeros((2, 5, 6), np.float32)
    assert np.isfinite(made.sample(tiny_batch(own.model).observation, noise)).all()


def test_an_odd_side_has_no_windows(setting):
    config, *_ = setting(image_size=36)
    with pytest.raises(ValueError, match="3 × 3 tokens have no windows"):
        cogvla.windows(config)
    with pytest.raises(ValueError, match="kind is one of film, plain, mean"):
        cogvla.CogVLA(kind="max")
