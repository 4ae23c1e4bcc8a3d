"""Prefix and velocity from prepared weights: what `sampler` integrates (see `prepare`).

Each stream is a plain stack of layers here. Both kinds of layer are one function: RMSNorm, plain or
adaptive, grouped-query attention over a cache and over the stream itself, gated MLP. Letters in
einsums: B batch, T query, S key/value, K kv heads, G queries per kv head, H head dim.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shallow_pi.models import gemma, layers, pi0, prepare
from shallow_pi.models import observation as observations


def prefill(
    config: pi0.Pi0Config, prepared: prepare.Prepared, observation: observations.Observation
) -> tuple[Any, Bool[Array, "b s"]]:
    """Keys and values of the prefix in every layer, and which of its tokens exist."""
    params = {"params": {"PaliGemma": prepared.params["PaliGemma"]}}
    embedded: Any = pi0.Pi0(config).apply(params, observation, method="embed_prefix")
    tokens, valid = embedded
    rope = layers.rope_table(jnp.cumsum(valid, axis=1) - 1, config.backbone.head_dim)
    _, cache = _tower(
        config, prepared.prefix, tokens.astype(config.dtype), None, rope, valid[:, None, None], None
    )
    return cache, valid


def append_state(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    state: Float[Array, "b ad"],
    cache: Any,
    valid: Bool[Array, "b s"],
) -> tuple[Any, Bool[Array, "b s+1"]]:
    """The cache with π0's state token at its end: it sees the prefix and itself alone."""
    token = prepare.dense(prepared.params["state_proj"], state)[:, None].astype(config.dtype)
    rope = layers.rope_table(jnp.sum(valid, axis=1, keepdims=True), config.expert.head_dim)
    valid = jnp.concatenate([valid, jnp.ones((valid.shape[0], 1), bool)], axis=1)
    _, own = _tower(config, prepared.suffix, token, cache, rope, valid[:, None, None], None)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-3), cache, own), valid


def velocity(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    cache: Any,
    valid: Bool[Array, "b s"],
    x_t: Float[Array, "b ah ad"],
    tables: prepare.Tables,
    state: Float[Array, "b ad"] | None = None,
) -> Float[Array, "b ah ad"]:
    """The velocity at one time, float32.

    Args:
      config: the model.
      prepared: its weights.
      cache: of `prefill` or `append_state`.
      valid: which of the cache's tokens exist.
      x_t: noisy actions.
      tables: of this one time (n = 1).
      state: π0's state, where its token is not in the cache.
    """
    params = prepared.params
    tokens = prepare.dense(params["action_in_proj"], x_t)
    if not config.pi05:
        assert tables.hidden is not None, "π0's tables hold its time's share"
        kernel = params["action_time_mlp_in"]["kernel"][: config.expert.width]
        hidden = nn.swish(prepare.multiply(tokens, kernel) + tables.hidden[:, None])
        tokens = prepare.dense(params["action_time_mlp_out"], hidden)
    if state is not None:
        token = prepare.dense(params["state_proj"], state)[:, None]
        tokens = jnp.concatenate([token.astype(tokens.dtype), tokens], axis=1)
    count = tokens.shape[1]
    positions = jnp.sum(valid, axis=1)[:, None] + jnp.arange(count)[None]
    own = jnp.asarray(gemma.suffix_mask(count, config.action_horizon))[None]
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(valid[:, None], (valid.shape[0], count, valid.shape[1])),
            jnp.broadcast_to(own, (valid.shape[0], count, count)),
        ],
        axis=-1,
    )
    x, _ = _tower(
        config,
        prepared.suffix,
        tokens.astype(config.dtype),
        cache,
        layers.rope_table(positions, config.expert.head_dim),
        mask[:, None],
        None if tables.modulation is None else tables.modulation[0],
    )
    x = x[:, -config.action_horizon :]
    if tables.final is None:
        scale = 1 + params["PaliGemma"]["llm"]["final_norm_1"]["scale"].astype(jnp.float32)
        x, _ = _norm(x, scale, None)
    else:
        x, _ = _norm(x, None, tables.final[0])
    return prepare.dense(params["action_out_proj"], x).astype(jnp.float32)


