"""Mesh, step, teacher and initial state of a config: everything of a run but its data.

Sizes that the teacher's checkpoint determines are taken from it (`resolve`). The teacher is read
directly into its shardings, and the student is cut out of it on its devices.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from shallow_pi import progress
from shallow_pi.checkpoints import fetch, sizes, weights
from shallow_pi.distill import layer_map, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.inference import attention
from shallow_pi.models import layers, pi0
from shallow_pi.parallel import shapes, sharding
from shallow_pi.planning import accelerators, memory
from shallow_pi.training import config
from shallow_pi.training import optimizer as optimizers

# The teacher's "path" that stands for random parameters.
RANDOM = "random"
# The part that the backward pass recomputes, by `--remat`.
RECOMPUTED = {
    "layers": "all activations of a layer but its input",
    "dots": "all activations but products with weights",
    "none": "nothing",
}


def make_mesh(
    experiment: config.DistillConfig, devices: Sequence[jax.Device], room: int | None = None
) -> jax.sharding.Mesh:
    """The mesh over `devices`; an `fsdp` of -1 is chosen by their memory.

    Args:
      experiment: the config.
      devices: the devices of the mesh.
      room: bytes of memory of a device; None asks the device.

    Raises:
      ValueError: a mesh that does not fit the devices, a batch that it cannot split, or losses
        that do not fit the models.
    """
    spec, dtype = make_spec(experiment), teacher_dtype(experiment)
    # Before the memory of its parts is estimated: every layout has as many.
    layout = experiment.mesh.create(devices)
    sharding.check_batch_size(layout, experiment.batch_size // experiment.accumulation)
    mesh = memory.choose(experiment.mesh, devices, spec, experiment.batch_size, dtype, room)
    return mesh.create(devices)


def make_spec(
    experiment: config.DistillConfig,
    mesh: jax.sharding.Mesh | None = None,
    measured: layer_map.LayerMap | None = None,
) -> specs.Spec:
    """The static part of the step, for a run or to plan one.

    Args:
      experiment: the config.
      mesh: on which the models keep the batch split.
      measured: the layers, where the strategy measures them on the teacher. Without them the spec
        has no layer map yet: enough for shapes and memory.
    """
    schedule, optimizer = _optimizer(experiment.schedule, experiment.optimizer)
    spec = specs.Spec(
        student=experiment.student_model,
        optimizer=optimizer,
        schedule=schedule,
        losses=experiment.losses,
        teacher=None if experiment.teacher is None else experiment.model,
        layer_map=experiment.fixed_layer_map() or measured,
        augmentation=experiment.augmentation,
        draws=experiment.draws,
        num_steps=experiment.student.num_steps,
        accumulation=experiment.accumulation,
        ema_decay=experiment.ema_decay or None,
        freeze=experiment.student.freeze,
        quantize=experiment.student.quantize,
        offload_teacher=experiment.teacher is not None and experiment.teacher.offload,
    )
    return dataclasses.replace(spec, execution=_execution(experiment, spec, mesh))


@functools.cache
def _optimizer(
    schedule: optimizers.CosineSchedule, optimizer: optimizers.AdamW
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The same functions for equal configs, so that their specs are equal."""
    rate = schedule.create()
    return rate, optimizer.create(rate)


def _execution(
    experiment: config.DistillConfig, spec: specs.Spec, mesh: jax.sharding.Mesh | None
) -> layers.Execution:
    """Execution of a step on a mesh; without one, "auto" is XLA's attention and least memory."""
    device = None if mesh is None else mesh.devices.flat[0]
    tower, prefix = kernels(experiment, device)
    rows = None if mesh is None else sharding.batch_sharding(mesh)
    found = layers.Execution(
        "layers" if experiment.remat == "auto" else experiment.remat,
        rows,
        unroll=experiment.unroll,
        tower_attention=tower,
        prefix_attention=prefix,
    )
    if experiment.remat != "auto" or mesh is None:
        return found
    room = memory.agreed_room(mesh.devices.flat[0])
    if room is None:
        return found
    dots = dataclasses.replace(found, remat="dots")
    more = dataclasses.replace(spec, execution=dots)
    needed = memory.estimate(more, mesh, experiment.batch_size, teacher_dtype(experiment)).total
    return dots if needed <= memory.USABLE * room else found


