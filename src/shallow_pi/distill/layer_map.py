"""The teacher layer that each student layer copies, and the strategies that choose.

A layer map is a strictly increasing tuple of teacher indices, one a student layer; backbone and
action expert use the same one, and a stream that is cut further (`halves`) some of it. `uniform` is
the paper's: round_half_even(linspace(0, L−1, S)), for 18 → 6 layers 0 3 7 10 14 17. The strategies
that look at the teacher (`MEASURED`) take a score of each layer as a plain array, which
`layer_scores` measures: those whose score says how much a layer repeats what came before it
(`similarity`, `cka`) drop the largest, those whose score says how much a layer is missed
(`sensitivity`, `gate`) the smallest.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from shallow_pi.models import layer_table

Measured = Literal["similarity", "sensitivity", "cka", "gate"]
Strategy = Literal["uniform", "first", "last", "random", Measured]
MEASURED: tuple[Measured, ...] = get_args(Measured)


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """Student layer i copies, and is compared with, teacher layer `layers[i]`."""

    layers: tuple[int, ...]
    teacher_depth: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a layer map needs at least one teacher layer, got none.")
        outside = [i for i in self.layers if not 0 <= i < self.teacher_depth]
        if outside:
            raise ValueError(
                f"layers must lie in 0..{self.teacher_depth - 1} (the teacher has "
                f"{self.teacher_depth}), got {outside} in {list(self.layers)}."
            )
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers must not repeat, got {list(self.layers)}.")
        if list(self.layers) != sorted(self.layers):
            raise ValueError(
                f"layers must be in increasing order, got {list(self.layers)}; did you mean "
                f"{sorted(self.layers)}?"
            )

    @property
    def depth(self) -> int:
        """Layers of the student."""
        return len(self.layers)


def explicit(layers: Sequence[int], teacher_depth: int) -> LayerMap:
    """Exactly these teacher layers."""
    return LayerMap(tuple(int(i) for i in layers), teacher_depth)


def uniform(depth: int, teacher_depth: int) -> LayerMap:
    """Evenly spaced from first to last, rounded half to even: the paper's choice."""
    _check_depth(depth, teacher_depth)
    spaced = np.round(np.linspace(0, teacher_depth - 1, depth))
    return explicit(spaced.astype(int).tolist(), teacher_depth)


def first(depth: int, teacher_depth: int) -> LayerMap:
    """The first layers."""
    _check_depth(depth, teacher_depth)
    return explicit(range(depth), teacher_depth)


def last(depth: int, teacher_depth: int) -> LayerMap:
    """The last layers."""
    _check_depth(depth, teacher_depth)
    return explicit(range(teacher_depth - depth, teacher_depth), teacher_depth)


def random(depth: int, teacher_depth: int, seed: int) -> LayerMap:
    """A random choice, in order, the same for the same seed."""
    _check_depth(depth, teacher_depth)
    chosen = np.random.default_rng(seed).choice(teacher_depth, size=depth, replace=False)
    return explicit(np.sort(chosen).tolist(), teacher_depth)


def similarity(depth: int, alike: Float[np.ndarray, " l"]) -> LayerMap:
    """Drop the layers that most repeat what came before them.

    `alike` is the likeness of each teacher layer's output to its input, a cosine or CKA.
    """
    return _keep_largest(depth, -np.asarray(alike), "alike")


def sensitivity(depth: int, missed: Float[np.ndarray, " l"]) -> LayerMap:
    """Drop the layers that are least missed.

    `missed` is the harm of being without each teacher layer, alone.
    """
    return _keep_largest(depth, np.asarray(missed), "missed")


def measured(strategy: Measured, depth: int, scores: Float[np.ndarray, " l"]) -> LayerMap:
    """The layers by a strategy whose scores `layer_scores.measure` gave."""
    choose = similarity if strategy in ("similarity", "cka") else sensitivity
    return choose(depth, scores)


def backbone_positions(count: int, depth: int) -> tuple[int, ...]:
    """The layers of a student that stay whole in a backbone cut to `count` of its `depth` layers.

    They are evenly spaced over all but the last, of which nothing but keys and values is ever read.
    """
    _check_count("backbone", count, depth)
    return uniform(count, depth - (count < depth)).layers


def expert_positions(count: int, depth: int) -> tuple[int, ...]:
    """The layers of a student that an expert cut to `count` of its `depth` layers keeps.

    They are evenly spaced from first to last; of one layer it is the last.
    """
    _check_count("expert", count, depth)
    return (depth - 1,) if count == 1 else uniform(count, depth).layers


def halves(
    depth: int, backbone: Collection[int], expert: Collection[int]
) -> tuple[tuple[layer_table.Half, ...], tuple[layer_table.Half, ...]]:
    """The two columns of a student's layer table, from the positions of its whole halves.

    A layer of the expert whose backbone half is cut keeps that half's keys and values.
    """
    cut: dict[int, layer_table.Half] = dict.fromkeys(expert, "keys_values")
    whole: tuple[dict[int, layer_table.Half], dict[int, layer_table.Half]]
    whole = dict.fromkeys(backbone, "whole"), dict.fromkeys(expert, "whole")
    columns = cut | whole[0], whole[1]
    first, second = (tuple(column.get(i, "absent") for i in range(depth)) for column in columns)
    return first, second


def _keep_largest(depth: int, score: np.ndarray, what: str) -> LayerMap:
    if score.ndim != 1 or not np.all(np.isfinite(score)):
        raise ValueError(
            f"{what} must be one finite number a teacher layer, got shape {score.shape}."
        )
    _check_depth(depth, len(score))
    kept = np.argsort(-score, kind="stable")[:depth]
    return explicit(np.sort(kept).tolist(), len(score))


def _check_depth(depth: int, teacher_depth: int) -> None:
    if not 1 <= depth <= teacher_depth:
        raise ValueError(
            f"the student's depth must lie in 1..{teacher_depth} (the teacher's), got {depth}."
        )


def _check_count(stream: str, count: int, depth: int) -> None:
    if not 1 <= count <= depth:
        raise ValueError(
            f"--student.{stream}-depth must lie in 1..{depth}, the student's layers, got {count}."
        )
