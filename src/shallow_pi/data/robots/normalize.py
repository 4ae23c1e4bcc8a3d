"""Statistics of states and actions, and the two normalizations π0 and π0.5 use with them.

π0 takes z-scores, (x − mean) / (std + 1e-6); π0.5 maps the 1st and 99th percentile to −1 and 1,
(x − q01) / (q99 − q01 + 1e-6) · 2 − 1. Statistics are exact (numpy over every frame) and are stored
as openpi's `norm_stats.json`. Statistics longer than the values are cut to their leading
dimensions, because openpi's own files are sometimes padded to the model's action dimension.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float

Kind = Literal["z_score", "quantile"]
FILE_NAME = "norm_stats.json"
EPSILON = 1e-6
_FIELDS = ("mean", "std", "q01", "q99")


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Per-dimension statistics of one vector quantity."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray
    q99: np.ndarray

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = np.asarray(getattr(self, name), np.float64)
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


def kind_of(pi05: bool) -> Kind:
    """How a model's inputs are normalized: π0 by z-score, π0.5 by quantiles."""
    return "quantile" if pi05 else "z_score"


def compute(values: Float[np.ndarray, "*n d"]) -> NormStats:
    """Exact statistics over every axis but the last."""
    rows = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
    if not len(rows):
        raise ValueError("normalization statistics need at least one row of values, got none")
    if not np.isfinite(rows).all():
        row, dim = np.argwhere(~np.isfinite(rows))[0]
        raise ValueError(
            f"cannot compute statistics: row {row}, dimension {dim} is {rows[row, dim]}; "
            "remove or repair that frame"
        )
    q01, q99 = np.quantile(rows, [0.01, 0.99], axis=0)
    return NormStats(rows.mean(0), rows.std(0), q01, q99)


def normalize(
    values: Float[np.ndarray, "*n d"], stats: NormStats, kind: Kind
) -> Float[np.ndarray, "*n d"]:
    """Physical units to the model's scale."""
    shift, scale = _shift_and_scale(stats, kind, np.shape(values)[-1])
    return ((np.asarray(values) - shift) / scale).astype(np.float32)


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
        half = (stats.q99[:dim] - stats.q01[:dim] + EPSILON) / 2
        return stats.q01[:dim] + half, half
    raise ValueError(f"unknown normalization {kind!r}; expected 'z_score' or 'quantile'")


def save(folder: str | os.PathLike[str], stats: Mapping[str, NormStats]) -> None:
    """Write `folder/norm_stats.json`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        key: {name: getattr(value, name).tolist() for name in _FIELDS}
        for key, value in stats.items()
    }
    (folder / FILE_NAME).write_text(json.dumps({"norm_stats": content}, indent=2))


def load(folder: str | os.PathLike[str]) -> dict[str, NormStats]:
    """Read `folder/norm_stats.json`, ours or openpi's."""
    path = pathlib.Path(folder) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(
            f"no normalization statistics at {path}; compute them, or copy the file that lies "
            "under the teacher checkpoint's assets folder"
        )
    try:
        content = json.loads(path.read_text())["norm_stats"]
        return {
            key: NormStats(**{name: np.asarray(entry[name]) for name in _FIELDS})
            for key, entry in content.items()
        }
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a norm_stats.json file: expected "
            f'{{"norm_stats": {{"state": {{{", ".join(_FIELDS)}}}, "actions": ...}}}} ({error!r})'
        ) from error