def kernels(
    experiment: config.DistillConfig, device: jax.Device | None
) -> tuple[layers.Kernel, layers.Kernel]:
    """The kernels of image tower and prefix, as the config says.

    Raises:
      ValueError: cuDNN is asked for where it does not run.
    """
    wanted, dtype = experiment.attention, experiment.model.dtype
    present = device is not None and device in jax.devices()
    if device is not None and wanted in ("cudnn", "tower"):
        try:
            attention.check("cudnn", dtype, device.platform)
        except ValueError as error:
            raise ValueError(f"--attention {wanted}: {error}") from None
        if not present:
            raise ValueError(
                f"--attention {wanted}: JAX looks at the GPU to compile cuDNN's attention, and "
                f"{device.device_kind} is not here: use 'xla'"
            )
    if wanted == "auto":
        capable = 0.0
        if device is not None and present and device.platform == "gpu" and dtype == "bfloat16":
            capable = float(getattr(device, "compute_capability", 0))
        wanted = "cudnn" if 9.0 <= capable < 10.0 else "tower" if capable >= 8.0 else "xla"
    return "xla" if wanted == "xla" else "cudnn", "cudnn" if wanted == "cudnn" else "xla"


def teacher_dtype(experiment: config.DistillConfig) -> str:
    """The dtype a teacher is held in, or would be."""
    return "bfloat16" if experiment.teacher is None else experiment.teacher.dtype


def describe_mesh(experiment: config.DistillConfig, mesh: jax.sharding.Mesh) -> list[str]:
    """The mesh, and the memory that a step needs on each of its devices, a line each."""
    device = mesh.devices.flat[0]
    dtype = teacher_dtype(experiment)
    spec = make_spec(experiment, mesh)
    needed = memory.estimate(spec, mesh, experiment.batch_size, dtype)
    room = accelerators.memory_of(device)
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    of = f" of {room / memory.GIGA:.0f} GB" if room else ""
    run = spec.execution
    lines = [
        f"Mesh: {axes} ({mesh.size} {device.device_kind})",
        f"Memory per device: about {needed}{of}",
        f"Recomputed: {RECOMPUTED[run.remat]} (--remat {run.remat}); attention: "
        f"{run.tower_attention} in the image tower, {run.prefix_attention} in the prefix",
    ]
    if room and needed.total > memory.USABLE * room:
        lines.append(
            "warning: this may not fit: try --student.freeze vision embedder, "
            "--optimizer.moments bfloat16, --teacher.offload or --accumulation"
        )
    return lines


def teacher_on_disk(experiment: config.DistillConfig) -> pathlib.Path | None:
    """The teacher's step folder if it is on this machine; downloads nothing."""
    path = _teacher_path(experiment)
    folder = fetch.kept(path) if path else None
    return None if folder is None else weights.step_folder(folder)


def find_teacher(experiment: config.DistillConfig) -> pathlib.Path | None:
    """The teacher's step folder, downloaded first if necessary; None without a teacher on disk.

    Raises:
      FileNotFoundError, ValueError: it is missing, or its parameters do not fit the config.
    """
    path = _teacher_path(experiment)
    if not path:
        return None
    folder = weights.step_folder(fetch.locate(path))
    check_teacher(experiment, folder)
    return folder


def check_teacher_here(experiment: config.DistillConfig) -> None:
    """`check_teacher` for a teacher on this machine, or with a local path; downloads nothing."""
    path = _teacher_path(experiment)
    if "://" not in path:
        find_teacher(experiment)
    elif (folder := fetch.kept(path)) is not None:
        check_teacher(experiment, weights.step_folder(folder))


def check_teacher(experiment: config.DistillConfig, folder: pathlib.Path) -> None:
    """Raise unless a step folder has the parameters of the config; reads their shapes only."""
    try:
        stored = weights.stored_params(folder)
    except FileNotFoundError as error:
        assert experiment.teacher is not None, "its folder was given"
        own = experiment.teacher.config
        if not own:
            raise
        raise FileNotFoundError(
            f"{error}; or train it first, with {own} (--teacher.train)"
        ) from error
    model = sizes.resolve(experiment.model, stored)
    weights.check_tree(pi0.abstract_params(model), stored, f"teacher ({folder})")


