"""The parts that each layer of a model has: one table for backbone and action expert.

A layer has two halves. The expert's half attends to the keys and values of the backbone's half, so
a backbone half that is cut may stay as "keys_values": its norm and key/value projection, applied to
the residual stream as it passes. The parameters keep openpi's tree with every layer in both
streams; what a layer does not have is zero there, so that openpi computes the same function.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from shallow_pi.models import parameters

Half = Literal["whole", "keys_values", "absent"]


class Kind(NamedTuple):
    """The halves of one layer."""

    backbone: Half
    # "whole" or "absent".
    expert: Half


WHOLE = Kind("whole", "whole")
_KEYS_VALUES = tuple(f"{parameters.LAYERS}/{n}/" for n in ("attn/kv_einsum", "pre_attention_norm"))


def table(depth: int, backbone: Sequence[Half], expert: Sequence[Half]) -> tuple[Kind, ...]:
    """The kind of every layer; a stream without entries is whole throughout.

    Raises:
      ValueError: another number of entries, an unknown one, or halves that do not go together.
    """
    for name, halves in (("backbone_layers", backbone), ("expert_layers", expert)):
        if halves and len(halves) != depth:
            raise ValueError(
                f"{name} must be empty or have one entry for each of the {depth} layers, got "
                f"{len(halves)}: {' '.join(halves)}."
            )
        if unknown := [half for half in halves if half not in get_args(Half)]:
            raise ValueError(
                f"{name} must be made of {', '.join(get_args(Half))}, got {', '.join(unknown)}."
            )
    kinds = tuple(
        Kind(backbone[i] if backbone else "whole", expert[i] if expert else "whole")
        for i in range(depth)
    )
    for i, kind in enumerate(kinds):
        match kind:
            case ("absent", "whole"):
                raise ValueError(
                    f"layer {i} of the expert reads the keys and values of backbone layer {i}, "
                    "which is 'absent' and must be 'whole' or 'keys_values'."
                )
            case (_, "keys_values"):
                raise ValueError(
                    f"layer {i} of the expert must be 'whole' or 'absent': nothing else reads its "
                    "keys and values."
                )
            case ("keys_values", "absent"):
                raise ValueError(
                    f"layer {i} has keys and values alone and no expert layer to read them: make "
                    "the backbone layer 'absent', or the expert layer 'whole'."
                )
    if not any(kind.expert == "whole" for kind in kinds):
        raise ValueError("the expert must have at least one layer.")
    return kinds


def reads_last(backbone: int, expert: int) -> tuple[tuple[Half, ...], tuple[Half, ...]]:
    """Halves of a model whose expert reads nothing of the backbone but its last state.

    The backbone's layers come first. Each of the expert's then attends to keys and values of its
    own of the state they leave, as in GR00T, where the depths of both are free of each other.
    """
    before, after = Kind("whole", "absent"), Kind("keys_values", "whole")
    first, second = zip(*[before] * backbone, *[after] * expert, strict=True)
    return first, second


def last_read(kinds: Sequence[Kind]) -> int:
    """The last layer of the expert: nothing of the backbone is read after its keys and values."""
    return max(i for i, kind in enumerate(kinds) if kind.expert == "whole")


def read(kinds: Sequence[Kind], attending: int | None = None) -> tuple[Kind, ...]:
    """The same layers without what nothing reads: of the last backbone layer all but its keys.

    The backbone's queries of the layer `attending` are read too.
    """
    last = last_read(kinds)
    kept = (*kinds[:last], Kind("keys_values", "whole"))
    if attending is not None and attending >= last:
        kept = tuple(kinds[: attending + 1])
    return kept + (Kind("absent", "absent"),) * (len(kinds) - len(kept))


def has(kind: Kind, path: str) -> bool:
    """True if a layer of this kind has its part of the stacked parameter at a path."""
    inside = path.removeprefix(f"{parameters.LAYERS}/").split("/")
    if any(name.endswith("_1") for name in inside):
        return kind.expert == "whole"
    if path.startswith(_KEYS_VALUES):
        return kind.backbone != "absent"
    return kind.backbone == "whole"


def zero_cut(kinds: Sequence[Kind], params: PyTree) -> PyTree:
    """A model's parameters with zeros for the parts that its layers lack."""

    def mask(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> Array:
        name = "/".join(key.key for key in path)
        if parameters.stack(name) != "layers":
            return leaf
        kept = np.array([has(kind, name) for kind in kinds])
        if kept.all():
            return leaf
        return jnp.where(kept.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(mask, params)


def unstack(tree: PyTree, depth: int) -> list[PyTree]:
    """Each layer's part of stacked parameters; its gradient is one concatenation."""
    leaves, structure = jax.tree.flatten(tree)
    parts = [[part[0] for part in jnp.split(leaf, depth)] for leaf in leaves]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)]
