"""The memory of a run on each device, estimated from sizes alone, and the mesh that fits.

Parameters, moments, batch and gradient are counted exactly from their shapes. Activations are
estimated from the few arrays that dominate them (`_activations`), within a fifth of a compiler's
plan. `compile` obtains such a plan, which takes minutes.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from shallow_pi.distill import spec as specs
from shallow_pi.distill import step
from shallow_pi.models import captures, gemma, siglip
from shallow_pi.parallel import processes, shapes, sharding
from shallow_pi.planning import accelerators

# Share of a device's memory that a runtime leaves to a program.
USABLE = 0.92
GIGA = 1e9


class DoesNotFitError(ValueError):
    """The devices' memory is too small for this batch."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    # The arguments of a step, by name (see `given`).
    given: dict[str, int]
    # The float32 gradient, sharded as the parameters are.
    gradient: int
    activations: int
    # Before the first step: the whole teacher, which the student is cut out of and validation
    # samples, beside the state and a batch.
    start: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {**self.given, "gradient": self.gradient, "activations": self.activations}

    @property
    def total(self) -> int:
        """The most at any time: the sum of all parts, or `start`."""
        return max(sum(self.parts.values()), self.start)

    def __str__(self) -> str:
        name, scale = unit(self.total)
        listed = ", ".join(f"{part} {n / scale:.2f}" for part, n in self.parts.items() if n)
        most = " at the start" if self.total == self.start else ""
        return f"{self.total / scale:.2f} {name}{most} ({listed})"


def unit(count: int) -> tuple[str, float]:
    """The unit that shows some digits of a number of bytes, and its size."""
    for name, scale in (("GB", GIGA), ("MB", 1e6)):
        if count >= 0.1 * scale:
            return name, scale
    return "kB", 1e3


def given(teacher: PyTree, state: step.DistillState, batch: PyTree) -> dict[str, int]:
    """Bytes on one device of the arguments of a step, by name."""
    return {
        "teacher": bytes_per_device(teacher),
        "student": bytes_per_device(state.params),
        "moments": bytes_per_device(state.opt_state),
        "ema": bytes_per_device(state.ema_params),
        "batch": bytes_per_device(batch),
    }


def bytes_per_device(tree: PyTree, *, host: bool = False) -> int:
    """Bytes of a pytree of sharded shapes on one device, or in its host's memory."""

    def one(leaf: jax.ShapeDtypeStruct) -> int:
        where = leaf.sharding
        assert isinstance(where, NamedSharding), "everything lies on the mesh"
        if (where.memory_kind == shapes.HOST_MEMORY) != host:
            return 0
        return math.prod(where.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(map(one, jax.tree.leaves(tree)))


def estimate(spec: specs.Spec, mesh: Mesh, batch_size: int, teacher_dtype: str) -> Estimate:
    """Estimate what a run with steps of a global batch needs on each device of a mesh."""
    fixed, whole_teacher, gradient, rounded = _fixed(spec, mesh, teacher_dtype)
    batch = shapes.abstract_batch(spec.student, mesh, batch_size)
    rows = batch_size / _divisor(spec, mesh)
    arguments = fixed | {"batch": bytes_per_device(batch)}
    return Estimate(
        given=arguments,
        gradient=gradient,
        activations=rounded + int(rows * _activations(spec, mesh.shape[sharding.TENSOR])),
        start=sum((arguments | {"teacher": whole_teacher}).values()),
    )


@functools.lru_cache(maxsize=32)
def _fixed(
    spec: specs.Spec, mesh: Mesh, teacher_dtype: str
) -> tuple[dict[str, int], int, int, int]:
    """The part of an estimate that does not depend on the batch.

    Bytes of the arguments, of the whole teacher, of the gradient, and of the weights that
    `--student.quantize` rounds.
    """
    state = shapes.abstract_state(spec, mesh)
    whole = shapes.whole_teacher(spec, mesh, teacher_dtype)
    teacher = shapes.held_teacher(spec, whole)
    # Microbatches add up into a second gradient.
    gradient = bytes_per_device(state.params) * (1 + (spec.accumulation > 1))
    rounded = 0 if spec.quantize == "none" else bytes_per_device(state.params)
    return given(teacher, state, ()), bytes_per_device(whole), gradient, rounded


def _divisor(spec: specs.Spec, mesh: Mesh) -> int:
    """Devices and microbatches a batch is divided over."""
    return mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP] * spec.accumulation


