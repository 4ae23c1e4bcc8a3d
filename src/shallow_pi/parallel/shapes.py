"""What a step is given, as shapes with the shardings of a mesh: teacher, state and batch.

Nothing is allocated: enough to compile a step, to count its bytes, and to restore a state into.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from shallow_pi.checkpoints import weights
from shallow_pi.distill import step, student
from shallow_pi.models import batch as batches
from shallow_pi.models import parameters, pi0
from shallow_pi.parallel import sharding

# What JAX calls memory of the host that devices reach by themselves.
HOST_MEMORY = "pinned_host"


def abstract_state(spec: step.Spec, mesh: jax.sharding.Mesh) -> PyTree:
    """Shapes, dtypes and shardings of the whole state."""
    params = pi0.abstract_params(spec.student)
    shapes = jax.eval_shape(functools.partial(step.init_state, spec), params)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        sharding.param_sharding(mesh, shapes),
    )


def abstract_teacher(spec: step.Spec, mesh: Mesh, dtype: str) -> PyTree:
    """Shapes and shardings of what the step needs of the teacher; None if nothing."""
    if spec.teacher is None:
        return None
    shapes = pi0.abstract_params(spec.teacher)
    whole = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=where),
        shapes,
        sharding.param_sharding(mesh, shapes),
    )
    return held_teacher(spec, whole)


def abstract_batch(model: pi0.Pi0Config, mesh: Mesh, batch_size: int) -> batches.Batch:
    """Shapes and shardings of a batch as the loader gives it."""
    where = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        batches.spec(model, batch_size),
    )


def given(teacher: PyTree, state: Any, batch: PyTree) -> dict[str, int]:
    """Bytes on one device of what a step is given, by what it is."""
    return {
        "teacher": bytes_per_device(teacher),
        "student": bytes_per_device(state.params),
        "moments": bytes_per_device(state.opt_state),
        "ema": bytes_per_device(state.ema_params),
        "batch": bytes_per_device(batch),
    }


def bytes_per_device(tree: PyTree, *, host: bool = False) -> int:
    """Bytes of a pytree of sharded shapes on one device, or for it in its host's memory."""

    def one(leaf: Any) -> int:
        assert isinstance(leaf.sharding, NamedSharding), "everything lies on the mesh"
        if (leaf.sharding.memory_kind == HOST_MEMORY) != host:
            return 0
        shape = leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def held_teacher(spec: step.Spec, teacher_params: PyTree) -> PyTree:
    """What the steps need of the teacher, where they want it; None if nothing.

    All of it, its layers in the host's memory if `spec` says so; or the student's frozen parts.
    """
    if spec.losses.needs_teacher:
        return offload(teacher_params) if spec.offload_teacher else teacher_params
    return student.split(teacher_params, spec.freeze)[1] if spec.freeze else None


def offload(params: PyTree) -> PyTree:
    """Parameters, or their shapes, with the tower's layers in the memory of their devices' host.

    Raises:
      ValueError: the devices cannot reach memory of the host's.
    """

    def move(path: Any, leaf: Any) -> Any:
        if parameters.stack(weights.path_name(path)) != "layers":
            return leaf
        where = leaf.sharding.with_memory_kind(HOST_MEMORY)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return jax.device_put(leaf, where)

    try:
        return jax.tree_util.tree_map_with_path(move, params)
    except ValueError as error:
        raise ValueError(
            f"--teacher.offload needs {HOST_MEMORY} memory, which these devices lack with JAX "
            f"{jax.__version__}: leave it out ({str(error).splitlines()[0]})"
        ) from error
