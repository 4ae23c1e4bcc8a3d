"""Statistics of states and actions, and the two normalizations π0 and π0.5 use with them.

π0 takes z-scores, (x − mean) / (std + 1e-6); π0.5 maps the 1st and 99th percentile to −1 and 1,
(x − q01) / (q99 − q01 + 1e-6) · 2 − 1. Statistics are exact (numpy over every frame) and are stored
as openpi's `norm_stats.json`, whose percentiles may be absent: π0 does without. Statistics longer
than the values are cut to their leading dimensions, because openpi's own files are sometimes padded
to the model's action dimension (`check` tells padding from another robot's numbers).
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import fetch

Kind = Literal["z_score", "quantile"]
FILE_NAME = "norm_stats.json"
EPSILON = 1e-6
# Range q01 to q99 of a normal distribution, in standard deviations.
NORMAL_RANGE = 4.653
# Smallest spread, as a share of the largest value of a dimension (or of 1): one that moved less in
# training may differ by the noise of its sensor.
SMALLEST_SPREAD = 0.01
FIELDS = ("mean", "std", "q01", "q99")
_COMPUTE = (
    "compute them with scripts/compute_norm_stats.py and name their folder with --data.norm-stats"
)


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Per-dimension statistics of one vector quantity."""

    mean: np.ndarray
    std: np.ndarray
    # The 1st and 99th percentile: both or neither.
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.q01 is None) != (self.q99 is None):
            raise ValueError("normalization statistics: one of q01 and q99 is absent, give both")
        for name, value in self.items():
            if value.ndim != 1 or value.shape != np.shape(self.mean):
                raise ValueError(
                    f"normalization statistics: {name} has shape {value.shape}, expected one "
                    f"number per dimension like mean, {np.shape(self.mean)}"
                )
            if not np.isfinite(value).all():
                raise ValueError(
                    f"normalization statistics: {name} is not finite in dimension "
                    f"{np.flatnonzero(~np.isfinite(value)).tolist()}; compute them from clean data"
                )
            object.__setattr__(self, name, value)
        widths = {"std is negative": self.std}
        if self.q01 is not None and self.q99 is not None:
            widths["q01 is above q99"] = self.q99 - self.q01
        for problem, width in widths.items():
            # LeRobot's formulas, written as openpi's, may be EPSILON below zero.
            if (wrong := width < -2 * EPSILON).any():
                raise ValueError(
                    f"normalization statistics: {problem} in dimension "
                    f"{np.flatnonzero(wrong).tolist()}; was the file edited by hand?"
                )

    def items(self) -> list[tuple[str, np.ndarray]]:
        """Name and values of every statistic there is."""
        values = ((name, getattr(self, name)) for name in FIELDS)
        return [
            (name, np.asarray(value, np.float64)) for name, value in values if value is not None
        ]

    def span(self, kind: Kind = "quantile") -> tuple[np.ndarray, np.ndarray]:
        """The ends of the middle 98 %: the percentiles, or else an estimate from mean and std."""
        if kind == "z_score" or self.q01 is None or self.q99 is None:
            return self.mean - 2.33 * self.std, self.mean + 2.33 * self.std
        return self.q01, self.q99

    @functools.cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """The ends to which `steady` keeps a value; infinite for dimensions that moved."""
        low, high = self.span()
        room = np.where(still(self), 2 * _spread(self), np.inf)
        return low - room, high + room


def kind_of(pi05: bool) -> Kind:
    """The normalization of a model's inputs: z-score for π0, quantiles for π0.5."""
    return "quantile" if pi05 else "z_score"


def check_asset_id(asset_id: str, what: str) -> None:
    """Raise a ValueError unless statistics' name is that of a folder inside `assets/`.

    openpi's are `trossen`, or the id of a dataset, `physical-intelligence/libero`.

    Args:
      asset_id: the name.
      what: where it is from, for the message.
    """
    if {"", ".", ".."} & set(asset_id.split("/")) or "\\" in asset_id:
        raise ValueError(
            f"{what} must name a folder inside a checkpoint's assets, such as droid or "
            f"physical-intelligence/libero, got {asset_id!r}"
        )


def check(stats: Mapping[str, NormStats], dims: Mapping[str, int], kind: Kind) -> None:
    """Raise unless statistics can normalize vectors of these dimensions.

    Args:
      stats: by key (`state`, `actions`).
      dims: the robot's dimensions by key.
      kind: the model's normalization.

    Raises:
      ValueError: a key, its percentiles or some of its dimensions are absent.
    """
    for key, dim in dims.items():
        if key not in stats:
            near = [name for name in stats if name.rpartition(".")[2].strip("s") == key.strip("s")]
            rename = f"call {near[0]!r} so if it is the same, or " if len(near) == 1 else ""
            raise ValueError(
                f"normalization statistics lack {key!r}; there are {sorted(stats)}: {rename}"
                f"{_COMPUTE}"
            )
        found = stats[key]
        if kind == "quantile" and found.q01 is None:
            raise ValueError(
                f"the statistics of {key!r} have no q01 and q99, and π0.5 normalizes by them: "
                f"{_COMPUTE}"
            )
        if len(found.mean) < dim:
            raise ValueError(
                f"the statistics of {key!r} have {len(found.mean)} dimensions, the robot has {dim}"
                f": they are another robot's; {_COMPUTE}"
            )
        if (moving := moving_dims(found)) > dim:
            progress.warn(
                f"the statistics of {key!r} have {moving} dimensions that move, the robot has "
                f"{dim}: are they another robot's?"
            )


