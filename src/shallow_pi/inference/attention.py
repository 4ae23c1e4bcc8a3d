"""Grouped-query attention over a buffer of keys and values, by the kernel one asks for.

Inference keeps a layer's keys and values in buffers with room for the prefix and the suffix, and
writes its own at their place (`write`): nothing is concatenated at every integration step, and the
slots in excess, which round the length up for the kernels' sake, are masked. Letters in einsums: B
batch, T query, S slot, K kv heads, G queries per kv head, R = T·G rows, H head dim.

`xla` is written out below and runs everywhere. `cudnn` is NVIDIA's flash attention, one kernel that
never stores the logits; it takes heads of 256 from Hopper (H100) on, and of 128 before.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shallow_pi.models import layers

Kernel = Literal["xla", "cudnn"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


def write(buffer: Any, own: Any, slot: int, layer: Any = None) -> Any:
    """Put keys and values (b, t, k, h) into buffers (b, s, k, h), or (l, b, s, k, h), from a slot.

    Where nobody needs the old buffers, XLA writes in place.
    """

    def put(into: Array, new: Array) -> Array:
        start: tuple[Any, ...] = (0, slot, 0, 0)
        if layer is not None:
            new, start = new[None], (layer, *start)
        return jax.lax.dynamic_update_slice(into, new, start)

    return jax.tree.map(put, buffer, own)


def attend(
    queries: Float[Array, "b t n h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    mask: Bool[Array, "b m s"] | None,
    kernel: Kernel = "xla",
) -> Float[Array, "b t nh"]:
    """Attention over the slots of a buffer.

    Args:
      queries: n heads, n / k of them to a kv head, with the logits' scale already in them.
      keys: buffer of keys.
      values: of values.
      mask: which slots count, for every query (m = t) or alike for all (m = 1); None counts all.
      kernel: what computes it.
    """
    b, t, n, h = queries.shape
    check(kernel, queries.dtype)
    if kernel == "cudnn":
        seen = None if mask is None else jnp.broadcast_to(mask[:, None], (b, 1, t, keys.shape[1]))
        mixed = jax.nn.dot_product_attention(
            queries, keys, values, mask=seen, scale=1.0, implementation="cudnn"
        )
        return mixed.reshape(b, t, n * h)
    k = keys.shape[2]
    # A kv head's queries are rows of one matrix, in the order they have in memory where k = 1.
    rows = jnp.moveaxis(queries.reshape(b, t, k, n // k, h), 2, 1).reshape(b, k, -1, h)
    logits = jnp.einsum("BKRH,BSKH->BKRS", rows, keys, preferred_element_type=jnp.float32)
    if mask is not None:
        seen = mask if mask.shape[1] == 1 else jnp.repeat(mask, n // k, axis=1)
        logits = jnp.where(seen[:, None], logits, layers.MASKED)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    mixed = jnp.einsum("BKRS,BSKH->BKRH", probabilities, values)
    return jnp.moveaxis(mixed.reshape(b, k, t, n // k, h), 1, 2).reshape(b, t, n * h)


def check(kernel: str, dtype: Any, backend: str | None = None) -> None:
    """Raise ValueError where a kernel cannot run; None is JAX's default backend."""
    if kernel not in KERNELS:
        raise ValueError(f"attention must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if kernel != "cudnn":
        return
    backend, name = backend or jax.default_backend(), jnp.dtype(dtype).name
    if backend not in ("gpu", "cuda"):
        raise ValueError(
            f"attention 'cudnn' needs an NVIDIA GPU, and JAX's backend is {backend}: use 'xla'"
        )
    if name not in ("bfloat16", "float16"):
        raise ValueError(
            f"attention 'cudnn' computes in bfloat16 or float16, the model in {name}: use 'xla'"
        )


def available(dtype: Any, backend: str | None = None) -> tuple[Kernel, ...]:
    """Kernels worth trying in this dtype; the hardware may still refuse one."""

    def possible(kernel: Kernel) -> bool:
        try:
            check(kernel, dtype, backend)
        except ValueError:
            return False
        return True

    return tuple(kernel for kernel in KERNELS if possible(kernel))
