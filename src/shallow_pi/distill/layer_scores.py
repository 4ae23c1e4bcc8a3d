"""Importance of each teacher layer: the scores of two layer-map strategies.

`similarity` is the mean cosine between a layer's input and output; `sensitivity` what skipping the
layer alone does to the velocity. Both are pure and meant to be jitted with `config` static; average
them over a few batches and times, for both change along the denoising path (METHOD: §6).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shallow_pi.distill import student
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0


def similarity(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
) -> Float[Array, " l"]:
    """Mean cosine between input and output of each layer, over valid prefix and suffix tokens."""
    hidden = pi0.hidden_states(config, params, observation, x_t, t)
    prefix, suffix = _cosine(hidden.prefix), _cosine(hidden.suffix)
    valid = jnp.broadcast_to(pi0.prefix_valid(config, observation)[None], prefix.shape)
    count = jnp.sum(valid[0]) + suffix[0].size
    total = jnp.sum(jnp.where(valid, prefix, 0.0), axis=(1, 2)) + jnp.sum(suffix, axis=(1, 2, 3))
    return total / count.astype(jnp.float32)


def sensitivity(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
    u: Float[Array, "b ah ad"] | None = None,
) -> Float[Array, " l"]:
    """Rise of the mean squared velocity error when each layer alone is skipped.

    The layers are skipped one after the other in one compiled loop, each in a copy of the others.

    Args:
      config: the teacher, of at least two layers.
      params: its parameters.
      observation: batch of b observations.
      x_t: noisy actions.
      t: their times.
      u: what the error is measured against; by default the full teacher's own velocity.
    """
    depth = config.depth
    if depth < 2:
        raise ValueError(f"skipping a layer needs a teacher of at least 2 layers, got {depth}.")
    full, _ = pi0.velocity(config, params, observation, x_t, t)
    reference = full if u is None else u
    shallow = pi0.at_depth(config, depth - 1)

    def error(kept: Array) -> Float[Array, ""]:
        rest = student.gather(params, kept)
        v, _ = pi0.velocity(shallow, rest, observation, x_t, t)
        return jnp.mean(jnp.square(v - reference))

    others = [[j for j in range(depth) if j != skipped] for skipped in range(depth)]
    errors = jax.lax.map(error, jnp.asarray(np.array(others, np.int32)))
    return errors - jnp.mean(jnp.square(full - reference))


def _cosine(stream: Float[Array, "l+1 *t d"]) -> Float[Array, " l *t"]:
    before, after = stream[:-1].astype(jnp.float32), stream[1:].astype(jnp.float32)
    product = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
    return jnp.sum(before * after, axis=-1) / jnp.where(product > 0, product, 1.0)
