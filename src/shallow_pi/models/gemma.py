"""The two-expert Gemma tower of π0, with openpi's parameter tree (openpi: models/gemma.py).

Two streams run through the layers in lock-step and share one attention: the *prefix* (images and
prompt, PaliGemma's width) and the *suffix* (state and actions, the action expert's width). Prefix
tokens never see the suffix, so each stream is its own attention call: the prefix over itself, the
suffix over the prefix and itself. That is openpi's joint attention without the masked quarter, and
it lets R draws of (noise, time) of one observation share its prefix.

Letters in einsums: those of `layers`, N query heads, D width. Heads stay axes of their own (N is K
and G), so that devices can share them; on each device XLA makes T and G the rows of one matrix.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from shallow_pi.models import layers, parameters

# A tree of parameters.
Weights = dict[str, Any]


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


def axis_sizes(configs: tuple[GemmaConfig, GemmaConfig]) -> dict[str, int]:
    """The sizes of the logical axes of a layer (`parameters.TABLE`)."""
    backbone, expert = configs
    return {
        "width": backbone.width,
        "mlp": backbone.mlp_dim,
        "heads": backbone.num_heads,
        "kv_heads": backbone.num_kv_heads,
        "head_dim": backbone.head_dim,
        "keys_values": 2,
        "gate_up": 2,
        "expert_width": expert.width,
        "expert_mlp": expert.mlp_dim,
        "modulation": 3 * expert.width,
    }


class Capture(NamedTuple):
    """The parts of one layer's attention of the action rows over the prefix columns."""

    # Scaled, rotated queries of the last rows of the suffix, the action tokens.
    queries: Float[Array, "b r a k g h"]
    keys: Float[Array, "b s k h"]

    def logits(self) -> Float[Array, "b r n a s"]:
        """The attention logits in float32, before any mask, one map a query head."""
        logits = jnp.einsum(
            "BRTKGH,BSKH->BRKTGS",
            self.queries,
            self.keys,
            preferred_element_type=jnp.float32,
        )
        b, r, k, a, g, s = logits.shape
        return jnp.moveaxis(logits, 4, 3).reshape(b, r, k * g, a, s)


class Hidden(NamedTuple):
    """The residual streams around every layer: index i enters layer i, the last one leaves all."""

    prefix: Float[Array, "l+1 b s d"]
    suffix: Float[Array, "l+1 b r t e"]


class Geometry(NamedTuple):
    """Inputs of every layer that no layer changes."""

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
    """The suffix tokens (columns) that each one (row) sees: the state sees itself, actions see all.

    openpi's rule: a new block opens at the state token and at the first action; a query sees the
    keys of its own and of earlier blocks.
    """
    opens = np.zeros(suffix_len, dtype=np.int64)
    opens[0] = 1
    opens[suffix_len - action_horizon] = 1
    block = np.cumsum(opens)
    return block[:, None] >= block[None, :]


def _name(name: str, stream: int) -> str:
    return name if stream == 0 else f"{name}_{stream}"


def norm(
    weights: Weights, x: Float[Array, "*b t d"], condition: Float[Array, "*b e"] | None
) -> tuple[Float[Array, "*b t d"], Float[Array, "*b 1 d"] | None]:
    """RMSNorm, adaptive where there is a condition; then also the gate of the residual."""
    if condition is None:
        return layers.rms_norm(x, 1 + weights["scale"].astype(jnp.float32))
    modulation = layers.dense(weights["Dense_0"], condition, x.dtype)[..., None, :]
    scale, shift, gate = jnp.split(modulation, 3, axis=-1)
    return layers.rms_norm(x, None, (scale, shift, gate))


