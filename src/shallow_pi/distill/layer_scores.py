"""Importance of each teacher layer: the scores of the layer-map strategies that measure.

| score | of a layer | source |
|---|---|---|
| `similarity` | mean cosine between its input and output | ShortGPT's, with cosine |
| `cka` | centred kernel alignment of its output and that of the layer before | CLP, 2606.20246 |
| `sensitivity` | rise of the velocity error when it alone is skipped | the Shallow-π paper |
| `gate` | gradient of the loss by a gate on it, E|∂L/∂g| at g = 1 | GateProbe, 2606.27755 |

The code of CLP and GateProbe is unpublished: ours follows reports of them. All functions are pure
and meant to be jitted with `config` static. Average the scores over a few batches and times,
because they change along the denoising path.
"""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from shallow_pi.distill import gates, losses, student
from shallow_pi.distill import layer_map as layer_maps
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0, prefixes


def measure(
    strategy: layer_maps.Measured,
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
    u: Float[Array, "b ah ad"],
) -> Float[Array, " l"]:
    """The scores by which a strategy chooses (`layer_map.measured`).

    `u` is the data's velocity, which `gate` alone looks at.
    """
    given = (config, params, observation, x_t, t)
    match strategy:
        case "similarity":
            return similarity(*given)
        case "sensitivity":
            return sensitivity(*given)
        case "cka":
            return cka(*given)
        case "gate":
            return gate(*given, u)
        case _:
            assert_never(strategy)


class Cosines(NamedTuple):
    """Mean cosine between input and output of each layer, by stream."""

    # Over valid prefix tokens.
    backbone: Float[Array, " l"]
    # Over suffix tokens.
    expert: Float[Array, " l"]


def similarity(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
) -> Float[Array, " l"]:
    """Mean cosine between input and output of each layer, over valid prefix and suffix tokens."""
    backbone, expert = cosines(config, params, observation, x_t, t)
    prefix = jnp.sum(prefixes.valid(config, observation)).astype(jnp.float32)
    suffix = len(t) * (config.action_horizon + (not config.pi05))
    return (prefix * backbone + suffix * expert) / (prefix + suffix)


def cosines(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
) -> Cosines:
    """`similarity` of each stream alone; of the two, only the expert's changes with the time."""
    hidden = pi0.hidden_states(config, params, observation, x_t, t)
    prefix, suffix = _cosine(hidden.prefix), _cosine(hidden.suffix)
    valid = jnp.broadcast_to(prefixes.valid(config, observation)[None], prefix.shape)
    total = jnp.sum(jnp.where(valid, prefix, 0.0), axis=(1, 2))
    return Cosines(total / jnp.sum(valid[0]).astype(jnp.float32), jnp.mean(suffix, axis=(1, 2, 3)))


def sensitivity(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
) -> Float[Array, " l"]:
    """Rise of the mean squared velocity error when each layer alone is skipped.

    The error is against the whole teacher's own. The layers are skipped one after the other in one
    compiled loop, each in a copy of the others.

    The teacher has at least two layers.
    """
    depth = config.depth
    if depth < 2:
        raise ValueError(f"skipping a layer needs a teacher of at least 2 layers, got {depth}.")
    full, _ = pi0.velocity(config, params, observation, x_t, t)
    shallow = pi0.at_depth(config, depth - 1)

    def error(kept: Array) -> Float[Array, ""]:
        rest = student.gather(params, kept)
        v, _ = pi0.velocity(shallow, rest, observation, x_t, t)
        return jnp.mean(jnp.square(v - full))

    others = [[j for j in range(depth) if j != skipped] for skipped in range(depth)]
    return jax.lax.map(error, jnp.asarray(np.array(others, np.int32)))


def cka(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
) -> Float[Array, " l"]:
    """Linear CKA of each layer's output and that of the layer before, the mean of both streams.

    The rows are all valid tokens of the batch. The first layer has none before it and scores 0:
    of each run of alike layers the first stays.
    """
    hidden = pi0.hidden_states(config, params, observation, x_t, t)
    valid = prefixes.valid(config, observation).reshape(-1)
    suffix = hidden.suffix.reshape(len(hidden.suffix), -1, hidden.suffix.shape[-1])
    prefix = hidden.prefix.reshape(len(hidden.prefix), -1, hidden.prefix.shape[-1])
    both = _cka(prefix, valid) + _cka(suffix, jnp.ones(suffix.shape[1], bool))
    return jnp.concatenate([jnp.zeros(1), both[1:] / 2])


def gate(
    config: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
    u: Float[Array, "b ah ad"],
) -> Float[Array, " l"]:
    """Mean over the batch of |∂L/∂g| at g = 1, L an observation's task loss, by one backward pass.

    The gate is on what the layer adds to both streams (see `gates`).
    """

    def loss(opened: Float[Array, "l b"]) -> Float[Array, ""]:
        prefix = gates.embed(config, params, observation)
        given = (prefix, observation.state, x_t[:, None], t[:, None])
        v = gates.velocity(config, params, *given, opened)[:, 0]
        return jnp.sum(jnp.mean(jnp.square(v - u), axis=(1, 2)))

    gradient = jax.grad(loss)(jnp.ones((config.depth, len(t))))
    return jnp.mean(jnp.abs(gradient), axis=1)


def _cka(stream: Float[Array, "l+1 n d"], valid: Bool[Array, " n"]) -> Float[Array, " l"]:
    """Linear CKA of each entry with the next: |YᵀX|² / (|XᵀX| |YᵀY|), of centred columns."""
    rows = valid.astype(jnp.float32)[None, :, None]
    x = stream.astype(jnp.float32)
    x = (x - jnp.sum(x * rows, axis=1, keepdims=True) / jnp.sum(rows)) * rows

    def cross(a: Float[Array, "n d"], b: Float[Array, "n d"]) -> Float[Array, ""]:
        return jnp.sum(jnp.square(a.T @ b))

    own = jnp.sqrt(jax.lax.map(lambda a: cross(a, a), x))  # Their squares may overflow float32.
    product = own[:-1] * own[1:]
    mixed = jax.lax.map(lambda pair: cross(*pair), (x[:-1], x[1:]))
    return mixed / jnp.where(product > 0, product, 1.0)


def _cosine(stream: Float[Array, "l+1 *t d"]) -> Float[Array, " l *t"]:
    stream = stream.astype(jnp.float32)
    return losses.cosine(stream[:-1], stream[1:])