def moving_dims(stats: NormStats) -> int:
    """Number of dimensions up to the last that is no padding."""
    # Padding is written as zeros, or as what leaves zeros alone.
    moves = (stats.std != 0) & ~((stats.mean == 0) & (stats.std == 1))
    return int(np.flatnonzero(moves)[-1]) + 1 if moves.any() else 0


def normalize(
    values: Float[np.ndarray, "*n d"], stats: NormStats, kind: Kind
) -> Float[np.ndarray, "*n d"]:
    """Physical units to the model's scale."""
    shift, scale = _shift_and_scale(stats, kind, np.shape(values)[-1])
    return ((np.asarray(values) - shift) / scale).astype(np.float32)


def steady(values: Float[np.ndarray, "*n d"], stats: NormStats) -> Float[np.ndarray, "*n d"]:
    """The values, those of dimensions that hardly moved in training kept near where they were.

    Such a dimension is divided by next to nothing, so that noise of a tenth of a milliradian would
    become a hundred of the model's units. Two spreads on either side of its range are let through.
    """
    dim = np.shape(values)[-1]
    low, high = stats.limits
    return np.clip(values, low[:dim], high[:dim])


def still(stats: NormStats) -> Bool[np.ndarray, " d"]:
    """The dimensions that hardly moved in training."""
    low, high = stats.span()
    size = np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
    return _spread(stats) < SMALLEST_SPREAD * size


def _spread(stats: NormStats) -> Float[np.ndarray, " d"]:
    """How far each dimension moved in training, by its range or its standard deviation."""
    low, high = stats.span()
    return np.maximum(high - low, NORMAL_RANGE * stats.std)


def unnormalize(
    values: Float[np.ndarray, "*n d"], stats: NormStats, kind: Kind
) -> Float[np.ndarray, "*n d"]:
    """The model's scale to physical units; inverse of `normalize`."""
    shift, scale = _shift_and_scale(stats, kind, np.shape(values)[-1])
    return (np.asarray(values) * scale + shift).astype(np.float32)


def _shift_and_scale(stats: NormStats, kind: Kind, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """`(x − shift) / scale`; for quantiles the `· 2 − 1` is folded into both."""
    if len(stats.mean) < dim:
        raise ValueError(
            f"normalization statistics have {len(stats.mean)} dimensions but the values have "
            f"{dim}; compute the statistics from this dataset"
        )
    if kind == "z_score":
        return stats.mean[:dim], stats.std[:dim] + EPSILON
    if kind == "quantile":
        if stats.q01 is None or stats.q99 is None:
            raise ValueError(f"statistics without q01 and q99 cannot normalize π0.5: {_COMPUTE}")
        half = (stats.q99[:dim] - stats.q01[:dim] + EPSILON) / 2
        return stats.q01[:dim] + half, half
    raise ValueError(f"unknown normalization {kind!r}; expected 'z_score' or 'quantile'")


def save(folder: str | os.PathLike[str], stats: Mapping[str, NormStats]) -> None:
    """Write `folder/norm_stats.json`; percentiles that are not there are left out."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        key: {name: values.tolist() for name, values in value.items()}
        for key, value in stats.items()
    }
    text = json.dumps({"norm_stats": content}, indent=2)
    atomic.write(folder / FILE_NAME, text)


def load(folder: str | os.PathLike[str]) -> dict[str, NormStats]:
    """Read `folder/norm_stats.json`, ours or openpi's; q01 and q99 may be absent or null."""
    path = pathlib.Path(folder) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(
            f"no normalization statistics at {path}; compute them, or copy the file that lies "
            "under the teacher checkpoint's assets folder"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))["norm_stats"]
        found = {key: _from_json(key, entry) for key, entry in content.items()}
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a norm_stats.json file: expected "
            f'{{"norm_stats": {{"state": {{{", ".join(FIELDS)}}}, "actions": ...}}}} ({error!r})'
            + fetch.lfs_advice(path)
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def _from_json(key: str, entry: Mapping[str, list[float] | None]) -> NormStats:
    values = {}
    for name in FIELDS:
        value = entry[name] if name in ("mean", "std") else entry.get(name)
        values[name] = None if value is None else np.asarray(value, np.float64)
    if values["mean"] is None or values["std"] is None:
        raise ValueError(f"{key} has no mean or no std")
    return NormStats(values["mean"], values["std"], values["q01"], values["q99"])
