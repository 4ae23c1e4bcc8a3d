"""Validation on held-out episodes: errors of sampled actions against the data and the teacher.

Samples and their noise are drawn once, so every measurement of a run, resumed or not and on any
mesh, answers the same question, and teacher and student start from the same noise. Where samples do
not fill the devices, others without any action do, and do not count. The teacher's actions are
sampled once and kept. An error is the mean absolute difference over the actions that exist (not
the padding behind an episode's end): of the normalized robot dimensions, and by group of joints in
the robot's own units.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.data import sources
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize
from shallow_pi.distill import losses as loss_terms
from shallow_pi.distill import spec as specs
from shallow_pi.distill import step, student
from shallow_pi.inference import sampler, tuning
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0
from shallow_pi.parallel import processes, sharding
from shallow_pi.training import config as configs

# Names in metrics.jsonl; the errors have one more for each group, "<name>/<group>", and for each
# joint of a group whose name is known, "<name>/<group>/<joint>".
PREFIX = "validation/"
TO_DATA = f"{PREFIX}error_to_data"
TO_TEACHER = f"{PREFIX}error_to_teacher"
TEACHER_TO_DATA = f"{PREFIX}teacher_error_to_data"
LOSSES = tuple(f"{term}_loss" for term in loss_terms.TERMS)
# Scanned and unfused: fastest to compile, and without a second copy of sharded weights.
OPTIONS = dataclasses.replace(tuning.SCANNED, fused=False)


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """The held-out samples of a run."""

    # (batch of the loader, noise) on device, over the mesh.
    batches: tuple[tuple[batches.Batch, Array], ...]
    # All of them on every host, normalized: recorded actions, which of them exist, and states. The
    # last may only fill the devices: none of their actions exist.
    actions: Float[np.ndarray, "n ah ad"]
    action_mask: Bool[np.ndarray, "n ah"]
    state: Float[np.ndarray, "n ad"]


def read(
    source: sources.Source, samples: int, batch_size: int, mesh: jax.sharding.Mesh, seed: int
) -> HeldOut:
    """Evenly spaced samples of `source` on the devices of `mesh`, each with its own noise.

    Args:
      source: source of held-out samples.
      samples: number of samples.
      batch_size: largest number of samples that go through a model at once; the devices divide it.
      mesh: the devices; each process reads its own share.
      seed: seed of the noise, which depends on the sample's place and not on the mesh.
    """
    ways = mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP]
    number = -(-samples // batch_size)
    size = -(-samples // (number * ways)) * ways
    local = size // jax.process_count()
    put = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    found = []
    with processes.bar("Held-out samples", number * size) as advance:
        for start in range(0, number * size, size):
            first = start + jax.process_index() * local
            places = range(first, first + local)
            rows = []
            for place in places:
                row = source[min(place, samples - 1) * len(source) // samples]
                present = row.action_mask & (place < samples)
                rows.append(dataclasses.replace(row, action_mask=present))
                advance(jax.process_count())
            batch = batches.stack(rows)
            shape = batch.actions.shape[1:]
            noise = np.stack([_noise(seed, place, shape) for place in places])
            found.append(jax.tree.map(put, (batch, noise)))
    gather = jax.jit(
        lambda batch: (batch.actions, batch.action_mask, batch.observation.state),
        out_shardings=sharding.replicated(mesh),
    )
    parts = jax.device_get([gather(batch) for batch, _ in found])
    return HeldOut(tuple(found), *map(np.concatenate, zip(*parts, strict=True)))


def _noise(seed: int, place: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, place]).standard_normal(shape).astype(np.float32)


def to_robot(
    assets: policy_assets.Assets,
    actions: Float[np.ndarray, "n ah ad"],
    state: Float[np.ndarray, "n ad"],
) -> Float[np.ndarray, "n ah rd"]:
    """Normalized actions in the robot's units; `state` is normalized too."""
    robot = assets.robot
    state = state[..., : robot.state_dim]  # Without the padding.
    own = normalize.unnormalize(state, assets.stats["state"], assets.kind)
    if robot.state_conversion is not None:
        own = robot.state_conversion.inverse(own)
    return assets.outputs()({"actions": actions, "state": own})["actions"]


