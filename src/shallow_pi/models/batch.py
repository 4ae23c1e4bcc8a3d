"""The batch that flows from the loader to the step, and the one description of its shapes.

Leaves are numpy arrays on the host and JAX arrays on devices. A sample of a dataset is a batch
without its leading axis; `stack` makes one batch of several. Zeros, noise, abstract arrays,
shardings and warm-up shapes derive from `spec`; nothing else spells the fields out.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import flax.struct
import jax
import numpy as np
from jaxtyping import Bool, Float

from shallow_pi.models import observation as observations

Tree = TypeVar("Tree")


class Sizes(Protocol):
    """The fields of a model (a `pi0.Pi0Config`) that decide the shapes of its batches."""

    @property
    def cameras(self) -> tuple[str, ...]: ...
    @property
    def image_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_token_len(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def action_horizon(self) -> int: ...


@flax.struct.dataclass
class Batch:
    """Observations and the actions to learn; every field has the leading axis b."""

    # Images are still uint8.
    observation: observations.Observation
    # Normalized, zero-padded to the action dimension.
    actions: Float[observations.AnyArray, "b ah ad"]
    # False where an action lies beyond the end of its episode.
    action_mask: Bool[observations.AnyArray, "b ah"]


def spec(model: Sizes, b: int) -> Batch:
    """Shapes and dtypes of a batch of `b` as the loader gives it."""

    def array(dtype: type[np.generic], *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), dtype)

    side, tokens = model.image_size, model.max_token_len
    return Batch(
        observation=observations.Observation(
            images={name: array(np.uint8, side, side, 3) for name in model.cameras},
            image_masks={name: array(np.bool_) for name in model.cameras},
            state=array(np.float32, model.action_dim),
            tokenized_prompt=array(np.int32, tokens),
            tokenized_prompt_mask=array(np.bool_, tokens),
        ),
        actions=array(np.float32, model.action_horizon, model.action_dim),
        action_mask=array(np.bool_, model.action_horizon),
    )


def zeros(model: Sizes, b: int) -> Batch:
    """Black images and zeros on the host, none of them masked."""
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, leaf.dtype == np.bool_, leaf.dtype), spec(model, b)
    )


def noise(model: Sizes, b: int, seed: int = 0) -> Batch:
    """Random images, states, tokens and actions on the host, none of them masked."""
    generator = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.bool_:
            return np.ones(leaf.shape, bool)
        if np.issubdtype(leaf.dtype, np.integer):
            top = 256 if leaf.dtype == np.uint8 else model.vocab_size
            return generator.integers(0, top, leaf.shape, leaf.dtype)
        return generator.standard_normal(leaf.shape).astype(leaf.dtype)

    return jax.tree.map(fill, spec(model, b))


def stack(samples: Sequence[Tree]) -> Tree:
    """One batch of several samples (or of their observations) on the host; of one, a view."""
    if len(samples) == 1:
        return jax.tree.map(lambda leaf: np.asarray(leaf)[None], samples[0])
    return jax.tree.map(lambda *leaves: np.stack(leaves), *samples)
