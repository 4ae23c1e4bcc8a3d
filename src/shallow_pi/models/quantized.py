"""Matrices in 8 bits, and their products with activations.

A quantized matrix is `values * scales` with one scale for each output; `values` are int8 or float8
(e4m3, without infinities). Activations are rounded to the same format with one scale for each
product, calibrated on data (`inference.calibration`), or stay in their own dtype (weight only).
Integers are multiplied and summed exactly (int8 × int8 → int32), float8 numbers are multiplied
exactly and summed in float32.

    y = (round(x / sₓ) · valuesᵀ) · sₓ · scales

Gradients with respect to activations pass straight through the rounding, up to its bounds.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Format = Literal["int8", "fp8"]
DTYPES: dict[Format, jnp.dtype] = {
    "int8": jnp.dtype(jnp.int8),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
}
# The largest magnitude of a rounded number; int8's -128 is used by no weight.
LARGEST: dict[Format, float] = {"int8": 127.0, "fp8": 448.0}
# Name under which a product appears in a jaxpr, where `onnx_nodes` finds it.
PRODUCT = "quantized_product"


class Quantized(NamedTuple):
    """A matrix in 8 bits (or a stack of them on leading axes)."""

    # Outputs first and summed axis last, the order that tensor cores read 8-bit operands in.
    values: Array
    # One for each output, float32.
    scales: Array
    # sₓ, one number in float32; None: activations are not rounded.
    input_scale: Array | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that it stands for."""
        return (*self.values.shape[:-2], self.values.shape[-1], self.values.shape[-2])

    def times(self, rows: Float[Array, "n i"]) -> Float[Array, "n o"]:
        """The product of rows of activations with the matrix, in the dtype of the rows."""
        return _product(rows, self)


def quantize(
    matrix: Float[Array, "*l i o"], format: Format, bound: Float[Array, "*l"] | None = None
) -> Quantized:
    """Round a matrix (or a stack) of inputs × outputs to 8 bits.

    `bound` is the magnitude of activations that becomes the largest number; None is weight only.
    """
    wide = jnp.swapaxes(matrix.astype(jnp.float32), -1, -2)
    scales = weight_scale(wide, format, (-1,))
    values = round_to(wide / scales, format)
    given = None if bound is None else bound.astype(jnp.float32)[..., None] / LARGEST[format]
    return Quantized(values, scales[..., 0], given)


def weight_scale(
    matrix: Float[Array, "..."], format: Format, inputs: tuple[int, ...]
) -> Float[Array, "..."]:
    """The scale of each output, over the axes of the inputs, which are kept as 1."""
    largest = jnp.max(jnp.abs(matrix), axis=inputs, keepdims=True)
    return jnp.where(largest > 0, largest, 1.0) / LARGEST[format]


def round_to(x: Float[Array, "..."], format: Format) -> Array:
    """The nearest number of a format, ties to even; beyond the largest, the largest.

    JAX 0.5's CPU rounds to float8 by way of float16: what is nearly a tie may go the other way.
    """
    smallest = -128.0 if format == "int8" else -LARGEST[format]  # As ONNX saturates.
    clipped = jnp.clip(x, smallest, LARGEST[format])
    return (jnp.round(clipped) if format == "int8" else clipped).astype(DTYPES[format])


def straight_through(
    matrix: Float[Array, "..."], format: Format, inputs: tuple[int, ...]
) -> Float[Array, "..."]:
    """The rounded matrix in its own dtype, whose gradient is that of the matrix (in training).

    `inputs` are the axes that a product sums over.
    """
    held = jax.lax.stop_gradient(matrix)
    wide = held.astype(jnp.float32)
    scale = weight_scale(wide, format, inputs)
    rounded = round_to(wide / scale, format).astype(jnp.float32) * scale
    # In this order it is the rounded matrix to the last bit.
    return rounded.astype(matrix.dtype) + (matrix - held)


def format_of(matrix: Quantized) -> Format:
    """The format of a matrix's values."""
    return "int8" if matrix.values.dtype == jnp.int8 else "fp8"


def _forward(rows: Float[Array, "n i"], matrix: Quantized) -> Float[Array, "n o"]:
    # Float sums leave in bfloat16 where activations are, which halves what a GPU writes; the range
    # of float16 is too small for them.
    wide = jnp.dtype(jnp.bfloat16 if rows.dtype == jnp.bfloat16 else jnp.float32)
    scales = matrix.scales
    if matrix.input_scale is None:
        left, right = rows, matrix.values.astype(rows.dtype)
    else:
        format = format_of(matrix)
        left = round_to(rows.astype(jnp.float32) / matrix.input_scale[None], format)
        right, scales = matrix.values, scales * matrix.input_scale
        wide = jnp.dtype(jnp.int32) if format == "int8" else wide
    sums = jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=wide)
    return (sums.astype(jnp.float32) * scales[None]).astype(rows.dtype)


def _forward_named(rows: Array, matrix: Quantized) -> Array:
    return _forward(rows, matrix)


_forward_named.__name__ = PRODUCT
_named = jax.jit(_forward_named)


@jax.custom_vjp
def _product(rows: Array, matrix: Quantized) -> Array:
    product: Array = _named(rows, matrix)
    return product


def _product_and_rest(rows: Array, matrix: Quantized) -> tuple[Array, tuple[Array, Quantized]]:
    return _product(rows, matrix), (rows, matrix)


def _gradient(rest: tuple[Array, Quantized], cotangent: Array) -> tuple[Array, None]:
    """To the activations alone: the weights of a quantized model are not trained."""
    rows, matrix = rest
    scaled = (cotangent.astype(jnp.float32) * matrix.scales[None]).astype(rows.dtype)
    to_rows = scaled @ matrix.values.astype(rows.dtype)
    if matrix.input_scale is not None:
        bound = matrix.input_scale[None] * LARGEST[format_of(matrix)]
        inside = jnp.abs(rows.astype(jnp.float32)) <= bound
        to_rows = jnp.where(inside, to_rows, jnp.zeros_like(to_rows))
    return to_rows, None


_product.defvjp(_product_and_rest, _gradient)
