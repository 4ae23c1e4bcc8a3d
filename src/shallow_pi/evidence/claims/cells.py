"""A cell of a study: one policy in one situation, measured, and its results as lines of JSON.

    Episodes    closed loop: success, time, collisions, path and jerk of every episode
    Chunks      open loop: the distribution of its plans at held-out observations

A cell knows nothing of the claim that asks for it: two claims with a cell in common share its
results. A line of a results file holds the cell, a digest of the policy's parameters, and a block
of episodes by their seeds, so that any number of processes and machines can append lines, an
interrupted cell loses a block at most, and files can be concatenated. All policies of a situation
meet the same seeds.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.evaluation import rollout
from shallow_pi.sims import simulator

# Far from the seeds that demonstrations are likely to have (63 random bits).
EPISODE_SEED, OBSERVATION_SEED = 1_000_000, 2_000_000
# Integration steps of a policy whose cell does not say.
NUM_STEPS = 10


@dataclasses.dataclass(frozen=True, order=True)
class Situation:
    """The tasks a policy is put before, and how its plans are executed."""

    tasks: tuple[str, ...]
    start: Literal["usual", "elsewhere"] = "usual"
    # Integration steps.
    num_steps: int = NUM_STEPS
    execute_steps: int = 10
    # Control steps that plans are late, and the execution of a late plan (`rollout.Delay`).
    late: int = 0
    executor: rollout.Executor = "skip"
    # A name of `simulator.SUITES`; the turntable's disc turns at this speed, degrees a second.
    sim: Literal["tabletop", "turntable", "metaworld_mt10"] = "tabletop"
    turning: float = 0.0

    @property
    def suite(self) -> simulator.Suite:
        """The simulator with its options.

        Raises:
          ValueError: its package is not installed.
        """
        options: dict[str, object] = {"tasks": self.tasks}
        if self.sim == "turntable":
            options["disc_speed_deg"] = self.turning
        if self.sim == "tabletop":
            options["start"] = self.start
        return simulator.find(self.sim, options)

    @property
    def delay(self) -> rollout.Delay:
        """The lateness of plans in a rollout."""
        return rollout.Delay(self.late, self.executor)

    @property
    def name(self) -> str:
        """Short, for lists and progress bars."""
        words = ["+".join(self.tasks) if len(self.tasks) < 4 else f"{len(self.tasks)} tasks"]
        words += [self.start] if self.start != "usual" else []
        words += [f"turntable-{self.turning:g}"] if self.sim == "turntable" else []
        words += ["metaworld"] if self.sim == "metaworld_mt10" else []
        words += [f"N{self.num_steps}", f"x{self.execute_steps}"]
        words += [f"late{self.late}-{self.executor}"] if self.late else []
        return " ".join(words)


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """A policy by its slug (see `sources`), and its situation."""

    policy: str
    situation: Situation
    # Closed-loop episodes, or the distribution of its plans (`num_steps` alone matters then).
    kind: str = "episodes"

    @property
    def name(self) -> str:
        """Short, for lists and progress bars."""
        words = f"{self.policy} {self.situation.name}"
        return words if self.kind == "episodes" else f"{words} {self.kind}"


# Measurements of each episode or observation, by the kind of cell.
COLUMNS: dict[str, tuple[str, ...]] = {
    "episodes": ("success", "steps", "collided", "path_mm", "jerk", "disc_speed"),
    "chunks": ("to_teacher_mm", "to_expert_mm", "spread_mm"),
}
# Not every simulator has these (`simulator.Followed.happened`).
OPTIONAL = ("collided", "disc_speed")


@dataclasses.dataclass(frozen=True)
class Block:
    """Some episodes (or held-out observations) of a cell: a line of a results file."""

    cell: Cell
    # Hash of the policy's parameters; results of another training of it are not mixed in.
    digest: str
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    columns: Mapping[str, Sequence[float]]
    # Commit, device and seconds of the measurement.
    origin: Mapping[str, object]

    def to_json(self) -> str:
        """One line."""
        situation = dataclasses.asdict(self.cell.situation)
        line = {
            "kind": self.cell.kind,
            "policy": self.cell.policy,
            **situation,
            "digest": self.digest,
            **self.origin,
            "seeds": _runs(self.seeds),
            "task": [self.cell.situation.tasks.index(task) for task in self.tasks],
            **{name: [_short(v) for v in values] for name, values in self.columns.items()},
        }
        return json.dumps(line, separators=(",", ":"))


def from_json(line: str) -> Block:
    """The block of a line.

    Raises:
      ValueError: not such a line.
    """
    try:
        found = json.loads(line)
        fields: dict[str, Any] = {f.name: found[f.name] for f in dataclasses.fields(Situation)}
        situation = Situation(**fields | {"tasks": tuple(fields["tasks"])})
        kind = found["kind"]
        cell = Cell(found["policy"], situation, kind)
        seeds = tuple(
            seed for first, count in found["seeds"] for seed in range(first, first + count)
        )
        names = [name for name in COLUMNS[kind] if name in found or name not in OPTIONAL]
        columns = {name: found[name] for name in names}
        tasks = tuple(situation.tasks[index] for index in found["task"])
        if {len(values) for values in columns.values()} != {len(seeds)} or len(tasks) != len(seeds):
            raise ValueError("its columns differ in length")
        origin = {name: found[name] for name in ("commit", "device", "seconds")}
        return Block(cell, found["digest"], seeds, tasks, columns, origin)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"expected a line of results, got {line[:120]!r} ({error!r})") from error


def _runs(seeds: Sequence[int]) -> list[list[int]]:
    """Consecutive seeds as [first, number] pairs."""
    found: list[list[int]] = []
    for seed in seeds:
        if found and seed == sum(found[-1]):
            found[-1][1] += 1
        else:
            found.append([seed, 1])
    return found


def _short(value: float) -> float | int:
    rounded = round(float(value), 3)
    return int(rounded) if rounded == int(rounded) else rounded


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything measured of each cell."""

    # By cell, then by episode or observation seed.
    rows: Mapping[Cell, Mapping[int, Mapping[str, float]]]
    tasks: Mapping[Cell, Mapping[int, str]]
    digests: Mapping[Cell, str]
    # Of every block that a result is from.
    origins: Mapping[Cell, Sequence[Mapping[str, object]]]

    def seeds(self, cell: Cell) -> set[int]:
        """The seeds that were measured."""
        return set(self.rows.get(cell, ()))

    def column(self, cell: Cell, name: str, seeds: Sequence[int]) -> Float[np.ndarray, " n"]:
        """Values of a column of a cell at these seeds."""
        return np.array([self.rows[cell][seed][name] for seed in seeds], float)


