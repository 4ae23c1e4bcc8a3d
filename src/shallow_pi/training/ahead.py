"""The distillation step compiled ahead of the machine: what it needs, without running it.

Everything is shapes: no parameter is made. The devices may be this machine's, virtual CPU devices,
or those of a TPU topology that is not there at all (`topology`): libtpu compiles for it on a CPU.
Bytes are those the compiler plans per device; what it plans for one kind of device is a fair proxy
for another of the same layout, not a promise.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from shallow_pi.distill import step
from shallow_pi.training import hlo, memory, shapes, sharding


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step of one layout."""

    devices: int
    batch_size: int
    # Bytes on one device of what the step is given, by what it is (see `shapes.given`).
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
        return self.total <= memory.USABLE * card


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
    """Compile the step of a global batch for the devices of a mesh.

    Args:
      spec: the static part of the step.
      mesh: over any devices, also such as are not there.
      batch_size: observations, over all devices.
      teacher_dtype: in which the teacher is held.

    Raises:
      ValueError: a batch or a layout the mesh cannot split.
    """
    sharding.check_batch_size(mesh, batch_size // spec.accumulation)
    teacher = shapes.abstract_teacher(spec, mesh, teacher_dtype)
    state = shapes.abstract_state(spec, mesh)
    batch = shapes.abstract_batch(spec.student, mesh, batch_size)
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
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Program(
        devices=mesh.size,
        batch_size=batch_size,
        given=shapes.given(teacher, state, batch),
        temporary=plan.temp_size_in_bytes,
        total=total + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes,
        host=shapes.bytes_per_device(teacher, host=True),
        collectives=hlo.collectives(text),
    )


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
    most = small.batch_size + (memory.USABLE * card - small.total) / slope
    return max(0, int(most) // multiple * multiple)
