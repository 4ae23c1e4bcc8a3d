"""Train many small policies in few programs.

A small policy leaves an accelerator idle: its kernels are shorter than their launch. So all recipes
that differ only in arrays (initial parameters, loss weights, seeds, number of demonstrations) are
trained together, by the same `step.distill_step` as any student, mapped twice: over seeds, each
with its own order of the data, noise and times, and over the variants that share them, for which
the teacher runs once. The frames stay on the device, and batches are drawn there, with replacement.
Their programs are compiled side by side and run one after the other.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from shallow_pi import progress
from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.evidence import frames, unfinished
from shallow_pi.evidence.claims import recipes
from shallow_pi.models import batch as batches
from shallow_pi.models import layers, pi0
from shallow_pi.training import optimizer

# Steps of one call of a compiled program, and programs compiled side by side.
CHUNK, THREADS = 50, 4
_NONE: Mapping[str, np.ndarray] = {}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher: its parameters on the host."""

    model: pi0.Pi0Config
    params: PyTree
    # Scores of its layers by strategy, for the strategies that measure.
    scores: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def student(self, recipe: recipes.Recipe) -> pi0.Pi0Config:
        """The model of a student of it."""
        return architecture(recipe, self.model, self.scores)


@dataclasses.dataclass(frozen=True)
class Group:
    """A grid of seeds × variants that one program trains."""

    # Seed and number of demonstrations of each row.
    rows: tuple[tuple[int, int], ...]
    # The columns; their own seed and demonstrations are not used.
    variants: tuple[recipes.Recipe, ...]

    @property
    def grid(self) -> list[list[recipes.Recipe]]:
        """One list for each row."""
        return [
            [dataclasses.replace(v, seed=seed, demonstrations=count) for v in self.variants]
            for seed, count in self.rows
        ]

    @property
    def first(self) -> recipes.Recipe:
        """Any member; the fields that the program depends on are equal in all."""
        return self.grid[0][0]

    def __str__(self) -> str:
        size = len(self.rows) * len(self.variants)
        return f"{size} × {self.first.slug}" if size > 1 else self.first.slug


def group(wanted: Iterable[recipes.Recipe]) -> list[Group]:
    """Recipes of one program together, in the order in which they first appear."""
    columns: dict[object, dict[recipes.Recipe, list[tuple[int, int]]]] = {}
    for recipe in dict.fromkeys(wanted):
        variant = dataclasses.replace(recipe, seed=0, demonstrations=0)
        rows = columns.setdefault(_program(recipe), {}).setdefault(variant, [])
        rows.append((recipe.seed, recipe.demonstrations))
    found = []
    for variants in columns.values():
        grids: dict[tuple[tuple[int, int], ...], list[recipes.Recipe]] = {}
        for variant, rows in variants.items():
            grids.setdefault(tuple(sorted(rows)), []).append(variant)
        found += [Group(rows, tuple(members)) for rows, members in grids.items()]
    return found


def _program(recipe: recipes.Recipe) -> tuple[object, ...]:
    """The fields that a program depends on; weights, initial parameters and seeds are arrays.

    A variant without some term joins those that have it: its weight is 0. Which of the teacher's
    layers is compared is part of the program, and so is the layer map where attention is.
    """
    compared: object = None
    chosen = (recipe.strategy, recipe.attention_layer, recipe.queries)
    if chosen != ("uniform", "middle", "actions"):
        compared = (*chosen, recipe.seed if recipe.strategy == "random" else None)
    return (
        recipe.role,
        recipe.model,
        (recipe.depth, recipe.vision_depth, recipe.image_tokens, recipe.token_choice),
        recipe.teacher,
        recipe.steps,
        recipe.batch_size,
        recipe.peak_lr,
        recipe.reflow > 0,
        recipe.num_steps,
        recipe.heads,
        compared if recipe.attention else None,
    )


def layers_of(
    recipe: recipes.Recipe, teacher: pi0.Pi0Config, scores: Mapping[str, np.ndarray]
) -> layer_map.LayerMap:
    """The teacher's layers that a student copies.

    Of a teacher whose expert reads the backbone's last state alone, these are as many of the
    backbone's layers, which come first, as of the expert's.
    """
    depth = teacher.depth if teacher.is_even else teacher.depth // 2
    match recipe.strategy:
        case "random":
            chosen = layer_map.random(recipe.depth, depth, recipe.seed)
        case "uniform" | "first" | "last":
            chosen = getattr(layer_map, recipe.strategy)(recipe.depth, depth)
        case strategy:
            if strategy not in scores:
                raise ValueError(f"{recipe.slug}: the layers' {strategy} has to be measured first")
            chosen = layer_map.measured(strategy, recipe.depth, scores[strategy])
    if teacher.is_even:
        return chosen
    both = (*chosen.layers, *(depth + layer for layer in chosen.layers))
    return layer_map.explicit(both, teacher.depth)


