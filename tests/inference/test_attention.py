"""Buffers of keys and values, and the alternatives to `layers.attend`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.inference import attention

B, T, N, H, S = 2, 3, 4, 8, 11


def _drawn(k):
    generator = np.random.default_rng(k)
    shapes = (B, T, k, N // k, H), (B, S, k, H), (B, S, k, H)
    return tuple(jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes)


@pytest.mark.parametrize("rows", [0, 1, T], ids=["no mask", "one row for all", "a row each"])
def test_cudnn_is_asked_for_the_same(monkeypatch, rows):
    """XLA's implementation gives the same result on the inputs passed to cuDNN."""
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


@pytest.mark.parametrize("b", [1, B])
@pytest.mark.parametrize("rows", [S, S + T * N + 1], ids=["joined", "with queries"])
@pytest.mark.parametrize("stacked", [False, True])
def test_joined_buffers_give_what_two_buffers_give(strict, b, rows, stacked):
    k = b  # One row and one kv head make a matrix of the buffer.
    queries, keys, values = (x[:b] for x in _drawn(k))
    own = (keys[:, :T] + 1, values[:, :T] - 1)
    mask = jnp.asarray(np.arange(S) < 10)[None, None].repeat(b, 0)
    expected, (new_keys, new_values) = attention.update_and_attend(
        queries, own, (keys, values), mask, 7
    )
    layer, pair = None, (keys, values)
    if stacked:
        layer, pair = jnp.int32(1), tuple(jnp.stack([x, x, x]) for x in pair)
    buffer = attention.join(pair, rows)
    assert buffer.shape == (*(3,) * stacked, *(() if b == 1 else (b, k)), rows, 2 * H)
    found, buffer = attention.update_and_attend(queries, own, buffer, mask, 7, layer=layer)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    held = buffer if layer is None else buffer[1]
    held = held.reshape(b, k, rows, 2 * H)[:, :, :S].swapaxes(1, 2)
    now = jnp.concatenate([new_keys, new_values], axis=-1)
    np.testing.assert_array_equal(held[:, :10], now[:, :10])
    if rows > S:
        assert jnp.abs(held[:, 10:, :, :H]).max() > 0  # The queries.
