"""The parts of a layer, each against its definition."""

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


def test_rms_norm_scales_and_the_adaptive_one_shifts_too(strict):
    x, scale, shift, gate = (jnp.asarray(_normal(2, 3, 8, seed=i)) for i in range(4))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    y, nothing = layers.rms_norm(x, scale[0, 0])
    np.testing.assert_allclose(y, normed * scale[0, 0][None, None], atol=1e-5)
    assert nothing is None
    y, kept = layers.rms_norm(x, None, (scale, shift, gate))
    np.testing.assert_allclose(y, normed * (1 + scale) + shift, atol=1e-5)
    assert kept is gate


def test_layer_norm_has_mean_bias_and_deviation_scale(strict):
    x = 3 + 2 * _normal(2, 3, 8)
    scale, bias = _normal(8, seed=1), _normal(8, seed=2)
    y = layers.layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias))
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, normed * scale + bias, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_gated_mlp_gates_with_gelu(strict, fused):
    x, gating, linear = _normal(2, 3, 4), _normal(2, 4, 6, seed=1), _normal(6, 4, seed=2)
    matrices = (np.concatenate(gating, axis=-1),) if fused else tuple(gating)
    y = layers.gated_mlp(jnp.asarray(x), tuple(map(jnp.asarray, matrices)), jnp.asarray(linear))
    a = x @ gating[0]
    gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    np.testing.assert_allclose(y, (gelu * (x @ gating[1])) @ linear, atol=1e-5)


def _by_hand(queries, keys, values, mask):
    """One query of one head at a time, in float64, over the keys it may see."""
    mixed = np.zeros(queries.shape)
    for b, t, k, g in np.ndindex(queries.shape[:-1]):
        seen = mask[b, t if mask.shape[1] > 1 else 0]
        logits = keys[b, seen, k].astype(np.float64) @ queries[b, t, k, g]
        weights = np.exp(logits - logits.max())
        mixed[b, t, k, g] = weights @ values[b, seen, k] / weights.sum()
    return mixed


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("rows", [1, 3], ids=["one row for all", "a row each"])
def test_attention_is_a_mean_of_the_values_that_a_query_may_see(strict, k, rows):
    queries, keys, values = _normal(2, 3, k, 2, 8), _normal(2, 9, k, 8), _normal(2, 9, k, 8, seed=1)
    mask = np.random.default_rng(0).random((2, rows, 9)) < 0.6
    mask[..., 4] = True
    found = layers.attend(*map(jnp.asarray, (queries, keys, values, mask)))
    np.testing.assert_allclose(found, _by_hand(queries, keys, values, mask), atol=1e-5)
    # What a masked slot holds changes nothing.
    absent = ~mask.any(axis=1)[..., None, None]
    filled = [np.where(absent, np.float32(1e4), x) for x in (keys, values)]
    np.testing.assert_array_equal(layers.attend(*map(jnp.asarray, (queries, *filled, mask))), found)
    every = layers.attend(*map(jnp.asarray, (queries, keys, values)), None)
    full = np.ones((2, 1, 9), bool)
    np.testing.assert_allclose(every, _by_hand(queries, keys, values, full), atol=1e-5)


def test_attention_over_a_shared_prefix_is_attention_over_both_joined(strict):
    b, r, t, s, k, g, h = 2, 3, 4, 5, 2, 2, 8
    queries, own = _normal(b, r, t, k, g, h), _normal(2, b, r, t, k, h, seed=1)
    prefix = _normal(2, b, s, k, h, seed=2)
    valid = np.arange(s) < np.array([[5], [3]])
    own_mask = np.tri(t, dtype=bool)
    arrays = [jnp.asarray(x) for x in (queries, *prefix, *own, valid, own_mask)]
    found = layers.attend_both(
        arrays[0], (arrays[1], arrays[2]), (arrays[3], arrays[4]), *arrays[5:]
    )
    mask = np.concatenate([np.repeat(valid[:, None], t, 1), np.tile(own_mask, (b, 1, 1))], axis=2)
    for draw in range(r):
        keys, values = (
            np.concatenate([p, o[:, draw]], axis=1) for p, o in zip(prefix, own, strict=True)
        )
        expected = _by_hand(queries[:, draw], keys, values, mask)
        np.testing.assert_allclose(found[:, draw], expected, atol=1e-5)


def test_token_embeddings_are_scaled_by_the_root_of_the_width(strict):
    table = jnp.asarray(_normal(10, 16))
    embedded = layers.embed_tokens(table, jnp.array([[3, 9]]), jnp.float32)
    np.testing.assert_allclose(embedded[0], 4.0 * table[jnp.array([3, 9])], rtol=1e-6)


def test_a_dense_layer_computes_in_the_wider_dtype_or_the_given_one():
    weights = {"kernel": jnp.full((4, 2), 0.5), "bias": jnp.ones(2)}
    x = jnp.ones((1, 3, 4), jnp.bfloat16)
    assert layers.dense(weights, x).dtype == jnp.float32
    given = layers.dense(weights, x, jnp.bfloat16)
    assert given.dtype == jnp.bfloat16
    np.testing.assert_array_equal(given.astype(jnp.float32), 3.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_part_keeps_the_dtype_of_its_input(dtype):
    x, wide = jnp.ones((1, 2, 8), dtype), jnp.ones(8)
    table = layers.rope_table(jnp.arange(2)[None], 8)
    heads = x.reshape(1, 2, 1, 1, 8)
    for y in (
        layers.rms_norm(x, wide)[0],
        layers.rms_norm(x, None, (x, x, x))[0],
        layers.layer_norm(x, wide, wide),
        layers.gated_mlp(x, (jnp.ones((8, 4)),) * 2, jnp.ones((4, 8))),
        layers.apply_rope(x[:, :, None], table),
        layers.attend(heads, x[:, :, None], x[:, :, None], None),
    ):
        assert y.dtype == dtype
