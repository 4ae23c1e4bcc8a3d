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
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.models import captures, layer_table, layers, parameters

# A tree of parameters.
Weights = dict[str, PyTree[Array]]


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


class Hidden(NamedTuple):
    """The residual streams around every layer: index i enters layer i, the last one leaves all."""

    prefix: Float[Array, "l+1 b s d"]
    suffix: Float[Array, "l+1 b r t e"]


class KeysValues(NamedTuple):
    """A prefix's keys and values of every expert layer: all that the suffix ever reads of it."""

    keys: Float[Array, "l b s k h"]
    values: Float[Array, "l b s k h"]


class Outputs(NamedTuple):
    """Result of the tower: the normed suffix and, on request, attention maps and hidden states."""

    suffix: Float[Array, "b r t e"]
    hidden: Hidden | None
    capture: captures.Capture | None
    cache: KeysValues | None


class Geometry(NamedTuple):
    """Inputs of every layer that no layer changes."""

    prefix_valid: Bool[Array, "b s"]
    prefix_rope: tuple[Array, Array]
    suffix_rope: tuple[Array, Array]
    suffix_mask: Bool[Array, "t t"]
    # Condition of the adaptive norms (π0.5).
    condition: Float[Array, "b r e"] | None
    # Flash attention of the prefix: its keys in an order that begins with those that exist. None:
    # `layers.attend`.
    order: Int[Array, "b s"] | None = None

    @classmethod
    def create(
        cls,
        prefix_valid: Bool[Array, "b s"],
        head_dim: int,
        suffix_len: int,
        action_rows: int,
        condition: Float[Array, "b r e"] | None = None,
        prefix_attention: layers.Kernel = "xla",
        positions: tuple[Int[Array, "b s"] | None, Int[Array, " b"]] | None = None,
    ) -> "Geometry":
        """Positions count valid tokens; the suffix, all valid, goes on where the prefix ends.

        Where tokens are left out they are given: the prefix's, and the suffix's first one.
        """
        in_prefix, end = positions or (None, jnp.sum(prefix_valid, axis=1))
        if in_prefix is None:
            in_prefix = jnp.cumsum(prefix_valid, axis=1) - 1
        prefix_rope = layers.rope_table(in_prefix, head_dim)
        mask = jnp.asarray(suffix_mask(suffix_len, action_rows))
        rope = layers.rope_table(end[:, None, None] + jnp.arange(suffix_len)[None, None], head_dim)
        order = None
        if prefix_attention == "cudnn":
            order = jnp.argsort(~prefix_valid, axis=1, stable=True)
        return cls(prefix_valid, prefix_rope, rope, mask, condition, order)


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


def _project(
    weights: Weights, stream: int, x: Float[Array, "*b t d"], rope: tuple[Array, Array]
) -> tuple[Array, tuple[Array, Array]]:
    """A stream's queries, and its keys and values."""
    to_queries = weights[_name("q_einsum", stream)]["w"].astype(x.dtype)
    to_both = weights[_name("kv_einsum", stream)]["w"].astype(x.dtype)
    queries = jnp.einsum("...TD,NDH->...TNH", x, to_queries)
    keys, values = jnp.einsum("...SD,CKDH->C...SKH", x, to_both)
    queries, keys = layers.split_heads(queries, keys, rope)
    return queries, (keys, values)


def _finish(
    weights: Weights,
    stream: int,
    x: Float[Array, "*b t d"],
    mixed: Float[Array, "*b t k g h"],
    gate: Array | None,
    condition: Array | None,
) -> Float[Array, "*b t d"]:
    """The rest of a stream's layer: out of the heads, then the MLP."""
    w = weights["attn"][_name("attn_vec_einsum", stream)]["w"].astype(mixed.dtype)
    heads = mixed.reshape(*mixed.shape[:-3], *w.shape[:2])
    x = layers.residual(x, jnp.einsum("...TNH,NHD->...TD", heads, w), gate)
    normed, gate = norm(weights[_name("pre_ffw_norm", stream)], x, condition)
    mlp = weights[_name("mlp", stream)]
    gating = mlp["gating_einsum"].astype(x.dtype)
    return layers.residual(x, layers.gated_mlp(normed, (gating[0], gating[1]), mlp["linear"]), gate)


def prefix_keys_values(
    weights: Weights, x: Float[Array, "b s d"], geometry: Geometry
) -> tuple[Array, Array]:
    """The keys and values of a prefix layer that has nothing else."""
    normed, _ = norm(weights["pre_attention_norm"], x, None)
    to_both = weights["attn"]["kv_einsum"]["w"].astype(x.dtype)
    keys, values = jnp.einsum("...SD,CKDH->C...SKH", normed, to_both)
    return layers.apply_rope(keys, geometry.prefix_rope), values


def _rows(x: Float[Array, "s k h"], order: Int[Array, " s"]) -> Float[Array, "s k h"]:
    return x.at[order].get(unique_indices=True)


