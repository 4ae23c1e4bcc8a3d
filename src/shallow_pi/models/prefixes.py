"""The prefix: image tokens of every camera, all of them or fewer, then prompt tokens."""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.models import observation as observations
from shallow_pi.models import pooling, scorer


class Sizes(Protocol):
    """The fields of a model (`pi0.Pi0Config`) that fix its prefix."""

    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def grid(self) -> int: ...
    @property
    def patches(self) -> int: ...
    @property
    def image_tokens(self) -> int: ...
    @property
    def pooled_tokens(self) -> int: ...
    @property
    def scored_tokens(self) -> int: ...


class Prefix(NamedTuple):
    """The tokens of an observation before the first layer."""

    tokens: Float[Array, "b s d"]
    # True for those that exist.
    valid: Bool[Array, "b s"]
    # Arbitrary where none exists.
    positions: Int[Array, "b s"]
    # The image tokens that a scorer chose; None without one.
    choice: scorer.Choice | None


def check(config: Sizes) -> None:
    """Raise ValueError unless the grid of patches gives the image tokens."""
    pooled, scored = config.pooled_tokens, config.scored_tokens
    if scored and pooled:
        raise ValueError(
            "image tokens are pooled (pooled_tokens) or chosen by a scorer (scored_tokens), not "
            f"both; got {pooled} and {scored}."
        )
    if not 0 <= scored <= config.patches:
        raise ValueError(
            f"a scorer chooses 1 to {config.patches} of the {config.grid} × {config.grid} patches "
            f"of a camera, not {scored}."
        )
    if not scored:
        pooling.cell(config.grid, config.image_tokens)


def join(
    config: Sizes,
    observation: observations.Observation,
    image_tokens: Float[Array, "b n d"],
    prompt_tokens: Float[Array, "b t d"],
    scorer_weights: PyTree | None,
) -> Prefix:
    """The prefix of all image-tower tokens and the embedded prompt, padding included."""
    there = valid(config, observation)
    prompt_there = observation.tokenized_prompt_mask
    choice, positions = None, jnp.cumsum(there, axis=1) - 1
    if config.scored_tokens:
        assert scorer_weights is not None, "this model has a scorer"
        b, _, d = image_tokens.shape
        whole = image_tokens.reshape(b, len(config.cameras), -1, d)
        choice = scorer.choose(
            scorer_weights, whole, prompt_tokens, prompt_there, config.scored_tokens
        )
        image_tokens = scorer.take(whole, choice.kept).reshape(b, -1, d)
        cameras = image_valid(config, observation, 1)
        positions = scorer.positions(choice.kept, cameras, prompt_there)
    else:
        image_tokens = pooling.pool(image_tokens, config.grid, config.image_tokens)
    tokens = jnp.concatenate([image_tokens, prompt_tokens], axis=1)
    return Prefix(tokens, there, positions, choice)


def positions_taken(config: Sizes, valid: Bool[Array, "b s"]) -> Int[Array, " b"]:
    """The number of positions that a prefix, and valid tokens behind it, take.

    A camera whose patches a scorer chooses takes as many as it has patches.
    """
    taken = jnp.sum(valid, axis=1)
    if not config.scored_tokens:
        return taken
    images = len(config.cameras) * config.image_tokens
    cameras = jnp.sum(valid[:, : images : config.image_tokens], axis=1)
    return taken + (config.patches - config.image_tokens) * cameras


def valid(config: Sizes, observation: observations.Observation) -> Bool[Array, "b s"]:
    """True for the tokens that exist, not for those of masked cameras or prompt padding."""
    seen = image_valid(config, observation, config.image_tokens)
    return jnp.concatenate([seen, observation.tokenized_prompt_mask], axis=1)


def image_valid(
    config: Sizes, observation: observations.Observation, tokens: int
) -> Bool[Array, "b n"]:
    """True for the tokens, of a number a camera, of cameras that exist."""
    cameras = jnp.stack([observation.image_masks[name] for name in config.cameras], axis=1)
    return jnp.repeat(cameras, tokens, axis=1)
