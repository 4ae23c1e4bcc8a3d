"""One optimizer step of the distillation, a pure function of arrays.

    distill_step(spec, teacher_params, state, key, batch) -> (state, metrics)

Randomness (augmentation, noise, time) is drawn once, from `fold_in(key, step)`, before either model
runs, so teacher and student see one x_t. The teacher is an argument: outside the gradient, never
donated, never in the state. Parts of the student that are frozen are the teacher's own leaves, and
a frozen image tower runs once for both. Without a teacher the same step fine-tunes, or trains from
scratch, on the task loss. Bind `spec` with `functools.partial` and jit the rest, donating `state`.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.distill import attention as attentions
from shallow_pi.distill import flow, losses, norms
from shallow_pi.distill import spec as specs
from shallow_pi.distill import student as students
from shallow_pi.inference import quantize as quantization
from shallow_pi.inference import sampler
from shallow_pi.models import batch as batches
from shallow_pi.models import cached, captures, pi0, prefixes
from shallow_pi.models import observation as observations

Metrics = norms.Metrics
# Integration steps from noise to the teacher's end, for the reflow loss; openpi's number.
TEACHER_STEPS = 10


@flax.struct.dataclass
class DistillState:
    """The state that training changes: all of a checkpoint but the frozen parts."""

    step: Int[Array, ""]
    # The student's parameters without the frozen parts.
    params: PyTree
    opt_state: PyTree
    # Exponential moving average of the parameters, or None.
    ema_params: PyTree


class Inputs(NamedTuple):
    """Inputs of both models, drawn once."""

    observation: observations.Observation
    x_t: Float[Array, "b r ah ad"]
    t: Float[Array, "b r"]
    u: Float[Array, "b r ah ad"]
    action_mask: Bool[Array, "b r ah"]
    # ε
    noise: Float[Array, "b r ah ad"]
    # Times on the line from ε to the teacher's end; None without the reflow loss.
    line_t: Float[Array, "b r"] | None


class Counts(NamedTuple):
    """Numbers that the losses of a batch are divided by, of all its microbatches together."""

    # Actions that count, in every draw.
    actions: Float[Array, ""]
    # Observations with such actions.
    observations: Float[Array, ""]

    @classmethod
    def of(cls, action_mask: Bool[Array, "b *r ah"]) -> "Counts":
        """Those of a batch; at least 1."""
        observed = jnp.any(action_mask, axis=tuple(range(1, action_mask.ndim)))
        sums = (jnp.sum(mask, dtype=jnp.float32) for mask in (action_mask, observed))
        return cls(*(jnp.maximum(total, 1.0) for total in sums))


def init_state(spec: specs.Spec, params: PyTree) -> DistillState:
    """A fresh state around parameters, which become float32 (the teacher's may be bfloat16)."""
    params, _ = students.split(params, spec.freeze)
    # A copy, never an alias: the state is donated, and the caller keeps the parameters it gave.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return DistillState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=spec.optimizer.init(params),
        ema_params=None if spec.ema_decay is None else jax.tree.map(jnp.array, params),
    )


def draw_inputs(spec: specs.Spec, key: Array, batch: batches.Batch) -> Inputs:
    """Augment the images and draw noise and time, with openpi's keys (one draw: its numbers)."""
    augment_key, noise_key, time_key = jax.random.split(key, 3)
    observation = batch.observation.as_float()
    if spec.augmentation != observations.NO_AUGMENTATION:
        observation = observations.augment(augment_key, observation, spec.augmentation)
    b, ah, ad = batch.actions.shape
    noise = flow.sample_noise(noise_key, (b, spec.draws, ah, ad))
    t = flow.sample_time(time_key, (b, spec.draws))
    actions = jnp.broadcast_to(batch.actions[:, None], noise.shape)
    mask = spec.losses.counted(jnp.asarray(batch.action_mask))
    line_t = None
    if spec.losses.reflow > 0:
        deployed = sampler.integration_times(spec.num_steps)
        line_key, share = jax.random.fold_in(time_key, 1), spec.losses.reflow_deployed
        line_t = flow.sample_line_time(line_key, t.shape, deployed, share)
    return Inputs(
        observation=observation,
        x_t=flow.interpolate(actions, noise, t),
        t=t,
        u=flow.target_velocity(actions, noise),
        action_mask=jnp.broadcast_to(mask[:, None], (b, spec.draws, ah)),
        noise=noise,
        line_t=line_t,
    )


