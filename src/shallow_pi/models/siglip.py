"""The image encoder: a vision transformer with openpi's SigLIP parameter tree (models/siglip.py).

A patch embedding and learned positions in float32, pre-norm encoder layers scanned over a leading
axis of their parameters (their own 27, not the tower's), a final norm, and a linear head to the
backbone's width. Every patch gives one token; there is no pooling.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from shallow_pi.models import layers


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the image encoder."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    # Side of a square patch in pixels; must divide the picture's side.
    patch_size: int = 14


class EncoderBlock(nn.Module):
    """One pre-norm encoder layer, shaped for `nn.scan`."""

    config: SiglipConfig
    dtype: jnp.dtype
    execution: layers.Execution

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], _: None) -> tuple[Float[Array, "b s d"], None]:
        c = self.config
        x = self.execution.keep_rows(x)
        normed = nn.LayerNorm(dtype=self.dtype, name="LayerNorm_0")(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=c.num_heads,
            kernel_init=nn.initializers.xavier_uniform(),
            deterministic=True,
            dtype=self.dtype,
            name="MultiHeadDotProductAttention_0",
        )(normed, normed)
        normed = nn.LayerNorm(dtype=self.dtype, name="LayerNorm_1")(x)
        x = x + Mlp(c.mlp_dim, self.dtype, name="MlpBlock_0")(normed)
        return self.execution.keep_rows(x), None


class Mlp(nn.Module):
    """Two dense layers around a GELU."""

    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        dense = functools.partial(
            nn.Dense,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(stddev=1e-6),
        )
        # As one matrix: much faster on XLA's CPU backend (see layers.FeedForward).
        rows = x.reshape(-1, x.shape[-1])
        hidden = nn.gelu(dense(self.mlp_dim, name="Dense_0")(rows))
        return dense(x.shape[-1], name="Dense_1")(hidden).reshape(x.shape)


class Encoder(nn.Module):
    """The stack of encoder layers and its final norm."""

    config: SiglipConfig
    dtype: jnp.dtype
    execution: layers.Execution

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        x, _ = nn.scan(
            self.execution.layer(EncoderBlock),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.depth,
        )(self.config, self.dtype, self.execution, name="encoderblock")(x, None)
        return nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)


class Module(nn.Module):
    """Pictures to tokens of the backbone's width."""

    config: SiglipConfig
    # Width of the tokens that come out.
    out_width: int
    dtype: jnp.dtype
    execution: layers.Execution = layers.DEFAULT_EXECUTION

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s d"]:
        """Encode pictures in [-1, 1] into (h/patch)·(w/patch) tokens, row by row."""
        c = self.config
        images = self.execution.keep_rows(images)
        x = nn.Conv(
            c.width,
            (c.patch_size, c.patch_size),
            strides=(c.patch_size, c.patch_size),
            padding="VALID",
            dtype=jnp.float32,
            name="embedding",
        )(images.astype(jnp.float32))
        x = x.reshape(x.shape[0], -1, c.width)
        positions = self.param(
            "pos_embedding",
            nn.initializers.normal(stddev=c.width**-0.5),
            (1, x.shape[1], c.width),
        )
        x = (x + positions.astype(jnp.float32)).astype(self.dtype)
        x = Encoder(c, self.dtype, self.execution, name="Transformer")(x)
        x = nn.Dense(self.out_width, dtype=self.dtype, name="head")(x)
        return self.execution.keep_rows(x)
