"""What a step needs on each device, from sizes alone, and the mesh that has room for it.

What a step is given, and the gradient, are counted from the shapes to the byte. Activations are
counted from the few arrays that make them up (`_activations`), a fifth more or less of what
compilers plan. For what a compiler plans to the byte, in minutes instead of at once, see `ahead`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from shallow_pi.distill import step
from shallow_pi.models import gemma, siglip
from shallow_pi.parallel import processes, shapes, sharding
from shallow_pi.planning import accelerators

# What a runtime leaves to a program, as a share of the card.
USABLE = 0.92
GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    # What a step is given, by what it is (see `shapes.given`).
    given: dict[str, int]
    # The gradient in float32, which lies as the parameters do.
    gradient: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.given.values()) + self.gradient + self.activations

    def __str__(self) -> str:
        parts = {**self.given, "gradient": self.gradient, "activations": self.activations}
        listed = ", ".join(f"{name} {size / GIGA:.2f}" for name, size in parts.items() if size)
        return f"{self.total / GIGA:.2f} GB ({listed})"


def estimate(spec: step.Spec, mesh: Mesh, batch_size: int, teacher_dtype: str) -> Estimate:
    """What one step of a global batch needs on each device of a mesh.

    Args:
      spec: the static part of the step.
      mesh: over any devices.
      batch_size: observations, over all devices.
      teacher_dtype: in which the teacher is held.
    """
    state = shapes.abstract_state(spec, mesh)
    teacher = shapes.abstract_teacher(spec, mesh, teacher_dtype)
    batch = shapes.abstract_batch(spec.student, mesh, batch_size)
    rows = batch_size / spec.accumulation / mesh.shape[sharding.DATA] / mesh.shape[sharding.FSDP]
    return Estimate(
        given=shapes.given(teacher, state, batch),
        gradient=shapes.bytes_per_device(state.params) * (1 + (spec.accumulation > 1)),
        activations=int(rows * _activations(spec) / mesh.shape[sharding.TENSOR]),
    )


def choose(
    wanted: sharding.MeshConfig,
    devices: Sequence[jax.Device],
    spec: step.Spec,
    batch_size: int,
    teacher_dtype: str,
) -> sharding.MeshConfig:
    """The mesh with its `fsdp` chosen, if that was left open: the fewest devices that have room.

    Splitting parameters costs traffic in every layer, so it goes no further than it must. Where
    devices tell nothing of their memory (CPUs) nothing is split.

    Args:
      wanted: of the config.
      devices: of the job, or that a program is compiled for.
      spec: the static part of the step.
      batch_size: observations, over all devices.
      teacher_dtype: in which the teacher is held.
    """
    room = memory_of(devices[0])
    if wanted.fsdp != -1 or wanted.data != -1 or room is None or len(devices) % wanted.tensor:
        return wanted
    ways = len(devices) // wanted.tensor
    found = wanted
    for fsdp in (n for n in range(1, ways + 1) if ways % n == 0):
        found = dataclasses.replace(wanted, fsdp=fsdp)
        needed = estimate(spec, found.create(devices), batch_size, teacher_dtype)
        if needed.total <= USABLE * room:
            break
    # Processes whose devices differ must still make one mesh.
    return dataclasses.replace(found, fsdp=max(processes.gather(found.fsdp)))


def memory_of(device: jax.Device) -> int | None:
    """Bytes a device has for programs: what it tells, or what is known of its kind."""
    try:
        told = device.memory_stats() or {}
    except (NotImplementedError, RuntimeError, jax.errors.JaxRuntimeError):
        told = {}  # It is described, and not there.
    if told.get("bytes_limit"):
        return int(told["bytes_limit"])
    card = accelerators.find(device.device_kind)
    return card.memory if card else None


def _activations(spec: step.Spec) -> float:
    """Bytes an observation takes on the way, while gradients flow back through the student.

    With every layer computed again, what stays is each layer's input, and the layer whose turn it
    is takes what its MLP and its attention hold at once. Otherwise each layer's own stays too.
    """
    model, remat = spec.student, spec.execution.remat
    size, tokens = jnp.dtype(model.dtype).itemsize, model.prefix_tokens
    suffix = spec.draws * (model.action_horizon + (not model.pi05))
    keys = tokens + model.action_horizon
    stays = at_once = 0.0
    for stream, queries in ((model.backbone, tokens), (model.expert, suffix)):
        kept, working = _layer(stream, queries, keys, size)
        stays += model.depth * (size * queries * stream.width + kept[remat])
        at_once += working
    image = model.image
    as_stream = _as_stream(image)
    cameras, patches = len(model.cameras), model.image_tokens
    kept, working = _layer(as_stream, patches, patches, size, gated=False)
    if "vision" not in spec.freeze:
        kept_image = size * patches * image.width + kept[remat]
        stays += cameras * image.depth * kept_image
    pictures = 3 * 4 * cameras * 3 * model.image_size**2  # As floats: augmented, and twice between.
    return stays + max(at_once, cameras * working) + pictures


def _layer(
    stream: gemma.GemmaConfig, queries: int, keys: int, size: int, *, gated: bool = True
) -> tuple[dict[str, float], float]:
    """What stays of a layer by remat policy besides its input, and what it holds at once; bytes."""
    heads = queries * stream.num_heads * stream.head_dim
    products = 2 * heads + 2 * queries * stream.num_kv_heads * stream.head_dim
    products += queries * ((1 + gated) * stream.mlp_dim + 2 * stream.width)
    weights = queries * keys * stream.num_heads
    everything = products + queries * (2 * stream.mlp_dim + 4 * stream.width)
    kept = {
        "layers": 0.0,
        "dots": float(size * products),
        "none": size * (everything + weights) + 4.0 * weights,
    }
    return kept, 4.0 * size * queries * stream.mlp_dim + 8.0 * weights


def _as_stream(image: siglip.SiglipConfig) -> gemma.GemmaConfig:
    head_dim = image.width // image.num_heads
    return gemma.GemmaConfig(image.width, image.mlp_dim, image.num_heads, image.num_heads, head_dim)
