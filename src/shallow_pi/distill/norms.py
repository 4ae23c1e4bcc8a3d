"""Norms of a gradient, in all and by part of the model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Metrics = dict[str, Float[Array, ""]]


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """Root of the sum of all squares; Optax renamed its own between the versions we support."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def by_part(grads: PyTree) -> Metrics:
    """Global norm of the gradient, in all and by part of the model."""
    parts: dict[str, list[Array]] = {
        "vision": [],
        "embedder": [],
        "backbone": [],
        "expert": [],
        "projections": [],
        "scorer": [],
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        parts[_part(tuple(key.key for key in path))].append(leaf)
    found = {f"grad_norm/{name}": global_norm(some) for name, some in parts.items() if some}
    return {"grad_norm": global_norm(grads), **found}


def _part(path: tuple[str, ...]) -> str:
    if path[:2] == ("PaliGemma", "img"):
        return "vision"
    if path[:3] == ("PaliGemma", "llm", "embedder"):
        return "embedder"
    if path[0] == "PaliGemma":
        return "expert" if any(name.endswith("_1") for name in path[2:5]) else "backbone"
    return "scorer" if path[0] == "image_scorer" else "projections"
