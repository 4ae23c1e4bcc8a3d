"""docs/evidence.md, generated from the claims and the measured results.

Only the claims' own words are written by hand. The verdicts (shown, refuted, open) follow from the
intervals, and pending cells are those without results.
"""

import collections
import os
import pathlib
import typing
from collections.abc import Iterator, Sequence

from shallow_pi import figures, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.evaluation import intervals
from shallow_pi.evidence import drawing, factorial, outcomes, rival_costs, running
from shallow_pi.evidence.claims import catalogue, cells, recipes, rows
from shallow_pi.evidence.claims.claim import Claim, Column, Side, Statement

HEAD = """# Evidence

The paper's claims and ours, tested on tabletop tasks with models small enough (1 M parameters) to
train every student under several seeds. Nothing on this page was measured at full size.
`uv run scripts/reproduce.py CLAIM` measures a claim, and rewrites this page and its plots from
`{results}/*.jsonl`.

**Tasks**

- *touch*: touch the named block.
- *insert*: put the peg into the named cup, with 3 mm of play. *precise*: the same with 1 mm.
- *relation*: touch the block left of, right of or nearest to a named object.
- *clutter*: eight objects under changing light and colours.
- *moving*: a disc turns at 15 or 30°/s.
- *around*: pass a pillar on the left or right, and touch the block; hitting the pillar's core
  fails. In the demonstrations a coin flip, which no observation shows, decides the side.

*Success* is over the first six tasks, and *elsewhere* is the same from initial states that are not
in the demonstrations. *around* is always reported separately.

**Protocol**, unless a section says otherwise

- There is one 18-layer teacher (`{teacher}`){untrained}. A row of a table is one training recipe
  under up to {seeds} training seeds. Task, velocity and attention loss have the weights
  {weights} unless a row says otherwise. For attention the toolkit's default is now 1, by what
  [losses](#losses) shows. The *best student* has an attention weight of 1, layers by similarity,
  {more} demonstrations and {longer} steps; *three losses* is the uniform cut, with {usual}
  demonstrations and {steps} steps.
- All policies meet the same {episodes} episodes (seeds from {first}; none is a demonstration), with
  the same noise for the sampler. They execute 10 of 20 planned actions at 20 Hz before the next
  plan, on *around* all 20.
- Plans are compared at {held} held-out observations, with {plans} draws of noise each. *Plans to
  teacher* is the energy distance (mm) between a policy's plans and its teacher's ten-step plans: 0
  if the distributions are equal. *Spread* is the standard deviation of a plan's middle position
  across the direct path to the target.

**Intervals** are 95 % and treat both training seeds and episodes as random (two crossed random
effects), so they are wide where the three seeds differ. Differences are paired by episode and
training seed. A statement is *shown* or *refuted* only if the whole interval supports or
contradicts it; otherwise it is *open*. Rows with one seed (the teacher, untrained cuts) describe
that one policy.
"""


