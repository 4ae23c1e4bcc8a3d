"""Products in 8 bits: exact integers, float8 as NumPy has it, and a gradient past the rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from shallow_pi.models import layers, quantized


@pytest.fixture(scope="module")
def operands():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 5, 40)).astype(np.float32)
    matrix = generator.standard_normal((40, 24)).astype(np.float32)
    return x, matrix * np.geomspace(0.01, 10, 24, dtype=np.float32)


def _integers(x, bound):
    """x in units of bound / 127, ties to even, in NumPy."""
    return np.clip(np.round(x / np.float32(bound / 127)), -128, 127).astype(np.int64)


def test_int8_products_are_those_of_integers(strict, operands):
    x, matrix = operands
    weight_scale = np.abs(matrix).max(axis=0) / np.float32(127)
    integers = np.round(matrix / weight_scale).astype(np.int64)
    expected = _integers(x, 2.0) @ integers

    held = quantized.quantize(jnp.asarray(matrix), "int8", jnp.asarray(2.0))
    np.testing.assert_array_equal(held.values, integers.T)
    assert (held.values.dtype, held.shape) == (jnp.int8, (40, 24))
    found = np.asarray(layers.multiply(jnp.asarray(x), held))
    # The sums are exact: only their product with the scales is in float32.
    scale = np.asarray(held.scales * held.input_scale)
    np.testing.assert_array_equal(found, expected.astype(np.float32) * scale)
    np.testing.assert_array_equal(np.round(found / scale).astype(np.int64), expected)


def test_float8_products_are_those_of_numbers_rounded_by_ml_dtypes(strict, operands):
    x, matrix = operands
    e4m3 = ml_dtypes.float8_e4m3fn
    weight_scale = np.abs(matrix).max(axis=0) / np.float32(448)
    left = np.clip(x / np.float32(2 / 448), -448, 448).astype(e4m3).astype(np.float64)
    right = (matrix / weight_scale).astype(e4m3).astype(np.float64)
    expected = left @ right * (weight_scale * np.float64(2 / 448))

    held = quantized.quantize(jnp.asarray(matrix), "fp8", jnp.asarray(2.0))
    found = np.asarray(layers.multiply(jnp.asarray(x), held))
    assert held.values.dtype == jnp.float8_e4m3fn
    size = np.abs(expected).max(axis=(0, 1))
    np.testing.assert_allclose(found / size, expected / size, atol=2e-6)


@pytest.mark.parametrize(("format", "error"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_weights_alone_leave_activations_as_they_are(strict, operands, format, error):
    x, matrix = operands
    held = quantized.quantize(jnp.asarray(matrix), format)
    back = quantized.dequantize(held)
    np.testing.assert_allclose(
        layers.multiply(jnp.asarray(x), held), x @ back, rtol=1e-4, atol=1e-4
    )
    largest = np.abs(matrix).max(axis=0)
    assert (np.abs(back - matrix).max(axis=0) <= error * largest * 1.001).all()


def test_an_output_that_is_zero_everywhere_stays_zero():
    matrix = jnp.zeros((8, 3)).at[:, 1].set(1.0)
    for format in ("int8", "fp8"):
        back = quantized.dequantize(quantized.quantize(matrix, format))
        np.testing.assert_allclose(back, matrix, rtol=1e-6)


def test_activations_beyond_the_bound_become_the_largest_number():
    x = jnp.asarray([[1e6, -1e6, 3.0, 0.0]])
    for format, least in (("int8", -2 * 128 / 127), ("fp8", -2)):
        held = quantized.quantize(jnp.eye(4), format, jnp.asarray(2.0))
        np.testing.assert_allclose(layers.multiply(x, held), [[2, least, 2, 0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_that_of_the_activations(operands, dtype):
    x, matrix = operands
    for format, bound in (("int8", jnp.asarray(4.0)), ("fp8", jnp.asarray(4.0)), ("fp8", None)):
        held = quantized.quantize(jnp.asarray(matrix), format, bound)
        found = layers.multiply(jnp.asarray(x, dtype), held)
        assert found.dtype == dtype
        size = np.abs(x @ matrix).max(axis=(0, 1))
        np.testing.assert_allclose(
            np.asarray(found, np.float32) / size, x @ matrix / size, atol=0.1
        )


def test_the_gradient_passes_through_the_rounding_inside_the_bound(strict, operands):
    x, matrix = jnp.asarray(operands[0]), jnp.asarray(operands[1])
    for format in ("int8", "fp8"):
        held = quantized.quantize(matrix, format, jnp.asarray(2.0))
        gradient = jax.grad(lambda x, held=held: jnp.sum(layers.multiply(x, held)))(x)
        through = jnp.broadcast_to(quantized.dequantize(held).sum(axis=1)[None, None], x.shape)
        expected = jnp.where(jnp.abs(x) <= 2.0, through, 0.0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_training_sees_rounded_weights_and_their_gradient_as_if_they_were_not(operands):
    matrix = jnp.asarray(operands[1])
    for format in ("int8", "fp8"):
        held = quantized.dequantize(quantized.quantize(matrix, format))

        def seen(m, format=format):
            return quantized.straight_through(m, format, (0,))

        np.testing.assert_allclose(seen(matrix), held, rtol=1e-6)
        gradient = jax.grad(lambda m, seen=seen: jnp.sum(seen(m) ** 2))(matrix)
        np.testing.assert_allclose(gradient, 2 * held, rtol=1e-5)


def test_a_stack_is_its_matrices_one_by_one(operands):
    stack = jnp.stack([jnp.asarray(operands[1]), 3 * jnp.asarray(operands[1][::-1])])
    whole = quantized.quantize(stack, "int8", jnp.asarray([2.0, 4.0]))
    assert whole.shape == (2, 40, 24)
    for i, bound in enumerate((2.0, 4.0)):
        one = quantized.quantize(stack[i], "int8", jnp.asarray(bound))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(a, b[i])
