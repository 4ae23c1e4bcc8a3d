"""The placement of arrays on devices: one mesh of three axes, and rules for the logical axes.

`data` splits the batch alone; `fsdp` splits the batch and the parameters; `tensor` splits heads and
MLP columns (Megatron's way: the first matrix of a pair by its outputs, the second by its inputs).
Parameters are found by the end of a path, so an optimizer moment is placed as its parameter. An
array that is no parameter is replicated if small and an error if large. A mesh axis that does not
divide its dimension is dropped from that dimension in a small array, and an error in a large one;
the KV heads alone may be fewer than `tensor`.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from shallow_pi.checkpoints import weights
from shallow_pi.models import parameters
from shallow_pi.parallel import processes

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
LARGE_BYTES = 4 * 2**20

# The mesh axis that splits a logical axis of the parameters (`parameters.TABLE`).
RULES: dict[str, str] = {
    "vocab": TENSOR,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "expert_mlp": TENSOR,
    "image_heads": TENSOR,
    "image_mlp": TENSOR,
    "time_hidden": TENSOR,
    "width": FSDP,
    "expert_width": FSDP,
    "image_width": FSDP,
    "action_and_time": FSDP,
}
# Parameters with one of these axes are small and replicated.
WHOLE = ("action_dim", "image_tokens", "colours", "scorer_hidden")


class CannotSplitError(ValueError):
    """Large arrays that a mesh would copy to every device."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis of the mesh; their product is the number of devices."""

    # Devices that only the batch is split over; -1 uses the rest.
    data: int = -1
    # Devices that parameters, moments and the batch are split over; -1 uses the fewest that fit in
    # memory, or, if --mesh.data is set, the rest.
    fsdp: int = -1
    # Devices that attention heads and MLP columns are split over.
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and not (name in (DATA, FSDP) and size == -1):
                others = {DATA: ", or -1 for the rest", FSDP: ", or -1 to choose"}
                allowed = f"1 or more{others.get(name, '')}"
                raise ValueError(f"--mesh.{name} must be {allowed}, got {size}")

    def create(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all devices of the job).

        An `fsdp` of -1 becomes 1, or with `data` set the rest of the devices; `memory.choose`
        picks it by memory before.

        Raises:
          ValueError: a layout that does not fit the devices, or JAX's old partitioner.
        """
        devices = list(jax.devices() if devices is None else devices)
        if len(devices) > 1 and not processes.uses_shardy():
            raise ValueError(
                f"JAX {jax.__version__} shards with its old partitioner, which can give wrong "
                "gradients: call processes.initialize() before, or set "
                "JAX_USE_SHARDY_PARTITIONER=1"
            )
        fsdp = self.fsdp
        if fsdp == -1:
            fsdp = 1 if self.data == -1 else max(1, len(devices) // (self.data * self.tensor))
        given = fsdp * self.tensor
        data = len(devices) // given if self.data == -1 else self.data
        if data * given != len(devices) or data < 1:
            raise ValueError(
                f"a mesh of data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} does not fit "
                f"{len(devices)} devices: the product must be {len(devices)}, where --mesh.data -1 "
                "takes what --mesh.fsdp and --mesh.tensor leave"
            )
        shape = (data, fsdp, self.tensor)
        grid = np.array(devices).reshape(shape)
        if devices[0].platform == "tpu":  # Neighbours in the mesh are neighbours in the torus.
            # An axis may be a part of one of the torus's: two of a side of four.
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        owners = [{d.process_index for d in group} for group in grid.reshape(-1, self.tensor)]
        if any(len(owner) > 1 for owner in owners):
            raise ValueError(
                f"--mesh.tensor {self.tensor} spans processes, each of which reads its own rows: "
                f"set it to a divisor of the {jax.local_device_count()} devices of a process"
            )
        return Mesh(grid, AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int) -> None:
    """Raise unless the batch divides evenly over the devices."""
    ways = mesh.shape[DATA] * mesh.shape[FSDP]
    if batch_size < 1 or batch_size % ways:
        lower = max(batch_size, 0) // ways * ways
        nearest = f"{lower} or {lower + ways}" if lower else f"{ways}"
        raise ValueError(
            f"batch size {batch_size} is not divisible by the {ways} devices of data × fsdp "
            f"({mesh.shape[DATA]} × {mesh.shape[FSDP]}): set it to {nearest}"
        )


def param_sharding(mesh: Mesh, shapes: PyTree) -> PyTree:
    """The sharding of each array (or shape) of a pytree of parameters or of a state.

    Raises:
      CannotSplitError: see there.
    """
    problems: list[str] = []

    def one(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = weights.path_name(path)
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        parameter = parameters.find(name)
        rule = _rule(parameter, len(leaf.shape))
        if not rule or parameter is None:
            if rule is None and size >= LARGE_BYTES:
                problems.append(f"{name} {leaf.shape} is not in parameters.TABLE: add it there")
            return replicated(mesh)
        spec = PartitionSpec(
            *(
                axis if axis is not None and dimension % mesh.shape[axis] == 0 else None
                for axis, dimension in zip(rule, leaf.shape, strict=True)
            )
        )
        dropped = [
            logical
            for logical, asked, axis in zip(parameter.axes, rule, spec, strict=True)
            if asked != axis and logical != "kv_heads"
        ]
        ways = math.prod(mesh.shape[axis] for axis in spec if axis is not None)
        whole = ways == 1 and mesh.shape[FSDP] > 1
        if size >= LARGE_BYTES and (dropped or whole):
            problems.append(
                f"{name} {leaf.shape} cannot be split as {rule} over fsdp={mesh.shape[FSDP]}, "
                f"tensor={mesh.shape[TENSOR]}: choose sizes that divide it"
            )
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(one, shapes)
    if problems:
        raise CannotSplitError(
            "large arrays would be copied from device to device:\n  " + "\n  ".join(problems)
        )
    return result


def _rule(parameter: parameters.Parameter | None, ndim: int) -> PartitionSpec | None:
    """The mesh axes of a parameter; None for any other array, and for one of another rank."""
    if parameter is None or len(parameter.axes) != ndim:
        return None
    axes = [RULES.get(axis) for axis in parameter.axes]
    if set(WHOLE) & set(parameter.axes):
        return PartitionSpec()
    vector = len(parameter.layer_axes) == 1
    spec = [
        # `fsdp` splits a matrix once, and no vector.
        None if axis == FSDP and (vector or FSDP in axes[:i]) else axis
        for i, axis in enumerate(axes)
    ]
    return PartitionSpec(*spec) if any(spec) else PartitionSpec()