def write(path: pathlib.Path, folder: pathlib.Path, episodes: int) -> list[pathlib.Path]:
    """Write the page, and its plots beside the results in a folder; returns the files."""
    results, drawings = cells.read(folder), folder / "plots"
    written = [path]
    tables = [outcomes.Table(claim, results, episodes) for claim in catalogue.CLAIMS.values()]
    measured = [table for table in tables if set(table.claim.cells()) & set(results.rows)]
    lines = _head(folder, episodes, results)
    lines += _verdicts(measured)
    for table in measured:
        lines += _section(table)
        plots: list[tuple[str, pathlib.Path]] = []
        try:
            drawings.mkdir(parents=True, exist_ok=True)
            for plot in table.claim.plots:
                if drawing.plot(drawings / f"{plot.name}.png", table, plot):
                    plots.append((plot.title, drawings / f"{plot.name}.png"))
            if table.claim.name == "skipping" and drawing.layer_scores(
                drawings / "layer_scores.png", folder / recipes.SCORES_FILE
            ):
                plots.append(("Scores of the layers", drawings / "layer_scores.png"))
            against = drawings / f"{table.claim.name}_costs.png"
            if rival_costs.plot(against, table, folder):
                plots.append(("Success against operations", against))
            pareto = drawings / f"{table.claim.name}_pareto.png"
            if factorial.plot(pareto, table, folder):
                plots.append(("Success against operations", pareto))
        except figures.PlotsMissingError as error:
            progress.warn(str(error))
        written += [file for _, file in plots]
        for title, file in plots:
            target = os.path.relpath(file, path.parent)
            lines += ["", f"![{title}]({pathlib.PurePath(target).as_posix()})"]
        lines += _tables(table)
        lines += rival_costs.lines(table.claim, folder)
        lines += factorial.lines(table, folder)
        lines += ["", f"*Limits:* {table.claim.limits}", *_pending(table), *_origin(table)]
    if others := [table.claim for table in tables if table not in measured]:
        lines += ["", "## Not measured", ""]
        lines += [f"- **{c.name}** ({len(c.cells())} cells): {c.question} {c.says}" for c in others]
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_text(path, "\n".join(lines) + "\n", run_folder.AGAIN)
    return written


def _head(folder: pathlib.Path, episodes: int, results: cells.Results) -> list[str]:
    there = any(cell.policy == rows.TEACHER for cell in results.rows)
    untrained = ", **which is not trained yet**: the sections below have their own teachers"
    return HEAD.format(
        untrained="" if there else untrained,
        results=folder.as_posix(),
        teacher=rows.TEACHER,
        seeds=len(rows.SEEDS),
        weights=", ".join(f"{rows.THREE[term]:g}" for term in ("task", "velocity", "attention")),
        more=f"{rows.MORE:,}",
        longer=f"{rows.LONGER:,}",
        usual=recipes.STUDENT.demonstrations,
        steps=f"{recipes.STUDENT.steps:,}",
        episodes=episodes,
        first=f"{cells.EPISODE_SEED:,}",
        held=running.OBSERVATIONS,
        plans=running.PLANS,
    ).splitlines()


def _verdicts(tables: Sequence[outcomes.Table]) -> Iterator[str]:
    """The question of each claim, and how many of its statements have which verdict."""
    if not tables:
        return
    verdicts = typing.get_args(outcomes.Verdict)
    columns = ("claim", "question", *verdicts)
    yield from ("", f"| {' | '.join(columns)} |", f"{len(columns) * '|---'}|")
    for table in tables:
        found = collections.Counter(table.decide(s)[0] for s in table.claim.statements)
        counts = " | ".join(str(found[verdict] or "") for verdict in verdicts)
        claim = table.claim
        yield f"| [{claim.name}](#{claim.name}) | {claim.question} | {counts} |"


def _section(table: outcomes.Table) -> list[str]:
    claim = table.claim
    measured, others = _decisions(table)
    lines = ["", f"## {claim.name}", "", f"**{claim.question}** {claim.says}"]
    lines += ["", "| statement | verdict | measured |", "|---|---|---|"]
    lines += [f"| {text} | {verdict} | {value} |" for text, verdict, value in measured]
    return [*lines, *(f"| {text} | not measured | |" for text in others)]