def errors(
    name: str,
    actions: Float[np.ndarray, "n ah ad"],
    reference: Float[np.ndarray, "n ah ad"],
    held_out: HeldOut,
    assets: policy_assets.Assets | None,
) -> dict[str, float]:
    """Mean absolute differences: over the normalized robot dimensions, then by group and joint.

    Without assets (synthetic samples) there are no robot units: one mean over all dimensions, and
    no groups. Nor are there groups if the robot's transforms are openpi's alone.
    """

    def mean(difference: np.ndarray) -> float:
        return float(np.abs(difference[held_out.action_mask], dtype=np.float64).mean())

    if assets is None:
        return {name: mean(actions - reference)}
    robot = assets.robot
    found = {name: mean((actions - reference)[..., : robot.action_dim])}
    if robot.elsewhere:
        return found
    own, other = (to_robot(assets, values, held_out.state) for values in (actions, reference))
    start, joints = 0, assets.names.get("actions", ())
    for group in robot.action_groups:
        part = slice(start, start + group.size)
        found[f"{name}/{group.name}"] = mean(own[..., part] - other[..., part])
        if joints and group.size > 1:
            for dim in range(start, start + group.size):
                error = mean(own[..., dim] - other[..., dim])
                found[f"{name}/{group.name}/{joints[dim].replace('/', '_')}"] = error
        start += group.size
    return found


def sample(
    model: pi0.Pi0Config,
    num_steps: int,
    params: PyTree,
    batch: batches.Batch,
    noise: Float[Array, "b ah ad"],
) -> Float[Array, "b ah ad"]:
    """Normalized actions of a model for a batch of the loader."""
    observation = batch.observation.as_float()
    return sampler.sample_actions(
        model, params, observation, noise, num_steps=num_steps, options=OPTIONS
    )


def sample_deployed(
    spec: specs.Spec,
    num_steps: int,
    params: PyTree,
    batch: batches.Batch,
    noise: Float[Array, "b ah ad"],
) -> Float[Array, "b ah ad"]:
    """`sample` of the student, its weights rounded as in deployment."""
    return sample(spec.student, num_steps, step.rounded(spec, params), batch, noise)


def losses(
    spec: specs.Spec,
    key: Array,
    counts: step.Counts,
    teacher_params: PyTree,
    state: step.DistillState,
    batch: batches.Batch,
    number: Int[Array, ""],
) -> step.Metrics:
    """A batch's shares of the losses over all held-out samples: of all batches, they add up.

    Noise and time belong to a sample, whatever batch it is in. The compiler drops the gradient,
    which nobody reads.

    Args:
      spec: the static part.
      key: of noise and times.
      counts: of all batches.
      teacher_params: as in `measure`.
      state: the student's.
      batch: one of the batches, which are of one size.
      number: its place among them.
    """

    def draw(place: Int[Array, ""], sample: batches.Batch) -> step.Inputs:
        alone = jax.tree.map(lambda leaf: leaf[None], sample)
        inputs = step.draw_inputs(spec, jax.random.fold_in(key, place), alone)
        return jax.tree.map(lambda leaf: leaf[0], inputs)

    rows = len(batch.actions)
    inputs = jax.vmap(draw)(number * rows + jnp.arange(rows), batch)
    params, weights = saved_params(state), spec.losses.weights
    _, metrics = step.microbatch(spec, teacher_params, params, inputs, counts, weights)
    return {name: metrics[name] for name in LOSSES if name in metrics}


def saved_params(state: step.DistillState) -> PyTree:
    """The deployed parameters without frozen parts: the moving average if there is one."""
    return state.params if state.ema_params is None else state.ema_params


