"""Cut a student out of a teacher: chosen layers gathered, everything else copied.

Leaves whose first axis is the tower's layers (`parameters.TABLE`), of backbone and action expert
alike, are indexed with the layer map; halves of layers that the student lacks become zero. A cut
image tower keeps evenly spaced layers. Every other leaf (embedder, final norms, projections) is
copied. A scorer of image tokens is new. The cut refuses a tree with a missing or unknown path.

What comes before the layers may stay as it is (`Part`): those leaves are then the teacher's own, in
one copy for both models, and the student's tree is put together where it is needed (`join`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map as layer_maps
from shallow_pi.models import layer_table, parameters, pi0

# Parts that can be frozen: the image tower, and the token embedding.
Part = Literal["vision", "embedder"]
# The fields of a model in which a student may differ, besides the depth of its image tower.
DIFFERING = ("depth", "backbone_layers", "expert_layers", "pooled_tokens", "scored_tokens", "dtype")
PARTS: dict[Part, tuple[str, ...]] = {
    "vision": ("PaliGemma", "img"),
    "embedder": ("PaliGemma", "llm", "embedder"),
}


def gather(
    params: PyTree,
    indices: Int[Array | np.ndarray, " s"],
    image_indices: Int[Array | np.ndarray, " i"] | None = None,
) -> PyTree:
    """The layers at `indices`, which may be traced, and the image tower's; other leaves as is."""
    chosen = {"layers": indices, "image_layers": image_indices}

    def take(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array:
        taken = chosen.get(parameters.stack(weights.path_name(path)) or "")
        return leaf if taken is None else jnp.take(leaf, taken, axis=0)

    return jax.tree_util.tree_map_with_path(take, params)


def model(teacher: pi0.Pi0Config, layer_map: layer_maps.LayerMap) -> pi0.Pi0Config:
    """The teacher's model with the map's layers, each with the halves that it has."""
    backbone, expert = zip(*[teacher.layers[layer] for layer in layer_map.layers], strict=True)
    return dataclasses.replace(
        teacher, depth=layer_map.depth, backbone_layers=backbone, expert_layers=expert
    )


def cut(
    teacher_config: pi0.Pi0Config,
    teacher_params: PyTree,
    layer_map: layer_maps.LayerMap,
    student_config: pi0.Pi0Config | None = None,
) -> PyTree:
    """Student parameters in the teacher's dtype; jit it to cut sharded parameters in place.

    `teacher_params` are checked against the config path by path. Without a `student_config` the
    student is the teacher with the map's layers, as they are.

    Raises:
      ValueError: a map for another depth, or parameters with a missing, extra or misshapen leaf.
    """
    if teacher_config.depth != layer_map.teacher_depth:
        raise ValueError(
            f"the layer map is for a teacher of {layer_map.teacher_depth} layers, this one has "
            f"{teacher_config.depth}."
        )
    weights.check_tree(pi0.abstract_params(teacher_config), teacher_params, "teacher")
    config = student_config or model(teacher_config, layer_map)
    tower = None
    if config.image.depth != teacher_config.image.depth:
        tower = np.asarray(vision_layers(teacher_config, config))
    student = gather(teacher_params, np.asarray(layer_map.layers), tower)
    if config.scored_tokens:  # No teacher has a scorer: every student's starts alike.
        scorer = parameters.Leaves("image_scorer", pi0.axis_sizes(config))
        student = {**student, "image_scorer": scorer.init(jax.random.key(0))["params"]}
    weights.check_tree(pi0.abstract_params(config), student, "student")
    return layer_table.zero_cut(config.layers, student)


def vision_layers(teacher: pi0.Pi0Config, student: pi0.Pi0Config) -> tuple[int, ...]:
    """The layers of the teacher's image tower that the student keeps: evenly spaced ones.

    Raises:
      ValueError: more layers than the teacher's, or none.
    """
    own, theirs = student.image.depth, teacher.image.depth
    if not 1 <= own <= theirs:
        raise ValueError(
            f"--student.vision-depth must lie in 1..{theirs} (the teacher's image tower), got {own}"
        )
    return layer_maps.uniform(own, theirs).layers


def split(params: PyTree, parts: Sequence[Part]) -> tuple[PyTree, PyTree]:
    """A tree of parameters as two: what is trained, and the parts that are not.

    Leaves may be of any kind; without parts the second tree is empty.
    """
    trained: dict[tuple[str, ...], Array] = {}
    frozen: dict[tuple[str, ...], Array] = {}
    prefixes = [PARTS[part] for part in parts]
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        held = any(path[: len(prefix)] == prefix for prefix in prefixes)
        (frozen if held else trained)[path] = leaf
    unflatten = flax.traverse_util.unflatten_dict
    return unflatten(trained), unflatten(frozen)


def join(trained: PyTree, params: PyTree, parts: Sequence[Part]) -> PyTree:
    """The whole tree again: `trained`, and the frozen parts of `params` (the teacher's)."""
    if not parts:
        return trained
    flatten = flax.traverse_util.flatten_dict
    whole = flatten(trained) | flatten(split(params, parts)[1])
    return flax.traverse_util.unflatten_dict(whole)


def check_pair(
    teacher: pi0.Pi0Config, student: pi0.Pi0Config, layer_map: layer_maps.LayerMap | None = None
) -> None:
    """Teacher and student may differ in layers, image tokens and dtype, and in nothing else.

    Fewer tokens are means or a choice of a teacher's that sees them all; of one that sees means
    itself the student has the same.
    A teacher whose expert reads the last state of its backbone (`layer_table.reads_last`) has
    halves of layers too: its student has the same ones of the layers it keeps.
    """
    if teacher.scored_tokens or (
        teacher.pooled_tokens and teacher.pooled_tokens != student.pooled_tokens
    ):
        raise ValueError(
            f"the teacher sees {teacher.image_tokens} of {teacher.patches} image tokens, so its "
            "student must see the same means (--student.image-tokens 0); from a teacher that sees "
            "all of them (--model.pooled-tokens 0 --model.scored-tokens 0) it may have any number."
        )
    if not teacher.is_even:
        kept = None if layer_map is None else [teacher.layers[i] for i in layer_map.layers]
        if kept != list(student.layers):
            raise ValueError(
                "the teacher's layers are not whole in both streams (--model.backbone-layers, "
                "--model.expert-layers), so its student must keep the same halves\n"
                "give --student.layers, --student.backbone-layers and --student.expert-layers, or "
                "distil from the teacher that this one was cut from."
            )
    same = dataclasses.replace(
        teacher,
        image=dataclasses.replace(teacher.image, depth=student.image.depth),
        **{name: getattr(student, name) for name in DIFFERING},
    )
    if same != student:
        differing = [
            f"{field.name} ({getattr(teacher, field.name)} and {getattr(student, field.name)})"
            for field in dataclasses.fields(teacher)
            if getattr(same, field.name) != getattr(student, field.name)
        ]
        raise ValueError(
            "teacher and student must be one model up to layers and tokens; they differ in "
            f"{', '.join(differing)}."
        )
