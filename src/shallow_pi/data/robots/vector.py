"""A robot's state or actions as one vector: values under one or more keys, all of them or some.

Recordings may hold more values than a model is to see, such as every joint of a humanoid of which a
policy moves one arm. `indices` are the places of those it takes, counted from 0 in the values of
all keys, one key after the other. Dimensions are those of the vector; only `sizes` counts the rest.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Vector:
    """Keys, sizes and indices of the state or of the actions."""

    # Name of the robot, and `state` or `action`, in messages and before `_sizes` and `_indices`.
    robot: str
    what: str
    keys: tuple[str, ...]
    dim: int
    # Number of values under each key; empty if they are not known.
    sizes: tuple[int, ...] = ()
    # Empty uses all values.
    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        keys, sizes, indices = self.keys, self.sizes, self.indices
        if len(set(keys)) < len(keys) or not all(keys):
            raise ValueError(
                f"robot {self.robot}: keys must be names that differ, got {list(keys)}"
            )
        total = sum(sizes) if indices else self.dim
        if sizes and (len(sizes) != len(keys) or min(sizes) < 1 or sum(sizes) != total):
            raise ValueError(
                f"robot {self.robot}: {self.what}_sizes are {list(sizes)}, expected one for each "
                f"of {list(keys)}" + f", with the sum {self.what}_dim, {self.dim}" * (not indices)
            )
        twice = sorted({str(one) for one in indices if indices.count(one) > 1})
        if twice or not all(type(one) is int and one >= 0 for one in indices):
            raise ValueError(
                f"robot {self.robot}: {self.what}_indices must be whole numbers from 0 that "
                f"differ, such as (*range(7, 14), 20), got {indices}"
                + f" ({', '.join(twice)} more than once)"
                * bool(twice)
            )
        if indices and len(indices) != self.dim:
            raise ValueError(
                f"robot {self.robot}: {self.what}_indices takes {len(indices)} dimensions, "
                f"{self.what}_dim is {self.dim}"
            )
        if sizes:
            self._check_range(sum(sizes))

    @property
    def named(self) -> str:
        """The keys, for messages: `'joints' + 'gripper'`."""
        return " + ".join(map(repr, self.keys))

    @property
    def places(self) -> tuple[int, ...]:
        """Place of each dimension in the values of all keys."""
        return self.indices or tuple(range(self.dim))

    @property
    def taken(self) -> str:
        """Which values it takes, for people: `7:14, 20 of 'action'`; empty if it takes all."""
        runs: list[list[int]] = []
        for place in self.indices:
            if runs and runs[-1][1] == place:
                runs[-1][1] += 1
            else:
                runs.append([place, place + 1])
        texts = [f"{a}:{b}" if b > a + 1 else str(a) for a, b in runs]
        return f"{', '.join(texts)} of {self.named}" if texts else ""

    def read(self, values: Mapping[str, object]) -> Float[np.ndarray, "*n d"]:
        """The vector out of the values of its keys, each (*n, its size).

        Raises:
          ValueError: parts of other sizes than expected, or too few values to take from. The size
            of a single part that is taken whole is for the caller to check.
        """
        parts = [np.asarray(values[key], np.float32) for key in self.keys]
        if len(parts) == 1 and not self.indices:
            return parts[0]
        # A gripper's position may come as a plain number.
        parts = [part[None] if part.ndim == 0 else part for part in parts]
        found = tuple(part.shape[-1] for part in parts)
        if self.sizes and found != self.sizes:
            raise ValueError(
                f"got {self._with(found)}, robot {self.robot} expects {self._with(self.sizes)}"
                + f" and takes {self.taken}" * bool(self.indices)
            )
        self._check_range(sum(found))
        whole = np.concatenate(parts, axis=-1)
        return whole[..., list(self.indices)] if self.indices else whole

    def take(self, names: Sequence[str]) -> tuple[str, ...]:
        """Of something for each value under the keys, that of each dimension."""
        return tuple(names[place] for place in self.places)

    def _with(self, sizes: Sequence[int]) -> str:
        return " + ".join(f"{key!r} ({size})" for key, size in zip(self.keys, sizes, strict=True))

    def _check_range(self, size: int) -> None:
        if beyond := sorted(one for one in self.indices if one >= size):
            raise ValueError(
                f"robot {self.robot}: {self.what}_indices has {', '.join(map(str, beyond))}, but "
                f"{self.named} has {size} values, 0 to {size - 1}"
            )
