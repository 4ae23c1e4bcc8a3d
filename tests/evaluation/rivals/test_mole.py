"""MoLE-VLA: all gates open is the teacher, and closed ones are skipped layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import gates, layer_map, student
from shallow_pi.evaluation.rivals import gated, mole, rival, training
from shallow_pi.inference import forward, sampler
from shallow_pi.models import pi0

# Compiled for each rival, and of use to who works on rivals alone.
pytestmark = pytest.mark.slow

_sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps", "options"))


@pytest.fixture(scope="module")
def router(tiny_config):
    made = mole.init(tiny_config(), jax.random.key(1))
    # Far from zero, so that rows of a batch are routed differently.
    return jax.tree.map(lambda leaf: 3.0 * leaf, made)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_a_router_with_all_layers_on_is_the_teacher(pi05, setting, weights, router):
    config, params, observation, noise = setting(pi05)
    expected = _sample(config, params, observation, noise, num_steps=4)
    run = jax.jit(mole.MoLE(layers=3).sample, static_argnums=0)
    found = run(config, weights(config, params, router), observation, noise)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_sampling_runs_the_layers_that_training_ran(setting, weights, euler, router):
    config, params, observation, noise = setting()
    prefix = gates.embed(config, params, observation)
    soft = jax.nn.softmax(mole.logits(router, prefix, 8), axis=-1)
    opened = mole.top(soft, 2).T
    given = (config, params, prefix, observation.state)
    expected = euler(lambda x_t, t: gates.velocity(*given, x_t, t, opened), noise)
    run = jax.jit(mole.MoLE(layers=2).sample, static_argnums=0)
    held = weights(config, params, router)
    np.testing.assert_allclose(run(config, held, observation, noise), expected, atol=1e-4)
    # Alone, layers are skipped and not computed.
    alone = jax.tree.map(lambda leaf: leaf[1:], observation)
    np.testing.assert_allclose(run(config, held, alone, noise[1:]), expected[1:], atol=1e-4)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_closed_gates_are_layers_cut_out(pi05, setting, weights):
    config, params, observation, noise = setting(pi05, depth=2)
    cut = student.cut(config, params, layer_map.explicit([1], 2))
    short = pi0.at_depth(config, 1)
    expected = _sample(short, cut, observation, noise, num_steps=4)
    held = weights(config, params).prepared

    @jax.jit
    def found(observation, noise):
        tokens, valid, *_ = forward.embed_prefix(config, held, observation)
        opened = jnp.broadcast_to(jnp.array([False, True])[:, None], (2, len(noise)))
        return gated.sample(config, held, tokens, valid, observation.state, noise, opened)

    np.testing.assert_allclose(found(observation, noise), expected, atol=1e-4)
    alone = jax.tree.map(lambda leaf: leaf[:1], observation)
    np.testing.assert_allclose(found(alone, noise[:1]), expected[:1], atol=1e-4)


def test_padding_does_not_reach_the_router(setting, router):
    config, params, observation, _ = setting()
    prefix = gates.embed(config, params, observation)
    noisy = jnp.where(prefix.valid[..., None], prefix.tokens, 9.0)
    found = mole.logits(router, prefix, 8)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(mole.logits(router, prefix._replace(tokens=noisy), 8), found)
    assert np.abs(np.diff(found, axis=0)).max() > 1e-3


def test_the_choice_is_hard_and_its_gradient_soft():
    soft = jnp.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    assert mole.top(soft, 2).tolist() == [[1, 0, 1], [0, 1, 1]]
    same = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
    np.testing.assert_allclose(mole.cognition(same, same), 0.0, atol=1e-7)
    assert mole.cognition(same, same[::-1]) > 0.01


def test_the_loss_trains_router_and_layers(setting, tiny_batch):
    config, params, _, _ = setting(depth=2)
    router = mole.init(config, jax.random.key(1))
    drawn = rival.draw(jax.random.key(0), tiny_batch(config, 4))
    tokens = jax.jit(pi0.embed_images, static_argnums=0)(config, params, drawn.observation)
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    v, _ = velocity(config, params, *drawn[:3], image_tokens=tokens)
    seen = training.Seen(drawn, tokens, v)
    rivals = mole.MoLE(layers=1)

    def loss(held):
        return rivals.loss(config, held, params, seen)

    grads = jax.jit(jax.grad(loss))(training.Trained(params, router))
    for tree in (grads.own, grads.model["PaliGemma"]["llm"]["layers"]):
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree)) > 1e-6


def test_too_many_layers_are_refused(own, params, tiny_batch, tmp_path):
    material = rival.Material(own, params, lambda: iter([tiny_batch(own.model)]))
    with pytest.raises(ValueError, match="9 layers of 2 cannot be on"):
        mole.MoLE(layers=9).make(material, tmp_path)


def test_what_was_trained_is_read_and_not_trained_again(own, params, tiny_batch, tmp_path):
    asked = []

    def feed():
        asked.append(True)
        return iter([tiny_batch(own.model, 4, seed) for seed in range(3)])

    material = rival.Material(own, params, feed)
    batch = tiny_batch(own.model, 2)
    noise = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    first, again = (
        mole.MoLE(layers=1, steps=3).make(material, tmp_path).sample(batch.observation, noise)
        for _ in range(2)
    )
    assert len(asked) == 1
    np.testing.assert_array_equal(first, again)
