"""The three losses against numpy, their gradients, and the rows where nothing is valid."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from shallow_pi.distill import losses

B, R, N, AH, S = 2, 3, 4, 5, 7
VALID = np.random.default_rng(9).random((B, S)) < 0.6
VALID[:, 0] = True
MASK = VALID[:, None, None, None, :]
HEADS = pytest.mark.parametrize("heads", ["per_head", "head_mean"])


def _normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def _logits(scale=2.0):
    return tuple(_normal(B, R, N, AH, S, seed=seed, scale=scale) for seed in (1, 2))


@functools.partial(jax.jit, static_argnames="heads")
def _attention(student, teacher, mask=MASK, heads="per_head"):
    return losses.attention_loss(student, teacher, jnp.asarray(mask), heads)


def _kl_by_hand(student, teacher, heads):
    """Row by row over the valid keys alone, in float64."""
    result = np.zeros((B, R, AH))
    for b, r, a in np.ndindex(B, R, AH):
        p, q = (np.exp(np.float64(x[b, r, :, a][:, VALID[b]])) for x in (teacher, student))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        if heads == "head_mean":
            p, q = p.mean(0, keepdims=True), q.mean(0, keepdims=True)
        result[b, r, a] = (p * np.log(p / q)).sum(-1).mean()
    return result


def test_task_loss_is_the_mean_square_over_action_dimensions(strict):
    v, u = _normal(B, R, AH, 4), _normal(B, R, AH, 4, seed=1)
    loss = losses.task_loss(jnp.asarray(v), jnp.asarray(u))
    np.testing.assert_allclose(loss, ((v - u) ** 2).mean(-1), rtol=1e-5)


def test_velocity_loss_is_the_same_against_the_teacher_and_stops_there(strict):
    v, teacher = jnp.asarray(_normal(B, AH, 4)), jnp.asarray(_normal(B, AH, 4, seed=1))
    np.testing.assert_array_equal(losses.velocity_loss(v, teacher), losses.task_loss(v, teacher))
    total = lambda *args: jnp.sum(losses.velocity_loss(*args))  # noqa: E731 - two lines of maths
    to_student, to_teacher = jax.grad(total, argnums=(0, 1))(v, teacher)
    np.testing.assert_allclose(to_student, 2 * (v - teacher) / 4, rtol=1e-5)
    np.testing.assert_array_equal(to_teacher, 0.0)


@HEADS
def test_attention_loss_is_the_divergence_of_student_from_teacher(heads, strict):
    student, teacher = _logits()
    expected = _kl_by_hand(student, teacher, heads)
    np.testing.assert_allclose(_attention(student, teacher, heads=heads), expected, atol=1e-5)
    # The teacher comes first: the other way round is another number.
    assert np.abs(_kl_by_hand(teacher, student, heads) - expected).max() > 0.1


@HEADS
def test_every_loss_is_zero_when_student_is_teacher(heads):
    logits, v = _logits()[0], jnp.asarray(_normal(B, AH, 4))
    np.testing.assert_allclose(_attention(logits, logits, heads=heads), 0.0, atol=1e-6)
    np.testing.assert_array_equal(losses.velocity_loss(v, v), 0.0)
    np.testing.assert_array_equal(losses.task_loss(v, v), 0.0)


def test_attention_loss_is_never_negative_and_head_mean_is_the_weaker(strict):
    """KL is convex: averaging the maps first cannot raise it."""
    student, teacher = _logits()
    per_head, mean = (
        np.asarray(_attention(student, teacher, heads=h)) for h in ("per_head", "head_mean")
    )
    assert per_head.min() > 0
    assert mean.min() > -1e-6
    assert (mean <= per_head + 1e-6).all()


@HEADS
def test_gradients_agree_with_finite_differences(heads):
    student, teacher = (x[:1, :1, :2, :2] for x in _logits(scale=1.0))
    attention = functools.partial(_attention, teacher=teacher, mask=MASK[:1], heads=heads)
    jax.test_util.check_grads(
        jax.jit(lambda x: jnp.sum(attention(x))),
        (jnp.asarray(student),),
        order=1,
        modes=("rev",),
        rtol=2e-2,
    )
    u = jnp.asarray(_normal(2, 3, seed=1))
    jax.test_util.check_grads(
        jax.jit(lambda v: jnp.sum(losses.task_loss(v, u))),
        (jnp.asarray(_normal(2, 3)),),
        order=1,
        rtol=2e-2,
    )


@HEADS
def test_no_gradient_reaches_the_teacher_s_attention(heads):
    student, teacher = _logits()
    total = jax.grad(lambda x: jnp.sum(_attention(student, x, heads=heads)))
    np.testing.assert_array_equal(total(jnp.asarray(teacher)), 0.0)


@HEADS
def test_what_lies_under_the_mask_changes_neither_loss_nor_gradient(heads):
    student, teacher = _logits()
    noise = np.where(MASK, 0.0, 1e4).astype(np.float32)
    gradient = jax.grad(lambda x, y: jnp.sum(_attention(x, y, heads=heads)))
    np.testing.assert_array_equal(
        _attention(student, teacher, heads=heads),
        _attention(student + noise, teacher - noise, heads=heads),
    )
    changed = gradient(jnp.asarray(student + noise), jnp.asarray(teacher - noise))
    np.testing.assert_array_equal(gradient(jnp.asarray(student), jnp.asarray(teacher)), changed)
    np.testing.assert_array_equal(np.where(MASK, 0.0, changed), 0.0)


@HEADS
@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
def test_large_logits_and_rows_without_a_key_stay_finite(heads, shift):
    """A row with no valid key gives 0, and no gradient; a common shift changes nothing."""
    student, teacher = _logits()
    mask = MASK.copy()
    mask[0] = False

    def loss(x):
        return _attention(x, teacher + shift, mask, heads)

    values, gradient = (
        loss(student + shift),
        jax.grad(lambda x: jnp.sum(loss(x)))(jnp.asarray(student + shift)),
    )
    np.testing.assert_array_equal(values[0], 0.0)
    np.testing.assert_allclose(values[1], _kl_by_hand(student, teacher, heads)[1], atol=1e-3)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], 0.0)


def test_bfloat16_inputs_are_computed_in_float32():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in _logits())
    loss = _attention(student, teacher)
    assert loss.dtype == jnp.float32
    full = (np.asarray(x, np.float32) for x in (student, teacher))
    np.testing.assert_allclose(loss, _attention(*full), rtol=1e-6)
    assert losses.task_loss(student[:, :, 0], teacher[:, :, 0]).dtype == jnp.float32


def test_cosine_by_hand():
    a = jnp.array([[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 1.0]]])
    b = jnp.array([[[0.0, 2.0], [6.0, 8.0], [1.0, 1.0], [-1.0, -1.0]]])
    np.testing.assert_allclose(losses.cosine(a, b), [[0.0, 1.0, 0.0, -1.0]], atol=1e-6)


def test_the_masked_sum_leaves_out_even_what_is_not_finite():
    values, mask = jnp.array([[1.0, jnp.nan], [2.0, 4.0]]), jnp.array([[True, False], [True, True]])
    assert losses.masked_sum(values, mask) == 7.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: losses.task_loss(jnp.zeros((2, 1, 4)), jnp.zeros((2, 5, 4))),
        lambda: losses.velocity_loss(jnp.zeros((2, 1, 4)), jnp.zeros((2, 5, 4))),
        lambda: losses.cosine(jnp.zeros((2, 1, 4)), jnp.zeros((2, 5, 4))),
        lambda: losses.masked_sum(jnp.zeros((2, 5)), jnp.ones((2, 1), bool)),
        lambda: _attention(np.zeros((1, 1, 4, 5, 7)), np.zeros((1, 1, 1, 5, 7)), MASK[:1]),
    ],
)
def test_shapes_that_would_broadcast_raise(call):
    with pytest.raises(ValueError, match="must have one shape, got"):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": -1.0}, "losses.task must be a finite weight of at least 0: -1.0"),
        ({"velocity": float("inf")}, "losses.velocity must be a finite weight"),
        ({"attention": float("nan")}, "losses.attention must be a finite weight"),
        ({"task": 0.0, "velocity": 0.0, "attention": 0.0}, "nothing to train on"),
        ({"attention_layer": -2}, "is a student layer or -1, got -2"),
        ({"reflow": -1.0}, "losses.reflow must be a finite weight of at least 0: -1.0"),
        ({"reflow_deployed": 1.5}, "losses.reflow-deployed is a share from 0 to 1, got 1.5"),
    ],
)
def test_bad_weights_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        losses.Losses(**changes)


def test_a_teacher_is_needed_by_all_but_the_task_loss():
    assert losses.Losses(task=1.0, velocity=0.0, attention=0.1).needs_teacher
    assert losses.Losses(task=1.0, velocity=0.1, attention=0.0).needs_teacher
    assert losses.Losses(task=1.0, velocity=0.0, attention=0.0, reflow=0.1).needs_teacher
    assert not losses.Losses(task=1.0, velocity=0.0, attention=0.0).needs_teacher
