"""Made-up weights, which cost little time to make and no memory beside themselves.

No time of a benchmark depends on the values, but the clock of a loaded chip does: zeros draw less
power than noise. So every leaf is noise, hashed from the index of each element: XLA fuses that into
whatever reads it, where random bits would be an array of their own.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from shallow_pi.inference import program, quantize, tuning
from shallow_pi.models import pi0

DEVIATION = 0.02
# An argument of the jitted functions, so that the compiler has no constants to fold.
SEED = np.uint32(0)


def noise(shape: tuple[int, ...], dtype: np.dtype | str, seed: Array | np.uint32) -> Array:
    """Uniform numbers of mean 0 and standard deviation 0.02, the same for the same seed."""
    bits = jnp.arange(int(np.prod(shape)), dtype=jnp.uint32) * np.uint32(0x9E3779B1) + seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    unit = (bits >> 8).astype(jnp.float32) / 2**24 - 0.5
    return (DEVIATION * 12**0.5 * unit).astype(dtype).reshape(shape)


def tree(shapes: PyTree, seed: Array | np.uint32, *, zero: str = "") -> PyTree:
    """A tree of these shapes: noise in floating leaves and in bytes, zeros in others.

    Leaves with the word `zero` in their path are zeros, such as the moments of an optimizer, which
    would have negative squares.
    """

    def leaf(path: jax.tree_util.KeyPath, shape: jax.ShapeDtypeStruct) -> Array:
        name = jax.tree_util.keystr(path)
        if zero and zero in name:
            return jnp.zeros(shape.shape, shape.dtype)
        # Not `hash`, which differs from process to process.
        own = seed + np.uint32(zlib.crc32(name.encode()))
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return noise(shape.shape, shape.dtype, own)
        if shape.dtype == jnp.int8:
            return (100 / DEVIATION * noise(shape.shape, jnp.float32, own) / 2).astype(jnp.int8)
        return jnp.zeros(shape.shape, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def params(config: pi0.Pi0Config) -> PyTree:
    """Parameters in the compute dtype; the same in every process."""
    shapes = _param_shapes(config)
    made: PyTree = jax.jit(lambda seed: tree(shapes, seed))(SEED)
    return made


def _param_shapes(config: pi0.Pi0Config) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype)),
        pi0.abstract_params(config),
    )


def prepared_program(
    config: pi0.Pi0Config, num_steps: int, options: tuning.InferenceOptions
) -> program.Program:
    """A program whose prepared weights are made up themselves, not prepared from parameters.

    A model that just fits has no room for both.
    """
    traced: list[program.Program] = []
    bounds = quantize.made_up_bounds(config)

    def arrays(params: PyTree) -> program.Arrays:
        traced.append(program.Program.create(config, params, num_steps, options, bounds))
        return traced[-1].arrays

    shapes = jax.eval_shape(arrays, _param_shapes(config))
    made: program.Arrays = jax.jit(lambda seed: tree(shapes, seed))(SEED)
    return dataclasses.replace(traced[-1], arrays=made)
