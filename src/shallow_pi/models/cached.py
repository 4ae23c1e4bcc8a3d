"""The velocity at more noisy actions of observations whose prefix has run: the suffix alone."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from shallow_pi.models import gemma, layers, pi0, prefixes


def suffix_params(params: PyTree, execution: layers.Execution) -> PyTree:
    """The part of the parameters that `velocity` reads, on the device.

    Offloaded layers are copied here, once for all its calls.
    """
    llm = gemma.suffix_weights(params["PaliGemma"]["llm"])
    if execution.offloaded:
        llm["layers"] = layers.to_device(llm["layers"])
    rest = {name: leaf for name, leaf in params.items() if name != "PaliGemma"}
    return {**rest, "PaliGemma": {"llm": llm}}


def velocity(
    config: pi0.Pi0Config,
    params: PyTree,
    cache: pi0.PrefixCache,
    x_t: Float[Array, "b r ah ad"],
    t: Float[Array, "b r"],
    execution: layers.Execution = layers.DEFAULT_EXECUTION,
) -> Float[Array, "b r ah ad"]:
    """`pi0.velocity` at other noisy actions of the same observations: the suffix alone.

    `params` are those of `suffix_params`, `cache` is that of `pi0.outputs`.
    """
    embedded: Any = pi0.Pi0(config, execution).apply(
        {"params": params}, cache.state, x_t, t, method="embed_suffix"
    )
    suffix, condition = embedded
    head_dim, horizon = config.expert.head_dim, config.action_horizon
    geometry = gemma.Geometry.create(
        cache.valid,
        *(head_dim, suffix.shape[2], horizon, condition),
        positions=(None, prefixes.positions_taken(config, cache.valid)),
    )
    llm, keep = params["PaliGemma"]["llm"], execution.keep_rows
    suffix = gemma.suffix_over_cache(llm, config.layers, suffix, cache.tower, geometry, keep)
    v = layers.dense(params["action_out_proj"], suffix[:, :, -horizon:])
    return v.astype(jnp.float32)