def read(folder: pathlib.Path, digests: Mapping[str, str] | None = None) -> Results:
    """All lines of the files `*.jsonl` in a folder, which may not exist yet.

    Of two lines of one seed, that of the file later in order of names holds. Lines of policies
    whose digest is not that in `digests` are left out.
    """
    blocks = []
    for block in _blocks(sorted(folder.glob("*.jsonl")) if folder.is_dir() else []):
        policy = block.cell.policy
        if digests is not None and digests.get(policy, block.digest) != block.digest:
            progress.warn(f"{policy} was retrained: its earlier results in {folder} are not used")
        else:
            blocks.append(block)
    # Where no checkpoint at hand tells which training is meant, the last line's.
    latest = {block.cell: block.digest for block in blocks}
    found: dict[Cell, dict[int, tuple[Block, int]]] = {}
    for block in blocks:
        if block.digest == latest[block.cell]:
            of_seed = {seed: (block, index) for index, seed in enumerate(block.seeds)}
            found.setdefault(block.cell, {}).update(of_seed)
    rows = {
        cell: {
            seed: {name: float(column[index]) for name, column in block.columns.items()}
            for seed, (block, index) in of_seed.items()
        }
        for cell, of_seed in found.items()
    }
    tasks = {
        cell: {seed: block.tasks[index] for seed, (block, index) in of_seed.items()}
        for cell, of_seed in found.items()
    }
    origins = {
        cell: [*{id(block): block.origin for block, _ in of_seed.values()}.values()]
        for cell, of_seed in found.items()
    }
    return Results(rows, tasks, latest, origins)


def _blocks(paths: Iterable[pathlib.Path]) -> Iterable[Block]:
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.endswith("}"):
                continue  # Cut short when its process was killed.
            try:
                yield from_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def append(path: pathlib.Path, block: Block) -> None:
    """Write a line; other processes may append to the file at the same time.

    Raises:
      run_folder.WriteError: the line is not there, or only its beginning.
    """
    with run_folder.writing(path, run_folder.AGAIN):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.append(path, block.to_json())
