"""Attention over a buffer is attention over its valid slots, whatever computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.inference import attention

B, T, N, H, S = 2, 3, 4, 8, 11


def _drawn(k):
    generator = np.random.default_rng(k)
    shapes = (B, T, N, H), (B, S, k, H), (B, S, k, H)
    return tuple(jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)


def _by_hand(queries, keys, values, mask):
    """One head and one query at a time, in float64, over the slots that count."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    mixed = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        seen = np.asarray(mask)[b, t if mask.shape[1] > 1 else 0]
        head = n // (N // keys.shape[2])
        logits = keys[b, seen, head] @ queries[b, t, n]
        weights = np.exp(logits - logits.max())
        mixed[b, t, n] = weights @ values[b, seen, head] / weights.sum()
    return mixed.reshape(B, T, N * H)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, T], ids=["one row for all", "a row each"])
def test_masked_slots_do_not_exist(strict, k, rows):
    queries, keys, values = _drawn(k)
    mask = np.random.default_rng(0).random((B, rows, S)) < 0.6
    mask[..., 4] = True
    found = attention.attend(queries, keys, values, jnp.asarray(mask))
    np.testing.assert_allclose(found, _by_hand(queries, keys, values, mask), atol=1e-5)
    # Not even what lies there matters.
    absent = ~jnp.asarray(mask).any(axis=1)[..., None, None]
    filled = [jnp.where(absent, 1e4, x) for x in (keys, values)]
    np.testing.assert_array_equal(attention.attend(queries, *filled, jnp.asarray(mask)), found)


def test_without_a_mask_every_slot_counts(strict):
    queries, keys, values = _drawn(2)
    found = attention.attend(queries, keys, values, None)
    expected = _by_hand(queries, keys, values, np.ones((B, 1, S), bool))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, T], ids=["no mask", "one row for all", "a row each"])
def test_cudnn_is_asked_for_the_same(monkeypatch, rows):
    """What cuDNN is given, given to XLA's implementation of the same function, comes out alike."""
    asked = []
    original = jax.nn.dot_product_attention

    def on_xla(*arguments, implementation, **keywords):
        asked.append(implementation)
        return original(*arguments, implementation="xla", **keywords)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    queries, keys, values = (x.astype(jnp.bfloat16) for x in _drawn(1))
    mask = None
    if rows:
        mask = jnp.asarray(np.random.default_rng(0).random((B, rows, S)) < 0.6).at[..., 4].set(True)
    found = attention.attend(queries, keys, values, mask, "cudnn")
    assert asked == ["cudnn"]
    expected = attention.attend(queries, keys, values, mask, "xla")
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=2e-2)


def test_a_kernel_that_cannot_run_raises():
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU, and JAX's backend is cpu"):
        attention.check("cudnn", jnp.bfloat16)
    with pytest.raises(ValueError, match="bfloat16 or float16, the model in float32: use 'xla'"):
        attention.check("cudnn", jnp.float32, "gpu")
    with pytest.raises(ValueError, match="must be one of xla, cudnn, got 'flash'"):
        attention.check("flash", jnp.bfloat16)


def test_kernels_worth_trying_are_those_that_could_run():
    assert attention.available("bfloat16", "cpu") == ("xla",)
    assert attention.available("bfloat16", "gpu") == ("xla", "cudnn")
    assert attention.available("float32", "gpu") == ("xla",)


def test_writing_changes_the_slots_it_writes_alone(strict):
    buffer = (jnp.zeros((B, S, 1, H)), jnp.ones((B, S, 1, H)))
    own = (jnp.full((B, 2, 1, H), 5.0), jnp.full((B, 2, 1, H), 6.0))
    keys, values = attention.write(buffer, own, 7)
    np.testing.assert_array_equal(keys[0, :, 0, 0], [0, 0, 0, 0, 0, 0, 0, 5, 5, 0, 0])
    np.testing.assert_array_equal(values[1, :, 0, 3], [1, 1, 1, 1, 1, 1, 1, 6, 6, 1, 1])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), buffer)
    written = attention.write(stacked, own, 7, layer=1)
    for before, after, one in zip(stacked, written, (keys, values), strict=True):
        np.testing.assert_array_equal(after[1], one)
        np.testing.assert_array_equal(after[::2], before[::2])
