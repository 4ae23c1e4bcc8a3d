"""The equations of a layer, as pure functions: norms, rotary embedding, attention, gated MLP.

Training (`gemma`, `siglip`, `pi0`) and inference call the same ones; an attention kernel is another
body of `attend`. Each computes what openpi's part of the same name does (models/gemma.py,
models/pi0.py): products in the dtype of the activations, norms, angles and softmax in float32.
`Execution` says how a stack of layers is run, which changes no result.

Letters in einsums: B batch, R draws, T query, S key/value, K kv heads, G queries per kv head,
H head dim.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

Tree = TypeVar("Tree")
MASKED = -2.3819763e38
ROPE_WAVELENGTH = 10_000.0
# What the forward pass keeps of a layer for the backward one, which recomputes the rest: its input;
# its products with weights, and flash attention, too; or everything, so that "none" recomputes
# nothing.
Remat = Literal["layers", "dots", "none"]
REMATS: tuple[Remat, ...] = get_args(Remat)
# `attend`, or NVIDIA's flash attention, which stores no logits.
Kernel = Literal["xla", "cudnn"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


@dataclasses.dataclass(frozen=True)
class Execution:
    """Settings of how a model is run. None of them changes a result."""

    remat: Remat = "layers"
    # The sharding of the batch, which every layer keeps; None leaves it to XLA.
    rows: jax.sharding.Sharding | None = None
    # The parameters are in host memory: each layer copies its own to the device when it runs.
    offloaded: bool = False
    # The two streams' layers are unrolled instead of scanned, and nothing of the prefix is computed
    # after the last keys and values that the suffix reads. It compiles longer.
    unroll: bool = False
    # The kernels that compute attention in the image tower and in the prefix.
    tower_attention: Kernel = "xla"
    prefix_attention: Kernel = "xla"

    def __post_init__(self) -> None:
        if self.remat not in REMATS:
            raise ValueError(f"remat must be layers, dots or none, got {self.remat!r}.")
        for name in ("tower_attention", "prefix_attention"):
            if getattr(self, name) not in KERNELS:
                raise ValueError(f"{name} must be xla or cudnn, got {getattr(self, name)!r}.")

    def layer(self, module: type[nn.Module]) -> type[nn.Module]:
        """The class of a layer, to be scanned, as this execution runs it."""
        if self.offloaded:
            module = nn.map_variables(module, "params", trans_in_fn=to_device, init=False)
        if self.remat == "none":
            return module
        return nn.remat(module, prevent_cse=False, policy=self._policy)

    def unrolled(self, function: Callable[..., Tree]) -> Callable[..., Tree]:
        """A layer as a function, to be called in a Python loop, as this execution runs it."""
        if self.remat == "none":
            return function
        return cast(Callable[..., Tree], jax.checkpoint(function, policy=self._policy))

    @property
    def _policy(self) -> Callable[..., bool] | None:
        return None if self.remat == "layers" else _save_dots

    def keep_rows(self, x: Float[Array, " b *more"]) -> Float[Array, " b *more"]:
        """`x` with its first axis sharded as `rows`, and no other axis.

        Where parameters are sharded over the devices of the batch, XLA might otherwise gather the
        batch instead of the parameters.
        """
        return x if self.rows is None else jax.lax.with_sharding_constraint(x, self.rows)

    def keep_columns(self, x: Float[Array, " b *more d"]) -> Float[Array, " b *more d"]:
        """`x`, looked up in a table, with its columns sharded as the table's.

        The columns are sharded over the last mesh axis of `rows`, so rows and columns change places
        on the way in and out. Without this, XLA copies the gradient of `x` to every device between.
        """
        if not isinstance(self.rows, NamedSharding) or not isinstance(self.rows.spec[0], tuple):
            return x
        *others, last = self.rows.spec[0]
        if x.shape[-1] % self.rows.mesh.shape[last]:
            return x
        spec = PartitionSpec(tuple(others), *[None] * (x.ndim - 2), last)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.rows.mesh, spec))


DEFAULT_EXECUTION = Execution()


def _save_dots(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """The remat policy that keeps products with weights, and flash attention."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if "dot_product_attention_fwd" in primitive.name:
        return True
    return bool(dots(primitive, *arguments, **parameters))


def to_device(tree: PyTree) -> PyTree:
    """A tree of arrays copied from host memory to their devices, inside a jit."""
    if hasattr(jax, "memory"):
        memory: Any = jax.memory.Space.Device
    else:  # Its name before JAX 0.7.
        memory = getattr(jax.sharding, "TransferToMemoryKind")("device")  # noqa: B009 (for mypy)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory), tree)


def row(values: Float[Array, " d"], ndim: int) -> Array:
    """A vector as the last of `ndim` axes, since strict code does not broadcast across ranks."""
    return values.reshape((1,) * (ndim - 1) + values.shape)