def attention(
    weights: Weights,
    prefix: Float[Array, "b s d"],
    suffix: Float[Array, "b r t e"],
    geometry: Geometry,
    action_rows: int,
) -> tuple[Float[Array, "b s d"], Float[Array, "b r t e"], Capture]:
    """Both streams' attention, and its parts for the last `action_rows` rows of the suffix."""

    def project(
        stream: int, x: Array, rope: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        to_queries = weights[_name("q_einsum", stream)]["w"].astype(x.dtype)
        to_both = weights[_name("kv_einsum", stream)]["w"].astype(x.dtype)
        queries = jnp.einsum("...TD,NDH->...TNH", x, to_queries)
        keys, values = jnp.einsum("...SD,CKDH->C...SKH", x, to_both)
        queries, keys = layers.split_heads(queries, keys, rope)
        return queries, (keys, values)

    def leave(stream: int, mixed: Array) -> Array:
        w = weights[_name("attn_vec_einsum", stream)]["w"].astype(mixed.dtype)
        return jnp.einsum("...TNH,NHD->...TD", mixed.reshape(*mixed.shape[:-3], *w.shape[:2]), w)

    queries, cached = project(0, prefix, geometry.prefix_rope)
    prefix_out = leave(0, layers.attend(queries, *cached, geometry.prefix_valid[:, None]))
    queries, own = project(1, suffix, geometry.suffix_rope)
    mixed = layers.attend_both(queries, cached, own, geometry.prefix_valid, geometry.suffix_mask)
    return prefix_out, leave(1, mixed), Capture(queries[:, :, -action_rows:], cached[0])


def layer(
    weights: Weights,
    streams: tuple[Float[Array, "b s d"], Float[Array, "b r t e"]],
    geometry: Geometry,
    action_rows: int,
) -> tuple[tuple[Array, Array], Capture]:
    """One layer of both streams."""
    conditions = (None, geometry.condition)

    def norms(name: str) -> list[tuple[Array, Array | None]]:
        return [norm(weights[_name(name, i)], streams[i], conditions[i]) for i in (0, 1)]

    (prefix, _), (suffix, gate) = norms("pre_attention_norm")
    *attended, capture = attention(weights["attn"], prefix, suffix, geometry, action_rows)
    streams = streams[0] + attended[0], layers.residual(streams[1], attended[1], gate)

    def mlp(stream: int, x: Array) -> Array:
        w = weights[_name("mlp", stream)]
        gating = w["gating_einsum"].astype(x.dtype)
        return layers.gated_mlp(x, (gating[0], gating[1]), w["linear"])

    (prefix, _), (suffix, gate) = norms("pre_ffw_norm")
    streams = streams[0] + mlp(0, prefix), layers.residual(streams[1], mlp(1, suffix), gate)
    return streams, capture


class Block(nn.Module):
    """One layer of both streams, shaped for `nn.scan`: (carry, scanned, shared) → (carry, out)."""

    configs: tuple[GemmaConfig, GemmaConfig]
    # Rows at the end of the suffix that are action tokens.
    action_rows: int
    # The layer whose action-to-prefix attention is carried out; None carries nothing.
    capture_layer: int | None
    # Stack the residual streams over the layers.
    hidden: bool
    execution: layers.Execution

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array, Capture | None],
        index: Int[Array, ""],
        geometry: Geometry,
    ) -> tuple[tuple[Array, Array, Capture | None], tuple[Array, Array] | None]:
        prefix, suffix, captured = carry
        pi05 = geometry.condition is not None
        weights = parameters.declare(self, parameters.LAYERS, axis_sizes(self.configs), pi05)
        keep = self.execution.keep_rows
        streams = keep(prefix), keep(suffix)
        streams, capture = layer(weights, streams, geometry, self.action_rows)
        if self.capture_layer is not None:
            captured = jax.tree.map(
                lambda new, old: jnp.where(index == self.capture_layer, new, old), capture, captured
            )
        streams = keep(streams[0]), keep(streams[1])
        return (*streams, captured), streams if self.hidden else None


class Module(nn.Module):
    """Embedder, layers scanned over a leading axis of their parameters, and final norms."""

    configs: tuple[GemmaConfig, GemmaConfig]
    depth: int
    vocab_size: int
    dtype: jnp.dtype
    execution: layers.Execution = layers.DEFAULT_EXECUTION

    def setup(self) -> None:
        sizes = {"vocab": self.vocab_size, "width": self.configs[0].width}
        self.embedder = parameters.Leaves("PaliGemma/llm/embedder", sizes, pi05=False)

    @nn.compact
    def __call__(
        self,
        prefix: Float[Array, "b s d"],
        suffix: Float[Array, "b r t e"],
        geometry: Geometry,
        *,
        action_rows: int = 0,
        capture_layer: int | None = None,
        hidden: bool = False,
    ) -> tuple[Float[Array, "b r t e"], Hidden | None, Capture | None]:
        """Run the layers.

        Returns:
          The normed suffix; the residual streams if `hidden`; the captured attention of
          `capture_layer` (None when that is None).
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
        )(self.configs, action_rows, capture_layer, hidden, self.execution, name="layers")
        embedded = prefix, suffix
        (_, suffix, captured), stacked = scanned(
            (prefix, suffix, captured), jnp.arange(self.depth), geometry
        )
        # openpi's tree has the prefix's final norm too, though nothing reads its output.
        names = ("final_norm", "final_norm_1")
        pi05 = geometry.condition is not None
        sizes = axis_sizes(self.configs)
        norms = parameters.declare(self, "PaliGemma/llm", sizes, pi05, names)
        suffix, _ = norm(norms["final_norm_1"], suffix, geometry.condition)
        if not hidden:
            return suffix, None, captured
        stacked = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), embedded, stacked)
        return suffix, Hidden(*stacked), captured

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Scaled embeddings of prompt tokens in the compute dtype."""
        table = self.embedder()["input_embedding"]
        return self.execution.keep_columns(layers.embed_tokens(table, tokens, self.dtype))
