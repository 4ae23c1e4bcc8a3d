"""The image encoder: a vision transformer with openpi's SigLIP parameter tree (models/siglip.py).

A patch embedding and learned positions in float32, pre-norm encoder layers scanned over a leading
axis of their parameters (their own 27, not the tower's), a final norm, and a linear head to the
backbone's width. Every patch gives one token; there is no pooling.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from shallow_pi.models import layers, parameters

# A kernel (or a norm's scale) and a bias.
Pair = tuple[Array, Array]
# A kernel of an array or in 8 bits, and a bias.
Dense = tuple[layers.Matrix, Array]


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the image encoder."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    # Side of a square patch in pixels; must divide the image's side.
    patch_size: int = 14


def axis_sizes(config: SiglipConfig, tokens: int, out_width: int) -> dict[str, int]:
    """The sizes of the logical axes of the encoder (`parameters.TABLE`)."""
    return {
        "image_width": config.width,
        "image_mlp": config.mlp_dim,
        "image_heads": config.num_heads,
        "image_head_dim": config.width // config.num_heads,
        "image_tokens": tokens,
        "patch_height": config.patch_size,
        "patch_width": config.patch_size,
        "colours": 3,
        "one": 1,
        "width": out_width,
    }


class Layer(NamedTuple):
    """The weights of one layer (or a stack of them); pairs are a kernel or scale, and a bias.

    Kernels may have an axis of heads, or be matrices.
    """

    norm: Pair
    # Query, key and value; or one matrix of all three.
    qkv: tuple[Dense, ...]
    out: Dense
    mlp_norm: Pair
    up: Dense
    down: Dense


def arrange(tree: PyTree, dtype: jax.typing.DTypeLike) -> Layer:
    """The weights of a layer, from openpi's tree."""

    def pair(
        tree: dict[str, Array], name: str = "kernel", dtype: jax.typing.DTypeLike = dtype
    ) -> Pair:
        return tree[name].astype(dtype), tree["bias"].astype(dtype)

    heads, mlp = tree["MultiHeadDotProductAttention_0"], tree["MlpBlock_0"]
    return Layer(
        norm=pair(tree["LayerNorm_0"], "scale", jnp.float32),
        qkv=tuple(pair(heads[name]) for name in ("query", "key", "value")),
        out=pair(heads["out"]),
        mlp_norm=pair(tree["LayerNorm_1"], "scale", jnp.float32),
        up=pair(mlp["Dense_0"]),
        down=pair(mlp["Dense_1"]),
    )


def embed_patches(
    config: SiglipConfig, images: Float[Array, "b h w 3"], weights: Pair
) -> Float[Array, "b s d"]:
    """The patches of images in [-1, 1], row by row, through one matrix, in float32."""
    (b, height, width, _), p = images.shape, config.patch_size
    cut = images.astype(jnp.float32).reshape(b, height // p, p, width // p, p, 3)
    patches = jnp.moveaxis(cut, 2, 3).reshape(b, -1, p * p * 3)
    kernel, bias = (leaf.astype(jnp.float32) for leaf in weights)
    return dense(patches, (kernel.reshape(-1, config.width), bias))


def layer(
    config: SiglipConfig,
    weights: Layer,
    x: Float[Array, "b s d"],
    attend: Callable[[Array, Array, Array], Array],
) -> Float[Array, "b s d"]:
    """One pre-norm layer, its weights in the dtype of `x`.

    `attend` gets scaled queries (b, s, n, 1, h), and keys and values (b, s, n, h).
    """
    b, s, _ = x.shape
    normed = layers.layer_norm(x, *weights.norm)
    parts = [dense(normed, part) for part in weights.qkv]
    if len(parts) == 1:
        parts = jnp.split(parts[0], 3, axis=-1)
    queries, keys, values = (part.reshape(b, s, config.num_heads, -1) for part in parts)
    queries = queries[:, :, :, None] / jnp.asarray(queries.shape[-1] ** 0.5, x.dtype)
    x = x + dense(attend(queries, keys, values), weights.out)
    normed = layers.layer_norm(x, *weights.mlp_norm)
    return x + dense(nn.gelu(dense(normed, weights.up)), weights.down)


def dense(x: Float[Array, "b s *i"], weights: Dense) -> Float[Array, "b s *o"]:
    """`x @ kernel + bias` over the kernel's leading axes, as one product of matrices."""
    kernel, bias = weights
    if isinstance(kernel, layers.Stored):
        return layers.multiply(x.reshape(*x.shape[:2], -1), kernel) + layers.row(bias, 3)
    inputs = kernel.ndim - bias.ndim
    rows = jnp.tensordot(x.reshape(-1, *kernel.shape[:inputs]), kernel, inputs) + bias[None]
    return rows.reshape(*x.shape[:2], *bias.shape)


class Block(nn.Module):
    """One layer, shaped for `nn.scan`."""

    config: SiglipConfig
    execution: layers.Execution

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], _: None) -> tuple[Float[Array, "b s d"], None]:
        sizes = axis_sizes(self.config, 0, 0)
        weights = parameters.declare(self, parameters.ENCODER, sizes)
        keep = self.execution.keep_rows

        def attend(queries: Array, keys: Array, values: Array) -> Array:
            if self.execution.tower_attention == "cudnn":
                return layers.attend_flash(queries, keys, values, None)
            return layers.attend(queries, keys, values, None, x.dtype)  # As openpi's logits.

        x = layer(self.config, arrange(weights, x.dtype), keep(x), attend)
        return keep(x), None


class Encoder(nn.Module):
    """The stack of layers and its final norm."""

    config: SiglipConfig
    execution: layers.Execution

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x, _ = nn.scan(
            self.execution.layer(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.depth,
        )(self.config, self.execution, name="encoderblock")(x, None)
        path, sizes = "PaliGemma/img/Transformer", axis_sizes(self.config, 0, 0)
        norm = parameters.declare(self, path, sizes, names=("encoder_norm",))["encoder_norm"]
        return layers.layer_norm(x, norm["scale"], norm["bias"])


class Module(nn.Module):
    """Images to tokens of the backbone's width."""

    config: SiglipConfig
    # Width of the tokens that come out.
    out_width: int
    dtype: jnp.dtype
    execution: layers.Execution = layers.DEFAULT_EXECUTION

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
        """Encode images in [-1, 1] into (h/patch)·(w/patch) tokens, row by row."""
        c = self.config
        tokens = images.shape[1] // c.patch_size * (images.shape[2] // c.patch_size)
        sizes, names = axis_sizes(c, tokens, self.out_width), ("embedding", "pos_embedding", "head")
        weights = parameters.declare(self, "PaliGemma/img", sizes, names=names)
        patches = weights["embedding"]["kernel"], weights["embedding"]["bias"]
        x = embed_patches(c, self.execution.keep_rows(images), patches)
        x = (x + weights["pos_embedding"].astype(jnp.float32)).astype(self.dtype)
        x = Encoder(c, self.execution, name="Transformer")(x)
        return self.execution.keep_rows(layers.dense(weights["head"], x, self.dtype))
