"""The prefix and one integration step's velocity, from prepared weights (see `prepare`).

Each stream is a plain stack of layers, run by one function. A layer's keys and values are in
buffers: the prefix from slot 0, then π0's state, then the actions, whose slots every integration
step overwrites (see `attention`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from shallow_pi.inference import attention, image_tower, prepare
from shallow_pi.models import gemma, layers, pi0, prefixes
from shallow_pi.models import observation as observations


def prefill(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    observation: observations.Observation,
    kernel: attention.Kernel = "xla",
    tower_kernel: attention.Kernel = "xla",
) -> tuple[attention.Cache, Bool[Array, "b s"]]:
    """Buffers with the prefix's keys and values of every layer, and a mask of the slots in use."""
    prefix = embed_prefix(config, prepared, observation, tower_kernel)
    return run_prefix(config, prepared, prefix.tokens, prefix.valid, prefix.positions, kernel)


def run_prefix(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    tokens: Float[Array, "b s d"],
    valid: Bool[Array, "b s"],
    positions: Int[Array, "b s"],
    kernel: attention.Kernel = "xla",
) -> tuple[attention.Cache, Bool[Array, "b n"]]:
    """`prefill` with the prefix's tokens, which of them exist, and their positions."""
    rope = layers.rope_table(positions, config.backbone.head_dim)
    length = prepare.cache_length(config)
    empty = blank(config, tokens, length)
    cache: attention.Cache = [empty] * config.depth
    if not isinstance(prepared.prefix, list):
        cache = (jnp.zeros((config.depth, *empty[0].shape), tokens.dtype),) * 2
    valid = jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])))
    _, cache = run_layers(
        config, prepared.prefix, tokens, cache, 0, rope, valid[:, None], None, kernel
    )
    return cache, valid


def blank(
    config: pi0.Pi0Config, tokens: Float[Array, "b s d"], length: int
) -> attention.KeysValues:
    """Empty keys and values of one layer, of this many slots, for these tokens' batch and dtype."""
    c = config.backbone
    empty = jnp.zeros((len(tokens), length, c.num_kv_heads, c.head_dim), tokens.dtype)
    return empty, empty


def embed_prefix(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    observation: observations.Observation,
    kernel: attention.Kernel = "xla",
) -> prefixes.Prefix:
    """Image tokens of every camera, encoded as one batch, then prompt tokens."""
    images = pi0.images(config, observation)
    seen = image_tower.encode(config.image, prepared.image, images, kernel)
    table = prepared.params["PaliGemma"]["llm"]["embedder"]["input_embedding"]
    words = layers.embed_tokens(table, observation.tokenized_prompt, seen.dtype)
    seen = seen.reshape(len(words), -1, config.backbone.width)
    weights = prepared.params["image_scorer"] if config.scored_tokens else None
    return prefixes.join(config, observation, seen, words, weights)


def append_state(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    state: Float[Array, "b ad"],
    cache: attention.Cache,
    valid: Bool[Array, "b s"],
    kernel: attention.Kernel = "xla",
) -> tuple[attention.Cache, Bool[Array, "b s"]]:
    """The buffers with π0's state token after the prefix: it sees the prefix and itself alone.

    π0.5 has no such token.
    """
    if config.pi05:
        return cache, valid
    token = layers.dense(prepared.params["state_proj"], state)[:, None].astype(config.dtype)
    rope = layers.rope_table(
        prefixes.positions_taken(config, valid)[:, None], config.expert.head_dim
    )
    slot = config.prefix_tokens
    valid = jax.lax.dynamic_update_slice(valid, jnp.ones((len(valid), 1), bool), (0, slot))
    _, cache = run_layers(
        config, prepared.suffix, token, cache, slot, rope, valid[:, None], None, kernel
    )
    return cache, valid


def step_buffers(
    config: pi0.Pi0Config, cache: attention.Cache, buffers: attention.Buffers, count: int
) -> attention.Cache:
    """The cache of `prefill` or `append_state` as the steps' buffers, for a count of tokens."""
    if buffers == "apart":
        return cache
    groups = config.expert.num_heads // config.expert.num_kv_heads
    queries = count * groups if buffers == "joined with queries" else 0
    rows = prepare.cache_length(config, queries)
    if isinstance(cache, list):
        return [attention.join(pair, rows) for pair in cache]
    return attention.join(cache, rows)