def architecture(
    recipe: recipes.Recipe, model: pi0.Pi0Config, scores: Mapping[str, np.ndarray] = _NONE
) -> pi0.Pi0Config:
    """The model of a recipe.

    `model` is a student's teacher, or has the sizes of a teacher's tasks' config; `scores` are
    those of the teacher's layers, for the strategies that measure.
    """
    if recipe.role == "teacher":
        return recipes.teacher_model(recipe, model)
    own = student.model(model, layers_of(recipe, model, scores))
    image = dataclasses.replace(own.image, depth=recipe.vision_depth or own.image.depth)
    pooled, scored = recipe.image_tokens or model.pooled_tokens, 0
    if recipe.token_choice == "scored":
        pooled, scored = scored, pooled
    own = dataclasses.replace(own, image=image, pooled_tokens=pooled, scored_tokens=scored)
    student.vision_layers(model, own)  # Checks the depth.
    return own


def initial(
    recipe: recipes.Recipe,
    model: pi0.Pi0Config,
    teacher: PyTree,
    scores: Mapping[str, np.ndarray] = _NONE,
) -> PyTree:
    """Parameters before the first step: cut out of the teacher's, or random.

    `model` is that of `architecture`. Op by op this takes minutes on an accelerator: it belongs in
    a program.
    """
    own = architecture(recipe, model, scores)
    if recipe.init == "random":
        return pi0.init(own, jax.random.key(1000 + recipe.seed))
    return student.cut(model, teacher, layers_of(recipe, model, scores), own)


@dataclasses.dataclass(frozen=True)
class _Program:
    """The programs of a group: the states before the first step, and `length` steps of them."""

    start: jax.stages.Compiled
    # None where nothing is trained.
    run: jax.stages.Compiled | None
    needs_teacher: bool
    length: int


def train(
    groups: Sequence[Group],
    data: frames.Frames,
    model: pi0.Pi0Config,
    teacher: Teacher | None = None,
    folder: pathlib.Path | None = None,
) -> Iterator[tuple[recipes.Recipe, PyTree, Mapping[str, float]]]:
    """Train groups of recipes; yields each policy's parameters, and its last metrics.

    Args:
      groups: of `group`, the most important first.
      data: demonstrations, of which a recipe takes the first.
      model: of students their teacher's; of teachers the sizes of the tasks' config, at any depth.
      teacher: what students are cut from and compared with; None for teachers.
      folder: where the states of long trainings are kept until the caller has taken all policies
        of a group; None keeps none.

    Raises:
      ValueError: more demonstrations are asked for than there are.
    """
    most = max((count for members in groups for _, count in members.rows), default=0)
    if most > len(data.ends) - 1:
        raise ValueError(f"{most} demonstrations are wanted, {len(data.ends) - 1} were collected")
    spec = batches.spec(model, len(data.samples.actions))
    samples = jax.device_put(data.samples)
    held = None if teacher is None else jax.device_put(teacher.params)
    known = [] if teacher is None else jax.tree.leaves(teacher.params)
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        programs = [pool.submit(_compile, members, model, teacher, spec) for members in groups]
        for members, program in zip(groups, programs, strict=True):
            kept = None
            if folder is not None:
                identity = members, model, data.ends, data.samples.actions, *known
                kept = unfinished.Unfinished(folder, str(members), identity)
            params, metrics = _run(program.result(), members, data, samples, held, kept)
            yield from _members(members, jax.device_get(params), jax.device_get(metrics))
            if kept is not None:
                kept.discard()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compile(
    members: Group, model: pi0.Pi0Config, teacher: Teacher | None, samples: batches.Batch
) -> _Program:
    """For `CHUNK` steps or a divisor."""
    steps, scores = members.first.steps, _NONE if teacher is None else teacher.scores
    spec = _spec(members, model, None if teacher is None else model, scores)
    known = None if teacher is None else pi0.abstract_params(model)
    begin = functools.partial(_start, spec, members, model, scores)
    start = jax.jit(begin).lower(known)
    if not steps:
        return _Program(start.compile(), None, False, 0)
    length = next(n for n in range(min(CHUNK, steps), 0, -1) if steps % n == 0)
    run = jax.jit(
        functools.partial(_chunk, spec, length, members.first.batch_size), donate_argnums=0
    )
    held = None if spec.teacher is None else known
    arrays = _arrays(members, np.zeros(1 + max(count for _, count in members.rows), int))
    lowered = run.lower(jax.eval_shape(begin, known), held, samples, *arrays)
    return _Program(start.compile(), lowered.compile(), held is not None, length)


def _members(
    members: Group, params: PyTree, metrics: Mapping[str, np.ndarray]
) -> Iterator[tuple[recipes.Recipe, PyTree, Mapping[str, float]]]:
    for i, row in enumerate(members.grid):
        for j, recipe in enumerate(row):
            own = jax.tree.map(lambda leaf, i=i, j=j: np.asarray(leaf[i, j]), params)
            yield recipe, own, {name: float(value[i, j]) for name, value in metrics.items()}