def distill_step(
    spec: specs.Spec,
    teacher_params: PyTree,
    state: DistillState,
    key: Array,
    batch: batches.Batch,
    weights: losses.Weights | None = None,
) -> tuple[DistillState, Metrics]:
    """One step of AdamW on the weighted sum of the losses (see `losses`).

    Teacher parameters may be of any float dtype; where no loss needs them, the frozen parts are
    enough. The key is the run's, the same at every step. `weights` take the place of those of
    `spec.losses`, as arrays that may differ between students of one program.

    Returns:
      The new state, and float32 metrics: every loss, gradient norms, the learning rate, the
      teacher's own task loss and the cosine between the two velocities.
    """
    inputs = draw_inputs(spec, jax.random.fold_in(key, state.step), batch)
    grads, metrics = _gradient(spec, teacher_params, state.params, inputs, weights)
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if spec.ema_decay is not None:
        decay = spec.ema_decay
        ema_params = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema_params, params)
    metrics |= norms.by_part(grads)
    metrics["learning_rate"] = jnp.asarray(spec.schedule(state.step), jnp.float32)
    metrics["param_norm"] = norms.global_norm(params)
    new_state = DistillState(
        step=state.step + 1, params=params, opt_state=opt_state, ema_params=ema_params
    )
    return new_state, metrics


def loss_gradient_norms(
    spec: specs.Spec, teacher_params: PyTree, state: DistillState, key: Array, batch: batches.Batch
) -> Metrics:
    """Norm of the gradient of each weighted loss alone, at the inputs the next step would draw.

    Costs one backward pass a loss, so the loop calls it now and then, not every step.
    """
    inputs = draw_inputs(spec, jax.random.fold_in(key, state.step), batch)
    found = {}
    for name in [name for name, weight in spec.losses.weights.items() if weight]:
        alone = spec.losses.only(**{name: getattr(spec.losses, name)})
        single = dataclasses.replace(spec, losses=alone)
        grads, _ = _gradient(single, teacher_params, state.params, inputs)
        found[f"grad_norm_of/{name}_loss"] = norms.global_norm(grads)
    return found


def _gradient(
    spec: specs.Spec,
    teacher_params: PyTree,
    params: PyTree,
    inputs: Inputs,
    weights: losses.Weights | None = None,
) -> tuple[PyTree, Metrics]:
    """Gradient and metrics of the whole batch, microbatch by microbatch."""
    weights = spec.losses.weights if weights is None else weights
    counts = Counts.of(inputs.action_mask)

    def one(part: Inputs) -> tuple[PyTree, Metrics]:
        return microbatch(spec, teacher_params, params, part, counts, weights)

    if spec.accumulation == 1:
        return one(inputs)

    def add(total: PyTree, part: Inputs) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, one(part)), None

    parts = _split(inputs, spec.accumulation)
    shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], parts))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, start, parts)[0]


def microbatch(
    spec: specs.Spec,
    teacher_params: PyTree,
    params: PyTree,
    inputs: Inputs,
    counts: Counts,
    weights: losses.Weights,
) -> tuple[PyTree, Metrics]:
    """Gradient and metrics of a microbatch: its shares of those of the whole batch of `counts`."""
    tokens = None
    if "vision" in spec.freeze or spec.losses.vision:
        assert spec.teacher is not None, "the tokens are its own"
        tokens = pi0.embed_images(spec.teacher, teacher_params, inputs.observation, spec.execution)
        tokens = jax.lax.stop_gradient(tokens)
    reference = _teacher_outputs(spec, teacher_params, inputs, tokens)

    def loss(params: PyTree) -> tuple[Float[Array, ""], Metrics]:
        whole = rounded(spec, students.join(params, teacher_params, spec.freeze))
        return _total_loss(spec, weights, whole, reference, inputs, tokens, counts)

    return jax.grad(loss, has_aux=True)(params)


class _Line(NamedTuple):
    """Points of the straight lines from noise to the teacher's ends, and their velocity ε − â."""

    x_t: Float[Array, "b r ah ad"]
    t: Float[Array, "b r"]
    u: Float[Array, "b r ah ad"]


class _Reference(NamedTuple):
    velocity: Float[Array, "b r ah ad"]
    attention: captures.PrefixAttention | None
    # None without the reflow loss.
    line: _Line | None


def _teacher_outputs(
    spec: specs.Spec, teacher_params: PyTree, inputs: Inputs, image_tokens: Array | None
) -> _Reference | None:
    """The teacher's velocity, its attention and its line where losses need them; no gradient."""
    if spec.teacher is None or not spec.losses.needs_teacher:
        return None
    teacher = spec.teacher
    compared = spec.losses.attention > 0 or spec.losses.scorer
    layer = spec.attention_layers[1] if compared else None
    offloaded = spec.offload_teacher
    execution = dataclasses.replace(spec.execution, offloaded=offloaded, unroll=False)
    found = pi0.outputs(
        teacher,
        teacher_params,
        inputs.observation,
        inputs.x_t,
        inputs.t,
        image_tokens=image_tokens,
        attention_layer=layer,
        attention_queries=spec.losses.attention_queries,
        cache=spec.losses.reflow > 0,
        execution=execution,
    )
    line = None
    if (cache := found.cache) is not None:
        assert inputs.line_t is not None, "drawn where the reflow loss is on"
        own = cached.suffix_params(teacher_params, execution)

        def velocity(x_t: Array, t: Array) -> Array:
            return cached.velocity(teacher, own, cache, x_t, t, execution)

        end = flow.integrate(velocity, inputs.noise, sampler.integration_times(TEACHER_STEPS))
        x_t = flow.interpolate(end, inputs.noise, inputs.line_t)
        line = _Line(x_t, inputs.line_t, flow.target_velocity(end, inputs.noise))
    return jax.lax.stop_gradient(_Reference(found.velocity, found.attention, line))


