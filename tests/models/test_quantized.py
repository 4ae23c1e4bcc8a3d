"""Products in 8 bits: exact integers, float8 as NumPy has it, and a gradient past the rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from shallow_pi.models import layers, quantized

E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def operands():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((3, 5, 40)).astype(np.float32)
    matrix = generator.standard_normal((40, 24)).astype(np.float32)
    return x, matrix * np.geomspace(0.01, 10, 24, dtype=np.float32)


def _integers(x, bound):
    """x in units of bound / 127, ties to even, in NumPy."""
    return np.clip(np.round(x / np.float32(bound / 127)), -128, 127).astype(np.int64)


def _matrix(held):
    """The float32 matrix that a quantized one stands for."""
    return (np.asarray(held.values).astype(np.float32) * np.asarray(held.scales)[:, None]).T


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


def test_float8_products_are_those_of_their_numbers(strict):
    """Operands that are float8 numbers times a power of two, so that nothing is rounded before."""
    generator = np.random.default_rng(0)
    left, right = (
        generator.normal(0, 100, shape).clip(-448, 448).astype(E4M3).astype(np.float64)
        for shape in ((3, 5, 40), (40, 24))
    )
    right[0] = 448
    held = quantized.quantize(jnp.asarray(right / 1024, jnp.float32), "fp8", jnp.asarray(448 / 256))
    assert held.values.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(held.values).astype(np.float64), right.T)
    found = np.asarray(layers.multiply(jnp.asarray(left / 256, jnp.float32), held))
    expected = left @ right / 1024 / 256
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


def test_float8_rounds_to_the_nearest(operands):
    """JAX 0.5's CPU rounds by way of float16, so that what is nearly a tie may go the other way."""
    matrix = operands[1]
    held = quantized.quantize(jnp.asarray(matrix), "fp8")
    numbers = (matrix / np.asarray(held.scales)).T
    values = np.asarray(held.values).astype(np.float32)
    least = np.abs(numbers - numbers.astype(E4M3).astype(np.float32))
    assert (np.abs(numbers - values) <= least + 2**-10 * np.abs(numbers)).all()


@pytest.mark.parametrize(("format", "error"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_weights_alone_leave_activations_as_they_are(strict, operands, format, error):
    x, matrix = operands
    held = quantized.quantize(jnp.asarray(matrix), format)
    back = _matrix(held)
    np.testing.assert_allclose(
        layers.multiply(jnp.asarray(x), held), x @ back, rtol=1e-4, atol=1e-4
    )
    largest = np.abs(matrix).max(axis=0)
    assert (np.abs(back - matrix).max(axis=0) <= error * largest * 1.001).all()


def test_an_output_that_is_zero_everywhere_stays_zero():
    matrix = jnp.zeros((8, 3)).at[:, 1].set(1.0)
    for format in ("int8", "fp8"):
        back = _matrix(quantized.quantize(matrix, format))
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
        through = jnp.broadcast_to(_matrix(held).sum(axis=1)[None, None], x.shape)
        expected = jnp.where(jnp.abs(x) <= 2.0, through, 0.0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_training_sees_rounded_weights_and_their_gradient_as_if_they_were_not(operands):
    matrix = jnp.asarray(operands[1])
    for format in ("int8", "fp8"):
        held = _matrix(quantized.quantize(matrix, format))

        def seen(m, format=format):
            return quantized.straight_through(m, format, (0,))

        np.testing.assert_array_equal(seen(matrix), held)
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