def prefix_layer(
    weights: Weights, x: Float[Array, "b s d"], geometry: Geometry
) -> tuple[Float[Array, "b s d"], tuple[Array, Array], Float[Array, "b s k g h"]]:
    """One layer of the prefix, its keys and values for the suffix, and its queries."""
    normed, _ = norm(weights["pre_attention_norm"], x, None)
    queries, cached = _project(weights["attn"], 0, normed, geometry.prefix_rope)
    if geometry.order is None:
        mixed = layers.attend(queries, *cached, geometry.prefix_valid[:, None])
    else:
        keys, values = (jax.vmap(_rows)(leaf, geometry.order) for leaf in cached)
        # Where nothing exists, nothing reads the result.
        lengths = jnp.maximum(jnp.sum(geometry.prefix_valid, axis=1), 1)
        mixed = layers.attend_flash(queries, keys, values, lengths)
    return _finish(weights, 0, x, mixed, None, None), cached, queries


def suffix_layer(
    weights: Weights,
    x: Float[Array, "b r t e"],
    cached: tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]],
    geometry: Geometry,
) -> tuple[Float[Array, "b r t e"], Float[Array, "b r t k g h"]]:
    """One layer of the suffix over that layer's prefix keys and values, and its queries."""
    normed, gate = norm(weights["pre_attention_norm_1"], x, geometry.condition)
    queries, own = _project(weights["attn"], 1, normed, geometry.suffix_rope)
    mixed = layers.attend_both(queries, cached, own, geometry.prefix_valid, geometry.suffix_mask)
    return _finish(weights, 1, x, mixed, gate, geometry.condition), queries


def joint_layer(
    kind: layer_table.Kind,
    weights: Weights,
    prefix: Float[Array, "b s d"],
    suffix: Float[Array, "b r t e"],
    geometry: Geometry,
) -> tuple[Array, Array, tuple[Array, Array] | None, tuple[Array | None, Array | None]]:
    """One layer of both streams: the streams, the prefix's keys and values, the queries of both.

    The last ones are None where the layer lacks them.
    """
    cached = asking = queries = None
    if kind.backbone == "whole":
        prefix, cached, asking = prefix_layer(weights, prefix, geometry)
    elif kind.backbone == "keys_values":
        cached = prefix_keys_values(weights, prefix, geometry)
    if kind.expert == "whole":
        assert cached is not None, "a table has no expert layer without its backbone layer"
        suffix, queries = suffix_layer(weights, suffix, cached, geometry)
    return prefix, suffix, cached, (asking, queries)


def suffix_weights(llm: Weights) -> Weights:
    """The part of the tower's parameters that the suffix reads: the action expert's."""

    def own(tree: Weights) -> Weights:
        return {name: leaf for name, leaf in tree.items() if name.endswith("_1")}

    scanned = own(llm["layers"]) | {"attn": own(llm["layers"]["attn"])}
    return own(llm) | {"layers": scanned}


def suffix_over_cache(
    weights: Weights,
    kinds: Sequence[layer_table.Kind],
    suffix: Float[Array, "b r t e"],
    cache: KeysValues,
    geometry: Geometry,
    keep: Callable[[Array], Array],
) -> Float[Array, "b r t e"]:
    """All layers of the suffix over a cached prefix, and the final norm; `Module`'s numbers.

    `weights` are those of `suffix_weights`; `keep` keeps the batch sharded
    (`layers.Execution.keep_rows`).
    """
    own = np.array([kind.expert == "whole" for kind in kinds])
    stack = weights["layers"]
    if not own.all():
        stack = jax.tree.map(lambda leaf: leaf[np.flatnonzero(own)], stack)

    def step(x: Array, scanned: tuple[Weights, KeysValues]) -> tuple[Array, None]:
        layer_weights, (keys, values) = scanned
        return suffix_layer(layer_weights, keep(x), (keys, values), geometry)[0], None

    suffix, _ = jax.lax.scan(step, suffix.astype(cache.keys.dtype), (stack, cache))
    return norm(weights["final_norm_1"], suffix, geometry.condition)[0]


class Block(nn.Module):
    """One layer of both streams, shaped for `nn.scan`: (carry, scanned, shared) → (carry, out)."""

    configs: tuple[GemmaConfig, GemmaConfig]
    # The attention that is carried out; None carries nothing.
    asked: captures.Asked | None
    # Stack the residual streams over the layers.
    hidden: bool
    # Stack the prefix's keys and values over the layers.
    cache: bool
    execution: layers.Execution

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array, captures.Capture | None],
        index: Int[Array, ""],
        geometry: Geometry,
    ) -> tuple[
        tuple[Array, Array, captures.Capture | None],
        tuple[tuple[Array, Array] | None, tuple[Array, Array] | None],
    ]:
        prefix, suffix, captured = carry
        pi05 = geometry.condition is not None
        weights = parameters.declare(self, parameters.LAYERS, axis_sizes(self.configs), pi05)
        keep = self.execution.keep_rows
        prefix, suffix, cached, queries = joint_layer(
            layer_table.WHOLE, weights, keep(prefix), keep(suffix), geometry
        )
        assert cached is not None, "a whole layer has keys and values"
        if (asked := self.asked) is not None:
            capture = captures.Capture.create(asked, cached[0], *queries)
            captured = jax.tree.map(
                lambda new, old: jnp.where(index == asked.layer, new, old), capture, captured
            )
        streams = keep(prefix), keep(suffix)
        stacked = streams if self.hidden else None, cached if self.cache else None
        return (*streams, captured), stacked


