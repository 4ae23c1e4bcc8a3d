"""A run's folder: the names of everything in it, starting or resuming it, and its saved config.

Everybody who reads or writes a run takes the file names from here. `config.json` holds the resolved
config; a resumed run must have the config it was started with, except in fields that change nothing
it has learned.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax

from shallow_pi import atomic, progress

# Files and folders beside the step folders.
CONFIG_FILE = "config.json"
# Locked by the process that works in the folder.
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
# The run's identity in wandb and trackio.
TRACKER_FILE = "tracker_id"
SHEET_FILE = "data_sheet.png"
TENSORBOARD_FOLDER = "tensorboard"
PROFILE_FOLDER = "profile"
# The step with the lowest validation error: a link to it, and its number and error in a file.
BEST, BEST_FILE = "best", "best.json"
# Files and folders that a study adds.
REPORT_FILE, REPORT_PAGE = "report.json", "report.md"
STAGES_FILE = "stages.json"
DEMONSTRATIONS, BASELINES, EVALUATIONS = "demonstrations", "baselines", "evaluations"
# Folders of a step: deployable parameters, the rest of the state, assets, the data position.
PARAMS, TRAIN_STATE, ASSETS, DATA = "params", "train_state", "assets", "data"
DATA_FILE = "metadata"

# Messages of a full, read-only or broken disk, which Orbax passes on inside longer texts.
_REASONS = [
    os.strerror(code)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
]


# Begins the name of a folder that is made and removed to see whether it can be.
_TRIAL = ".writable-"

# What a training command does after a file could not be written.
RESUME = "go on with --resume, or give another --checkpoint-dir"
# The same for a command that goes on by itself.
AGAIN = "give the same command again"
_UNREADABLE = re.compile(r"[\[\]*?\\]|^\w+:$")


class WriteError(OSError):
    """A file of a run could not be written; the message names it and says what to do."""


@contextlib.contextmanager
def writing(path: pathlib.Path, advice: str = RESUME) -> Iterator[None]:
    """Raise an `OSError` of the block as a `WriteError` that names `path` and gives advice."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({reason(error)}): free space there or make it writable, "
            f"then {advice}"
        ) from error


def reason(error: Exception) -> str:
    """An error in a few words: the operating system's message if the text contains one."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    first_line = next(iter(text.splitlines()), "")[:300]
    own = f"{type(error).__name__}: {first_line}"
    return next((words for words in _REASONS if words in text), own)


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise if Orbax could not read a checkpoint saved under this path.

    Orbax finds the parts of a checkpoint with a glob pattern, takes `\\` for `/`, and `gs:` for a
    scheme.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    for part in folder.parts:
        if _UNREADABLE.search(part):
            raise ValueError(
                f"Orbax cannot read checkpoints in {folder}: {part!r} has one of [ ] * ? \\ or a "
                "final colon; choose another name or folder, or a symbolic link to it"
            )


def steps(folder: pathlib.Path) -> list[int]:
    """The complete steps; a step folder gets its plain name last."""
    if not folder.is_dir():
        return []
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())


def check(path: str | os.PathLike[str], resume: bool, overwrite: bool) -> bool:
    """Raise where `prepare` would, leaving nothing behind; True if the folder holds anything."""
    folder = pathlib.Path(path).expanduser().absolute()
    check_name(folder)
    if resume and overwrite:
        raise ValueError("--resume continues a run, --overwrite starts a new one: give only one")
    # Another process of this job may be trying to write.
    occupied = folder.is_dir() and any(
        not child.name.startswith((_TRIAL, LOCK_FILE)) for child in folder.iterdir()
    )
    if occupied and not (resume or overwrite):
        raise ValueError(
            f"{folder} already holds a run: --resume continues it, --overwrite renames it and "
            "starts a new one, or choose another --exp-name"
        )
    if resume and steps(folder) and not (folder / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{folder / CONFIG_FILE} is missing: without it nothing shows that the steps there are "
            "of this config; put it back, or use --overwrite or another --exp-name"
        )
    if jax.process_index() == 0:
        check_output(folder, "give another --exp-name or --checkpoint-dir")
        if (folder / LOCK_FILE).exists():
            with held(folder):  # Nobody works there.
                pass
    return occupied


def check_output(
    path: str | os.PathLike[str], otherwise: str, *, is_new: bool = False
) -> pathlib.Path:
    """Raise if nothing can be written in a folder; leaves nothing behind.

    Call it before anything is read or computed for the folder.

    Args:
      path: of the folder, which need not exist.
      otherwise: what to do if the folder cannot be used, such as "give another --output".
      is_new: the folder must not exist.

    Returns:
      The folder as an absolute path.

    Raises:
      ValueError: it is an address.
      FileExistsError: it exists and must not, or is a file.
      WriteError: it cannot be made, or written in.
    """
    if re.match(r"\w{2,}:/", os.fspath(path)):  # A `Path` keeps one slash of the two.
        raise ValueError(f"{path} is an address, expected a folder on this machine: {otherwise}")
    folder = pathlib.Path(path).expanduser().absolute()
    there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    is_taken = is_new and there == folder
    if is_taken or not there.is_dir():
        found = "is a file" if there.exists() else "is a link to nothing (is its disk mounted?)"
        if there.is_dir():
            found = "exists and is never overwritten"
        expected = "the name of a new folder" if is_taken else "a folder"
        raise FileExistsError(f"{there} {found}, expected {expected}: move it away, or {otherwise}")
    # As root every folder says that it is writable, on a read-only disk too.
    advice = f"repeat the command, or {otherwise}"
    with writing(folder, advice), tempfile.TemporaryDirectory(prefix=_TRIAL, dir=there):
        pass
    return folder


def prepare(
    path: str | os.PathLike[str],
    resume: bool,
    overwrite: bool,
    meet: Callable[[str], None] = lambda name: None,
) -> bool:
    """Make a run's folder, or resume or rename the existing one; True if there is a run to resume.

    Call it when everything else is checked. `overwrite` renames the old folder, unless a process
    works in it; the user deletes it. `meet` is a barrier of the processes of a job.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    occupied = check(folder, resume, overwrite)
    meet("looked at the run folder")
    if jax.process_index() == 0:
        with writing(folder):
            if occupied and overwrite:
                names = (folder.with_name(f"{folder.name}.old-{n}") for n in itertools.count(1))
                with held(folder):  # A training in it would go on under the old name.
                    folder.rename(next(name for name in names if not name.exists()))
            folder.mkdir(parents=True, exist_ok=True)
    meet("prepared the run folder")
    return occupied and resume


