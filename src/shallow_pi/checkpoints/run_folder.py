"""The folder of a run: what becomes of one that exists, and the resolved config in it.

`<folder>/config.json` lies beside the steps (see `checkpoint`). A run that is resumed must have the
config it was started with, but for fields that change nothing it has learned.
"""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax

CONFIG_FILE = "config.json"


def prepare(
    path: str | os.PathLike[str],
    resume: bool,
    overwrite: bool,
    meet: Callable[[str], None] = lambda name: None,
) -> bool:
    """Settle what becomes of an existing run folder; True where there is a run to resume.

    Call it when everything else is validated. `overwrite` renames the old folder, and leaves it to
    the user to delete. `meet` is where the processes of a job wait for each other.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite starts it anew: give only one")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder: choose another --exp-name")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not (resume or overwrite):
        raise ValueError(
            f"{folder} already holds a run: --resume continues it, --overwrite puts it aside and "
            "starts anew, another --exp-name leaves it alone"
        )
    meet("looked at the run folder")
    if jax.process_index() == 0:
        with _explained(folder):
            if occupied and overwrite:
                names = (folder.with_name(f"{folder.name}.old-{n}") for n in itertools.count(1))
                folder.rename(next(name for name in names if not name.exists()))
            folder.mkdir(parents=True, exist_ok=True)
    meet("prepared the run folder")
    return occupied and resume


def save_config(folder: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write the resolved config beside the checkpoints, complete or not at all."""
    if jax.process_index() == 0:
        path = pathlib.Path(folder) / CONFIG_FILE
        partial = path.with_suffix(".partial")
        with _explained(path.parent):
            partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)


def compare_config(
    folder: str | os.PathLike[str], config: Mapping[str, Any], safe: Collection[str] = ()
) -> None:
    """Raise where a resumed run's config differs from the saved one in a field that is not `safe`.

    Fields are named as on the command line ("losses.attention"); a safe name covers what lies
    below it.
    """
    path = pathlib.Path(folder) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: this folder cannot be resumed, use --overwrite"
        )
    old = flatten(json.loads(path.read_text(encoding="utf-8")))
    new = flatten(json.loads(json.dumps(config)))
    absent = "absent"
    different = [
        f"{name}: saved {old.get(name, absent)!r}, now {new.get(name, absent)!r}"
        for name in sorted({*old, *new})
        if old.get(name, absent) != new.get(name, absent)
        and not any(name == field or name.startswith(f"{field}.") for field in safe)
    ]
    if different:
        raise ValueError(
            f"the run in {folder} was started with another config:\n  "
            + "\n  ".join(different)
            + "\nresume with the saved values, or use --overwrite or another --exp-name"
        )


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the run's folder {folder} cannot be written ({error.strerror or error}): make it "
            "writable and free space there, or give another --checkpoint-dir"
        ) from error


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, fields named as on the command line ("losses.attention")."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, child in tree.items():
        flat |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return flat
