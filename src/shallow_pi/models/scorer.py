"""Fewer image tokens: those of each camera that a small scorer ranks highest, before the backbone.

    score_i = w·gelu(W·norm(x_i) + V·norm(mean prompt token) + b) + position_i

x_i is a token of the image tower. The scorer learns to predict the attention that a teacher's
action tokens will pay to x_i (`losses.scorer_loss`), which is not known before the backbone runs.
Every camera keeps the same number of tokens: shapes are static, a camera that is masked or left out
changes nothing for the others, and a wrist camera keeps its share of them. Kept tokens stay in the
order of the patches and at the positions they have in the whole model, so that all of them are that
model. The choice has no gradient, and the scorer's inputs are constants to it: its own loss alone
trains it, and trains nothing else.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.models import layers

# Width of the hidden layer.
HIDDEN = 128


class Choice(NamedTuple):
    """The scores of a camera's patches, and the patches that are kept."""

    scores: Float[Array, "b c n"]
    # For each kept token, in the order of the patches, one True.
    kept: Bool[Array, "b c m n"]


def choose(
    weights: PyTree,
    tokens: Float[Array, "b c n d"],
    prompt: Float[Array, "b t d"],
    prompt_valid: Bool[Array, "b t"],
    count: int,
) -> Choice:
    """Score every patch, and keep the best `count` of each camera."""
    scores = score(weights, tokens, prompt, prompt_valid)
    return Choice(scores, top(scores, count))


def score(
    weights: PyTree,
    tokens: Float[Array, "b c n d"],
    prompt: Float[Array, "b t d"],
    prompt_valid: Bool[Array, "b t"],
) -> Float[Array, "b c n"]:
    """The scores in float32; gradients stop at the tokens."""
    tokens, prompt = jax.lax.stop_gradient((tokens, prompt))
    there = prompt_valid[..., None].astype(jnp.float32)
    mean = jnp.sum(prompt.astype(jnp.float32) * there, axis=1)
    mean = mean / jnp.maximum(jnp.sum(there, axis=1), 1.0)
    asked = layers.multiply(_normed(mean), weights["prompt"]["kernel"])
    seen = layers.dense(weights["hidden"], _normed(tokens.astype(jnp.float32)), jnp.float32)
    hidden = nn.gelu(seen + asked[:, None, None])
    found = layers.multiply(hidden, weights["score"]["kernel"])[..., 0]
    return found + layers.row(weights["position"].astype(jnp.float32), 3)


def top(scores: Float[Array, "b c n"], count: int) -> Bool[Array, "b c m n"]:
    """The patches with the highest scores, as rows of one True each; of equal ones the first.

    By comparing all pairs, so that there is no sort and no gather, which graphs for robots lack.
    """
    order = jnp.arange(scores.shape[-1])
    one, other = scores[..., :, None], scores[..., None, :]
    earlier = (order[None, :] < order[:, None])[None, None]
    ahead = (other > one) | ((other == one) & earlier)
    kept = jnp.sum(ahead, axis=-1) < count
    slot = jnp.cumsum(kept, axis=-1) - 1
    return kept[..., None, :] & (slot[..., None, :] == jnp.arange(count)[None, None, :, None])


def take(x: Float[Array, "b c n *d"], kept: Bool[Array, "b c m n"]) -> Float[Array, "b c m *d"]:
    """Gather what belongs to the kept patches, exactly."""
    rows = x.reshape(*x.shape[:3], -1)
    found = jnp.einsum(
        "bcmn,bcnd->bcmd", kept.astype(x.dtype), rows, precision=jax.lax.Precision.HIGHEST
    )
    return found.reshape(*found.shape[:3], *x.shape[3:])


def take_logits(
    logits: Float[Array, "b r n ah s"], kept: Bool[Array, "b c m p"]
) -> Float[Array, "b r n ah q"]:
    """Attention logits over the kept patches and the prompt, of those over all.

    Their softmax is the attention restricted to these keys and renormalised.
    """
    _, c, _, p = kept.shape
    images = jnp.moveaxis(logits[..., : c * p].reshape(*logits.shape[:-1], c, p), (4, 5), (1, 2))
    chosen = jnp.moveaxis(take(images, kept), (1, 2), (4, 5))
    chosen = chosen.reshape(*logits.shape[:-1], -1)
    return jnp.concatenate([chosen, logits[..., c * p :]], axis=-1)


def positions(
    kept: Bool[Array, "b c m n"], cameras: Bool[Array, "b c"], prompt_valid: Bool[Array, "b t"]
) -> Int[Array, "b s"]:
    """Positions of kept patches and prompt in the whole prefix; arbitrary where nothing exists."""
    b, _, _, n = kept.shape
    patch = jnp.sum(jnp.where(kept, jnp.arange(n)[None, None, None], 0), axis=-1)
    count = cameras.astype(jnp.int32)
    before = n * (jnp.cumsum(count, axis=1) - count)
    images = (before[..., None] + patch).reshape(b, -1)
    prompt = n * jnp.sum(count, axis=1, keepdims=True) + jnp.cumsum(prompt_valid, axis=1) - 1
    return jnp.concatenate([images, prompt], axis=1)


def _normed(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Divided by the root mean square of its features."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
