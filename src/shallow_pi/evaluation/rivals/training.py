"""The training of rivals that are trained: the teacher's parameters and their own, by one loss.

Every rival that is trained gets what a student gets: the same demonstrations, batches, draws,
optimizer and number of steps, the teacher's velocity beside the data's, its image tower frozen.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.distill import losses, student
from shallow_pi.evaluation.rivals import rival
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.training import optimizer

# (noise, time) pairs for every sample, as students have on the simulated tasks.
DRAWS = 2
PEAK_LR = 2e-3


class Trained(NamedTuple):
    """A model's parameters, in openpi's tree, and a rival's own."""

    model: PyTree
    own: PyTree


class Seen(NamedTuple):
    """The inputs of a loss."""

    drawn: rival.Draw
    # Of the frozen tower.
    image_tokens: Float[Array, "b n d"]
    # The teacher's velocity at the same x_t.
    teacher: Float[Array, "b r ah ad"]


# From trained parameters and what is seen to a scalar.
Loss = Callable[[Trained, Seen], Float[Array, ""]]


def fit(
    material: rival.Material,
    model: pi0.Pi0Config,
    start: Trained,
    loss: Loss,
    folder: pathlib.Path,
    *,
    steps: int,
    label: str,
) -> Trained:
    """Train, or read what was trained in the folder before; float32.

    The model and its initial parameters have the teacher's tower.
    """
    # Copies: they are donated, and the teacher stays.
    whole = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), start)
    if (folder / run_folder.PARAMS).is_dir():
        shapes = jax.eval_shape(lambda: whole._asdict())
        return Trained(**weights.load_params(folder, shapes, what=label))
    trained, frozen = student.split(whole.model, ("vision",))
    schedule = optimizer.CosineSchedule.over(steps, PEAK_LR).create()
    adam = optimizer.AdamW().create(schedule)
    step = jax.jit(
        functools.partial(_step, material.model, model, loss, adam), donate_argnums=(2, 3)
    )
    held = Trained(trained, whole.own)
    state, feed = adam.init(held), iter(material.feed())
    with progress.bar(f"Train {label}", total=steps) as advance:
        for i in range(steps):
            key = jax.random.fold_in(jax.random.key(0), i)
            held, state, value = step(material.params, frozen, held, state, key, next(feed))
            if not (i + 1) % 10 or i + 1 == steps:
                advance(i + 1 - i // 10 * 10, note=f"loss {float(value):.3f}")
    if not jnp.isfinite(value):
        raise ValueError(f"{label}: the loss became {float(value)} in {steps} steps")
    whole = Trained(student.join(held.model, whole.model, ("vision",)), held.own)
    weights.save_params(folder / run_folder.PARAMS, whole._asdict())
    return whole


def _step(
    teacher: pi0.Pi0Config,
    model: pi0.Pi0Config,
    loss: Loss,
    adam: optax.GradientTransformation,
    teacher_params: PyTree,
    frozen: PyTree,
    held: Trained,
    state: PyTree,
    key: Array,
    batch: batches.Batch,
) -> tuple[Trained, PyTree, Float[Array, ""]]:
    drawn = rival.draw(key, batch, DRAWS)
    given = (drawn.observation, drawn.x_t, drawn.t)
    image_tokens = pi0.embed_images(model, teacher_params, drawn.observation)
    v, _ = pi0.velocity(teacher, teacher_params, *given, image_tokens=image_tokens)
    seen = Seen(drawn, image_tokens, jax.lax.stop_gradient(v))

    def total(held: Trained) -> Float[Array, ""]:
        return loss(Trained(student.join(held.model, frozen, ("vision",)), held.own), seen)

    value, grads = jax.value_and_grad(total)(held)
    updates, state = adam.update(grads, state, held)
    return optax.apply_updates(held, updates), state, value


def task_and_velocity(v: Float[Array, "b r ah ad"], seen: Seen) -> Float[Array, ""]:
    """The two losses that need no inner state of a student."""
    task = jnp.mean(losses.task_loss(v, seen.drawn.u))
    return task + jnp.mean(losses.velocity_loss(v, seen.teacher))


def cast(config: pi0.Pi0Config, tree: PyTree) -> PyTree:
    """Parameters as they are deployed."""
    return jax.tree.map(lambda leaf: leaf.astype(config.dtype), tree)
