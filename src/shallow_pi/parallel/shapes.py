"""The arguments of a step as shapes with shardings on a mesh: teacher, state and batch.

They allocate nothing, and suffice to compile a step, to count its bytes and to restore a state.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from shallow_pi.checkpoints import weights
from shallow_pi.distill import spec as specs
from shallow_pi.distill import step, student
from shallow_pi.models import batch as batches
from shallow_pi.models import parameters, pi0
from shallow_pi.parallel import sharding

# JAX's name for host memory that devices access directly.
HOST_MEMORY = "pinned_host"


def abstract_state(spec: specs.Spec, mesh: Mesh) -> PyTree:
    """Shapes, dtypes and shardings of the whole state."""
    params = pi0.abstract_params(spec.student)
    return _sharded(mesh, jax.eval_shape(functools.partial(step.init_state, spec), params))


def abstract_teacher(spec: specs.Spec, mesh: Mesh, dtype: str) -> PyTree:
    """Shapes and shardings of the part of the teacher that the step needs; None for no part."""
    return held_teacher(spec, whole_teacher(spec, mesh, dtype))


def whole_teacher(spec: specs.Spec, mesh: Mesh, dtype: str) -> PyTree:
    """Shapes and shardings of the teacher as it is loaded; None without one."""
    if spec.teacher is None:
        return None
    return _sharded(mesh, pi0.abstract_params(spec.teacher), jnp.dtype(dtype))


def _sharded(mesh: Mesh, shapes: PyTree, dtype: np.dtype | None = None) -> PyTree:
    """Shapes with their shardings from the parameter table."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where),
        shapes,
        sharding.param_sharding(mesh, shapes),
    )


def abstract_batch(model: pi0.Pi0Config, mesh: Mesh, batch_size: int) -> batches.Batch:
    """Shapes and shardings of a batch of the loader."""
    where = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        batches.spec(model, batch_size),
    )


def held_teacher(spec: specs.Spec, teacher_params: PyTree) -> PyTree:
    """The part of the teacher that the steps need, in the memory they read it from.

    The whole teacher if a loss needs it, with its layers in host memory if `spec` offloads them;
    else the student's frozen parts; None if there are none.
    """
    if spec.losses.needs_teacher:
        return offload(teacher_params) if spec.offload_teacher else teacher_params
    return student.split(teacher_params, spec.freeze)[1] if spec.freeze else None


def offload(params: PyTree) -> PyTree:
    """Parameters, or their shapes, with the layers of the transformer in host memory.

    Raises:
      ValueError: the devices cannot access host memory.
    """

    def move(
        path: tuple[object, ...], leaf: jax.Array | jax.ShapeDtypeStruct
    ) -> jax.Array | jax.ShapeDtypeStruct:
        if parameters.stack(weights.path_name(path)) != "layers":
            return leaf
        assert leaf.sharding is not None, "every leaf lies on a mesh"
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
