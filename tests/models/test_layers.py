"""The parts of a layer, each against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.models import layers


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rope_turns_pairs_of_the_two_halves(strict):
    """As complex numbers: x[i] + i·x[i + H/2] turns by position / 10000^(2i/H)."""
    x, positions = _normal(1, 3, 2, 8), np.array([[0, 1, 7]])
    turned = layers.apply_rope(jnp.asarray(x), layers.rope_table(jnp.asarray(positions), 8))
    angle = positions[0][:, None] / 10_000.0 ** (np.arange(4) / 4)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[None, :, None]
    np.testing.assert_allclose(turned[..., :4], expected.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 4:], expected.imag, atol=1e-5)


def test_time_embedding_by_hand(strict):
    """Width 4 has the periods 0.004 and 4; openpi concatenates the sines, then the cosines."""
    time = jnp.array([0.25, 1.0], jnp.float32)
    angle = 2 * np.pi * np.array([0.25, 1.0])[:, None] / np.array([0.004, 4.0])
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    np.testing.assert_allclose(layers.time_embedding(time, 4), expected, atol=2e-3)
    middle = layers.time_embedding(time, 6)[:, 1]
    np.testing.assert_allclose(
        middle, np.sin(2 * np.pi * np.array([0.25, 1.0]) / np.sqrt(0.004 * 4.0)), atol=1e-4
    )


def test_softmax_is_a_distribution_over_the_mask_alone():
    logits = 5 * _normal(2, 3, 4)
    mask = np.array([1, 1, 0, 1], bool)
    probabilities = np.asarray(layers.softmax(jnp.asarray(logits), jnp.asarray(mask)))
    np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(probabilities[..., 2], 0.0)
    kept = np.exp(logits[..., mask])
    np.testing.assert_allclose(
        probabilities[..., mask], kept / kept.sum(-1, keepdims=True), atol=1e-6
    )


def test_rms_norm_multiplies_by_one_plus_scale(strict):
    x, scale = _normal(2, 3, 8), _normal(8, seed=1)
    y, gate = layers.RMSNorm().apply({"params": {"scale": scale}}, jnp.asarray(x))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert gate is None


def test_adaptive_norm_takes_scale_shift_and_gate_from_the_condition(strict):
    x, condition = _normal(2, 3, 8), _normal(2, 5, seed=1)
    dense = {"kernel": _normal(5, 24, seed=2), "bias": _normal(24, seed=3)}
    y, gate = layers.RMSNorm().apply(
        {"params": {"Dense_0": dense}}, jnp.asarray(x), jnp.asarray(condition)
    )
    modulation = condition @ dense["kernel"] + dense["bias"]
    scale, shift = modulation[:, None, :8], modulation[:, None, 8:16]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(gate, modulation[:, None, 16:], atol=1e-5)


def test_adaptive_norm_starts_with_a_closed_gate():
    x, condition = jnp.ones((1, 2, 8)), jnp.ones((1, 5))
    params = layers.RMSNorm().init(jax.random.key(0), x, condition)
    y, gate = layers.RMSNorm().apply(params, x, condition)
    np.testing.assert_array_equal(gate, 0.0)
    np.testing.assert_allclose(y, 1.0, atol=1e-5)


def test_feed_forward_gates_with_gelu(strict):
    x, gating, linear = _normal(2, 3, 4), _normal(2, 4, 6, seed=1), _normal(6, 4, seed=2)
    params = {"gating_einsum": gating, "linear": linear}
    y = layers.FeedForward(6).apply({"params": params}, jnp.asarray(x))
    a = x @ gating[0]
    gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    np.testing.assert_allclose(y, (gelu * (x @ gating[1])) @ linear, atol=1e-5)


def test_prompt_tokens_are_scaled_by_the_root_of_the_width(strict):
    table = _normal(10, 16)
    embedded = layers.Embedder(10, 16).apply(
        {"params": {"input_embedding": table}}, jnp.array([[3, 9]]), jnp.float32
    )
    np.testing.assert_allclose(embedded[0], 4.0 * table[[3, 9]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_part_keeps_the_dtype_of_its_input(dtype):
    x = jnp.ones((1, 2, 8), dtype)
    condition = jnp.ones((1, 5), jnp.float32)
    table = layers.rope_table(jnp.arange(2)[None], 8)
    for y in (
        layers.RMSNorm().init_with_output(jax.random.key(0), x)[0][0],
        layers.RMSNorm().init_with_output(jax.random.key(0), x, condition)[0][0],
        layers.FeedForward(4).init_with_output(jax.random.key(0), x)[0],
        layers.apply_rope(x[:, :, None], table),
    ):
        assert y.dtype == dtype