def _teacher_path(experiment: config.DistillConfig) -> str:
    """The teacher's path; empty without a teacher, and for a random one."""
    path = "" if experiment.teacher is None else experiment.teacher.path
    return "" if path == RANDOM else path


def resolve(
    experiment: config.DistillConfig, teacher_step: pathlib.Path | None
) -> config.DistillConfig:
    """The experiment with the tower sizes of its teacher's checkpoint; prints those that differ.

    Widths, MLPs, heads, vocabulary and image size are facts about a checkpoint, so a config need
    not repeat them; kind, depth and action dimension are the config's decision (`check_teacher`).
    """
    if teacher_step is None:
        return experiment
    model = sizes.resolve(experiment.model, weights.stored_params(teacher_step))
    found = sizes.differences(experiment.model, model)
    if not found:
        return experiment
    progress.say("The sizes are those of the teacher's checkpoint:")
    for _, fields in itertools.groupby(found, key=lambda field: field.rpartition(".")[0]):
        progress.say(f"  {', '.join(fields)}")
    return dataclasses.replace(experiment, model=model)


def load_teacher(
    experiment: config.DistillConfig, teacher_step: pathlib.Path | None, mesh: jax.sharding.Mesh
) -> PyTree:
    """The teacher's parameters, read directly into their shardings; None without a teacher.

    Raises:
      FileNotFoundError, ValueError: they are missing, do not fit, or are not finite, which would
        show in the losses and errors alone that need them, or in a student that is cut out of them.
    """
    if experiment.teacher is None:
        return None
    model, dtype = experiment.model, jnp.dtype(experiment.teacher.dtype)
    expected = pi0.abstract_params(model)
    shardings = sharding.param_sharding(mesh, expected)
    if teacher_step is None:
        made = jax.jit(_random, static_argnums=(0, 1), out_shardings=shardings)
        return made(model, dtype, jax.random.key(experiment.seed))
    params = weights.load_params(teacher_step, expected, dtype=dtype, sharding=shardings)
    are_finite = jax.jit(_are_finite, out_shardings=sharding.replicated(mesh))
    finite = weights.leaves(jax.device_get(are_finite(params)))
    if broken := [path for path, is_finite in finite.items() if not is_finite]:
        raise ValueError(
            f"the teacher in {teacher_step} is not finite in {len(broken)} of its parameters, such "
            f"as {broken[0]}: its training diverged or its file is damaged; give another "
            "(--teacher.path)"
        )
    return params


def _are_finite(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


def _random(model: pi0.Pi0Config, dtype: jnp.dtype, key: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), pi0.init(model, key))


def cut_state(
    spec: specs.Spec, mesh: jax.sharding.Mesh, teacher_params: PyTree
) -> step.DistillState:
    """A fresh state around the student that is cut out of the teacher."""
    cut = jax.jit(_cut, static_argnums=0, out_shardings=_shardings(spec, mesh))
    return cut(spec, teacher_params)


def _cut(spec: specs.Spec, teacher_params: PyTree) -> step.DistillState:
    assert spec.teacher is not None, "a student is cut out of a teacher"
    assert spec.layer_map is not None, "layers are chosen before a student is cut"
    params = student.cut(spec.teacher, teacher_params, spec.layer_map, spec.student)
    return step.init_state(spec, params)


def random_state(spec: specs.Spec, mesh: jax.sharding.Mesh, seed: int) -> step.DistillState:
    """A fresh state around random parameters."""
    made = jax.jit(_around_random, static_argnums=0, out_shardings=_shardings(spec, mesh))
    return made(spec, jax.random.key(seed))


def _around_random(spec: specs.Spec, key: Array) -> step.DistillState:
    return step.init_state(spec, pi0.init(spec.student, key))


def _shardings(spec: specs.Spec, mesh: jax.sharding.Mesh) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes.abstract_state(spec, mesh))


def resolve_from_disk(experiment: config.DistillConfig) -> config.DistillConfig:
    """`resolve` if the teacher is on this machine; planning a step downloads nothing.

    Raises:
      ValueError: it is here, and its parameters do not fit the config.
    """
    teacher_step = teacher_on_disk(experiment)
    if teacher_step is not None:
        check_teacher(experiment, teacher_step)
    elif path := _teacher_path(experiment):
        progress.say(f"The sizes are the config's: the teacher {path} is not on this machine")
    return resolve(experiment, teacher_step)
