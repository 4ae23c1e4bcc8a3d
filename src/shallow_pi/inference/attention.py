"""Grouped-query attention over a buffer of keys and values, by a chosen kernel.

Inference keeps a layer's keys and values in buffers with room for prefix and suffix, and writes its
own into their slots (`write`), so no integration step concatenates. Slots beyond the last token,
which round the length up for the kernels, are masked.

`xla` is `layers.attend` and runs everywhere. `cudnn` is NVIDIA's flash attention, one kernel that
never stores the logits; it takes heads of 256 from Hopper (H100) on, and of 128 before.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.models import layers

Kernel = Literal["xla", "cudnn"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
# Buffers or tokens of one layer, or of a stack of layers.
KeysValues = tuple[Array, Array]
# The buffers of all layers: one pair each, or one pair of stacks if layers are scanned.
Cache = PyTree[Array]


def write(
    buffer: KeysValues, own: KeysValues, slot: int, layer: Int[Array, ""] | None = None
) -> KeysValues:
    """Put keys and values (b, t, k, h) into buffers (b, s, k, h), or (l, b, s, k, h), from a slot.

    XLA writes in place if nothing else reads the old buffers.
    """

    def put(into: Array, new: Array) -> Array:
        start: tuple[int | Array, ...] = (0, slot, 0, 0)
        if layer is not None:
            new, start = new[None], (layer, *start)
        return jax.lax.dynamic_update_slice(into, new, start)

    return put(buffer[0], own[0]), put(buffer[1], own[1])


def attend(
    queries: Float[Array, "b t k g h"],
    keys: Float[Array, "b s k h"],
    values: Float[Array, "b s k h"],
    mask: Bool[Array, "b m s"] | None,
    kernel: Kernel = "xla",
) -> Float[Array, "b t k g h"]:
    """`layers.attend` over the slots of a buffer, computed by a kernel."""
    check(kernel, queries.dtype)
    if kernel == "xla":
        return layers.attend(queries, keys, values, mask)
    b, t, k, g, h = queries.shape
    seen = None if mask is None else jnp.broadcast_to(mask[:, None], (b, 1, t, keys.shape[1]))
    mixed = jax.nn.dot_product_attention(
        *(queries.reshape(b, t, k * g, h), keys, values),
        mask=seen,
        scale=1.0,
        implementation="cudnn",
    )
    return mixed.reshape(queries.shape)


def check(kernel: str, dtype: jax.typing.DTypeLike, backend: str | None = None) -> None:
    """Raise ValueError if a kernel cannot run on a backend; None is JAX's default one."""
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


def available(dtype: jax.typing.DTypeLike, backend: str | None = None) -> tuple[Kernel, ...]:
    """Kernels worth trying in this dtype; the hardware may still refuse one."""

    def possible(kernel: Kernel) -> bool:
        try:
            check(kernel, dtype, backend)
        except ValueError:
            return False
        return True

    return tuple(kernel for kernel in KERNELS if possible(kernel))