def largest_batch(spec: specs.Spec, mesh: Mesh, room: int, teacher_dtype: str) -> int:
    """The largest batch that is estimated to fit devices of `room` bytes; 0 if none does."""
    multiple = _divisor(spec, mesh)

    def fits(count: int) -> bool:
        found = estimate(spec, mesh, count * multiple, teacher_dtype)
        return found.total <= USABLE * room

    beyond = 1
    while fits(beyond):
        beyond *= 2
    fitting = beyond // 2
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    return fitting * multiple


def agreed_room(device: jax.Device) -> int | None:
    """Bytes of a device: the least that any process of the job knows; None if none knows it.

    A device reports its memory to its own process alone, and all must decide alike. Every process
    must call this.
    """
    known = processes.gather(accelerators.memory_of(device))
    return min((room for room in known if room is not None), default=None)


def choose(
    wanted: sharding.MeshConfig,
    devices: Sequence[jax.Device],
    spec: specs.Spec,
    batch_size: int,
    teacher_dtype: str,
    room: int | None = None,
) -> sharding.MeshConfig:
    """The mesh with `fsdp` set, where it was left open, to the fewest devices that fit.

    Sharding parameters costs communication in every layer, so it uses no more devices than needed.
    Nothing is sharded if the memory of the devices is unknown (CPUs). A number of devices that the
    model's sizes cannot be divided by (3 of 6) is left out.

    `room` is the bytes of a device; None asks the device. The batch size is over all devices.
    """
    room = room or agreed_room(devices[0])  # Of all processes, whose configs may differ yet.
    if wanted.fsdp != -1 or wanted.data != -1 or room is None or len(devices) % wanted.tensor:
        return wanted
    ways = len(devices) // wanted.tensor
    found = wanted
    for fsdp in (n for n in range(1, ways + 1) if ways % n == 0):
        layout = dataclasses.replace(wanted, fsdp=fsdp)
        try:
            needed = estimate(spec, layout.create(devices), batch_size, teacher_dtype)
        except sharding.CannotSplitError:
            continue
        found = layout
        if needed.total <= USABLE * room:
            break
    return found


def _activations(spec: specs.Spec, split: int) -> float:
    """Bytes of activations of one observation, while gradients flow back through the student.

    With `--remat layers` every layer keeps its input, and the layer being computed also holds its
    MLP and attention. The other policies keep more of each layer. Heads and MLP columns are split
    over `split` devices, the inputs of layers are whole on each.
    """
    model, remat = spec.student, spec.execution.remat
    size, tokens = jnp.dtype(model.dtype).itemsize, model.prefix_tokens
    # The reflow loss doubles the student's draws, and keeps the teacher's keys and values.
    reflow = spec.losses.reflow > 0
    suffix = (1 + reflow) * spec.draws * (model.action_horizon + (not model.pi05))
    keys = tokens + model.action_horizon
    stays = at_once = 0.0
    if reflow and spec.teacher is not None:
        heads = 2 * model.backbone.num_kv_heads * model.backbone.head_dim
        stays += spec.teacher.depth * size * tokens * heads
    in_prefix = 0 if spec.execution.prefix_attention == "cudnn" else keys
    for stream, queries, seen, halves in zip(
        (model.backbone, model.expert),
        (tokens, suffix),
        (in_prefix, keys),
        zip(*model.layers, strict=True),
        strict=True,
    ):
        kept, working = _layer(stream, queries, seen, size, split)
        there = len(halves) - halves.count("absent")
        stays += there * size * queries * stream.width + halves.count("whole") * kept[remat]
        at_once += working
    image = model.image
    as_stream = _as_stream(image)
    cameras, patches = len(model.cameras), model.patches
    seen = 0 if spec.execution.tower_attention == "cudnn" else patches
    kept, working = _layer(as_stream, patches, seen, size, split, gated=False)
    if "vision" not in spec.freeze:
        kept_image = size * patches * image.width + kept[remat]
        stays += cameras * image.depth * kept_image
    if model.scored_tokens:  # Floats: the scorer's inputs.
        stays += 4 * cameras * patches * model.backbone.width
    stays += _compared(spec, split)
    images = 3 * 4 * cameras * 3 * model.image_size**2  # Floats: augmented, and two copies.
    return stays + max(at_once, cameras * working) + images


