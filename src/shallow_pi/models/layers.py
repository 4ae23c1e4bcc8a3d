"""The parts of a layer: rotary and time embeddings, masked softmax, norms, projections, the MLP.

Each computes what openpi's part of the same name does (models/gemma.py, models/pi0.py), parameter
names included. Parameters are cast to the dtype of the activations; norms, angles and softmax are
float32. `Execution` says how a stack of layers is run, which changes no result.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

MASKED = -2.3819763e38
ROPE_WAVELENGTH = 10_000.0
# What the backward pass finds of a layer: its input alone, and it computes the rest again; also the
# products with weights, so that only what lies between them is computed again; or everything.
Remat = Literal["layers", "dots", "none"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is run. Nothing here changes a result."""

    remat: Remat = "layers"
    # How the batch is split over devices, which every layer then keeps to; None leaves it to XLA.
    rows: jax.sharding.Sharding | None = None
    # The parameters lie in the host's memory: each layer's are copied to the device when it runs.
    offloaded: bool = False

    def __post_init__(self) -> None:
        if self.remat not in ("layers", "dots", "none"):
            raise ValueError(f"remat must be layers, dots or none, got {self.remat!r}.")

    def layer(self, module: type[nn.Module]) -> Any:
        """A layer's class, to be scanned, as this execution runs it."""
        if self.offloaded:
            module = nn.map_variables(module, "params", trans_in_fn=to_device, init=False)
        if self.remat == "none":
            return module
        policy = None if self.remat == "layers" else _SAVE_DOTS
        return nn.remat(module, prevent_cse=False, policy=policy)

    def keep_rows(self, x: Float[Array, " b *more"]) -> Float[Array, " b *more"]:
        """`x` with its first axis split as `rows` says, and nothing else.

        Where parameters are split over the same devices as the batch, XLA might otherwise gather
        the batch instead of the parameters.
        """
        return x if self.rows is None else jax.lax.with_sharding_constraint(x, self.rows)

    def keep_columns(self, x: Float[Array, " b *more d"]) -> Float[Array, " b *more d"]:
        """`x`, looked up in a table, with its columns split as the table's.

        These are the last of the axes that split `rows`, so rows and columns change places on the
        way in and out. Told nothing, XLA copies the gradient of `x` to every device in between.
        """
        if not isinstance(self.rows, NamedSharding) or not isinstance(self.rows.spec[0], tuple):
            return x
        *others, last = self.rows.spec[0]
        if x.shape[-1] % self.rows.mesh.shape[last]:
            return x
        spec = PartitionSpec(tuple(others), *[None] * (x.ndim - 2), last)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.rows.mesh, spec))


DEFAULT_EXECUTION = Execution()
_SAVE_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def to_device(tree: Any) -> Any:
    """A tree of arrays copied from the host's memory to that of their devices, inside a jit."""
    if hasattr(jax, "memory"):
        memory: Any = jax.memory.Space.Device
    else:  # Its name before JAX 0.7.
        memory = getattr(jax.sharding, "TransferToMemoryKind")("device")  # noqa: B009 (for mypy)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory), tree)


def _row(values: Float[Array, " d"], ndim: int) -> Array:
    """A vector as the last of `ndim` axes, since strict code does not broadcast across ranks."""
    return values.reshape((1,) * (ndim - 1) + values.shape)


def rope_table(
    positions: Int[Array, "*b s"], head_dim: int
) -> tuple[Float[Array, "*b s 1 hh"], Float[Array, "*b s 1 hh"]]:
    """Sine and cosine of the rotary angles, float32, with an axis for the heads."""
    exponents = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim)
    wavelengths = jnp.power(ROPE_WAVELENGTH, exponents)
    radians = positions[..., None].astype(jnp.float32) / _row(wavelengths, positions.ndim + 1)
    return jnp.sin(radians)[..., None, :], jnp.cos(radians)[..., None, :]


def apply_rope(x: Float[Array, "*b s n h"], table: tuple[Array, Array]) -> Array:
    """Rotate the two halves of each head; computed in float32, returned in x's dtype."""
    sin, cos = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def time_embedding(
    time: Float[Array, "*b"], width: int, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "*b e"]:
    """Sine-cosine embedding of the flow time, float32, periods geometric between the two given."""
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = min_period * (max_period / min_period) ** fraction
    # In openpi's order: angles reach 1,571, where one rounding more is 1e-4 of the sine.
    angular = 1.0 / period * 2 * jnp.pi
    angle = time[..., None].astype(jnp.float32) * _row(angular, time.ndim + 1)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def softmax(logits: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Softmax over the last axis where `mask`, in float32."""
    return jax.nn.softmax(jnp.where(mask, logits, MASKED), axis=-1)


class RMSNorm(nn.Module):
    """RMSNorm; with a condition the adaptive one, which also returns a gate for the residual."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b t d"], condition: Float[Array, "*b e"] | None = None
    ) -> tuple[Float[Array, "*b t d"], Float[Array, "*b 1 d"] | None]:
        variance = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
        normed = x.astype(jnp.float32) * jax.lax.rsqrt(variance + 1e-6)
        if condition is None:
            scale = self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],))
            scale = _row(scale.astype(jnp.float32), x.ndim)
            return (normed * (1 + scale)).astype(x.dtype), None
        modulation = nn.Dense(
            3 * x.shape[-1], kernel_init=nn.initializers.zeros_init(), dtype=x.dtype, name="Dense_0"
        )(condition)
        scale, shift, gate = jnp.split(modulation[..., None, :], 3, axis=-1)
        normed = normed * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
        return normed.astype(x.dtype), gate


class Einsum(nn.Module):
    """A projection with the parameter `w`, cast to the input's dtype."""

    shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, equation: str, x: Array) -> Array:
        return jnp.einsum(
            equation, x, self.param("w", self.kernel_init, self.shape).astype(x.dtype)
        )


class FeedForward(nn.Module):
    """Gated GELU MLP."""

    mlp_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        d = x.shape[-1]
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        gating = self.param("gating_einsum", init, (2, d, self.mlp_dim)).astype(x.dtype)
        linear = self.param(
            "linear", nn.initializers.lecun_normal(in_axis=-2, out_axis=-1), (self.mlp_dim, d)
        ).astype(x.dtype)
        # As one matrix: XLA's CPU backend takes five times as long for the gradient otherwise.
        rows = x.reshape(-1, d)
        return ((nn.gelu(rows @ gating[0]) * (rows @ gating[1])) @ linear).reshape(x.shape)


class Embedder(nn.Module):
    """The token embedding, scaled by sqrt(width)."""

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "b t"], dtype: jnp.dtype) -> Float[Array, "b t d"]:
        table = self.param(
            "input_embedding",
            # Embedded words then have unit variance, like image tokens.
            nn.initializers.normal(stddev=self.width**-0.5),
            (self.vocab_size, self.width),
        )
        return (table[tokens] * jnp.asarray(self.width**0.5, table.dtype)).astype(dtype)
