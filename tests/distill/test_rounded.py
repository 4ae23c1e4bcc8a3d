"""A student trained for 8 bits: its forward pass sees rounded weights, its gradient passes them."""

import dataclasses
import functools

import jax
import numpy as np

from shallow_pi.distill import step
from shallow_pi.inference import quantize

KEY = jax.random.key(5)
_step = jax.jit(step.distill_step, static_argnums=0)


def test_a_step_is_that_of_the_rounded_weights_and_moves_the_unrounded_ones(setting):
    spec, teacher, state, batch = setting
    rounding = jax.jit(functools.partial(quantize.straight_through, scheme="fp8"))
    rounded = dataclasses.replace(state, params=rounding(state.params))
    in_8_bits = dataclasses.replace(spec, quantize="fp8")
    found, metrics = _step(in_8_bits, teacher, state, KEY, batch)
    plain, plain_metrics = _step(spec, teacher, rounded, KEY, batch)
    for name in ("loss", "attention_loss", "velocity_loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-4)
    pairs = ((found, state), (plain, rounded))
    moved, expected = (
        jax.tree.map(lambda x, y: np.subtract(*map(np.asarray, (x, y))), new.params, old.params)
        for new, old in pairs
    )
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(b).max()) or 1.0
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-3)
    without = _step(spec, teacher, state, KEY, batch)[1]
    assert abs(without["loss"] - metrics["loss"]) > 1e-4 * without["loss"]


def test_a_frozen_image_tower_stays_the_teachers(setting):
    spec, _, state, _ = setting
    params = state.params
    spec = dataclasses.replace(spec, quantize="int8", freeze=("vision",))
    seen = jax.jit(step.rounded, static_argnums=0)(spec, params)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), params, seen)
    assert jax.tree.all(same["PaliGemma"]["img"])
    assert not any(same["PaliGemma"]["llm"]["layers"]["mlp"].values())
