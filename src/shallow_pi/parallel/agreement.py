"""Processes that train together must be doing the same: config, code, packages, data, folder.

A process that differs would train on, with every number a little wrong, or hang in a collective
the others never enter. So all processes exchange their facts right after the start (`check`), and
if any differ all end with one error that names the processes and the facts.
"""

import hashlib
import importlib.metadata
import pathlib
import platform
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from shallow_pi import flags
from shallow_pi.checkpoints import run_folder
from shallow_pi.data import sources
from shallow_pi.parallel import processes

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# Seconds a shared file system may take to show another host's file.
_VISIBLE_SECONDS = 30.0


def facts(config: Mapping[str, object], source: sources.Source) -> dict[str, str]:
    """Facts that must be equal in all processes, by name; fields of the config by their flags."""
    fields = run_folder.flatten(config).items()
    return {
        **{flags.as_flag(name): repr(value) for name, value in fields},
        "shallow_pi's sources": code_hash(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "number of samples": str(len(source)),
        "first, middle and last sample": sample_hash(source),
    }


def differences(found: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each fact that differs, with the processes that hold each value."""
    lines = []
    for name in dict.fromkeys(name for one in found for name in one):
        holders: dict[str, list[int]] = {}
        for index, one in enumerate(found):
            holders.setdefault(one.get(name, "absent"), []).append(index)
        if len(holders) > 1:
            # The majority first, then those that differ from it.
            ranked = sorted(holders.items(), key=lambda item: (-len(item[1]), item[1]))
            values = [f"{value} in process {_numbers(who)}" for value, who in ranked]
            lines.append(f"{name}: {'; '.join(values)}")
    return lines


def check(config: Mapping[str, object], source: sources.Source) -> None:
    """Raise in every process, with the same message, unless all have the same `facts`."""
    if jax.process_count() == 1:
        return
    if different := differences(processes.gather(facts(config, source))):
        raise ValueError(
            "the processes of this job differ in\n  "
            + "\n  ".join(different)
            + "\nstart all with the same command, checkout, packages and data"
        )


def check_shared(folder: pathlib.Path) -> None:
    """Raise in every process unless all see each other's files in `folder`; it is made if absent.

    Raises:
      ValueError: names the processes that do not see each other's files, and says what to do.
    """
    if jax.process_count() == 1:
        return
    token, index = processes.of_main(time.time_ns()), jax.process_index()
    own = folder / f".process-{token}-{index}"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # Absent where it is not shared.
        own.touch()
        problem = ""
    except OSError as error:
        problem = f"process {index} cannot write there ({error.strerror})"
    processes.sync("wrote to the run folder")
    if not problem and (unseen := _unseen(folder, token)):
        problem = f"process {index} does not see the files of process {_numbers(unseen)}"
    problems = [line for line in processes.gather(problem) if line]
    own.unlink(missing_ok=True)
    if problems:
        raise ValueError(
            f"{folder} must be one folder for all processes: {'; '.join(problems)}. Give a "
            "--checkpoint-dir on a file system that all hosts share (docs/launch.md)"
        )


def code_hash() -> str:
    """A short hash of this package's source files as they are on disk."""
    package = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def sample_hash(source: sources.Source) -> str:
    """A short hash of three samples, to four decimals: normalized states, actions and prompts."""
    digest = hashlib.sha256()
    for i in (0, len(source) // 2, len(source) - 1):
        sample = source[i]
        # Without images: decoders may differ in the last bit.
        for leaf in (sample.observation.state, sample.actions, sample.observation.tokenized_prompt):
            # Machines may differ in the last bits of a sine; adding zero makes -0 a 0.
            digest.update((np.round(np.asarray(leaf, np.float64), 4) + 0.0).tobytes())
    return digest.hexdigest()[:12]


def _unseen(folder: pathlib.Path, token: int) -> list[int]:
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        here = {path.name for path in folder.iterdir()}
        everyone = range(jax.process_count())
        unseen = [n for n in everyone if f".process-{token}-{n}" not in here]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(0.2)


def _numbers(indices: Sequence[int]) -> str:
    """Process numbers as "0, 2 and 3"; of more than eight, the first eight."""
    shown = [str(n) for n in indices[:8]] + ([f"{len(indices) - 8} more"] if indices[8:] else [])
    return " and ".join(part for part in (", ".join(shown[:-1]), shown[-1]) if part)
