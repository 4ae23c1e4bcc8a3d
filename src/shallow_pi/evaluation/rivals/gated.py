"""Inference with a gate on every joint layer and observation: closed layers are not computed.

At batch 1 a closed layer is skipped by `lax.cond`; in a larger batch all are computed and selected,
with the same result. A closed layer leaves no keys and values, and its expert layer goes with it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shallow_pi.evaluation.rivals import rival
from shallow_pi.inference import attention, forward, prepare
from shallow_pi.models import layers, pi0

Gates = Bool[Array, "l b"]


def prefill(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    tokens: Float[Array, "b s d"],
    valid: Bool[Array, "b s"],
    state: Float[Array, "b ad"],
    gates: Gates,
) -> tuple[attention.Cache, Bool[Array, "b s"]]:
    """Buffers with the keys and values of the prefix, and behind it of π0's state."""
    stack = prepared.prefix
    cache, valid = empty(config, tokens, valid, len(stack))
    positions = jnp.cumsum(valid, axis=1)[:, : tokens.shape[1]] - 1
    rope = layers.rope_table(positions, config.backbone.head_dim)
    _, cache = run(config, stack, tokens, cache, 0, rope, valid[:, None], None, gates)
    return append_state(config, prepared, state, cache, valid, gates)


def empty(
    config: pi0.Pi0Config, tokens: Float[Array, "b s d"], valid: Bool[Array, "b s"], depth: int
) -> tuple[attention.Cache, Bool[Array, "b n"]]:
    """Buffers of `depth` layers without keys, and the mask of the prefix's slots."""
    length = prepare.cache_length(config)
    cache = [forward.blank(config, tokens, length)] * depth
    return cache, jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])))


def append_state(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    state: Float[Array, "b ad"],
    cache: attention.Cache,
    valid: Bool[Array, "b s"],
    gates: Gates,
) -> tuple[attention.Cache, Bool[Array, "b s"]]:
    """`forward.append_state` through the open layers; nothing for π0.5."""
    if config.pi05:
        return cache, valid
    token = layers.dense(prepared.params["state_proj"], state)[:, None].astype(config.dtype)
    position = jnp.sum(valid, axis=1, keepdims=True)
    rope = layers.rope_table(position, config.backbone.head_dim)
    slot = config.prefix_tokens
    valid = jax.lax.dynamic_update_slice(valid, jnp.ones((len(valid), 1), bool), (0, slot))
    _, cache = run(config, prepared.suffix, token, cache, slot, rope, valid[:, None], None, gates)
    return cache, valid


def suffix(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    tokens: Float[Array, "b t e"],
    cache: attention.Cache,
    valid: Bool[Array, "b s"],
    tables: prepare.Tables,
    gates: Gates,
) -> tuple[Float[Array, "b t e"], attention.Cache]:
    """`forward.run_suffix` through the open layers."""
    slot, rope, mask = forward.suffix_geometry(config, valid, tokens.shape[1])
    modulation = None if tables.modulation is None else tables.modulation[0]
    return run(config, prepared.suffix, tokens, cache, slot, rope, mask, modulation, gates)


def run(
    config: pi0.Pi0Config,
    stack: prepare.Stack,
    x: Float[Array, "b t d"],
    cache: attention.Cache,
    slot: int,
    rope: tuple[Array, Array],
    mask: Bool[Array, "b m s"],
    modulation: Float[Array, "l 2 3 e"] | None,
    gates: Gates,
) -> tuple[Float[Array, "b t d"], attention.Cache]:
    """`forward.run_layers` through the open layers of as many as the stack has."""
    one, buffers = pi0.at_depth(config, 1), list(cache)
    assert isinstance(stack, list), "rivals prepare lists of layers"
    for i, layer in enumerate(stack):

        def whole(
            x: Array, buffer: attention.KeysValues, i: int = i, layer: prepare.Layer = layer
        ) -> tuple[Array, attention.KeysValues]:
            given = None if modulation is None else modulation[i : i + 1]
            behind, (after,) = forward.run_layers(
                one, [layer], x, [buffer], slot, rope, mask, given, "xla"
            )
            return behind, after

        if len(x) == 1:
            x, buffers[i] = jax.lax.cond(
                gates[i, 0], whole, lambda x, buffer: (x, buffer), x, buffers[i]
            )
        else:
            behind, buffers[i] = whole(x, buffers[i])
            x = jnp.where(gates[i][:, None, None], behind, x)
    return x, buffers


def sample(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    tokens: Float[Array, "b s d"],
    valid: Bool[Array, "b s"],
    state: Float[Array, "b ad"],
    noise: Float[Array, "b ah ad"],
    gates: Gates,
) -> Float[Array, "b ah ad"]:
    """Sample with the same gates at all integration steps."""
    cache, valid = prefill(config, prepared, tokens, valid, state, gates)

    def velocity(
        x_t: Array, tables: prepare.Tables, cache: attention.Cache
    ) -> tuple[Array, attention.Cache]:
        own = forward.embed_suffix(config, prepared, x_t, tables)
        behind, cache = suffix(config, prepared, own, cache, valid, tables, gates)
        return forward.read_velocity(config, prepared, behind, tables), cache

    return rival.integrate(velocity, prepared, noise, cache)
