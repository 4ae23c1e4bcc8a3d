"""What a run starts from: its checks, its teacher, its layer map and its first state.

What can be wrong is found out cheaply first (`validate`), before the run's folder is touched; sizes
that the teacher's checkpoint fixes are taken from it (`resolve`). The teacher is read straight into
its shardings, the student is cut out of it where it will live, and everything else is shapes.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from shallow_pi import progress
from shallow_pi.checkpoints import fetch, run_folder, sizes, weights
from shallow_pi.data import loader, opening
from shallow_pi.distill import layer_map, layer_scores, step, student
from shallow_pi.models import layers, pi0
from shallow_pi.parallel import sharding
from shallow_pi.planning import accelerators, memory
from shallow_pi.training import config

# The teacher's "path" that stands for made-up parameters.
RANDOM = "random"


def validate(
    experiment: config.DistillConfig,
) -> tuple[jax.sharding.Mesh, pathlib.Path | None]:
    """Find out cheaply what cannot work: mesh, batch size, losses, dataset, teacher's checkpoint.

    Returns:
      The mesh, and the teacher's step folder on this machine (None without a teacher on disk).
    """
    mesh = make_mesh(experiment, jax.devices())
    sharding.check_batch_size(mesh, experiment.batch_size // experiment.accumulation)
    if experiment.data.path or experiment.closed_loop is None:
        opening.check(experiment.data)  # Before the teacher, which may be a long download.
    if experiment.teacher is None or experiment.teacher.path == RANDOM:
        return mesh, None
    teacher_step = _step_folder(fetch.locate(experiment.teacher.path))
    try:
        stored = weights.stored_params(teacher_step)
    except FileNotFoundError as error:
        if not experiment.teacher.config:
            raise
        own = experiment.teacher.config
        raise FileNotFoundError(
            f"{error}; or --teacher.train makes it first, from {own}"
        ) from error
    model = sizes.resolve(experiment.model, stored)
    weights.check_tree(pi0.abstract_params(model), stored, f"teacher ({teacher_step})")
    return mesh, teacher_step


def make_mesh(
    experiment: config.DistillConfig, devices: Sequence[jax.Device], room: int | None = None
) -> jax.sharding.Mesh:
    """The mesh over some devices, its `fsdp` chosen by their memory where that was left open.

    Args:
      experiment: the config.
      devices: of the mesh.
      room: bytes of memory of a device; None asks the device.

    Raises:
      ValueError: they cannot share it as the config says, or its losses and models do not fit.
    """
    spec = any_spec(experiment)
    mesh = memory.choose(
        experiment.mesh, devices, spec, experiment.batch_size, teacher_dtype(experiment), room
    )
    return mesh.create(devices)


def teacher_dtype(experiment: config.DistillConfig) -> str:
    """The dtype a teacher is held in, or would be."""
    return "bfloat16" if experiment.teacher is None else experiment.teacher.dtype


def describe_mesh(experiment: config.DistillConfig, mesh: jax.sharding.Mesh) -> str:
    """One line: the mesh, and what a step needs on each of its devices."""
    spec, device = any_spec(experiment), mesh.devices.flat[0]
    needed = memory.estimate(spec, mesh, experiment.batch_size, teacher_dtype(experiment))
    room = accelerators.memory_of(device)
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    of = f" of {room / memory.GIGA:.0f} GB" if room else ""
    line = f"Mesh: {axes} ({mesh.size} {device.device_kind}); a device needs about {needed}{of}"
    if room and needed.total > memory.USABLE * room:
        line += (
            "; it may not fit: try --student.freeze vision embedder, --optimizer.moments bfloat16, "
            "--teacher.offload or --accumulation"
        )
    return line


def teacher_on_disk(experiment: config.DistillConfig) -> pathlib.Path | None:
    """The teacher's step folder if it lies on this machine; nothing is fetched."""
    path = "" if experiment.teacher is None else experiment.teacher.path
    if not path or path == RANDOM:
        return None
    folder = fetch.kept(path)
    return None if folder is None else _step_folder(folder)


def _step_folder(path: pathlib.Path) -> pathlib.Path:
    """The folder of a step, whose assets lie beside its `params`."""
    return path.parent if path.name == "params" else path


def resolve(
    experiment: config.DistillConfig, teacher_step: pathlib.Path | None
) -> config.DistillConfig:
    """The experiment with the tower sizes of its teacher's checkpoint; told where they differ.

    Comes after `validate`, whose step folder it takes. Widths, MLPs, heads, vocabulary and pictures
    are facts about a checkpoint, so a config need not repeat them; kind, depth and action dimension
    are decisions of the config, which `validate` holds the checkpoint to.
    """
    if teacher_step is None:
        return experiment
    model = sizes.resolve(experiment.model, weights.stored_params(teacher_step))
    found = sizes.differences(experiment.model, model)
    if not found:
        return experiment
    progress.console.print(
        f"The sizes are those of the teacher's checkpoint: {', '.join(found)}",
        highlight=False,
        soft_wrap=True,
    )
    return dataclasses.replace(experiment, model=model)


