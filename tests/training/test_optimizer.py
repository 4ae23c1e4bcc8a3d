"""The learning rate by hand at its corners; the optimizer against AdamW written out in numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.training import optimizer


def test_schedule_is_openpis_at_its_corners():
    rate = optimizer.CosineSchedule().create()
    expected = {
        0: 2.5e-5 / 1001,
        500: 2.5e-5 / 1001 + (2.5e-5 - 2.5e-5 / 1001) / 2,
        1000: 2.5e-5,
        15500: (2.5e-5 + 2.5e-6) / 2,
        30000: 2.5e-6,
        40000: 2.5e-6,
    }
    for step, value in expected.items():
        # One float32 rounding of the peak.
        assert math.isclose(float(rate(step)), value, rel_tol=1e-5, abs_tol=3e-12), step


def test_schedule_without_warm_up_starts_at_the_peak():
    rate = optimizer.CosineSchedule(warmup_steps=0, peak_lr=1e-3, decay_steps=10, end_lr=0).create()
    assert math.isclose(float(rate(0)), 1e-3, rel_tol=1e-6)
    assert math.isclose(float(rate(5)), 5e-4, rel_tol=1e-6)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_adamw_is_the_published_update_after_the_clip(moments):
    """With moments in bfloat16, those of the last step are rounded to it."""
    config = optimizer.AdamW(
        b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.1, clip_norm=2.0, moments=moments
    )

    def kept(moment):
        return np.asarray(jnp.asarray(moment, moments), np.float64)

    transform = config.create(0.5)
    params = np.array([1.0, -2.0], np.float32)
    # Norms 5 (clipped to 2) and 1; neither's moments are numbers of bfloat16.
    gradients = [np.array([3.0, 4.0]), np.array([0.6, -0.8]), np.array([0.3, 0.1])]
    state = transform.init(jnp.asarray(params))
    mean = square = np.zeros(2)
    ours, oracle = jnp.asarray(params), params.astype(np.float64)
    for count, gradient in enumerate(gradients, start=1):
        updates, state = transform.update(jnp.asarray(gradient, jnp.float32), state, ours)
        ours = ours + updates
        clipped = gradient * min(1.0, 2.0 / np.linalg.norm(gradient))
        mean = 0.8 * mean + 0.2 * clipped
        square = 0.9 * square + 0.1 * clipped**2
        step = (mean / (1 - 0.8**count)) / (np.sqrt(square / (1 - 0.9**count)) + 1e-3)
        oracle = oracle - 0.5 * (step + 0.1 * oracle)
        np.testing.assert_allclose(ours, oracle, rtol=1e-5)
        mean, square = kept(mean), kept(square)


def test_moments_in_bfloat16_take_half_the_bytes_and_stay_so():
    params = {"kernel": jnp.ones((4, 8))}
    sizes = {}
    for moments in ("float32", "bfloat16"):
        transform = optimizer.AdamW(moments=moments).create(0.1)
        state = transform.init(params)
        _, after = transform.update(params, state, params)
        for tree in (state, after):
            leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
            assert {leaf.dtype for leaf in leaves} == {jnp.dtype(moments)}
        sizes[moments] = sum(leaf.nbytes for leaf in leaves)
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 2 * 4 * 32


def test_moments_in_bfloat16_follow_the_gradient_at_the_slowest_decay_there_is():
    """A steady gradient is normalized to 1, and a tenth of it after it has fallen."""
    transform = optimizer.AdamW(
        b2=optimizer.SLOWEST_BFLOAT16, moments="bfloat16", clip_norm=10.0
    ).create(1.0)
    params = {"kernel": jnp.ones(1)}

    def update(state, gradient):
        updates, state = transform.update({"kernel": gradient}, state, params)
        return state, updates["kernel"]

    gradients = jnp.repeat(jnp.array([1.0, 0.1]), 2000)[:, None]
    _, updates = jax.lax.scan(update, transform.init(params), gradients)
    np.testing.assert_allclose(-updates[jnp.array([1999, 3999])], 1.0, atol=0.25)


def test_weights_decay_by_the_learning_rate_times_the_decay():
    transform = optimizer.AdamW(weight_decay=0.1).create(0.5)
    params = {"kernel": jnp.full(2, 3.0)}
    updates, _ = transform.update({"kernel": jnp.zeros(2)}, transform.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1 * 3.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optimizer.CosineSchedule(warmup_steps=-1),
            "--schedule.warmup-steps must be at least 0",
        ),
        (
            lambda: optimizer.CosineSchedule(decay_steps=1000),
            r"must exceed --schedule.warmup-steps \(1000\)",
        ),
        (
            lambda: optimizer.CosineSchedule(peak_lr=float("nan")),
            "--schedule.peak-lr must be a positive",
        ),
        (
            lambda: optimizer.CosineSchedule(end_lr=1.0),
            r"end-lr must lie in 0…2.5e-05 \(--schedule.peak-lr\)",
        ),
        (lambda: optimizer.AdamW(b1=1.0), r"b1 must lie in \[0, 1\), got 1.0"),
        (lambda: optimizer.AdamW(b2=-0.1), "b2 must lie in"),
        (lambda: optimizer.AdamW(eps=0.0), "eps must be positive"),
        (lambda: optimizer.AdamW(clip_norm=0.0), "clip-norm must be positive, got 0.0"),
        (
            lambda: optimizer.AdamW(moments="bfloat16", b2=0.999),
            "decay of 0.999 changes in a step: --optimizer.b2 must be at most 0.99, or give",
        ),
        (lambda: optimizer.AdamW(moments="bfloat16", b1=0.995), "--optimizer.b1 must be at most"),
        (lambda: optimizer.AdamW(moments="int8"), "float32 or bfloat16, got 'int8'"),
        (lambda: optimizer.AdamW(weight_decay=-1.0), "--optimizer.weight-decay must be at least 0"),
    ],
)
def test_a_bad_value_says_what_is_valid(make, message):
    with pytest.raises(ValueError, match=message):
        make()
