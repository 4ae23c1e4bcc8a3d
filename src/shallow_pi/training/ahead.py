"""The distillation step compiled ahead of the machine: what it needs, without running it.

Everything is shapes: no parameter is made. The devices may be this machine's, virtual CPU devices,
or those of a TPU topology that is not there at all (`topology`): libtpu compiles for it on a CPU.
Bytes are those the compiler plans per device; what it plans for one kind of device is a fair proxy
for another of the same layout, not a promise.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from shallow_pi.distill import step
from shallow_pi.models import pi0
from shallow_pi.training import hlo, setup, sharding

# Memory of one device, bytes, by its name here.
CARDS = {
    "h100": 80 * 10**9,
    "h200": 141 * 10**9,
    "a100": 80 * 10**9,
    "a100-40": 40 * 10**9,
    "rtx4090": 24 * 10**9,
    "v5e": 16 * 2**30,
    "v5p": 95 * 2**30,
    "v6e": 32 * 2**30,
}
# What a runtime leaves to a program, as a share of the card.
USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step of one layout."""

    devices: int
    batch_size: int
    # Bytes on one device of what the step is given, by what it is: "teacher", "student", "moments",
    # "ema", "batch".
    given: dict[str, int]
    # Bytes on one device that the step needs besides: activations, gradients, gathered parameters.
    temporary: int
    # Bytes on one device in all.
    total: int
    # Bytes in the host's memory for one device: an offloaded teacher.
    host: int
    collectives: list[hlo.Collective]

    def fits(self, card: int) -> bool:
        """Whether it fits into a device of so many bytes."""
        return self.total <= USABLE * card


def devices(count: int, topology_name: str = "") -> Sequence[jax.Device]:
    """`count` virtual CPU devices, or those of a TPU topology; call it before JAX has any.

    Raises:
      ValueError: a count below 1, or see `topology`.
    """
    if count < 1:
        raise ValueError(f"--devices must be 1 or more, got {count}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return topology(topology_name) if topology_name else jax.devices()


def topology(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology such as "v5e:8x8", for compiling alone.

    Raises:
      ValueError: no such topology, or no libtpu to ask.
    """
    # Not an attribute of jax until somebody imports it.
    from jax.experimental import topologies

    try:
        with _quiet():
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"cannot compile for the TPU topology {name!r}: {error}. Names are like v5e:4x4, "
            "v5p:2x2x1 or v6e:4x4, and libtpu has to be installed (uv sync --extra tpu)"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Tell libtpu that there is no TPU and no metadata server to look for."""
    names = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def compile_step(
    spec: step.Spec, mesh: Mesh, batch_size: int, teacher_dtype: str = "bfloat16"
) -> Program:
    """Compile the step of a global batch for the devices of a mesh; see `build`."""
    return build(spec, mesh, batch_size, teacher_dtype)[1]


def build(
    spec: step.Spec, mesh: Mesh, batch_size: int, teacher_dtype: str = "bfloat16"
) -> tuple[jax.stages.Compiled, Program]:
    """The compiled step (of teacher, state, which is donated, key and batch), and what it needs.

    Args:
      spec: the static part of the step.
      mesh: over any devices, also such as are not there.
      batch_size: observations, over all devices.
      teacher_dtype: in which the teacher is held.

    Raises:
      ValueError: a batch or a layout the mesh cannot split.
    """
    sharding.check_batch_size(mesh, batch_size // spec.accumulation)
    teacher = abstract_teacher(spec, mesh, teacher_dtype)
    state = setup.abstract_state(spec, mesh)
    batch = abstract_batch(spec.student, mesh, batch_size)
    whole = sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    advance = jax.jit(
        functools.partial(step.distill_step, spec),
        out_shardings=(shardings, whole),
        donate_argnums=1,
    )
    compiled = advance.lower(teacher, state, key, batch).compile()
    plan, text = compiled.memory_analysis(), compiled.as_text()
    if plan is None or text is None:
        raise ValueError(f"the compiler of {mesh.devices.flat[0].platform} tells no memory plan")
    given = {
        "teacher": bytes_per_device(teacher),
        "student": bytes_per_device(state.params),
        "moments": bytes_per_device(state.opt_state),
        "ema": bytes_per_device(state.ema_params),
        "batch": bytes_per_device(batch),
    }
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    program = Program(
        devices=mesh.size,
        batch_size=batch_size,
        given=given,
        temporary=plan.temp_size_in_bytes,
        total=total + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes,
        host=bytes_per_device(teacher, host=True),
        collectives=hlo.collectives(text),
    )
    return compiled, program


def largest_batch(programs: Sequence[Program], card: int, multiple: int) -> int:
    """The largest batch that fits a card, by the straight line through two compiled batches.

    Args:
      programs: of two batch sizes on the same layout.
      card: bytes of a device.
      multiple: of which a batch must be one.

    Returns:
      0 where not even one multiple fits.
    """
    small, large = sorted(programs, key=lambda program: program.batch_size)
    slope = (large.total - small.total) / (large.batch_size - small.batch_size)
    if slope <= 0:
        raise ValueError(
            f"batches of {small.batch_size} and {large.batch_size} take {small.total} and "
            f"{large.total} bytes: too small to tell what an observation costs; give larger ones"
        )
    most = small.batch_size + (USABLE * card - small.total) / slope
    return max(0, int(most) // multiple * multiple)


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
    return setup.held_teacher(spec, whole)


def abstract_batch(model: pi0.Pi0Config, mesh: Mesh, batch_size: int) -> dict[str, Any]:
    """Shapes and shardings of a batch as the loader gives it."""
    b, side, where = batch_size, model.image_size, sharding.batch_sharding(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), dtype, sharding=where)

    return {
        "image": {name: array((side, side, 3), np.uint8) for name in model.cameras},
        "image_mask": {name: array((), np.bool_) for name in model.cameras},
        "state": array((model.action_dim,), np.float32),
        "tokenized_prompt": array((model.max_token_len,), np.int32),
        "tokenized_prompt_mask": array((model.max_token_len,), np.bool_),
        "actions": array((model.action_horizon, model.action_dim), np.float32),
        "action_mask": array((model.action_horizon,), np.bool_),
    }


def bytes_per_device(tree: PyTree, *, host: bool = False) -> int:
    """Bytes of a pytree of sharded shapes on one device, or for it in its host's memory."""

    def one(leaf: Any) -> int:
        assert isinstance(leaf.sharding, NamedSharding), "everything lies on the mesh"
        if (leaf.sharding.memory_kind == setup.HOST_MEMORY) != host:
            return 0
        shape = leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))
