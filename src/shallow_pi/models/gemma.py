"""The two-expert Gemma tower of π0, with openpi's parameter tree (openpi: models/gemma.py).

Two streams run through the layers in lock-step and share one attention: the *prefix* (images and
prompt, PaliGemma's width) and the *suffix* (state and actions, the action expert's width). Prefix
tokens never see the suffix, so each stream is its own attention call: the prefix over itself, the
suffix over the prefix and itself. That is openpi's joint attention without the masked quarter, and
it lets R draws of (noise, time) of one observation share its prefix.

Letters in einsums: B batch, R draws, T query, S key/value, N query heads, K kv heads, G queries per
kv head, H head dim, D width. Heads stay axes of their own (N is K and G), so that devices can share
them; on each device XLA makes T and G the rows of one matrix.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from shallow_pi.models import layers

Outputs = Literal["nothing", "cache", "hidden"]


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one stream. Both streams must agree on the three attention sizes."""

    # Width of the residual stream (D).
    width: int
    # Hidden width of the gated MLP.
    mlp_dim: int
    # Query heads (N).
    num_heads: int = 8
    # Key/value heads (K); must be smaller than num_heads and divide it.
    num_kv_heads: int = 1
    # Size of one head (H).
    head_dim: int = 256


class Cache(NamedTuple):
    """Rotated prefix keys, and values, of every layer."""

    keys: Float[Array, "l b s k h"]
    values: Float[Array, "l b s k h"]


class Capture(NamedTuple):
    """What one layer's attention of the action rows over the prefix columns is made of."""

    # Scaled, rotated queries of the last rows of the suffix, the action tokens.
    queries: Float[Array, "b r a k g h"]
    keys: Float[Array, "b s k h"]

    def logits(self) -> Float[Array, "b r n a s"]:
        """The attention logits in float32, before any mask, one map a query head."""
        logits = _logits("BRTKGH,BSKH->BRKTGS", self.queries, self.keys)
        b, r, k, a, g, s = logits.shape
        return jnp.moveaxis(logits, 4, 3).reshape(b, r, k * g, a, s)


class Hidden(NamedTuple):
    """The residual streams around every layer: index i enters layer i, the last one leaves all."""

    prefix: Float[Array, "l+1 b s d"]
    suffix: Float[Array, "l+1 b r t e"]


class Geometry(NamedTuple):
    """What every layer needs and no layer changes."""

    prefix_valid: Bool[Array, "b s"]
    prefix_rope: tuple[Array, Array]
    suffix_rope: tuple[Array, Array]
    suffix_mask: Bool[Array, "t t"]
    # Condition of the adaptive norms (π0.5).
    condition: Float[Array, "b r e"] | None

    @classmethod
    def create(
        cls,
        prefix_valid: Bool[Array, "b s"],
        head_dim: int,
        suffix_len: int,
        action_rows: int,
        condition: Float[Array, "b r e"] | None = None,
    ) -> "Geometry":
        """Positions count valid tokens; the suffix, all valid, goes on where the prefix ends."""
        prefix_rope = layers.rope_table(jnp.cumsum(prefix_valid, axis=1) - 1, head_dim)
        positions = (
            jnp.sum(prefix_valid, axis=1)[:, None, None] + jnp.arange(suffix_len)[None, None]
        )
        mask = jnp.asarray(suffix_mask(suffix_len, action_rows))
        rope = layers.rope_table(positions, head_dim)
        return cls(prefix_valid, prefix_rope, rope, mask, condition)


def suffix_mask(suffix_len: int, action_horizon: int) -> Bool[np.ndarray, "t t"]:
    """Which suffix token (row) sees which (column): the state token sees itself, actions see all.

    openpi's rule: a new block opens at the state token and at the first action; a query sees the
    keys of its own and of earlier blocks.
    """
    opens = np.zeros(suffix_len, dtype=np.int64)
    opens[0] = 1
    opens[suffix_len - action_horizon] = 1
    block = np.cumsum(opens)
    return block[:, None] >= block[None, :]


def _logits(equation: str, queries: Array, keys: Array) -> Array:
    return jnp.einsum(equation, queries, keys, preferred_element_type=jnp.float32)