@contextlib.contextmanager
def held(folder: pathlib.Path, flag: str = "--exp-name") -> Iterator[None]:
    """Keep other processes from working in a folder; the system frees it when this one ends.

    The lock is on a file opened for writing: NFS locks no folder, and nothing that is only read.

    `flag` is the option that names another folder, for the error.

    Raises:
      ValueError: another process holds it.
      WriteError: the folder is not writable.
    """
    if jax.process_index() != 0:
        yield
        return
    lock = folder / LOCK_FILE
    with writing(lock, f"start again, or give another {flag}"):
        opened = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have renamed the folder since the file was opened.
            taken = not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(opened)))
        except BlockingIOError:
            taken = True
        except OSError as error:  # Some network file systems have no locks.
            progress.say(f"{folder} cannot be locked ({reason(error)}): start no second run there")
            taken = False
        if taken:
            raise ValueError(
                f"another process works in {folder}: wait for it or stop it, or give another {flag}"
            )
        yield
    finally:
        os.close(opened)


@contextlib.contextmanager
def working(folder: pathlib.Path, flag: str) -> Iterator[None]:
    """Make a folder unless it is there, and hold it; if the block fails, it leaves no empty one.

    Args and errors as of `held`.
    """
    lock = folder / LOCK_FILE
    with atomic.parents(lock), held(folder, flag):
        try:
            yield
        except BaseException:
            if set(folder.iterdir()) == {lock}:
                lock.unlink()
            raise


def write_text(path: pathlib.Path, text: str, advice: str = RESUME) -> None:
    """Write a file of a run atomically; `advice` is for a file that cannot be written."""
    with writing(path, advice):
        atomic.write(path, text)


def save_config(folder: str | os.PathLike[str], config: Mapping[str, object]) -> None:
    """Write the resolved config beside the checkpoints, in process 0."""
    if jax.process_index() == 0:
        write_text(pathlib.Path(folder) / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The saved config of a run; None if there is none yet."""
    path = pathlib.Path(folder) / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): expected the config of a run; use --overwrite"
        ) from error


def compare_config(
    folder: str | os.PathLike[str],
    config: Mapping[str, object],
    safe: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> list[str]:
    """Raise where a resumed run's config differs from the saved one in a field that is not `safe`.

    Fields are named as on the command line ("losses.attention"); a safe name covers the fields
    below it. Paths in the folder of all runs (`checkpoint_dir`) are compared from there on, because
    it may have moved.

    `defaults` has the default of every field that has one, by name. A field that the saved config
    lacks, because it is newer than the run, may have its default.

    Returns:
      The fields that the saved config lacks and that have their defaults.
    """
    saved = read_config(folder)
    assert saved is not None, "the caller found it"
    old, new, usual = (_comparable(values) for values in (saved, config, defaults or {}))
    absent = "absent"
    newer = [name for name in new if name not in old and name in usual and new[name] == usual[name]]
    different = [
        f"{name}: saved {old.get(name, absent)!r}, now {new.get(name, absent)!r}"
        for name in sorted({*old, *new}.difference(newer))
        if old.get(name, absent) != new.get(name, absent)
        and not any(name == field or name.startswith(f"{field}.") for field in safe)
    ]
    if different:
        raise ValueError(
            f"the run in {folder} was started with another config:\n  "
            + "\n  ".join(different)
            + "\nresume with the saved values, or use --overwrite or another --exp-name"
        )
    return newer


def _comparable(config: Mapping[str, object]) -> dict[str, object]:
    """The fields as they are saved, with paths in `checkpoint_dir` relative to it."""
    fields = flatten(json.loads(json.dumps(config)))
    top = f"{pathlib.Path(str(fields.get('checkpoint_dir', ''))).expanduser()}/"
    return {
        name: value.removeprefix(top) if isinstance(value, str) else value
        for name, value in fields.items()
    }


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    """Flatten nested dictionaries; fields are named as on the command line ("losses.attention")."""
    if not isinstance(tree, Mapping) or (prefix and not tree):
        return {prefix: tree}
    flat: dict[str, object] = {}
    for name, child in tree.items():
        flat |= flatten(child, f"{prefix}.{name}" if prefix else name)
    return flat