@dataclasses.dataclass(frozen=True, eq=False)
class Validation:
    """Everything that validation needs besides the state; made by `create`."""

    interval: int
    # Name of the error that decides which step is best.
    criterion: str
    held_out: HeldOut
    assets: policy_assets.Assets | None
    # Sampled once, from the same noise; None without a teacher.
    teacher_actions: Float[np.ndarray, "n ah ad"] | None
    # Compiled `sample_deployed`, and `losses`.
    sample_student: Callable[..., Array]
    losses: Callable[..., step.Metrics]
    # Parts of the student that are the teacher's.
    freeze: tuple[student.Part, ...] = ()

    def is_due(self, number: int, last: int) -> bool:
        """True if step `number` of `last` is validated."""
        return number % self.interval == 0 or number == last

    def measure(self, teacher_params: PyTree, state: step.DistillState) -> dict[str, float]:
        """All errors and losses of a state, by their names in metrics.jsonl.

        Args:
          teacher_params: the teacher's parameters if a loss needs them, else the frozen parts.
          state: the student's state; read, not donated.
        """
        params = student.join(saved_params(state), teacher_params, self.freeze)
        held = self.held_out.batches
        sampled = [self.sample_student(params, batch, noise) for batch, noise in held]
        terms = [
            self.losses(teacher_params, state, batch, jnp.int32(number))
            for number, (batch, _) in enumerate(held)
        ]
        sampled, terms = jax.device_get((sampled, terms))
        actions = np.concatenate(sampled)
        compare = functools.partial(errors, held_out=self.held_out, assets=self.assets)
        found = compare(TO_DATA, actions, self.held_out.actions)
        if self.teacher_actions is not None:
            found |= compare(TO_TEACHER, actions, self.teacher_actions)
            found |= compare(TEACHER_TO_DATA, self.teacher_actions, self.held_out.actions)
        return found | {
            f"{PREFIX}{name}": float(sum(term[name] for term in terms)) for name in terms[0]
        }


def create(
    config: configs.ValidationConfig,
    source: sources.Source | None,
    assets: policy_assets.Assets | None,
    spec: specs.Spec,
    teacher_params: PyTree,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    seed: int,
) -> Validation | None:
    """Read the held-out samples and sample the teacher on them; None if validation is off.

    Args:
      config: interval, number of samples, and criterion.
      source: source of held-out samples; None if no episode is held out.
      assets: conversion to the robot's units; None for synthetic samples.
      spec: static part of the training step.
      teacher_params: the teacher's parameters, not kept; None without a teacher.
      mesh: mesh of the training.
      batch_size: rows of a training microbatch, which fit in memory.
      seed: seed of the noise.
    """
    if source is None or not config.interval:
        return None
    held_out = read(source, config.samples, batch_size, mesh, seed)
    whole = sharding.replicated(mesh)

    teacher_actions = None
    if spec.teacher is not None:
        num_steps, parts = config.num_steps or step.TEACHER_STEPS, []
        run = jax.jit(sample, static_argnums=(0, 1), out_shardings=whole)
        sample_teacher = functools.partial(run, spec.teacher, num_steps)
        with processes.bar("Held-out teacher", len(held_out.state)) as advance:
            for batch, noise in held_out.batches:
                parts.append(jax.device_get(sample_teacher(teacher_params, batch, noise)))
                advance(len(noise))
        teacher_actions = np.concatenate(parts)
    plain = dataclasses.replace(
        spec, augmentation=observations.NO_AUGMENTATION, draws=1, ema_decay=None
    )
    counted = spec.losses.counted(jnp.asarray(held_out.action_mask))
    return Validation(
        interval=config.interval,
        criterion=TO_DATA if config.against == "data" else TO_TEACHER,
        held_out=held_out,
        assets=assets,
        teacher_actions=teacher_actions,
        sample_student=functools.partial(
            jax.jit(sample_deployed, static_argnums=(0, 1), out_shardings=whole),
            *(spec, config.num_steps or spec.num_steps),
        ),
        losses=functools.partial(
            jax.jit(losses, static_argnums=0, out_shardings=whole),
            *(plain, jax.random.key(seed), step.Counts.of(counted)),
        ),
        freeze=spec.freeze,
    )
