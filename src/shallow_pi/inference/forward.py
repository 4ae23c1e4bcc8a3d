"""Prefix and velocity from prepared weights: what `sampler` integrates (see `prepare`).

Each stream is a plain stack of layers here. Both kinds of layer are one function: RMSNorm, plain or
adaptive, grouped-query attention, gated MLP. A layer's keys and values are in one buffer: the
prefix from slot 0, then π0's state, then the actions, whose slots every integration step overwrites
(see `attention`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shallow_pi.inference import attention, image_tower, prepare
from shallow_pi.models import gemma, layers, pi0
from shallow_pi.models import observation as observations


def prefill(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    observation: observations.Observation,
    kernel: attention.Kernel = "xla",
) -> tuple[Any, Bool[Array, "b s"]]:
    """Buffers with the prefix's keys and values in every layer, and which slots hold tokens."""
    c = config.backbone
    valid = pi0.prefix_valid(config, observation)
    tokens = embed_prefix(config, prepared, observation, kernel)
    rope = layers.rope_table(jnp.cumsum(valid, axis=1) - 1, c.head_dim)
    shape = (len(tokens), prepare.cache_length(config), c.num_kv_heads, c.head_dim)
    empty = jnp.zeros(shape, tokens.dtype)
    cache: Any = [(empty, empty)] * config.depth
    if not isinstance(prepared.prefix, list):
        cache = (jnp.zeros((config.depth, *shape), tokens.dtype),) * 2
    valid = jnp.pad(valid, ((0, 0), (0, shape[1] - valid.shape[1])))
    _, cache = _tower(config, prepared.prefix, tokens, cache, 0, rope, valid[:, None], None, kernel)
    return cache, valid


def embed_prefix(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    observation: observations.Observation,
    kernel: attention.Kernel = "xla",
) -> Float[Array, "b p d"]:
    """Image tokens of every camera as one batch, then prompt tokens."""
    pictures = jnp.stack([observation.images[name] for name in config.cameras], axis=1)
    b, n, *shape = pictures.shape
    seen = image_tower.encode(config.image, prepared.image, pictures.reshape(b * n, *shape), kernel)
    table = prepared.params["PaliGemma"]["llm"]["embedder"]["input_embedding"]
    scale = jnp.asarray(config.backbone.width**0.5, table.dtype)
    words = (table[observation.tokenized_prompt] * scale).astype(seen.dtype)
    return jnp.concatenate([seen.reshape(b, -1, config.backbone.width), words], axis=1)


def append_state(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    state: Float[Array, "b ad"],
    cache: Any,
    valid: Bool[Array, "b s"],
    kernel: attention.Kernel = "xla",
) -> tuple[Any, Bool[Array, "b s"]]:
    """The buffers with π0's state token after the prefix: it sees the prefix and itself alone."""
    token = prepare.dense(prepared.params["state_proj"], state)[:, None].astype(config.dtype)
    rope = layers.rope_table(jnp.sum(valid, axis=1, keepdims=True), config.expert.head_dim)
    slot = config.prefix_tokens
    valid = valid.at[:, slot].set(True)
    _, cache = _tower(
        config, prepared.suffix, token, cache, slot, rope, valid[:, None], None, kernel
    )
    return cache, valid


