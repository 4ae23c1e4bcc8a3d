"""Layers left out without training: the order, and the policy that is left."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import layer_scores, student
from shallow_pi.evaluation.rivals import rival, skipping, table
from shallow_pi.inference import sampler
from shallow_pi.models import pi0

# Compiled for each rival, and of use to who works on rivals alone.
pytestmark = pytest.mark.slow

_sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps", "options"))


@pytest.fixture(scope="module")
def material(own, tiny_params, tiny_batch):
    config = pi0.at_depth(own.model, 3)
    batch = tiny_batch(config, 4)
    assets = dataclasses.replace(own, model=config)
    return rival.Material(assets, tiny_params(config), lambda: iter([batch]))


def test_the_oracle_leaves_out_what_then_changes_the_velocity_least(material):
    model, params = material.model, material.params
    drawn = rival.draw(jax.random.key(0), next(material.feed()))
    given = (drawn.observation, drawn.x_t[:, 0], drawn.t[:, 0])
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    whole, _ = velocity(model, params, *given)

    def harm(gone):
        kept = skipping.without(3, tuple(gone))
        cut = student.cut(model, params, kept)
        v, _ = velocity(pi0.at_depth(model, kept.depth), cut, *given)
        return float(jnp.mean((v - whole) ** 2))

    first = min(range(3), key=lambda i: harm([i]))
    second = min({0, 1, 2} - {first}, key=lambda i: harm([first, i]))
    found = skipping.order(material, "oracle")
    assert found == (first, second, *({0, 1, 2} - {first, second}))
    sensitivity = jax.jit(layer_scores.sensitivity, static_argnums=0)(model, params, *given)
    assert skipping.order(material, "sensitivity") == tuple(np.argsort(sensitivity).tolist())
    alike = jax.jit(layer_scores.similarity, static_argnums=0)(model, params, *given)
    assert skipping.order(material, "similarity") == tuple(np.argsort(-alike).tolist())


def test_a_policy_without_layers_is_the_cut_and_without_any_gone_the_teacher(material, tmp_path):
    model, batch = material.model, next(material.feed())
    noise = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    observation = jax.tree.map(jnp.asarray, batch.observation).as_float()
    for name in ("teacher", "skip:drop=2"):
        made = table.find(name).make(material, tmp_path)
        drop = 2 if name.endswith("2") else 0
        kept = skipping.without(3, skipping.order(material, "oracle")[:drop])
        expected = _sample(
            pi0.at_depth(model, kept.depth),
            student.cut(model, material.params, kept),
            observation,
            noise,
        )
        np.testing.assert_allclose(made.sample(batch.observation, noise), expected, atol=1e-4)


def test_a_rival_refuses_to_go_on_from_a_chunk(material, tmp_path):
    made = table.find("teacher").make(material, tmp_path)
    with pytest.raises(ValueError, match="cannot continue a previous chunk"):
        made.warm_up(guided=True)