def _start(
    spec: specs.Spec,
    members: Group,
    model: pi0.Pi0Config,
    scores: Mapping[str, np.ndarray],
    teacher: PyTree,
) -> step.DistillState:
    """States before the first step, with axes of seeds and variants in front."""
    made: dict[object, PyTree] = {}

    def params(recipe: recipes.Recipe) -> PyTree:
        # Members that differ in their losses or data alone begin as one.
        own = recipe.seed if "random" in (recipe.init, recipe.strategy) else None
        key = recipe.init, recipe.strategy, own
        if key not in made:
            made[key] = initial(recipe, model, teacher, scores)
        return made[key]

    def stack(*trees: PyTree) -> PyTree:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    grid = stack(*[stack(*map(params, row)) for row in members.grid])
    return jax.vmap(jax.vmap(functools.partial(step.init_state, spec)))(grid)


def _spec(
    members: Group,
    model: pi0.Pi0Config,
    teacher: pi0.Pi0Config | None,
    scores: Mapping[str, np.ndarray],
) -> specs.Spec:
    # A term that any variant has is computed for all; a weight of 0 drops it again.
    weighted = [variant.losses.weights for variant in members.variants]
    largest: dict[str, Any] = {
        name: max(weights[name] for weights in weighted) for name in losses.TERMS
    }
    shown = next((v for v in members.variants if v.attention), members.first)
    weights = dataclasses.replace(shown.losses, **largest)
    first = members.first
    schedule = optimizer.CosineSchedule.over(first.steps, first.peak_lr).create()
    at = dataclasses.replace(shown, seed=members.rows[0][0])
    own = architecture(at, model, scores)
    teacher = teacher if weights.needs_teacher else None
    return specs.Spec(
        student=own,
        optimizer=optimizer.AdamW().create(schedule),
        schedule=schedule,
        losses=weights,
        teacher=teacher,
        layer_map=None if teacher is None else layers_of(at, teacher, scores),
        draws=recipes.DRAWS,
        num_steps=first.num_steps,
        execution=layers.Execution(remat="none"),
    )


def _arrays(
    members: Group, ends: Int[np.ndarray, " e+1"]
) -> tuple[Array, Array, Mapping[str, Array]]:
    """Seeds and numbers of frames of the rows, and the weights of all members."""
    grid = members.grid
    weights = {
        name: jnp.array([[r.losses.weights[name] for r in row] for row in grid], jnp.float32)
        for name in losses.TERMS
    }
    seeds = jnp.array([seed for seed, _ in members.rows], jnp.int32)
    return seeds, jnp.array([ends[count] for _, count in members.rows], jnp.int32), weights


def _run(
    program: _Program,
    members: Group,
    data: frames.Frames,
    samples: batches.Batch,
    held: PyTree,
    kept: unfinished.Unfinished | None,
) -> tuple[PyTree, Mapping[str, Array]]:
    steps, state = members.first.steps, program.start(held)
    metrics: Mapping[str, Array] = {}
    if program.run is None:
        return state.params, metrics
    arrays, known = _arrays(members, data.ends), held if program.needs_teacher else None
    state = state if kept is None else kept.restore(state)
    done = int(np.ravel(state.step)[0])
    with progress.bar(str(members), total=steps) as advance:
        advance(done)
        while done < steps:
            state, metrics = program.run(state, known, samples, *arrays)
            jax.block_until_ready(state.step)
            done += program.length
            advance(program.length)
            if kept is not None and done < steps:
                kept.keep(state)
    return state.params, metrics


def _chunk(
    spec: specs.Spec,
    length: int,
    batch_size: int,
    state: step.DistillState,
    teacher: PyTree,
    samples: batches.Batch,
    seeds: Array,
    count: Array,
    weights: Mapping[str, Array],
) -> tuple[step.DistillState, Mapping[str, Array]]:
    """`length` steps of every policy; the metrics are means over them."""

    def one_row(
        states: step.DistillState, seed: Array, frames: Array, scales: Mapping[str, Array]
    ) -> tuple[step.DistillState, Mapping[str, Array]]:
        key = jax.random.key(seed)
        drawn = jax.random.fold_in(jax.random.fold_in(key, 2**30), states.step[0])
        rows = jax.random.randint(drawn, (batch_size,), 0, frames)
        batch = jax.tree.map(lambda leaf: leaf[rows], samples)

        def one(
            state: step.DistillState, scale: Mapping[str, Array]
        ) -> tuple[step.DistillState, Mapping[str, Array]]:
            # The step's number is the row's, so that inputs and teacher are not mapped.
            shared = dataclasses.replace(state, step=states.step[0])
            return step.distill_step(spec, teacher, shared, key, batch, scale)

        return jax.vmap(one)(states, scales)

    def one_step(
        states: step.DistillState, _: None
    ) -> tuple[step.DistillState, Mapping[str, Array]]:
        return jax.vmap(one_row)(states, seeds, count, weights)

    state, metrics = jax.lax.scan(one_step, state, None, length)
    return state, {name: jnp.mean(values, 0) for name, values in metrics.items()}
