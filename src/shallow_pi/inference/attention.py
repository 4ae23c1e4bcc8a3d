"""Grouped-query attention over a buffer of keys and values, by a chosen kernel.

Inference keeps a layer's keys and values in buffers with room for prefix and suffix, and writes its
own into their slots (`write`), so no integration step concatenates. Slots beyond the last token,
which round the length up for the kernels, are masked.

A step may instead keep them side by side in one buffer (`join`), written at once, and have its
queries in further rows of the same buffer (`attend_joined`): one kernel where there were three.

`xla` is `layers.attend` and runs everywhere. `cudnn` is NVIDIA's flash attention, one kernel that
never stores the logits; it takes heads of 256 from Hopper (H100) on, and of 128 before.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.models import layers

Kernel = layers.Kernel
KERNELS = layers.KERNELS
# The buffers of a step's layer: keys and values apart; side by side; or with queries below them.
Buffers = Literal["apart", "joined", "joined with queries"]
BUFFERS: tuple[Buffers, ...] = get_args(Buffers)
# Buffers or tokens of one layer, or of a stack of layers.
KeysValues = tuple[Array, Array]
# Of one layer, or of a stack: a pair of buffers, or a joined one.
Held = KeysValues | Array
# The buffers of all layers: one pair (or joined buffer) each, or of stacks if layers are scanned.
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


def update_and_attend(
    queries: Float[Array, "b t k g h"],
    own: KeysValues,
    held: Held,
    mask: Bool[Array, "b m s"],
    slot: int,
    kernel: Kernel = "xla",
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b t k g h"], Held]:
    """Attention over buffers after own keys and values are in them, and those buffers.

    Arguments are those of `write`, `attend` and `attend_joined`.
    """
    if not isinstance(held, tuple):
        return attend_joined(queries, own, held, mask, slot, layer)
    held = write(held, own, slot, layer)
    keys, values = held if layer is None else (held[0][layer], held[1][layer])
    return attend(queries, keys, values, mask, kernel), held


def join(cache: KeysValues, rows: int) -> Float[Array, "*lbk r 2h"]:
    """Keys and values side by side, with empty rows after the slots, up to a number of rows.

    The axes of batch and kv heads are left out if both are 1: XLA reads rows of a matrix in place,
    and copies those of an array with more axes.
    """
    both = jnp.moveaxis(jnp.concatenate(cache, axis=-1), -2, -3)
    both = jnp.pad(both, [(0, 0)] * (both.ndim - 2) + [(0, rows - both.shape[-2]), (0, 0)])
    *more, b, k, r, width = both.shape
    return both.reshape(*more, r, width) if b * k == 1 else both


def attend_joined(
    queries: Float[Array, "b t k g h"],
    own: KeysValues,
    buffer: Float[Array, "*lbk r 2h"],
    mask: Bool[Array, "b m s"],
    slot: int,
    layer: Int[Array, ""] | None = None,
) -> tuple[Float[Array, "b t k g h"], Float[Array, "*lbk r 2h"]]:
    """`write`, then `attend`, over a joined buffer; also the buffer as written.

    A query is multiplied with keys and values alike, the latter by zeros, and of the result the
    half that comes from values is kept: products as small as a step's take no longer for it.

    If the buffer has t·g rows after the own ones, the queries are written there too. Arguments are
    those of `write` and `attend`.
    """
    b, t, k, g, h = queries.shape
    lead = () if b * k == 1 else (b, k)
    new = jnp.moveaxis(jnp.concatenate(own, axis=-1), 2, 1).reshape(*lead, t, 2 * h)
    rows = jnp.moveaxis(queries, 2, 1).reshape(*lead, t * g, h)
    rows = jnp.concatenate([rows, jnp.zeros_like(rows)], axis=-1)
    after, end = slot + t, slot + t + t * g
    if buffer.shape[-2] >= end:
        new = jnp.concatenate([new, rows], axis=-2)
    start: tuple[int | Array, ...] = (*(0 for _ in lead), slot, 0)
    if layer is not None:
        new, start = new[None], (layer, *start)
    buffer = jax.lax.dynamic_update_slice(buffer, new, start)
    held = buffer if layer is None else buffer[layer]
    if buffer.shape[-2] >= end:
        rows = held[..., after:end, :]
    logits = jnp.einsum("...QH,...SH->...QS", rows, held, preferred_element_type=jnp.float32)
    seen = jnp.pad(mask, ((0, 0), (0, 0), (0, held.shape[-2] - mask.shape[2])))
    probabilities = layers.softmax(logits.reshape(b, k, t, g, -1), seen[:, None, :, None])
    probabilities = probabilities.astype(queries.dtype).reshape(*lead, t * g, -1)
    mixed = jnp.einsum("...QS,...SH->...QH", probabilities, held)[..., h:]
    return jnp.moveaxis(mixed.reshape(b, k, t, g, h), 1, 2), buffer


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


def check_buffers(buffers: str, kernel: Kernel) -> None:
    """Raise ValueError for buffers that do not exist, or that a kernel cannot read."""
    if buffers not in BUFFERS:
        raise ValueError(f"step_buffers must be one of {', '.join(BUFFERS)}, got {buffers!r}")
    if buffers != "apart" and kernel != "xla":
        raise ValueError(
            f"step_buffers {buffers!r} needs step_attention 'xla', got {kernel!r}: use 'apart'"
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
