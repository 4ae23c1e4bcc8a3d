"""Time a training step: the distillation step and the student's own fine-tuning step.

Both run on the same state, which each call hands to the next as training does (it is donated), on
the same synthetic batch and with random weights: no time depends on their values. The steps take
turns and each is waited for, so the host's part, which training hides, is in the numbers.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from shallow_pi.distill import spec as specs
from shallow_pi.distill import step
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.parallel import shapes, sharding
from shallow_pi.planning import accelerators, compile, memory
from shallow_pi.speed import flops, latency, made_up, trace

DISTILLATION, FINE_TUNING = "distillation", "fine-tuning"


@dataclasses.dataclass(frozen=True)
class Timing:
    """The two steps, by name, over all devices."""

    batch_size: int
    draws: int
    devices: int
    device: str
    # Prefix and suffix of one observation, all its draws.
    tokens: int
    median_ms: dict[str, float]
    p95_ms: dict[str, float]
    # Useful operations of one step.
    flops: dict[str, int]
    # Bytes on one device as the compiler plans them: each argument, "temporary", "in all".
    plan: dict[str, dict[str, int]]
    # Most bytes in use on a device since the process began; 0 where the backend reports none.
    peak_bytes: int
    # Activations that are recomputed, and the attention of image tower and prefix.
    execution: dict[str, str]
    # Kernels of a distillation step; None unless asked for, or on a CPU.
    kernels: trace.Kernels | None

    @property
    def ratio(self) -> float:
        """Fine-tuning steps that a distillation step costs."""
        return self.median_ms[DISTILLATION] / self.median_ms[FINE_TUNING]

    def samples_per_second(self, name: str) -> float:
        """Observations a second."""
        return 1e3 * self.batch_size / self.median_ms[name]

    def tokens_per_second(self, name: str) -> float:
        """Tokens of the student a second."""
        return self.tokens * self.samples_per_second(name)

    def utilization(self, name: str, flops_per_second: float) -> float:
        """Share of the devices' matrix rate, given that of one. Virtual CPU devices share one."""
        devices = 1 if self.device == "cpu" else self.devices
        return self.flops[name] / (self.median_ms[name] / 1e3) / (devices * flops_per_second)


def stated_rate(device: str, dtype: str) -> float | None:
    """The maker's matrix rate of a device kind, operations a second; None for other dtypes."""
    found = accelerators.find(device)
    return found.flops if found and dtype == "bfloat16" else None


def fine_tuning(spec: specs.Spec) -> specs.Spec:
    """The same step on the task loss alone, which needs no teacher."""
    return dataclasses.replace(spec, losses=spec.losses.only(task=1.0))


def measure(
    spec: specs.Spec,
    mesh: Mesh,
    *,
    batch_size: int,
    teacher_dtype: str = "bfloat16",
    repeats: int = 20,
    warmup: int = 3,
    profile: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> Timing:
    """Time both steps, with made-up weights.

    `batch_size` is over all devices; `repeats` steps of each kind are timed, after `warmup` others.
    `profile` also traces the kernels of the distillation step. `ready` is called when everything is
    compiled; no weights are in memory until it returns.

    Raises:
      ValueError: nothing to compare; a batch the mesh cannot split.
      memory.DoesNotFitError: see there.
    """
    if not spec.losses.needs_teacher:
        raise ValueError(
            "the config has no teacher, or no loss that needs one: its step is the fine-tuning "
            "step already; name a config with both"
        )
    pair = {DISTILLATION: spec, FINE_TUNING: fine_tuning(spec)}
    plan: dict[str, dict[str, int]] = {}
    with memory.explained(batch_size, plan):
        build = functools.partial(
            compile.build, mesh=mesh, batch_size=batch_size, teacher_dtype=teacher_dtype
        )
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            both = pool.map(build, pair.values())
            # On the device first, whence `held_teacher` takes what is offloaded.
            near = dataclasses.replace(spec, offload_teacher=False)
            teacher = shapes.abstract_teacher(near, mesh, teacher_dtype)
            make = pool.submit(_maker, (teacher, shapes.abstract_state(spec, mesh)))
            compiled = dict(zip(pair, both, strict=True))
        for name, (_, program) in compiled.items():
            plan[name] = {**program.given, "temporary": program.temporary, "in all": program.total}
        ready()
        whole, state = make.result()(made_up.SEED)
        held = [state]
        del state
        batch = made_up_batch(spec.student, mesh, batch_size)
        key = jax.jit(lambda: jax.random.key(0), out_shardings=sharding.replicated(mesh))()
        calls = {
            name: functools.partial(
                _advance, advance, shapes.held_teacher(pair[name], whole), held, key, batch
            )
            for name, (advance, _) in compiled.items()
        }
        found = latency.median_latency(calls, repeats=repeats, warmup=warmup, label="Steps")
        kernels = trace.kernels(calls[DISTILLATION], calls=2) if profile else None
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    student = spec.student
    suffix = student.action_horizon + (not student.pi05)
    return Timing(
        batch_size=batch_size,
        draws=spec.draws,
        devices=mesh.size,
        device=found.device,
        tokens=student.prefix_tokens + spec.draws * suffix,
        median_ms=found.median_ms,
        p95_ms=found.p95_ms,
        flops={name: flops.of_step(one, batch_size) for name, one in pair.items()},
        plan=plan,
        peak_bytes=max(int(one.get("peak_bytes_in_use", 0)) for one in statistics),
        execution={
            "remat": spec.execution.remat,
            "tower_attention": spec.execution.tower_attention,
            "prefix_attention": spec.execution.prefix_attention,
        },
        kernels=kernels,
    )


def _maker(abstract: PyTree) -> jax.stages.Compiled:
    """A compiled function of a seed that makes a tree of these shapes and shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda seed: made_up.tree(abstract, seed, zero="opt_state"), out_shardings=shardings
    )
    return make.lower(made_up.SEED).compile()


def made_up_batch(model: pi0.Pi0Config, mesh: Mesh, batch_size: int) -> batches.Batch:
    """Noise as the loader would give it, over the mesh."""
    where = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__),
        batches.noise(model, batch_size),
    )


def _advance(
    compiled: jax.stages.Compiled,
    teacher_params: PyTree,
    held: list[step.DistillState],
    key: jax.Array,
    batch: batches.Batch,
) -> step.Metrics:
    held[0], metrics = compiled(teacher_params, held[0], key, batch)
    return metrics
