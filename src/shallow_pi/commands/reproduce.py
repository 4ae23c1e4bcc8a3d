"""Measure the paper's claims on simulated tasks, cell by cell, and write docs/evidence.md.

uv run scripts/reproduce.py CLAIM ... [--runs DIR] [--results DIR] [--page FILE]

    --list                       lists the claims, and how much of each is measured
    late --pending               lists the cells of this claim that are not measured
    late parity                  measures the missing cells of these claims, most important first
    all                          measures the missing cells of all claims
    all --episodes 0             measures nothing, and rewrites the page from the committed results
    late --only teacher          only cells whose names match a regular expression
    all --part 2/3 --workers 16  the second third of the cells, in 16 processes on a core each
    rivals --train-rivals        first trains the rivals that need training
    all --miniature              a trial of everything in a temporary folder, with tiny untrained
                                 policies

A cell is one policy in one situation. A measured cell is not measured again. Cells whose policies
are not in --runs stay pending; --train first trains the policies of the chosen cells, many in one
program (minutes on an accelerator, days on a CPU). Several machines can each measure a part: put
their results files into one folder.
"""

import dataclasses
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from typing import Annotated

import rich.box
import rich.console
import rich.table
import tyro

from shallow_pi import atomic, flags, progress, suggestions
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.evidence import (
    calibrating,
    factorial,
    miniature,
    outcomes,
    page,
    rival_costs,
    rival_runs,
    running,
    scoring,
    sources,
    training,
)
from shallow_pi.evidence.claims import catalogue, cells, recipes, rows
from shallow_pi.evidence.claims.claim import Claim
from shallow_pi.parallel import processes
from shallow_pi.sims import simulator
from shallow_pi.training import command_line

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The claims to measure, and with what."""

    # Names of claims, or all.
    claims: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[CLAIM ...]")
    ] = ()
    # List the claims and exit.
    list: bool = False
    # List the cells that are not measured, and exit.
    pending: bool = False
    # Folder with a step folder for each policy, by its name.
    runs: pathlib.Path = pathlib.Path("checkpoints/evidence")
    # Folder of the results.
    results: pathlib.Path = pathlib.Path("benchmarks/evidence")
    # Page to write, with its plots beside the results; empty writes none.
    page: str = "docs/evidence.md"
    # Episodes of a cell.
    episodes: int = 500
    # Measure only cells whose names match this regular expression; empty means all.
    only: str = ""
    # Measure every n-th cell, starting with the i-th: i/n.
    part: str = "1/1"
    # Number of processes, each on its own core.
    workers: int = 1
    # First train missing rivals that need training (each takes as long as a student of all layers);
    # the others are made anyway.
    train_rivals: bool = False
    # First train missing policies.
    train: bool = False
    # Try everything with tiny untrained policies and two episodes.
    miniature: bool = False

    def chosen(self) -> Sequence[Claim]:
        """The claims named.

        Raises:
          ValueError: one that does not exist, or none.
        """
        wanted = tuple(catalogue.CLAIMS) if ALL in self.claims else self.claims
        unknown = [name for name in wanted if name not in catalogue.CLAIMS]
        if unknown or not wanted:
            known = [*catalogue.CLAIMS, ALL]
            got = f", got {unknown[0]!r}" if unknown else "; --list shows what each measures"
            hint = suggestions.closest(unknown[0], known) if unknown else ""
            raise ValueError(f"expected claims of {', '.join(known)}{got}{hint}")
        return [catalogue.CLAIMS[name] for name in wanted]

    def names(self) -> re.Pattern[str]:
        """The pattern of names.

        Raises:
          ValueError: no regular expression.
        """
        try:
            return re.compile(self.only)
        except re.error as error:
            raise ValueError(
                f"--only: expected a regular expression, got {self.only!r} ({error}); write \\ "
                "before a character that stands for itself"
            ) from error

    def share(self) -> tuple[int, int]:
        """The part as (index from 0, number of parts).

        Raises:
          ValueError: not i/n.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"--part: expected i/n with i of 1 to n, got {self.part!r}")
        return int(found[1]) - 1, int(found[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure what is missing, write the page."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    processes.cache_compilations()
    with exits.exit_on():
        if given.list:
            show(given)
            return
        chosen, (index, parts), names = given.chosen(), given.share(), given.names()
        flags.at_least(given, 0, "episodes")
        flags.at_least(given, 1, "workers")
        if given.pending:
            print("\n".join(page.pending(chosen, given.results, given.episodes)))
            return
        if given.miniature:
            with tempfile.TemporaryDirectory() as folder:
                miniature.run(chosen, given.workers, pathlib.Path(folder))
            progress.say("Every chosen study ran in miniature")
            return
        if given.train or given.episodes:
            for name in ("runs", "results"):
                run_folder.check_output(getattr(given, name), f"give another --{name}")
        if given.page:
            run_folder.check_output(pathlib.Path(given.page).parent, "give another --page")
        wanted = [cell for claim in chosen for cell in claim.cells() if names.search(cell.name)]
        wanted = list(dict.fromkeys(wanted))[index::parts]
        slugs = catalogue.students(wanted)
        if given.train or given.episodes:
            unpack(slugs, given.runs)
        if given.train:
            train([rows.RECIPES[slug] for slug in slugs], given)
        if given.episodes:
            measure(wanted, given)
        if given.page:
            written = page.write(
                pathlib.Path(given.page), given.results, given.episodes or Arguments.episodes
            )
            progress.say(f"Written: {', '.join(map(str, written))}")


def _idle(given: Arguments) -> flags.Idle:
    making = "only part train_rivals"
    lists = f"--{'list' if given.list else 'pending'} prints a list and exits; leave it out"
    more = f"{making} runs page workers train miniature"
    yield given.list or given.pending, more, lists
    tiny = "--miniature tries everything in a temporary folder; leave it out"
    yield given.miniature, f"{making} runs results page episodes train", tiny
    nothing = "--episodes 0 measures nothing; leave it out"
    yield not given.episodes, "train_rivals", nothing
    yield not given.episodes and not given.train, "only part", nothing


def unpack(slugs: Sequence[str], runs: pathlib.Path) -> None:
    """Copy the packaged teachers among the runs, those that are wanted and not there."""
    for recipe in recipes.PACKAGED:
        target = runs / recipe.slug
        if recipe.slug not in slugs or target.exists():
            continue
        student = command_line.load(command_line.configs(), f"{recipes.config(recipe)}_l6")
        assert student.teacher is not None, "in assets/"
        progress.say(f"The suite's teacher is the packaged one, {student.teacher.path}")
        with atomic.folder(target) as partial:
            shutil.copytree(student.teacher.path, partial, dirs_exist_ok=True)


def train(wanted: Sequence[recipes.Recipe], given: Arguments) -> None:
    """Make the policies that are missing, by the configs with their sizes and simulators."""
    left = training.missing(wanted, given.runs)
    for name in dict.fromkeys(map(recipes.config, left)):
        own = [recipe for recipe in left if recipes.config(recipe) == name]
        config = command_line.load(command_line.configs(), name)
        task = config.closed_loop
        assert task is not None, "its simulator"
        suite = simulator.find(task.sim, task.set_demonstrated())
        training.ensure(own, config.model, suite, given.runs, given.workers, task.noise)


def measure(wanted: Sequence[cells.Cell], given: Arguments) -> None:
    """Measure cells whose simulator and policies are there; say which are not."""
    for sim in dict.fromkeys(cell.situation.sim for cell in wanted):
        own = [cell for cell in wanted if cell.situation.sim == sim]
        try:
            simulator.find(sim, {})
        except ValueError as error:
            progress.say(f"{len(own)} cells are pending: {error}")
            wanted = [cell for cell in wanted if cell.situation.sim != sim]
    rival_runs.ensure([cell.policy for cell in wanted], given.runs, given.train_rivals)
    absent = {c.policy for c in wanted if not sources.exists(c.policy, given.runs)}
    if absent:
        few = ", ".join(sorted(absent)[:4]) + (" ..." if len(absent) > 4 else "")
        progress.say(f"{len(absent)} policies are not in {given.runs}, and pending: {few}")
    ready = [cell for cell in wanted if cell.policy not in absent]
    teachers = {rows.teacher_of(cell.policy) for cell in ready if cell.kind == "chunks"}
    if lost := sorted(slug for slug in teachers if not sources.exists(slug, given.runs)):
        raise FileNotFoundError(f"plans are compared with {lost[0]}'s: not in {given.runs}")
    scoring.ensure([cell.policy for cell in ready], given.runs, given.results)
    calibrating.ensure([cell.policy for cell in ready], given.runs)
    digests = running.digests([cell.policy for cell in ready], given.runs)
    results = cells.read(given.results, digests)
    todo = running.jobs(ready, results, rows.teacher_of, given.episodes)
    progress.say(f"{len(ready) - len(todo)} of {len(wanted)} cells are measured, {len(todo)} to do")
    name = (
        f"cells-{given.part.replace('/', '-of-')}.jsonl" if given.part != "1/1" else "cells.jsonl"
    )
    running.run(todo, given.runs, given.results / name, given.workers)
    rival_costs.ensure(given.chosen(), given.runs, given.results)
    factorial.ensure(given.chosen(), given.runs, given.results)


def show(given: Arguments) -> None:
    """List the claims with their cells, and the number of these that are measured."""
    results = cells.read(given.results)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("claim", "question", "cells", "measured"):
        table.add_column(column, no_wrap=column == "claim")
    for claim in catalogue.CLAIMS.values():
        total = len(claim.cells())
        left = outcomes.missing(claim, results, given.episodes, running.OBSERVATIONS)
        table.add_row(claim.name, claim.question, str(total), str(total - len(left)))
    rich.console.Console().print(table)
