"""The attention of one layer over the prefix, carried out of a pass for the attention loss."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shallow_pi.models import layer_table

# The tokens whose attention over the prefix is asked for: the actions, every token of both streams,
# or the prompt.
Queries = Literal["actions", "all", "text"]


class Asked(NamedTuple):
    """The attention that is carried out: that of one layer, of the last rows of each stream."""

    layer: int
    suffix_rows: int
    prefix_rows: int

    @classmethod
    def create(
        cls, layer: int, queries: Queries, suffix: int, prefix: int, prompt: int, actions: int
    ) -> "Asked":
        """Rows of these queries; the other arguments are numbers of tokens.

        The suffix ends with the actions, the prefix with the prompt.
        """
        rows = {"actions": (actions, 0), "all": (suffix, prefix), "text": (0, prompt)}
        return cls(layer, *rows[queries])


def lacks(kind: layer_table.Kind, queries: Queries) -> str:
    """The stream whose half of a layer these tokens' queries need and that is cut; "" is none."""
    if queries != "text" and kind.expert != "whole":
        return "expert"
    return "backbone" if queries != "actions" and kind.backbone != "whole" else ""


def check(kinds: Sequence[layer_table.Kind], layer: int | None, queries: Queries) -> None:
    """Raise ValueError for a layer that does not exist, or lacks the tokens' half."""
    if layer is None:
        return
    if not 0 <= layer < len(kinds):
        raise ValueError(
            f"attention_layer must lie in 0..{len(kinds) - 1} for a model of {len(kinds)} layers, "
            f"got {layer}."
        )
    if lacking := lacks(kinds[layer], queries):
        raise ValueError(f"layer {layer} has no {lacking} half, whose attention is asked.")


class PrefixAttention(NamedTuple):
    """The logits of one layer's attention over the prefix in float32, before the mask."""

    # Of the action tokens, or of the whole suffix; None of the prompt.
    logits: Float[Array, "b r n t s"] | None
    # Of the whole prefix, or of the prompt; None of the action tokens.
    prefix_logits: Float[Array, "b n p s"] | None
    # True for prefix tokens that exist (masked cameras and prompt padding do not).
    valid: Bool[Array, "b s"]


class Capture(NamedTuple):
    """The parts of one layer's attention of some rows over the prefix columns.

    Letters as in `gemma`.
    """

    keys: Float[Array, "b s k h"]
    # Scaled, rotated queries of the last rows of each stream; None where no rows are asked for.
    suffix_queries: Float[Array, "b r a k g h"] | None
    prefix_queries: Float[Array, "b p k g h"] | None

    @classmethod
    def create(
        cls,
        asked: Asked,
        keys: Float[Array, "b s k h"] | None,
        prefix_queries: Float[Array, "b s k g h"] | None,
        suffix_queries: Float[Array, "b r t k g h"] | None,
    ) -> "Capture":
        """The rows that are asked for, of a layer that has them (`lacks`)."""
        assert keys is not None, "the caller names a layer with keys"
        own = others = None
        if asked.suffix_rows:
            assert suffix_queries is not None, "the caller names a layer with an expert half"
            own = suffix_queries[:, :, suffix_queries.shape[2] - asked.suffix_rows :]
        if asked.prefix_rows:
            assert prefix_queries is not None, "the caller names a layer with a backbone half"
            others = prefix_queries[:, prefix_queries.shape[1] - asked.prefix_rows :]
        return cls(keys, own, others)

    def attention(self, valid: Bool[Array, "b s"]) -> PrefixAttention:
        """The logits, one map a query head."""
        own = others = None
        if self.suffix_queries is not None:
            own = _logits(self.suffix_queries, self.keys)
        if self.prefix_queries is not None:
            others = _logits(self.prefix_queries[:, None], self.keys)[:, 0]
        return PrefixAttention(own, others, valid)


def _logits(
    queries: Float[Array, "b r t k g h"], keys: Float[Array, "b s k h"]
) -> Float[Array, "b r n t s"]:
    logits = jnp.einsum("BRTKGH,BSKH->BRKTGS", queries, keys, preferred_element_type=jnp.float32)
    b, r, k, t, g, s = logits.shape
    return jnp.moveaxis(logits, 4, 3).reshape(b, r, k * g, t, s)