def _decisions(table: outcomes.Table) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Text, verdict and value of the measured statements; the texts of the others."""
    measured, others = [], []
    for statement in table.claim.statements:
        verdict, found = table.decide(statement)
        if found is None:
            others.append(statement.text)
            continue
        column = next(c for c in table.claim.columns if c.label == statement.a[1])
        value = _difference(found, column) if statement.b else _mean(found, column)
        bold = f"**{verdict}**" if verdict != "open" else verdict
        few = " (one training seed)" if found.seeds == 1 and _trained(statement) else ""
        measured.append((statement.text, bold + few, value))
    return measured, others


def _trained(statement: Statement) -> bool:
    """A student takes part, whose training seeds count."""
    sides = [side for side in (statement.a, statement.b) if side is not None]
    return any(not side[0].startswith("teacher") for side in sides)


def _mean(found: intervals.Mean, column: Column) -> str:
    scale, unit = (100, " %") if column.is_rate else (1, "")
    low, high = scale * found.low, scale * found.high
    return f"{scale * found.mean:.1f}{unit} ({low:.1f} to {high:.1f})"


def _difference(found: intervals.Mean, column: Column) -> str:
    scale, unit = (100, " points") if column.is_rate else (1, "")
    values = (scale * v for v in (found.mean, found.low, found.high))
    mean, low, high = (f"{v:+.1f}".replace("-", "−") for v in values)
    return f"{mean}{unit} ({low} to {high})"


def _tables(table: outcomes.Table) -> Iterator[str]:
    """Every policy that was measured: mean, interval, and difference from the reference.

    The longer of the two lists, policies or columns, runs down the page.
    """
    claim = table.claim
    columns = [
        c for c in claim.columns if any(table.mean((r.label, c.label)) for r in claim.variants)
    ]
    grid = {
        row.label: [_cell(table, (row.label, c.label), c) for c in columns]
        for row in claim.variants
    }
    grid = {label: texts for label, texts in grid.items() if any(texts)}
    across = [f"{c.label}, %" if c.is_rate else c.label for c in columns]
    down, texts = [*grid], [*grid.values()]
    if len(across) > len(down):
        across, down, texts = down, across, [list(line) for line in zip(*texts, strict=True)]
    yield ""
    yield "| | " + " | ".join(across) + " |"
    yield "|---|" + "---|" * len(across)
    for label, line in zip(down, texts, strict=True):
        yield f"| {label} | " + " | ".join(line) + " |"
    yield ""
    yield (
        "Each cell has the mean (interval; number of training seeds if several; n episodes if not "
        f"all), and below it the difference from *{claim.reference}*."
    )


def _cell(table: outcomes.Table, side: Side, column: Column) -> str:
    found = table.mean(side) if table.claim.has(side) else None
    if found is None:
        return ""
    scale = 100 if column.is_rate else 1
    seeds = f"; {found.seeds} seeds" if found.seeds > 1 else ""
    if column.kind == "episodes" and not column.task and found.episodes < table.episodes:
        seeds += f"; n {found.episodes}"
    low, high = scale * found.low, scale * found.high
    text = f"{scale * found.mean:.1f} ({low:.1f} to {high:.1f}{seeds})"
    reference = (table.claim.reference, side[1])
    if side[0] != table.claim.reference and table.claim.has(reference):
        other = table.difference(side, reference)
        if other is not None:
            text += f"<br>{_difference(other, column)}"
    return text.replace("-", "−")


def _pending(table: outcomes.Table) -> list[str]:
    claim = table.claim
    left = outcomes.missing(claim, table.results, table.episodes, running.OBSERVATIONS)
    if not left:
        return []
    text = f"*Pending:* {len(left)} of {len(claim.cells())} cells"
    return ["", f"{text}; `uv run scripts/reproduce.py {claim.name} --pending` lists them."]


def _origin(table: outcomes.Table) -> list[str]:
    """Commits and devices of the measurements."""
    origins = [o for cell in table.claim.cells() for o in table.results.origins.get(cell, ())]
    if not origins:
        return []
    commits, devices = (
        ", ".join(sorted({str(o[name]) for o in origins if o[name]}))
        for name in ("commit", "device")
    )
    return ["", f"*Measured* at {commits} ({devices})."]


def pending(chosen: Sequence[Claim], folder: pathlib.Path, episodes: int) -> list[str]:
    """Lines that name every cell that is not complete."""
    results = cells.read(folder)
    return [
        f"{claim.name}: {cell.name} ({there})"
        for claim in chosen
        for cell, there in outcomes.missing(claim, results, episodes, running.OBSERVATIONS).items()
    ]