def _tower(
    config: pi0.Pi0Config,
    stack: Any,
    x: Float[Array, "b t d"],
    cache: Any,
    rope: tuple[Array, Array],
    mask: Bool[Array, "b 1 t s"],
    modulation: Float[Array, "l 2 3 e"] | None,
) -> tuple[Array, Any]:
    """All layers of one stream; returns its own keys and values, by layer or stacked."""
    if isinstance(stack, list):
        own = []
        for i, layer in enumerate(stack):
            given = None if modulation is None else modulation[i]
            x, keys_values = _block(
                config, x, layer, None if cache is None else cache[i], rope, mask, given
            )
            own.append(keys_values)
        return x, own

    def step(x: Array, scanned: Any) -> tuple[Array, Any]:
        layer, before, given = scanned
        return _block(config, x, layer, before, rope, mask, given)

    return jax.lax.scan(step, x, (stack, cache, modulation))


def _block(
    config: pi0.Pi0Config,
    x: Float[Array, "b t d"],
    layer: prepare.Layer,
    cache: tuple[Array, Array] | None,
    rope: tuple[Array, Array],
    mask: Bool[Array, "b 1 t s"],
    modulation: Float[Array, "2 3 e"] | None,
) -> tuple[Float[Array, "b t d"], tuple[Array, Array]]:
    c = config.backbone
    n, k, h = c.num_heads, c.num_kv_heads, c.head_dim
    b, t = x.shape[:2]
    first, second = (None, None) if modulation is None else modulation
    normed, gate = _norm(x, layer.attention_norm, first)
    queries, keys, values = _parts(normed, layer.qkv, (n * h, k * h, k * h))
    queries = layers.apply_rope(queries.reshape(b, t, n, h), rope) * jnp.asarray(h**-0.5, x.dtype)
    own = layers.apply_rope(keys.reshape(b, t, k, h), rope), values.reshape(b, t, k, h)
    keys, values = own
    if cache is not None:
        keys, values = (jnp.concatenate(both, axis=1) for both in zip(cache, own, strict=True))
    queries = jnp.moveaxis(queries.reshape(b, t, k, n // k, h), 1, 3)  # b k g t h
    logits = jnp.einsum("BKGTH,BSKH->BKGTS", queries, keys, preferred_element_type=jnp.float32)
    probabilities = layers.softmax(logits, mask[:, None]).astype(values.dtype)
    mixed = jnp.moveaxis(jnp.einsum("BKGTS,BSKH->BKGTH", probabilities, values), 3, 1)
    x = _residual(x, prepare.multiply(mixed.reshape(b, t, n * h), layer.out), gate)
    normed, gate = _norm(x, layer.mlp_norm, second)
    f = layer.down.shape[0]
    gated, up = _parts(normed, layer.gate_up, (f, f))
    return _residual(x, prepare.multiply(nn.gelu(gated) * up, layer.down), gate), own


def _norm(
    x: Float[Array, "b t d"],
    scale: Float[Array, " d"] | None,
    modulation: Float[Array, "3 d"] | None,
) -> tuple[Float[Array, "b t d"], Float[Array, " d"] | None]:
    """RMSNorm, plain or adaptive, with the adaptive one's gate (see `layers.RMSNorm`)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if modulation is None:
        assert scale is not None, "a norm is plain or adaptive"
        return (normed * scale[None, None]).astype(x.dtype), None
    shifted = normed * (1 + modulation[0].astype(jnp.float32))[None, None]
    shifted += modulation[1].astype(jnp.float32)[None, None]
    return shifted.astype(x.dtype), modulation[2]


def _residual(x: Array, y: Array, gate: Array | None) -> Array:
    return x + y if gate is None else x + y * gate[None, None]


def _parts(x: Array, matrices: tuple[Array, ...], sizes: tuple[int, ...]) -> list[Array]:
    """The products of x with the parts of a matrix, however it is stored."""
    if len(matrices) > 1:
        return [prepare.multiply(x, part) for part in matrices]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(prepare.multiply(x, matrices[0]), ends, axis=-1)