def rope_table(
    positions: Int[Array, "*b s"], head_dim: int
) -> tuple[Float[Array, "*b s 1 hh"], Float[Array, "*b s 1 hh"]]:
    """Sine and cosine of the rotary angles, float32, with an axis for the heads."""
    exponents = jnp.arange(head_dim // 2, dtype=jnp.float32) * (2.0 / head_dim)
    wavelengths = jnp.power(ROPE_WAVELENGTH, exponents)
    radians = positions[..., None].astype(jnp.float32) / row(wavelengths, positions.ndim + 1)
    return jnp.sin(radians)[..., None, :], jnp.cos(radians)[..., None, :]


def apply_rope(x: Float[Array, "*b s n h"], table: tuple[Array, Array]) -> Array:
    """Rotate the two halves of each head; computed in float32, returned in x's dtype."""
    sin, cos = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def time_embedding(time: Float[Array, "*b"], width: int) -> Float[Array, "*b e"]:
    """Sine-cosine embedding of the flow time, float32, of periods geometric from 0.004 to 4."""
    fraction = jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    period = 4e-3 * (4.0 / 4e-3) ** fraction
    # In openpi's order: angles reach 1,571, where one rounding more is 1e-4 of the sine.
    angular = 1.0 / period * 2 * jnp.pi
    angle = time[..., None].astype(jnp.float32) * row(angular, time.ndim + 1)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def rms_norm(
    x: Float[Array, "*b t d"],
    scale: Float[Array, " d"] | None,
    modulation: tuple[Array, Array, Array] | None = None,
) -> tuple[Float[Array, "*b t d"], Array | None]:
    """RMSNorm, or the adaptive one, which also returns a gate for the residual.

    `scale` is the plain norm's, in float32 (openpi's parameter is scale - 1); `modulation` has
    scale - 1, shift and gate of the adaptive norm, broadcastable to `x`.
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if modulation is None:
        assert scale is not None, "a norm is plain or adaptive"
        return (normed * row(scale, x.ndim)).astype(x.dtype), None
    scale, shift, gate = modulation
    normed = normed * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
    return normed.astype(x.dtype), gate


def layer_norm(
    x: Float[Array, "b s d"], scale: Float[Array, " d"], bias: Float[Array, " d"]
) -> Float[Array, "b s d"]:
    """LayerNorm in float32, with Linen's variance: E[x²] - E[x]², in one pass."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(wide * wide, axis=-1, keepdims=True) - mean * mean, 0.0)
    factor = jax.lax.rsqrt(variance + 1e-6) * row(scale.astype(jnp.float32), x.ndim)
    return ((wide - mean) * factor + row(bias.astype(jnp.float32), x.ndim)).astype(x.dtype)


def residual(x: Array, y: Array, gate: Array | None) -> Array:
    """`x + y`, with `y` gated behind an adaptive norm."""
    return x + y if gate is None else x + y * gate


@runtime_checkable
class Stored(Protocol):
    """A matrix (inputs × outputs) in another form than an array, which multiplies rows itself."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def times(self, rows: Float[Array, "n i"]) -> Float[Array, "n o"]:
        """The product, in the dtype of the rows."""
        ...


# A weight of a large product: an array, or in 8 bits (`quantized.Quantized`).
Matrix = Array | Stored


def multiply(x: Float[Array, "*b i"], matrix: Matrix) -> Float[Array, "*b o"]:
    """One product of two matrices in the dtype of `x`, which XLA's CPU backend is fastest at.

    Every large product of a layer in inference is this one.
    """
    rows = x.reshape(-1, x.shape[-1])
    found = matrix.times(rows) if isinstance(matrix, Stored) else rows @ matrix.astype(x.dtype)
    return found.reshape(*x.shape[:-1], -1)


def dense(
    weights: Mapping[str, Array], x: Float[Array, "*b i"], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "*b o"]:
    """`x @ kernel + bias` in a dtype; None: the wider of the dtypes of `x` and `kernel`."""
    dtype = dtype or jnp.promote_types(x.dtype, weights["kernel"].dtype)
    bias = row(weights["bias"].astype(dtype), x.ndim)
    return multiply(x.astype(dtype), weights["kernel"]) + bias


def products(
    x: Float[Array, "*b i"], matrices: tuple[Matrix, ...], sizes: tuple[int, ...]
) -> list[Array]:
    """The products of `x` with matrices of these widths, given one by one or as one matrix."""
    if len(matrices) > 1:
        return [multiply(x, matrix) for matrix in matrices]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(multiply(x, matrices[0]), ends, axis=-1)


def gated_mlp(
    x: Float[Array, "*b d"], gate_up: tuple[Matrix, ...], down: Matrix
) -> Float[Array, "*b d"]:
    """Gated GELU MLP: `(gelu(x @ gate) * (x @ up)) @ down`."""
    # As one matrix throughout: XLA's CPU backend takes five times as long for the gradient else.
    rows = x.reshape(-1, x.shape[-1])
    gate, up = products(rows, gate_up, (down.shape[0],) * 2)
    return multiply(nn.gelu(gate) * up, down).reshape(x.shape)


def split_heads(
    queries: Float[Array, "*b t n h"], keys: Float[Array, "*b s k h"], rope: tuple[Array, Array]
) -> tuple[Float[Array, "*b t k g h"], Float[Array, "*b s k h"]]:
    """Rotated queries, scaled and grouped by their kv head, and rotated keys."""
    *b, n, h = queries.shape
    queries = apply_rope(queries, rope) * jnp.asarray(h**-0.5, queries.dtype)
    k = keys.shape[-2]
    return queries.reshape(*b, k, n // k, h), apply_rope(keys, rope)


def softmax(logits: Float[Array, "..."], mask: Bool[Array, "..."] | None) -> Float[Array, "..."]:
    """Softmax over the last axis where `mask`; None masks nothing."""
    masked = logits if mask is None else jnp.where(mask, logits, MASKED)
    return jax.nn.softmax(masked, axis=-1)


def attend(
    queries: Float[Array, "b t k g h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    mask: Bool[Array, "b m s"] | None,
    logits_dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "b t k g h"]:
    """Grouped-query attention of queries that are scaled already.

    `mask` has the keys that every query (m = t), or all alike (m = 1), may see; None: all keys.
    Logits and softmax are in `logits_dtype`.
    """
    rows = jnp.moveaxis(queries, 2, 1)  # T and G are then the rows of one matrix in memory.
    logits = jnp.einsum("BKTGH,BSKH->BKTGS", rows, keys, preferred_element_type=logits_dtype)
    probabilities = softmax(logits, None if mask is None else mask[:, None, :, None])
    mixed = jnp.einsum("BKTGS,BSKH->BKTGH", probabilities.astype(values.dtype), values)
    return jnp.moveaxis(mixed, 1, 2)


def attend_flash(
    queries: Float[Array, "b t k g h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    lengths: Int[Array, " b"] | None,
) -> Float[Array, "b t k g h"]:
    """`attend` by cuDNN; every query sees the first keys, up to a length, or all of them."""
    b, t, k, g, h = queries.shape
    mixed = jax.nn.dot_product_attention(
        queries.reshape(b, t, k * g, h),
        keys,
        values,
        scale=1.0,
        query_seq_lengths=None if lengths is None else jnp.full((b,), t, jnp.int32),
        key_value_seq_lengths=None if lengths is None else lengths.astype(jnp.int32),
        implementation="cudnn",
    )
    return mixed.reshape(queries.shape)


def attend_both(
    queries: Float[Array, "b r t k g h"],
    prefix: tuple[Array, Array],
    own: tuple[Array, Array],
    prefix_valid: Bool[Array, "b s"],
    own_mask: Bool[Array, "t t"],
) -> Float[Array, "b r t k g h"]:
    """Attention over a prefix that r draws share and over the draw's own tokens, not joined.

    Args:
      queries: scaled already.
      prefix: keys and values (b, s, k, h).
      own: keys and values (b, r, t, k, h).
      prefix_valid: the prefix tokens that exist.
      own_mask: the own tokens (columns) that each own token (row) sees.
    """
    (keys, values), (own_keys, own_values) = prefix, own
    wide = {"preferred_element_type": jnp.float32}
    to_prefix = jnp.einsum("BRTKGH,BSKH->BRKTGS", queries, keys, **wide)
    to_own = jnp.einsum("BRTKGH,BRSKH->BRKTGS", queries, own_keys, **wide)
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(prefix_valid[:, None, None, None, None, :], to_prefix.shape),
            jnp.broadcast_to(own_mask[:, None, :], to_own.shape),
        ],
        axis=-1,
    )
    probabilities = softmax(jnp.concatenate([to_prefix, to_own], axis=-1), mask)
    on_prefix, on_own = jnp.split(
        probabilities.astype(values.dtype), [to_prefix.shape[-1]], axis=-1
    )
    mixed = jnp.einsum("BRKTGS,BSKH->BRTKGH", on_prefix, values, **wide)
    mixed = mixed + jnp.einsum("BRKTGS,BRSKH->BRTKGH", on_own, own_values, **wide)
    return mixed.astype(queries.dtype)


def embed_tokens(
    table: Float[Array, "v d"], tokens: Int[Array, "b t"], dtype: jax.typing.DTypeLike
) -> Float[Array, "b t d"]:
    """Token embeddings, scaled by the root of the width."""
    return (table[tokens] * jnp.asarray(table.shape[-1] ** 0.5, table.dtype)).astype(dtype)