def velocity(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    cache: attention.Cache,
    valid: Bool[Array, "b s"],
    x_t: Float[Array, "b ah ad"],
    tables: prepare.Tables,
    state: Float[Array, "b ad"] | None = None,
    kernel: attention.Kernel = "xla",
) -> tuple[Float[Array, "b ah ad"], attention.Cache]:
    """The velocity at one time, float32, and the buffers for the next one.

    `cache` and `valid` are those of `prefill` or `append_state`; the cache may have gone through
    `step_buffers` or an earlier time's velocity. `tables` hold this one time (n = 1), and `state`
    is π0's if its token is not in the cache.
    """
    tokens = embed_suffix(config, prepared, x_t, tables, state)
    x, cache = run_suffix(config, prepared, tokens, cache, valid, tables, kernel)
    return read_velocity(config, prepared, x, tables), cache


def embed_suffix(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    x_t: Float[Array, "b ah ad"],
    tables: prepare.Tables,
    state: Float[Array, "b ad"] | None = None,
) -> Float[Array, "b t e"]:
    """The suffix's tokens before the first layer; arguments as of `velocity`."""
    params = prepared.params
    tokens = layers.dense(params["action_in_proj"], x_t)
    if not config.pi05:
        assert tables.hidden is not None, "π0's tables hold its time's share"
        kernel_half = params["action_time_mlp_in"]["kernel"][: config.expert.width]
        hidden = nn.swish(layers.multiply(tokens, kernel_half) + tables.hidden[:, None])
        tokens = layers.dense(params["action_time_mlp_out"], hidden)
    if state is not None:
        token = layers.dense(params["state_proj"], state)[:, None]
        tokens = jnp.concatenate([token.astype(tokens.dtype), tokens], axis=1)
    return tokens.astype(config.dtype)


def run_suffix(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    tokens: Float[Array, "b t e"],
    cache: attention.Cache,
    valid: Bool[Array, "b s"],
    tables: prepare.Tables,
    kernel: attention.Kernel = "xla",
) -> tuple[Float[Array, "b t e"], attention.Cache]:
    """The suffix's tokens behind the last layer, and the buffers with their keys and values."""
    slot, rope, mask = suffix_geometry(config, valid, tokens.shape[1])
    return run_layers(
        config,
        prepared.suffix,
        tokens,
        cache,
        slot,
        rope,
        mask,
        None if tables.modulation is None else tables.modulation[0],
        kernel,
    )


def suffix_geometry(
    config: pi0.Pi0Config, valid: Bool[Array, "b s"], count: int
) -> tuple[int, tuple[Array, Array], Bool[Array, "b m s"]]:
    """First slot, rotary table and mask of the suffix's tokens.

    `count` includes the actions, and π0's state if it is not in the cache.
    """
    with_state = count > config.action_horizon
    slot = config.prefix_tokens + (not config.pi05 and not with_state)
    positions = prefixes.positions_taken(config, valid)[:, None] + jnp.arange(count)[None]
    # The state does not see the actions; without it, one row stands for all.
    rows = slice(None) if with_state else slice(-1, None)
    own = jnp.asarray(gemma.suffix_mask(count, config.action_horizon)[rows])[None]
    mask = jnp.broadcast_to(valid[:, None], (len(valid), own.shape[1], valid.shape[1]))
    own = jnp.broadcast_to(own, (len(valid), *own.shape[1:]))
    mask = jax.lax.dynamic_update_slice(mask, own, (0, 0, slot))
    return slot, layers.rope_table(positions, config.expert.head_dim), mask


def read_velocity(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    x: Float[Array, "b t e"],
    tables: prepare.Tables,
) -> Float[Array, "b ah ad"]:
    """The velocity, float32, from the suffix's tokens behind the last layer."""
    params, scale = prepared.params, None
    if tables.final is None:
        scale = 1 + params["PaliGemma"]["llm"]["final_norm_1"]["scale"].astype(jnp.float32)
    given = None if tables.final is None else tables.final[0]
    x, _ = _norm(x[:, -config.action_horizon :], scale, given)
    return layers.dense(params["action_out_proj"], x).astype(jnp.float32)