# The suffix that leaves the layers; the capture; on request the stacked streams and the cache.
_Run = tuple[Array, captures.Capture | None, tuple[Array, Array] | None, tuple[Array, Array] | None]


class Module(nn.Module):
    """Embedder, layers scanned over a leading axis of their parameters, and final norms."""

    configs: tuple[GemmaConfig, GemmaConfig]
    depth: int
    vocab_size: int
    dtype: jnp.dtype
    execution: layers.Execution = layers.DEFAULT_EXECUTION
    # The halves of each layer; None: all are whole, and scanned instead of unrolled.
    kinds: tuple[layer_table.Kind, ...] | None = None

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
        asked: captures.Asked | None = None,
        hidden: bool = False,
        cache: bool = False,
    ) -> Outputs:
        """Run the layers; residual streams, one layer's attention and the cache on request."""
        prefix = prefix.astype(self.dtype)
        suffix = suffix.astype(self.dtype)
        embedded, pi05 = (prefix, suffix), geometry.condition is not None
        run = self._scan if self.kinds is None else self._loop
        suffix, captured, streams, cached = run(*embedded, geometry, asked, hidden, cache)
        # openpi's tree has the prefix's final norm too, though nothing reads its output.
        names = ("final_norm", "final_norm_1")
        sizes = axis_sizes(self.configs)
        norms = parameters.declare(self, "PaliGemma/llm", sizes, pi05, names)
        suffix, _ = norm(norms["final_norm_1"], suffix, geometry.condition)
        stacked = None
        if hidden:
            both = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), embedded, streams)
            stacked = Hidden(*both)
        return Outputs(suffix, stacked, captured, None if cached is None else KeysValues(*cached))

    def _scan(
        self,
        prefix: Float[Array, "b s d"],
        suffix: Float[Array, "b r t e"],
        geometry: Geometry,
        asked: captures.Asked | None,
        hidden: bool,
        cache: bool,
    ) -> _Run:
        """All layers, which are whole, in one scan."""
        captured = None
        if asked is not None:
            c = self.configs[0]
            k, g, h = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
            keys = jnp.zeros((*prefix.shape[:2], k, h), self.dtype)
            heads = (jnp.zeros((*x.shape[:-1], k, g, h), self.dtype) for x in (prefix, suffix))
            captured = captures.Capture.create(asked, keys, *heads)
        scanned = nn.scan(
            self.execution.layer(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
        )(self.configs, asked, hidden, cache, self.execution, name="layers")
        (_, suffix, captured), (streams, cached) = scanned(
            (prefix, suffix, captured), jnp.arange(self.depth), geometry
        )
        return suffix, captured, streams, cached

    def _loop(
        self,
        prefix: Float[Array, "b s d"],
        suffix: Float[Array, "b r t e"],
        geometry: Geometry,
        asked: captures.Asked | None,
        hidden: bool,
        cache: bool,
    ) -> _Run:
        """All layers one after the other, each computing only the halves it has."""
        if self.execution.offloaded:
            raise ValueError("layers that are cut or unrolled are not offloaded.")
        keep, captured = self.execution.keep_rows, None
        sizes = {**axis_sizes(self.configs), "layers": self.depth}
        pi05 = geometry.condition is not None
        stack = parameters.Leaves(parameters.LAYERS, sizes, pi05, stacked=True, name="layers")()
        streams, read, kinds = [], [], self.kinds or ()
        if self.execution.unroll:
            attending = asked.layer if asked is not None and asked.prefix_rows else None
            kinds = layer_table.read(kinds, attending)
        weights = layer_table.unstack(stack, self.depth)
        for i, (kind, own) in enumerate(zip(kinds, weights, strict=True)):
            layer = self.execution.unrolled(functools.partial(joint_layer, kind))
            prefix, suffix, cached, queries = layer(own, keep(prefix), keep(suffix), geometry)
            streams.append((prefix, suffix))
            if kind.expert == "whole":
                read.append(cached)
            if asked is not None and i == asked.layer:
                captured = captures.Capture.create(
                    asked, None if cached is None else cached[0], *queries
                )

        def together(parts: list[PyTree]) -> PyTree:
            return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)

        held = together(read) if cache else None
        return keep(suffix), captured, together(streams) if hidden else None, held

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Scaled embeddings of prompt tokens in the compute dtype."""
        table = self.embedder()["input_embedding"]
        return self.execution.keep_columns(layers.embed_tokens(table, tokens, self.dtype))