def _total_loss(
    spec: specs.Spec,
    weights: losses.Weights,
    params: PyTree,
    reference: _Reference | None,
    inputs: Inputs,
    image_tokens: Array | None,
    counts: Counts,
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted loss of a microbatch as its share of the mean over the whole batch.

    `image_tokens` are the teacher's: for the vision loss, or the student's too where it has its
    tower. `counts` are of the whole batch.
    """
    own_tokens = image_tokens
    if spec.losses.vision:
        own_tokens = pi0.embed_images(spec.student, params, inputs.observation, spec.execution)
    layer = spec.attention_layers[0] if spec.losses.attention > 0 else None
    x_t, t, draws = inputs.x_t, inputs.t, inputs.t.shape[1]
    line = None if reference is None else reference.line
    if line is not None:  # More draws in the one pass: they share the prefix.
        x_t = jnp.concatenate([x_t, line.x_t], axis=1)
        t = jnp.concatenate([t, line.t], axis=1)
    found = pi0.outputs(
        spec.student,
        params,
        inputs.observation,
        x_t,
        t,
        image_tokens=own_tokens,
        attention_layer=layer,
        attention_queries=spec.losses.attention_queries,
        execution=spec.execution,
    )
    v_all, attention, choice = found.velocity, found.attention, found.choice

    def mean(values: Float[Array, "b r ah"]) -> Float[Array, ""]:
        return losses.masked_sum(values, inputs.action_mask) / counts.actions

    def over_observations(values: Float[Array, "b ..."]) -> Float[Array, ""]:
        observed = jnp.any(inputs.action_mask, axis=(1, 2))
        of_each = jnp.mean(values.reshape(len(values), -1), axis=1)
        return losses.masked_sum(of_each, observed) / counts.observations

    v_student = v_all[:, :draws]
    metrics = {"task_loss": mean(losses.task_loss(v_student, inputs.u))}
    loss = weights["task"] * metrics["task_loss"]
    if reference is not None:
        metrics["teacher_task_loss"] = mean(losses.task_loss(reference.velocity, inputs.u))
        metrics["velocity_cosine"] = mean(losses.cosine(v_student, reference.velocity))
        metrics["velocity_loss"] = mean(losses.velocity_loss(v_student, reference.velocity))
        loss += weights["velocity"] * metrics["velocity_loss"]
    if reference is not None and attention is not None:
        assert reference.attention is not None, "the teacher returns it too"
        both = attention, reference.attention
        values = attentions.divergence(spec.student, spec.losses, *both, inputs.action_mask, choice)
        of_actions = spec.losses.attention_queries == "actions"
        metrics["attention_loss"] = mean(values) if of_actions else over_observations(values)
        loss += weights["attention"] * metrics["attention_loss"]
    if line is not None:
        metrics["reflow_loss"] = mean(losses.velocity_loss(v_all[:, draws:], line.u))
        loss += weights["reflow"] * metrics["reflow_loss"]
    if spec.losses.vision:
        assert own_tokens is not None, "this tower has run"
        assert image_tokens is not None, "and the teacher's"
        valid = prefixes.image_valid(spec.student, inputs.observation, spec.student.patches)
        errors = losses.vision_loss(own_tokens, image_tokens, valid)
        metrics["vision_loss"] = over_observations(errors)
        loss += weights["vision"] * metrics["vision_loss"]
    if spec.losses.scorer:
        assert choice is not None, "this student has a scorer"
        assert reference is not None, "the scores are compared"
        assert reference.attention is not None, "with the teacher's attention"
        cameras = prefixes.image_valid(spec.student, inputs.observation, 1)
        mask = inputs.action_mask
        errors, kept = attentions.of_scorer(choice, cameras, reference.attention, mask)
        metrics["scorer_loss"] = over_observations(errors)
        metrics["attention_kept"] = over_observations(kept)
        loss += weights["scorer"] * metrics["scorer_loss"]
    metrics["loss"] = loss
    return loss, metrics


def rounded(spec: specs.Spec, params: PyTree) -> PyTree:
    """The student's parameters as it is deployed, in 8 bits, with the gradient of the unrounded.

    A frozen image tower stays as it is: teacher and student share its tokens.
    """
    parts = tuple(part for part in quantization.PARTS if part not in spec.freeze)
    return quantization.straight_through(params, spec.quantize, parts)


def _split(inputs: Inputs, parts: int) -> Inputs:
    """An axis of microbatches, each every parts-th sample, so that no data changes device."""

    def split(x: Array) -> Array:
        if x.shape[0] % parts:
            raise ValueError(
                f"the batch of {x.shape[0]} does not divide into accumulation = {parts} "
                "microbatches."
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, inputs)