def velocity(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    cache: Any,
    valid: Bool[Array, "b s"],
    x_t: Float[Array, "b ah ad"],
    tables: prepare.Tables,
    state: Float[Array, "b ad"] | None = None,
    kernel: attention.Kernel = "xla",
) -> tuple[Float[Array, "b ah ad"], Any]:
    """The velocity at one time, float32, and the buffers for the next one.

    Args:
      config: the model.
      prepared: its weights.
      cache: of `prefill` or `append_state`, or of another time's velocity.
      valid: which of its slots hold tokens, of `prefill` or `append_state`.
      x_t: noisy actions.
      tables: of this one time (n = 1).
      state: π0's state, where its token is not in the cache.
      kernel: what computes attention.
    """
    params = prepared.params
    tokens = prepare.dense(params["action_in_proj"], x_t)
    if not config.pi05:
        assert tables.hidden is not None, "π0's tables hold its time's share"
        kernel_half = params["action_time_mlp_in"]["kernel"][: config.expert.width]
        hidden = nn.swish(prepare.multiply(tokens, kernel_half) + tables.hidden[:, None])
        tokens = prepare.dense(params["action_time_mlp_out"], hidden)
    slot = config.prefix_tokens + (not config.pi05 and state is None)
    if state is not None:
        token = prepare.dense(params["state_proj"], state)[:, None]
        tokens = jnp.concatenate([token.astype(tokens.dtype), tokens], axis=1)
    count = tokens.shape[1]
    positions = jnp.sum(valid, axis=1)[:, None] + jnp.arange(count)[None]
    # The state does not see the actions; where it is not here, one row stands for all.
    rows = slice(None) if state is not None else slice(-1, None)
    own = jnp.asarray(gemma.suffix_mask(count, config.action_horizon)[rows])[None]
    mask = jnp.broadcast_to(valid[:, None], (len(valid), own.shape[1], valid.shape[1]))
    own = jnp.broadcast_to(own, (len(valid), *own.shape[1:]))
    mask = jax.lax.dynamic_update_slice(mask, own, (0, 0, slot))
    x, cache = _tower(
        config,
        prepared.suffix,
        tokens.astype(config.dtype),
        cache,
        slot,
        layers.rope_table(positions, config.expert.head_dim),
        mask,
        None if tables.modulation is None else tables.modulation[0],
        kernel,
    )
    x = x[:, -config.action_horizon :]
    if tables.final is None:
        scale = 1 + params["PaliGemma"]["llm"]["final_norm_1"]["scale"].astype(jnp.float32)
        x, _ = _norm(x, scale, None)
    else:
        x, _ = _norm(x, None, tables.final[0])
    return prepare.dense(params["action_out_proj"], x).astype(jnp.float32), cache


def _tower(
    config: pi0.Pi0Config,
    stack: Any,
    x: Float[Array, "b t d"],
    cache: Any,
    slot: int,
    rope: tuple[Array, Array],
    mask: Bool[Array, "b m s"],
    modulation: Float[Array, "l 2 3 e"] | None,
    kernel: attention.Kernel,
) -> tuple[Array, Any]:
    """All layers of one stream, which write their keys and values into the cache from a slot."""
    if isinstance(stack, list):
        cache = list(cache)
        for i, layer in enumerate(stack):
            given = None if modulation is None else modulation[i]
            queries, own, gate = _project(config, x, layer, rope, given)
            cache[i] = attention.write(cache[i], own, slot)
            keys, values = cache[i]
            mixed = attention.attend(queries, keys, values, mask, kernel)
            x = _finish(x, mixed, layer, gate, given)
        return x, cache

    def step(carry: tuple[Array, Any], scanned: Any) -> tuple[tuple[Array, Any], None]:
        (x, cache), (i, layer, given) = carry, scanned
        queries, own, gate = _project(config, x, layer, rope, given)
        cache = attention.write(cache, own, slot, layer=i)
        keys, values = cache
        mixed = attention.attend(queries, keys[i], values[i], mask, kernel)
        return (_finish(x, mixed, layer, gate, given), cache), None

    (x, cache), _ = jax.lax.scan(step, (x, cache), (jnp.arange(config.depth), stack, modulation))
    return x, cache


def _project(
    config: pi0.Pi0Config,
    x: Float[Array, "b t d"],
    layer: prepare.Layer,
    rope: tuple[Array, Array],
    modulation: Float[Array, "2 3 e"] | None,
) -> tuple[Array, tuple[Array, Array], Array | None]:
    """Scaled queries (b, t, n, h), own keys and values (b, t, k, h), and the residual's gate."""
    c = config.backbone
    n, k, h = c.num_heads, c.num_kv_heads, c.head_dim
    b, t = x.shape[:2]
    normed, gate = _norm(x, layer.attention_norm, None if modulation is None else modulation[0])
    queries, keys, values = _parts(normed, layer.qkv, (n * h, k * h, k * h))
    queries = layers.apply_rope(queries.reshape(b, t, n, h), rope) * jnp.asarray(h**-0.5, x.dtype)
    own = layers.apply_rope(keys.reshape(b, t, k, h), rope), values.reshape(b, t, k, h)
    return queries, own, gate


def _finish(
    x: Float[Array, "b t d"],
    mixed: Float[Array, "b t nh"],
    layer: prepare.Layer,
    gate: Array | None,
    modulation: Float[Array, "2 3 e"] | None,
) -> Float[Array, "b t d"]:
    """Out of the heads, then the MLP."""
    x = _residual(x, prepare.multiply(mixed, layer.out), gate)
    normed, gate = _norm(x, layer.mlp_norm, None if modulation is None else modulation[1])
    f = layer.down.shape[0]
    gated, up = _parts(normed, layer.gate_up, (f, f))
    return _residual(x, prepare.multiply(nn.gelu(gated) * up, layer.down), gate)


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