def _compared(spec: specs.Spec, split: int) -> float:
    """Bytes of the attention that losses compare: both models' logits and log-probabilities."""
    if spec.teacher is None or not (spec.losses.attention or spec.losses.scorer):
        return 0.0
    model = spec.student
    prefix, prompt, actions = model.prefix_tokens, model.max_token_len, model.action_horizon
    suffix = actions + (not model.pi05)
    queries = spec.losses.attention_queries
    asked = captures.Asked.create(0, queries, suffix, prefix, prompt, actions)
    rows = spec.draws * asked.suffix_rows + asked.prefix_rows
    keys = model.prefix_tokens + spec.teacher.prefix_tokens
    return 2 * 4.0 * _share(model.backbone.num_heads, split) * rows * keys


def _share(count: int, split: int) -> float:
    """Heads or columns on one device: all of them if they cannot be split."""
    return count if count % split else count / split


def _layer(
    stream: gemma.GemmaConfig, queries: int, keys: int, size: int, split: int, *, gated: bool = True
) -> tuple[dict[str, float], float]:
    """Bytes a layer keeps in addition to its input, by remat policy, and while it is computed.

    Flash attention stores no logits: as for 0 keys. `split` is as of `_activations`.
    """
    num_heads, mlp_dim = _share(stream.num_heads, split), _share(stream.mlp_dim, split)
    products = 2 * queries * stream.head_dim * (num_heads + _share(stream.num_kv_heads, split))
    products += queries * ((1 + gated) * mlp_dim + 2 * stream.width)
    weights = queries * keys * num_heads
    # XLA keeps eight arrays of the GELU.
    everything = products + queries * (8 * mlp_dim + 4 * stream.width)
    kept = {
        "layers": 0.0,
        "dots": float(size * products),
        "none": size * (everything + weights) + 4.0 * weights,
    }
    return kept, 4.0 * size * queries * mlp_dim + 8.0 * weights


def _as_stream(image: siglip.SiglipConfig) -> gemma.GemmaConfig:
    head_dim = image.width // image.num_heads
    return gemma.GemmaConfig(image.width, image.mlp_dim, image.num_heads, image.num_heads, head_dim)


@contextlib.contextmanager
def explained(
    batch_size: int, plan: Mapping[str, Mapping[str, int]] | None = None
) -> Iterator[None]:
    """Turn an out-of-memory error of a device into one that says what to change.

    The error names the batch size that was tried, and the compiler's plans so far, by step.

    Raises:
      DoesNotFitError: in place of the device's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        room = f" ({limit / GIGA:.1f} GB)" if limit else ""
        needs = "".join(
            f"\nthe {name} step is planned to need {parts['in all'] / GIGA:.3g} GB a device ("
            + ", ".join(f"{p} {n / GIGA:.3g}" for p, n in parts.items() if p != "in all")
            + ")"
            for name, parts in (plan or {}).items()
        )
        raise DoesNotFitError(
            f"a batch of {batch_size} does not fit into the memory of "
            f"{device.device_kind}{room}{needs}\n"
            f"try --batch-size {max(1, batch_size // 2)}, --accumulation 2 (the same batch in "
            "halves), --student.freeze vision embedder, --optimizer.moments bfloat16,\n"
            "--teacher.offload, or --mesh.fsdp N on several devices\n"
            "on a GPU, end other programs that hold its memory (nvidia-smi); JAX takes 75 % of it "
            "unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set"
        ) from error
