"""How arrays lie on devices: one mesh of three axes, one table of rules.

`data` splits the batch alone; `fsdp` splits the batch and the parameters; `tensor` splits heads and
MLP columns (Megatron's way: the first matrix of a pair by its outputs, the second by its inputs).
A rule matches the end of a parameter's path, so an optimizer moment lies where its parameter does.
The first match wins; an unmatched array is replicated if small and an error if large. An axis that
does not divide its dimension (the one KV head over `tensor`) is dropped from that dimension, and
that is an error only where it leaves a large array whole although `fsdp` was asked for.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shallow_pi.checkpoints import weights

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
LARGE_BYTES = 4 * 2**20

# The comments name dimensions: l layers, n heads, k kv heads, h head dim, d width, f MLP width.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"llm/embedder/input_embedding", PartitionSpec(TENSOR, FSDP)),  # vocabulary, d
    (r"attn/q_einsum(_1)?/w", PartitionSpec(None, TENSOR, FSDP, None)),  # l n d h
    (r"attn/kv_einsum(_1)?/w", PartitionSpec(None, None, TENSOR, FSDP, None)),  # l 2 k d h
    (r"attn/attn_vec_einsum(_1)?/w", PartitionSpec(None, TENSOR, None, FSDP)),  # l n h d
    (r"mlp(_1)?/gating_einsum", PartitionSpec(None, None, FSDP, TENSOR)),  # l 2 d f
    (r"mlp(_1)?/linear", PartitionSpec(None, TENSOR, FSDP)),  # l f d
    # Adaptive norms read and write whole rows: never split over `tensor`.
    (r"pre_(attention|ffw)_norm_1/Dense_0/kernel", PartitionSpec(None, FSDP, None)),  # l d 3d
    (r"final_norm_1/Dense_0/kernel", PartitionSpec(FSDP, None)),  # d 3d
    (
        r"MultiHeadDotProductAttention_0/(query|key|value)/kernel",
        PartitionSpec(None, FSDP, TENSOR, None),  # l d n h
    ),
    (r"MultiHeadDotProductAttention_0/out/kernel", PartitionSpec(None, TENSOR, None, FSDP)),
    (
        r"MultiHeadDotProductAttention_0/(query|key|value)/bias",
        PartitionSpec(None, TENSOR, None),  # l n h
    ),
    (r"MlpBlock_0/Dense_0/kernel", PartitionSpec(None, FSDP, TENSOR)),  # l d f
    (r"MlpBlock_0/Dense_0/bias", PartitionSpec(None, TENSOR)),  # l f
    (r"MlpBlock_0/Dense_1/kernel", PartitionSpec(None, TENSOR, FSDP)),  # l f d
    (r"img/head/kernel", PartitionSpec(FSDP, None)),
    (r"(action_)?time_mlp_in/kernel", PartitionSpec(FSDP, TENSOR)),
    (r"(action_)?time_mlp_in/bias", PartitionSpec(TENSOR)),
    (r"(action_)?time_mlp_out/kernel", PartitionSpec(TENSOR, FSDP)),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has; their product is the number of devices."""

    # Devices along `data`; -1 is whatever the other two leave.
    data: int = -1
    # Devices over which parameters, moments and the batch are split; -1 is as few as have room, or
    # with `data` given whatever that leaves.
    fsdp: int = -1
    # Devices over which heads and MLP columns are split.
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name in (DATA, FSDP) and size == -1):
                others = {DATA: ", or -1 for the rest", FSDP: ", or -1 to choose"}
                allowed = f"1 or more{others.get(name, '')}"
                raise ValueError(f"mesh axis {name} must be {allowed}, got {size}")

    def create(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all of the job).

        An `fsdp` that nobody has chosen (`memory.choose`) is 1, or what a given `data` leaves.
        """
        if jax.__version_info__ < (0, 7):
            # Before Shardy became the default, XLA's partitioner could swap the batch rows of two
            # devices, and with them give `action_in_proj` a wrong gradient on a 2 × 2 × 2 mesh.
            jax.config.update("jax_use_shardy_partitioner", True)
        devices = list(jax.devices() if devices is None else devices)
        fsdp = self.fsdp
        if fsdp == -1:
            fsdp = 1 if self.data == -1 else max(1, len(devices) // (self.data * self.tensor))
        given = fsdp * self.tensor
        data = len(devices) // given if self.data == -1 else self.data
        if data * given != len(devices) or data < 1:
            raise ValueError(
                f"a mesh of data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not fit "
                f"{len(devices)} devices: their product must be {len(devices)} "
                "(data=-1 takes what fsdp and tensor leave)"
            )
        shape = (data, fsdp, self.tensor)
        grid = np.array(devices).reshape(shape)
        if devices[0].platform == "tpu":  # Neighbours in the mesh are neighbours in the torus.
            # An axis may be a part of one of the torus's: two of a side of four.
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        owners = [{d.process_index for d in group} for group in grid.reshape(-1, self.tensor)]
        if any(len(owner) > 1 for owner in owners):
            raise ValueError(
                f"mesh.tensor {self.tensor} spans processes, each of which reads its own rows: set "
                f"it to a divisor of the {jax.local_device_count()} devices of a process"
            )
        return Mesh(grid, AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raise unless every device gets as many rows."""
    ways = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size < 1 or batch_size % ways:
        lower = max(batch_size, 0) // ways * ways
        nearest = f"{lower} or {lower + ways}" if lower else f"{ways}"
        raise ValueError(
            f"batch size {batch_size} is not divisible by the {ways} devices of data × fsdp "
            f"({mesh.shape[DATA]} × {mesh.shape[FSDP]}): set it to {nearest}"
        )


def param_sharding(mesh: Mesh, shapes: Any) -> Any:
    """The sharding of each array of a pytree with `.shape` and `.dtype`: parameters or state."""
    problems: list[str] = []

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = weights.path_name(path)
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        rule = _rule(name, len(leaf.shape))
        if rule is None:
            if size >= LARGE_BYTES:
                problems.append(f"no rule matches {name} {leaf.shape}: add one to sharding.RULES")
            return replicated(mesh)
        spec = PartitionSpec(
            *(
                axis if axis is not None and dimension % mesh.shape[axis] == 0 else None
                for axis, dimension in zip(rule, leaf.shape, strict=True)
            )
        )
        ways = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        if ways == 1 and mesh.shape[FSDP] > 1 and size >= LARGE_BYTES:
            problems.append(
                f"{name} {leaf.shape} cannot be split as {rule} over fsdp={mesh.shape[FSDP]}, "
                f"tensor={mesh.shape[TENSOR]}: choose sizes that divide it"
            )
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(one, shapes)
    if problems:
        raise ValueError(
            "large arrays would be copied to every device:\n  " + "\n  ".join(problems)
        )
    return result


def _rule(name: str, ndim: int) -> PartitionSpec | None:
    for pattern, spec in RULES:
        if len(spec) == ndim and re.search(rf"(^|/){pattern}$", name):
            return spec
    return None
