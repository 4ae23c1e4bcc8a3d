"""The joint pass of both streams with a gate on every layer, and its hidden states.

    h_{k+1} = h_k + g_k · (layer_k(h_k) − h_k)

g_k = 1 is the layer and 0 its absence, each observation with its own. The gradient with respect to
g at 1 says how much a layer matters (`layer_scores.gate`); routers choose g, early exits end it.
The prefix is given as tokens, so that a model may have fewer of them than its cameras give.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from shallow_pi.models import gemma, layers, pi0
from shallow_pi.models import observation as observations


class Prefix(NamedTuple):
    """The tokens of an observation before the first layer."""

    tokens: Float[Array, "b s d"]
    # True for those that exist.
    valid: Bool[Array, "b s"]


class Streams(NamedTuple):
    """Both residual streams behind every layer."""

    prefix: Float[Array, "l b s d"]
    suffix: Float[Array, "l b r t e"]


def embed(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    image_tokens: Float[Array, "b n d"] | None = None,
) -> Prefix:
    """Image tokens, encoded here unless they are given, then prompt tokens."""
    found: Any = pi0.Pi0(config).apply(
        {"params": params}, observation, image_tokens, method="embed_prefix"
    )
    return Prefix(found.tokens, found.valid)


def run(
    config: pi0.Pi0Config,
    params: PyTree,
    prefix: Prefix,
    state: Float[Array, "b ad"],
    x_t: Float[Array, "b r ah ad"],
    t: Float[Array, "b r"],
    gates: Float[Array, "l b"] | None = None,
) -> Streams:
    """All layers over the prefix and r draws of noisy actions.

    There is a gate for each layer and observation; without gates all layers count.
    """
    embedded: Any = pi0.Pi0(config).apply({"params": params}, state, x_t, t, method="embed_suffix")
    suffix, condition = embedded
    head_dim, horizon = config.expert.head_dim, config.action_horizon
    geometry = gemma.Geometry.create(prefix.valid, head_dim, suffix.shape[2], horizon, condition)
    dtype = jnp.dtype(config.dtype)

    def mix(x: Array, y: Array, gate: Array | None) -> Array:
        if gate is None:
            return y
        wide = gate.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return x + wide * (y - x)

    def layer(
        streams: tuple[Array, Array], scanned: tuple[gemma.Weights, Array | None]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        (before, own), (weights, gate) = streams, scanned
        after, cached, _ = gemma.prefix_layer(weights, before, geometry)
        acted, _ = gemma.suffix_layer(weights, own, cached, geometry)
        streams = mix(before, after, gate), mix(own, acted, gate)
        return streams, streams

    start = prefix.tokens.astype(dtype), suffix.astype(dtype)
    scanned = params["PaliGemma"]["llm"]["layers"], gates
    return Streams(*jax.lax.scan(layer, start, scanned)[1])


def condition(
    config: pi0.Pi0Config, params: PyTree, t: Float[Array, "b r"]
) -> Float[Array, "b r e"] | None:
    """π0.5's condition of the adaptive norms at these times; None for π0."""
    if not config.pi05:
        return None
    return pi0.time_condition(params, layers.time_embedding(t, config.expert.width))


def read(
    config: pi0.Pi0Config, params: PyTree, suffix: Float[Array, "b r t e"], t: Float[Array, "b r"]
) -> Float[Array, "b r ah ad"]:
    """The velocity, float32, that the model's head reads from the suffix behind a layer."""
    final_norm = params["PaliGemma"]["llm"]["final_norm_1"]
    normed, _ = gemma.norm(final_norm, suffix, condition(config, params, t))
    v = layers.dense(params["action_out_proj"], normed[:, :, -config.action_horizon :])
    return v.astype(jnp.float32)


def velocity(
    config: pi0.Pi0Config,
    params: PyTree,
    prefix: Prefix,
    state: Float[Array, "b ad"],
    x_t: Float[Array, "b r ah ad"],
    t: Float[Array, "b r"],
    gates: Float[Array, "l b"] | None = None,
) -> Float[Array, "b r ah ad"]:
    """The velocity of the gated pass; with all gates 1 it is `pi0.velocity`."""
    return read(config, params, run(config, params, prefix, state, x_t, t, gates).suffix[-1], t)
