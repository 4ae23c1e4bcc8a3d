"""The image encoder from weights prepared for inference: what `siglip` computes, and no more.

Query, key and value are one matrix, layers are written out (a scan would copy each layer's weights
out of their stack at every call) or scanned, and patches are embedded by a matrix product.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from shallow_pi.inference import attention
from shallow_pi.models import siglip


class Layer(NamedTuple):
    """One layer (or a stack of them on a leading axis); pairs are a kernel or scale, and a bias."""

    norm: tuple[Array, Array]
    # D × 3D and 3D, or its three parts.
    qkv: tuple[tuple[Array, Array], ...]
    out: tuple[Array, Array]
    mlp_norm: tuple[Array, Array]
    up: tuple[Array, Array]
    down: tuple[Array, Array]


class Tower(NamedTuple):
    """The encoder's weights."""

    patches: tuple[Array, Array]
    positions: Float[Array, "1 s d"]
    # By layer, or stacked where layers are scanned.
    layers: Any
    norm: tuple[Array, Array]
    head: tuple[Array, Array]


def prepare(
    config: siglip.SiglipConfig, params: PyTree, dtype: Any, *, fused: bool, unrolled: bool
) -> Tower:
    """Rearrange the parameters of `siglip.Module`."""
    blocks = params["Transformer"]["encoderblock"]
    heads, width = blocks["MultiHeadDotProductAttention_0"], config.width

    def dense(tree: PyTree, inward: int = 1) -> tuple[Array, Array]:
        """A kernel as a matrix; `inward` of its axes (after the layers') are the input's."""
        kernel, bias = tree["kernel"].astype(dtype), tree["bias"].astype(dtype)
        rows = 1
        for size in kernel.shape[1 : 1 + inward]:
            rows *= size
        return kernel.reshape(config.depth, rows, -1), bias.reshape(config.depth, -1)

    parts = [dense(heads[name]) for name in ("query", "key", "value")]
    if fused:
        kernels, biases = zip(*parts, strict=True)
        parts = [(jnp.concatenate(kernels, axis=-1), jnp.concatenate(biases, axis=-1))]
    stack: Any = Layer(
        norm=_pair(blocks["LayerNorm_0"], "scale", jnp.float32),
        qkv=tuple(parts),
        out=dense(heads["out"], inward=2),
        mlp_norm=_pair(blocks["LayerNorm_1"], "scale", jnp.float32),
        up=dense(blocks["MlpBlock_0"]["Dense_0"]),
        down=dense(blocks["MlpBlock_0"]["Dense_1"]),
    )
    if unrolled:
        stack = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(config.depth)]
    kernel, bias = _pair(params["embedding"], "kernel", jnp.float32)
    return Tower(
        patches=(kernel.reshape(-1, width), bias),
        positions=params["pos_embedding"].astype(jnp.float32),
        layers=stack,
        norm=_pair(params["Transformer"]["encoder_norm"], "scale", jnp.float32),
        head=_pair(params["head"], "kernel", dtype),
    )


def encode(
    config: siglip.SiglipConfig,
    tower: Tower,
    images: Float[Array, "b h w 3"],
    kernel: attention.Kernel = "xla",
) -> Float[Array, "b s d"]:
    """Tokens of pictures in [-1, 1], row by row."""
    (b, height, width, _), p = images.shape, config.patch_size
    dtype = tower.head[0].dtype
    cut = images.astype(jnp.float32).reshape(b, height // p, p, width // p, p, 3)
    patches = jnp.moveaxis(cut, 2, 3).reshape(b, -1, p * p * 3)
    x = (_dense(patches, tower.patches) + tower.positions).astype(dtype)
    if isinstance(tower.layers, list):
        for layer in tower.layers:
            x = _block(config, x, layer, kernel)
    else:

        def step(x: Array, layer: Layer) -> tuple[Array, None]:
            return _block(config, x, layer, kernel), None

        x, _ = jax.lax.scan(step, x, tower.layers)
    return _dense(_norm(x, tower.norm), tower.head)


def _block(
    config: siglip.SiglipConfig, x: Float[Array, "b s d"], layer: Layer, kernel: attention.Kernel
) -> Float[Array, "b s d"]:
    b, s = x.shape[:2]
    normed = _norm(x, layer.norm)
    products = [_dense(normed, part) for part in layer.qkv]
    if len(products) == 1:
        products = jnp.split(products[0], 3, axis=-1)
    queries, keys, values = (y.reshape(b, s, config.num_heads, -1) for y in products)
    queries = queries * jnp.asarray(queries.shape[-1] ** -0.5, x.dtype)
    x = x + _dense(attention.attend(queries, keys, values, None, kernel), layer.out)
    hidden = nn.gelu(_dense(_norm(x, layer.mlp_norm), layer.up))
    return x + _dense(hidden, layer.down)


def _dense(x: Float[Array, "b s d"], weights: tuple[Array, Array]) -> Float[Array, "b s e"]:
    kernel, bias = weights
    rows = x.reshape(-1, x.shape[-1]) @ kernel
    return (rows + bias[None]).reshape(*x.shape[:-1], -1)


def _norm(x: Float[Array, "b s d"], weights: tuple[Array, Array]) -> Float[Array, "b s d"]:
    scale, bias = weights
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    # E[x²] − E[x]², as Linen computes it: one pass.
    variance = jnp.maximum(jnp.mean(wide * wide, axis=-1, keepdims=True) - mean * mean, 0.0)
    normed = (wide - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale[None, None])
    return (normed + bias[None, None]).astype(x.dtype)


def _pair(tree: PyTree, name: str, dtype: Any) -> tuple[Array, Array]:
    return tree[name].astype(dtype), tree["bias"].astype(dtype)
