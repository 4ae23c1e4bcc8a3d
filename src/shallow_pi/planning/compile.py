"""Compile the distillation step from shapes, for any devices, without running it.

No parameter is allocated. The devices may be this machine's, virtual CPU devices, or those of an
absent TPU slice or GPU host (`topology`): libtpu and XLA's GPU plugin compile for them on a CPU.
Bytes are the compiler's plan for one device; a plan for one kind of device approximates another
kind in the same layout, without guarantee.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

from shallow_pi.distill import spec as specs
from shallow_pi.distill import step
from shallow_pi.parallel import processes, shapes, sharding
from shallow_pi.planning import accelerators, hlo, memory

# Share of the stated matrix rate that a tuned step of this size achieves (MFU).
UTILIZATION = 0.45
# The description of an absent GPU that XLA compiles for.
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": _HOPPER.format(
        name="NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3_352_320_000_000
    ),
    "h200": _HOPPER.format(name="NVIDIA H200", memory=150_754_820_096, bandwidth=4_800_000_000_000),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled step of one layout."""

    devices: int
    batch_size: int
    # Bytes on one device of the step's arguments, by name (see `memory.given`).
    given: dict[str, int]
    # Other bytes on one device: activations, gradients, gathered parameters.
    temporary: int
    # Bytes on one device in all.
    total: int
    # Bytes in the host's memory for one device: an offloaded teacher.
    host: int
    # None where the program comes from a newer XLA than this JAX can read.
    collectives: list[hlo.Collective] | None


def devices(count: int | None, topology_name: str = "") -> Sequence[jax.Device]:
    """`count` virtual CPU devices, or those of a topology; call it before JAX initializes devices.

    Raises:
      ValueError: a count below 1 or beside a topology, or see `topology`.
    """
    if topology_name and count is not None:
        raise ValueError(
            f"--devices {count} and --topology {topology_name} both say the devices: give only one"
        )
    count = 1 if count is None else count
    if count < 1:
        raise ValueError(f"--devices must be 1 or more, got {count}")
    processes.use_shardy()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return topology(topology_name) if topology_name else jax.devices()


def topology(name: str) -> Sequence[jax.Device]:
    """The devices of "v5e:8x8" (a TPU slice) or "h100:8" (a GPU host), for compilation only.

    Raises:
      ValueError: no such topology, or no compiler for it.
    """
    # A submodule that jax does not import by itself.
    from jax.experimental import topologies

    kind, _, count = name.partition(":")
    try:
        if kind in GPUS:
            return topologies.get_topology_desc(
                kind, "cuda", target_config=GPUS[kind], topology=f"1x1x{int(count or 1)}"
            ).devices
        with _quiet():
            return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"cannot compile for the topology {name!r}: {str(error).splitlines()[0]}\n"
            "names are like v5e:4x4, v5p:2x2x1 or v6e:4x4, which need libtpu (uv sync --extra "
            "tpu), and h100:8 (uv sync --extra cuda); scripts/estimate_memory.py --card h100 needs "
            "neither"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libtpu from looking for a TPU, a metadata server or a lock."""
    names = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def build(
    spec: specs.Spec, mesh: Mesh, batch_size: int, teacher_dtype: str = "bfloat16"
) -> tuple[jax.stages.Compiled, Program]:
    """Compile the step as a function of teacher, state (donated), key and batch; and its plan.

    The mesh may be of absent devices; the batch size is over all of them.

    Raises:
      ValueError: a batch or a layout that does not divide over the mesh.
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
    # XLA cannot autotune for an absent GPU, and an untuned Triton product may not compile.
    device = mesh.devices.flat[0]
    described = device.platform == "gpu" and device not in jax.devices()
    options: dict[str, str | bool] | None = (
        {"xla_gpu_enable_triton_gemm": False} if described else None
    )
    compiled = advance.lower(teacher, state, key, batch).compile(compiler_options=options)
    plan = compiled.memory_analysis()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if plan is None:
        raise ValueError(f"the compiler of {mesh.devices.flat[0].platform} gives no memory plan")
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    program = Program(
        devices=mesh.size,
        batch_size=batch_size,
        given=memory.given(teacher, state, batch),
        temporary=plan.temp_size_in_bytes,
        total=total + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes,
        host=memory.bytes_per_device(teacher, host=True),
        collectives=None if text is None else hlo.collectives(text),
    )
    return compiled, program


def predict(
    program: Program, useful_flops: float, accelerator: accelerators.Accelerator
) -> tuple[float, float | None]:
    """Seconds of computation and of communication (None: unknown) of a step; they may overlap.

    `useful_flops` are those of one device.
    """
    computation, communication = useful_flops / (UTILIZATION * accelerator.flops), None
    if program.collectives is not None and accelerator.links:
        sent = sum(collective.sent for collective in program.collectives)
        communication = sent / (accelerator.links / 2)
    return computation, communication