def run_layers(
    config: pi0.Pi0Config,
    stack: prepare.Stack,
    x: Float[Array, "b t d"],
    cache: attention.Cache,
    slot: int,
    rope: tuple[Array, Array],
    mask: Bool[Array, "b m s"],
    modulation: Float[Array, "l 2 3 e"] | None,
    kernel: attention.Kernel,
) -> tuple[Array, attention.Cache]:
    """All layers of one stream, which write their keys and values into the cache from a slot."""
    if isinstance(stack, list):
        cache = list(cache)
        for i, layer in enumerate(stack):
            if not layer.qkv:  # The stream lacks this layer.
                continue
            if layer.out is None:  # It has its keys and values alone.
                cache[i] = attention.write(cache[i], _keys_values(config, x, layer, rope), slot)
                continue
            given = None if modulation is None else modulation[i]
            queries, own, gate = _project(config, x, layer, rope, given)
            mixed, cache[i] = attention.update_and_attend(
                queries, own, cache[i], mask, slot, kernel
            )
            x = _finish(x, mixed, layer, gate, given)
        return x, cache

    def step(
        carry: tuple[Array, attention.Held], scanned: tuple[Array, prepare.Layer, Array | None]
    ) -> tuple[tuple[Array, attention.Held], None]:
        (x, cache), (i, layer, given) = carry, scanned
        queries, own, gate = _project(config, x, layer, rope, given)
        mixed, cache = attention.update_and_attend(queries, own, cache, mask, slot, kernel, i)
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
    """Scaled queries (b, t, k, g, h), own keys and values (b, t, k, h), and the residual's gate."""
    c = config.backbone
    n, k, h = c.num_heads, c.num_kv_heads, c.head_dim
    normed, gate = _norm(x, layer.attention_norm, None if modulation is None else modulation[0])
    parts = layers.products(normed, layer.qkv, (n * h, k * h, k * h))
    queries, keys, values = (part.reshape(*x.shape[:2], -1, h) for part in parts)
    queries, keys = layers.split_heads(queries, keys, rope)
    return queries, (keys, values), gate


def _keys_values(
    config: pi0.Pi0Config, x: Float[Array, "b t d"], layer: prepare.Layer, rope: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Keys and values of a layer of the prefix that has nothing else."""
    k, h = config.backbone.num_kv_heads, config.backbone.head_dim
    normed, _ = _norm(x, layer.attention_norm, None)
    parts = layers.products(normed, layer.qkv, (k * h, k * h))
    keys, values = (part.reshape(*x.shape[:2], k, h) for part in parts)
    return layers.apply_rope(keys, rope), values


def _finish(
    x: Float[Array, "b t d"],
    mixed: Float[Array, "b t k g h"],
    layer: prepare.Layer,
    gate: Array | None,
    modulation: Float[Array, "2 3 e"] | None,
) -> Float[Array, "b t d"]:
    """Out of the heads, then the MLP."""
    assert layer.out is not None, "the layer is whole"
    assert layer.down is not None, "the layer is whole"
    mixed = mixed.reshape(*x.shape[:2], -1)
    x = layers.residual(x, layers.multiply(mixed, layer.out), gate)
    normed, gate = _norm(x, layer.mlp_norm, None if modulation is None else modulation[1])
    return layers.residual(x, layers.gated_mlp(normed, layer.gate_up, layer.down), gate)


def _norm(
    x: Float[Array, "b t d"],
    scale: Float[Array, " d"] | None,
    modulation: Float[Array, "3 d"] | None,
) -> tuple[Float[Array, "b t d"], Float[Array, "1 1 d"] | None]:
    """RMSNorm, plain or adaptive, and the residual's gate of the adaptive one."""
    if modulation is None:
        return layers.rms_norm(x, scale)
    parts = tuple(layers.row(modulation[i], 3) for i in range(3))
    return layers.rms_norm(x, None, (parts[0], parts[1], parts[2]))
