"""The image encoder from weights prepared for inference: `siglip`'s layers on matrices.

Query, key and value are one matrix, and layers are unrolled (a scan would copy each layer's weights
out of their stack at every call) or scanned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from shallow_pi.inference import attention
from shallow_pi.models import layers, siglip

# The width of the MLP is rounded up to a multiple of this for products on tensor cores.
WIDE = 128


class Tower(NamedTuple):
    """The encoder's weights."""

    patches: siglip.Pair
    positions: Float[Array, "1 s d"]
    # One for each layer, or one of stacked arrays if layers are scanned.
    layers: list[siglip.Layer] | siglip.Layer
    norm: siglip.Pair
    head: siglip.Pair


def prepare(
    config: siglip.SiglipConfig,
    params: PyTree,
    dtype: jax.typing.DTypeLike,
    *,
    fused: bool,
    unrolled: bool,
    multiple: int = 1,
) -> Tower:
    """Rearrange the parameters of `siglip.Module`, the layers' in `dtype`.

    `fused` has query, key and value as one matrix, `unrolled` a list of layers instead of a stack.
    The MLP's width is rounded up to a multiple of `multiple`, with the same result: columns of
    zeros give GELU(0) = 0, which meets rows of zeros.
    """

    def pair(
        tree: PyTree, name: str = "kernel", dtype: jax.typing.DTypeLike = jnp.float32
    ) -> siglip.Pair:
        return tree[name].astype(dtype), tree["bias"].astype(dtype)

    def matrix(weights: siglip.Dense) -> siglip.Pair:
        """Kernels and biases of all layers, without an axis of heads."""
        kernel, bias = weights[0], weights[1].reshape(config.depth, -1)
        assert not isinstance(kernel, layers.Stored), "the tree has arrays"
        return kernel.reshape(config.depth, -1, bias.shape[-1]), bias

    layer = siglip.arrange(params["Transformer"]["encoderblock"], dtype)
    qkv = tuple(matrix(part) for part in layer.qkv)
    up, down = matrix(layer.up), matrix(layer.down)
    if fused:
        kernels, biases = zip(*qkv, strict=True)
        qkv = ((jnp.concatenate(kernels, axis=-1), jnp.concatenate(biases, axis=-1)),)
    more = (0, -config.mlp_dim % multiple)
    stack: list[siglip.Layer] | siglip.Layer = layer._replace(
        qkv=qkv,
        out=matrix(layer.out),
        up=(jnp.pad(up[0], ((0, 0), (0, 0), more)), jnp.pad(up[1], ((0, 0), more))),
        down=(jnp.pad(down[0], ((0, 0), more, (0, 0))), down[1]),
    )
    if unrolled:
        stack = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(config.depth)]
    kernel, bias = pair(params["embedding"])
    return Tower(
        patches=(kernel.reshape(-1, config.width), bias),
        positions=params["pos_embedding"].astype(jnp.float32),
        layers=stack,
        norm=pair(params["Transformer"]["encoder_norm"], "scale"),
        head=pair(params["head"], dtype=dtype),
    )


def encode(
    config: siglip.SiglipConfig,
    tower: Tower,
    images: Float[Array, "b h w 3"],
    kernel: attention.Kernel = "xla",
) -> Float[Array, "b s d"]:
    """Tokens of images in [-1, 1], row by row."""

    def attend(queries: Array, keys: Array, values: Array) -> Array:
        return attention.attend(queries, keys, values, None, kernel)

    def step(x: Array, layer: siglip.Layer) -> tuple[Array, None]:
        return siglip.layer(config, layer, x, attend), None

    x = siglip.embed_patches(config, images, tower.patches) + tower.positions
    x = x.astype(tower.head[0].dtype)
    if isinstance(tower.layers, list):
        for layer in tower.layers:
            x, _ = step(x, layer)
    else:
        x, _ = jax.lax.scan(step, x, tower.layers)
    return siglip.dense(layers.layer_norm(x, *tower.norm), tower.head)
