"""The statistics a checkpoint was trained with, wherever its trainer has left them.

Velocities of two models, and a policy's actions, mean something in one normalization only, so a
checkpoint's own statistics are found or their absence is told: openpi's in
`assets/<asset_id>/norm_stats.json`, LeRobot's where `lerobot_policy` finds them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data.robots import lerobot_policy, normalize

# Of the folder `assets` itself, as `_openpis` names it.
_UNNAMED = "."


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Statistics, and where they are from."""

    stats: dict[str, normalize.NormStats]
    # Their name under a checkpoint's `assets`.
    asset_id: str
    # The file they were read from.
    path: pathlib.Path


def find(
    step: pathlib.Path,
    asset_id: str,
    kind: normalize.Kind,
    *,
    options: str,
    exact: bool = False,
) -> Found | None:
    """The statistics of a step folder; None where it has none.

    Args:
      step: the folder.
      asset_id: which of openpi's; the last part of the name is enough.
      kind: the normalization of the model.
      options: how a user gives others, for messages.
      exact: refuse statistics of another name. Otherwise the only ones there are taken, with a
        warning that names them.

    Raises:
      ValueError: several statistics and none of that name, or files that cannot be read.
    """
    there = _openpis(step)
    names = _named(there, asset_id)
    if not names and there:
        names = [] if exact else list(there)
        if len(names) != 1:
            raise ValueError(
                f"{step} has no statistics of {asset_id!r}; it has {sorted(there)}: choose one "
                f"that was made for this robot, or give others ({options})"
            )
        progress.warn(
            f"{step} has no statistics of {asset_id!r}: taking its only ones, {names[0]!r} "
            f"({options} to choose)"
        )
    if len(names) > 1:
        raise ValueError(f"{step} has several statistics of {asset_id!r}, {names}: {options}")
    if names:
        folder, name = there[names[0]], names[0] if names[0] != _UNNAMED else asset_id
        return Found(normalize.load(folder), name, folder / normalize.FILE_NAME)
    theirs = lerobot_policy.statistics(step, kind)
    return None if theirs is None else Found(theirs[0], asset_id, theirs[1])


def warn_of_others(
    step: pathlib.Path,
    asset_id: str,
    kind: normalize.Kind,
    given: Mapping[str, normalize.NormStats],
    dims: Mapping[str, int],
) -> None:
    """Warn where a teacher was trained with other statistics than those given in their place."""
    there = _openpis(step)
    names = _named(there, asset_id) or list(there)
    if len(names) > 1:
        return  # Nothing says which were its own.
    found = find(step, names[0] if names else asset_id, kind, options="")
    for key, dim in dims.items():
        if found is None or key not in found.stats:
            continue
        ends = np.stack([np.zeros(dim), np.ones(dim)])
        own, other = (normalize.normalize(ends, x[key], kind) for x in (found.stats, given))
        if not np.allclose(own, other, rtol=1e-3, atol=1e-3):
            progress.warn(
                f"the teacher was trained with other statistics of {key!r} ({found.path}): its "
                "velocities are compared in a normalization that it does not know"
            )


def _openpis(step: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name of statistics in openpi's layout → their folder."""
    root = step / run_folder.ASSETS
    return {folder.relative_to(root).as_posix(): folder for folder in _below(root)}


def _below(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders with statistics at and below a folder, behind symbolic links too."""
    return sorted(
        pathlib.Path(folder)
        for folder, _, files in os.walk(root, followlinks=True)
        if normalize.FILE_NAME in files
    )


def _named(there: Iterable[str], asset_id: str) -> list[str]:
    exact = [name for name in there if name == asset_id]
    last = [name for name in there if name.rpartition("/")[2] == asset_id]
    # Statistics in `assets` itself have no name to be compared.
    return exact or last or [name for name in there if name == _UNNAMED]


def at(folder: pathlib.Path, asset_id: str) -> Found:
    """The statistics of a folder named by hand: in it, in its folder `asset_id` or in its only one.

    Raises:
      FileNotFoundError: there are none, or several of other names.
    """
    if folder.name == normalize.FILE_NAME:
        folder = folder.parent
    for inside in (folder, folder / asset_id):
        if (inside / normalize.FILE_NAME).is_file():
            return Found(normalize.load(inside), asset_id, inside / normalize.FILE_NAME)
    found = _below(folder)
    if len(found) != 1:
        names = [path.relative_to(folder).as_posix() for path in found]
        raise FileNotFoundError(
            f"no {normalize.FILE_NAME} in {folder}"
            + (f"; there are several below it: name one of {names}" if names else "")
            + "; scripts/compute_norm_stats.py makes one from a dataset"
        )
    name = found[0].relative_to(folder).as_posix()
    if not _named([name], asset_id):
        progress.warn(
            f"{folder} has no statistics of {asset_id!r}: taking its only ones, {name!r} (name "
            "their folder if they are this robot's)"
        )
    return Found(normalize.load(found[0]), asset_id, found[0] / normalize.FILE_NAME)