def load_teacher(
    experiment: config.DistillConfig, teacher_step: pathlib.Path | None, mesh: jax.sharding.Mesh
) -> PyTree:
    """The teacher's parameters, straight into the shardings of the one table; None without one."""
    if experiment.teacher is None:
        return None
    model, dtype = experiment.model, jnp.dtype(experiment.teacher.dtype)
    expected = pi0.abstract_params(model)
    shardings = sharding.param_sharding(mesh, expected)
    if teacher_step is None:

        def random(key: Array) -> PyTree:
            return jax.tree.map(lambda leaf: leaf.astype(dtype), pi0.init(model, key))

        return jax.jit(random, out_shardings=shardings)(jax.random.key(experiment.seed))
    return weights.load_params(teacher_step, expected, dtype=dtype, sharding=shardings)


def choose_layers(
    experiment: config.DistillConfig,
    teacher_params: PyTree,
    feed: loader.Prefetch,
    resumed: pathlib.Path | None = None,
) -> layer_map.LayerMap | None:
    """The layer map; strategies that look at the teacher measure it on the first batch.

    A run that is resumed from the folder `resumed` keeps the layers it has.
    """
    if experiment.teacher is None:
        return None
    fixed = experiment.fixed_layer_map()
    if fixed is not None:
        return fixed
    if resumed is not None and (resumed / run_folder.CONFIG_FILE).exists():
        saved = json.loads((resumed / run_folder.CONFIG_FILE).read_text(encoding="utf-8"))
        if saved["layer_map"]:
            return layer_map.explicit(saved["layer_map"], experiment.model.depth)
    position = feed.state()
    spec = dataclasses.replace(
        make_spec(experiment, layer_map.first(experiment.student.depth, experiment.model.depth)),
        draws=1,
    )
    inputs = step.draw_inputs(spec, jax.random.key(experiment.seed), next(feed))
    feed.restore(position)
    strategy = experiment.student.strategy
    measure: Callable[..., Array]
    choose: Callable[[int, np.ndarray], layer_map.LayerMap]
    measure, choose = {
        "similarity": (layer_scores.similarity, layer_map.similarity),
        "sensitivity": (layer_scores.sensitivity, layer_map.sensitivity),
    }[strategy]
    progress.console.print(f"Measuring the {strategy} of {experiment.model.depth} layers")
    scores = jax.jit(functools.partial(measure, experiment.model))(
        teacher_params, inputs.observation, inputs.x_t[:, 0], inputs.t[:, 0]
    )
    return choose(experiment.student.depth, np.asarray(scores))


def make_spec(
    experiment: config.DistillConfig,
    chosen: layer_map.LayerMap | None,
    mesh: jax.sharding.Mesh | None = None,
) -> step.Spec:
    """The static part of the step; on a mesh the models keep the batch split over it."""
    schedule = experiment.schedule.create()
    return step.Spec(
        student=experiment.student_model,
        optimizer=experiment.optimizer.create(schedule),
        schedule=schedule,
        losses=experiment.losses,
        teacher=None if chosen is None else experiment.model,
        layer_map=chosen,
        augmentation=experiment.augmentation,
        draws=experiment.draws,
        accumulation=experiment.accumulation,
        ema_decay=experiment.ema_decay or None,
        freeze=experiment.student.freeze,
        execution=layers.Execution(
            experiment.remat, None if mesh is None else sharding.batch_sharding(mesh)
        ),
        offload_teacher=experiment.teacher is not None and experiment.teacher.offload,
    )


def any_spec(experiment: config.DistillConfig, mesh: jax.sharding.Mesh | None = None) -> step.Spec:
    """`make_spec` with some layers, for what does not depend on which: checks, sizes, compiling."""
    chosen = None
    if experiment.teacher is not None:
        chosen = layer_map.first(experiment.student_model.depth, experiment.model.depth)
    return make_spec(experiment, chosen, mesh)


def initial_state(
    experiment: config.DistillConfig, spec: step.Spec, teacher_params: PyTree, abstract: PyTree
) -> step.DistillState:
    """A fresh state, made where it will live: the cut teacher, or random parameters."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if spec.layer_map is not None and experiment.student.init == "cut":
        assert spec.teacher is not None, "a layer map comes with a teacher"
        teacher, chosen = spec.teacher, spec.layer_map

        def cut(params: PyTree) -> step.DistillState:
            return step.init_state(spec, student.cut(teacher, params, chosen))

        return jax.jit(cut, out_shardings=shardings)(teacher_params)

    def random(key: Array) -> step.DistillState:
        return step.init_state(spec, pi0.init(spec.student, key))

    return jax.jit(random, out_shardings=shardings)(jax.random.key(experiment.seed))


def resolve_from_disk(experiment: config.DistillConfig) -> config.DistillConfig:
    """`resolve` with the teacher where it is on this machine; nothing is fetched to plan a step."""
    teacher_step = teacher_on_disk(experiment)
    if teacher_step is None and experiment.teacher is not None:
        path = experiment.teacher.path
        if path != RANDOM:
            progress.say(f"The sizes are the config's: the teacher {path} is not on this machine")
    return resolve(experiment, teacher_step)
