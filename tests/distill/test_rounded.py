"""A student trained for 8 bits: its forward pass sees rounded weights, its gradient passes them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.inference import quantize
from shallow_pi.models import layers, pi0

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def setting(tiny_config, tiny_params, tiny_batch):
    config = tiny_config(cameras=("base_0_rgb",))
    teacher, chosen = tiny_params(config), layer_map.explicit((0, 2), 3)
    spec = step.Spec(
        student=pi0.at_depth(config, 2),
        optimizer=optax.sgd(0.1),
        schedule=optax.constant_schedule(0.1),
        losses=losses.Losses(task=1.0, velocity=0.5, attention=2.0),
        teacher=config,
        layer_map=chosen,
        execution=layers.Execution(remat="none"),
    )
    return spec, teacher, student.cut(config, teacher, chosen), tiny_batch(config)


def _advance(spec, teacher, params, batch):
    run = jax.jit(functools.partial(step.distill_step, spec))
    return run(teacher, step.init_state(spec, params), KEY, batch)


def test_a_step_is_that_of_the_rounded_weights_and_moves_the_unrounded_ones(setting):
    spec, teacher, params, batch = setting
    rounded = jax.jit(functools.partial(quantize.straight_through, scheme="fp8"))(params)
    state, metrics = _advance(dataclasses.replace(spec, quantize="fp8"), teacher, params, batch)
    plain, plain_metrics = _advance(spec, teacher, rounded, batch)
    for name in ("loss", "attention_loss", "velocity_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-4)
    moved = jax.tree.map(jnp.subtract, state.params, params)
    expected = jax.tree.map(jnp.subtract, plain.params, rounded)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(b).max()) or 1.0
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-3)
    without = _advance(spec, teacher, params, batch)[1]
    assert abs(without["loss"] - metrics["loss"]) > 1e-4 * without["loss"]


def test_a_frozen_image_tower_stays_the_teachers(setting):
    spec, *_, params, _ = setting
    spec = dataclasses.replace(spec, quantize="int8", freeze=("vision",))
    seen = step.rounded(spec, params)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, seen)
    assert jax.tree.all(same["PaliGemma"]["img"])
    assert not any(same["PaliGemma"]["llm"]["layers"]["mlp"].values())