def _name(name: str, stream: int) -> str:
    return name if stream == 0 else f"{name}_{stream}"


class Attention(nn.Module):
    """Projections of both streams around the shared grouped-query attention."""

    configs: tuple[GemmaConfig, GemmaConfig]
    action_rows: int

    @nn.compact
    def __call__(
        self,
        prefix: Float[Array, "b s d"],
        suffix: Float[Array, "b r t e"],
        geometry: Geometry,
    ) -> tuple[Array, Array, tuple[Array, Array], Capture]:
        queries, keys, values = self._project(0, prefix, geometry.prefix_rope)
        logits = _logits("BTKGH,BSKH->BKTGS", queries, keys)
        probabilities = layers.softmax(logits, geometry.prefix_valid[:, None, None, None, :])
        mixed = jnp.einsum("BKTGS,BSKH->BTKGH", probabilities.astype(values.dtype), values)
        prefix_out = self._output(0, mixed)
        queries, own_keys, own_values = self._project(1, suffix, geometry.suffix_rope)
        to_prefix = _logits("BRTKGH,BSKH->BRKTGS", queries, keys)
        to_own = _logits("BRTKGH,BRSKH->BRKTGS", queries, own_keys)
        prefix_valid = geometry.prefix_valid[:, None, None, None, None, :]
        mask = jnp.concatenate(
            [
                jnp.broadcast_to(prefix_valid, to_prefix.shape),
                jnp.broadcast_to(geometry.suffix_mask[:, None, :], to_own.shape),
            ],
            axis=-1,
        )
        probabilities = layers.softmax(jnp.concatenate([to_prefix, to_own], axis=-1), mask)
        on_prefix, on_own = jnp.split(
            probabilities.astype(values.dtype), [to_prefix.shape[-1]], axis=-1
        )
        mixed = jnp.einsum(
            "BRKTGS,BSKH->BRTKGH", on_prefix, values, preferred_element_type=jnp.float32
        ) + jnp.einsum(
            "BRKTGS,BRSKH->BRTKGH", on_own, own_values, preferred_element_type=jnp.float32
        )
        suffix_out = self._output(1, mixed.astype(suffix.dtype))
        capture = Capture(queries[:, :, -self.action_rows :], keys)
        return prefix_out, suffix_out, (keys, values), capture

    def _project(
        self, stream: int, x: Array, rope: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Rotated, scaled queries (..., T, K, G, H), rotated keys and values (..., S, K, H)."""
        c = self.configs[stream]
        queries = layers.Einsum(
            (c.num_heads, c.width, c.head_dim),
            nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,)),
            name=_name("q_einsum", stream),
        )("...TD,NDH->...TNH", x)
        key_value = layers.Einsum(
            (2, c.num_kv_heads, c.width, c.head_dim),
            nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0, 1)),
            name=_name("kv_einsum", stream),
        )("...SD,CKDH->C...SKH", x)
        queries = layers.apply_rope(queries, rope) * jnp.asarray(c.head_dim**-0.5, queries.dtype)
        groups = c.num_heads // c.num_kv_heads
        queries = queries.reshape(*queries.shape[:-2], c.num_kv_heads, groups, c.head_dim)
        return queries, layers.apply_rope(key_value[0], rope), key_value[1]

    def _output(self, stream: int, mixed: Array) -> Array:
        c = self.configs[stream]
        mixed = mixed.reshape(*mixed.shape[:-3], c.num_heads, c.head_dim)
        return layers.Einsum(
            (c.num_heads, c.head_dim, c.width),
            nn.initializers.lecun_normal(in_axis=(-3, -2), out_axis=-1),
            name=_name("attn_vec_einsum", stream),
        )("...TNH,NHD->...TD", mixed)


class Block(nn.Module):
    """One layer of both streams, shaped for `nn.scan`: (carry, scanned, shared) → (carry, out)."""

    configs: tuple[GemmaConfig, GemmaConfig]
    # Rows at the end of the suffix that are action tokens.
    action_rows: int
    # Layer whose action-to-prefix attention is carried out, or None: then nothing is carried.
    capture_layer: int | None
    # What is stacked over the layers: nothing, the prefix keys and values, or the residual streams.
    outputs: Outputs
    execution: layers.Execution

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array, Capture | None],
        layer: Int[Array, ""],
        geometry: Geometry,
    ) -> tuple[tuple[Array, Array, Capture | None], Any]:
        prefix, suffix, captured = carry
        streams = [self.execution.keep_rows(x) for x in (prefix, suffix)]
        conditions = (None, geometry.condition)

        def norm(name: str) -> list[tuple[Array, Array | None]]:
            return [
                layers.RMSNorm(name=_name(name, i))(x, conditions[i]) for i, x in enumerate(streams)
            ]

        normed = norm("pre_attention_norm")
        *attended, keys_values, capture = Attention(self.configs, self.action_rows, name="attn")(
            normed[0][0], normed[1][0], geometry
        )
        streams = [
            _residual(x, y, gate) for x, y, (_, gate) in zip(streams, attended, normed, strict=True)
        ]
        normed = norm("pre_ffw_norm")
        hidden = [
            layers.FeedForward(self.configs[i].mlp_dim, name=_name("mlp", i))(x)
            for i, (x, _) in enumerate(normed)
        ]
        streams = [
            _residual(x, y, gate) for x, y, (_, gate) in zip(streams, hidden, normed, strict=True)
        ]
        if self.capture_layer is not None:
            captured = jax.tree.map(
                lambda new, old: jnp.where(layer == self.capture_layer, new, old), capture, captured
            )
        streams = [self.execution.keep_rows(x) for x in streams]
        stacked = {"nothing": None, "cache": keys_values, "hidden": tuple(streams)}[self.outputs]
        return (streams[0], streams[1], captured), stacked


def _residual(x: Array, y: Array, gate: Array | None) -> Array:
    return x + y if gate is None else x + y * gate


class Module(nn.Module):
    """Embedder, layers scanned over a leading axis of their parameters, and final norms."""

    configs: tuple[GemmaConfig, GemmaConfig]
    depth: int
    vocab_size: int
    dtype: jnp.dtype
    execution: layers.Execution = layers.DEFAULT_EXECUTION

    def setup(self) -> None:
        self.embedder = layers.Embedder(self.vocab_size, self.configs[0].width)

    @nn.compact
    def __call__(
        self,
        prefix: Float[Array, "b s d"],
        suffix: Float[Array, "b r t e"],
        geometry: Geometry,
        *,
        action_rows: int = 0,
        capture_layer: int | None = None,
        outputs: Outputs = "nothing",
    ) -> tuple[Any, Any, Capture | None]:
        """Run the layers.

        Returns:
          The normed suffix; nothing, a `Cache` or `Hidden`, by `outputs`;
          the captured attention of `capture_layer` (None when that is None).
        """
        prefix = prefix.astype(self.dtype)
        suffix = suffix.astype(self.dtype)
        captured = None
        if capture_layer is not None:
            c = self.configs[0]
            k, g, h = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
            captured = Capture(
                jnp.zeros((*suffix.shape[:2], action_rows, k, g, h), self.dtype),
                jnp.zeros((*prefix.shape[:2], k, h), self.dtype),
            )
        scanned = nn.scan(
            self.execution.layer(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
        )(self.configs, action_rows, capture_layer, outputs, self.execution, name="layers")
        embedded = prefix, suffix
        (_, suffix, captured), stacked = scanned(
            (prefix, suffix, captured), jnp.arange(self.depth), geometry
        )
        if self.is_initializing():
            # openpi's tree has the prefix's final norm, though nothing ever reads its output.
            layers.RMSNorm(name="final_norm")(jnp.zeros((1, 1, self.configs[0].width)))
        suffix, _ = layers.RMSNorm(name="final_norm_1")(suffix, geometry.condition)
        if outputs == "hidden":
            stacked = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), embedded, stacked)
            return suffix, Hidden(*stacked), captured
        return suffix, Cache(*stacked) if outputs == "cache" else None, captured

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Scaled embeddings of prompt tokens in the compute dtype."""
        return self.execution.keep_columns(self.embedder(tokens, self.dtype))
