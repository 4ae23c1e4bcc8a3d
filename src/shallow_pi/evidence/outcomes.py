"""From lines of results to numbers: means, paired differences and decisions, with their intervals.

A row's outcomes are a table of training seeds × episodes; its interval counts both as drawn at
random (`intervals.over_seeds`). Two rows are compared in the episodes that both met, seed by seed,
by the training seeds that both have; one of a single policy (the teacher) meets every seed of the
other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from shallow_pi.evaluation import intervals
from shallow_pi.evidence.claims import cells
from shallow_pi.evidence.claims.claim import Claim, Column, Side, Statement, Variant

Verdict = Literal["shown", "refuted", "open", "not measured"]


@dataclasses.dataclass(frozen=True)
class Table:
    """A claim's results."""

    claim: Claim
    results: cells.Results
    # Episodes that a complete cell has; `complete` asks for them.
    episodes: int

    def _row(self, label: str) -> Variant:
        return next(row for row in self.claim.variants if row.label == label)

    def _column(self, label: str) -> Column:
        return next(column for column in self.claim.columns if column.label == label)

    def _measured(self, side: Side) -> dict[int, dict[int, float]]:
        """Outcome by episode of each policy that was measured at all, by its place in the row."""
        column, found = self._column(side[1]), {}
        for place, policy in enumerate(self._row(side[0]).policies):
            cell = column.cell(policy)
            rows, tasks = self.results.rows.get(cell, {}), self.results.tasks.get(cell, {})
            outcomes = {
                seed: row[column.measure]
                for seed, row in rows.items()
                if column.task in ("", tasks[seed])
            }
            if outcomes:
                found[place] = outcomes
        return found

    def mean(self, side: Side) -> intervals.Mean | None:
        """Of a row in a column; None where nothing was measured."""
        values = _matrix([*self._measured(side).values()])
        if values is None:
            return None
        rate = self._column(side[1]).is_rate
        return intervals.rate_over_seeds(values) if rate else intervals.over_seeds(values)

    def difference(self, a: Side, b: Side) -> intervals.Mean | None:
        """`a` − `b`, paired; None where one of them was not measured."""
        first, second = self._measured(a), self._measured(b)
        # A row that has one policy, not one of which one seed was measured so far.
        if first and len(self._row(a[0]).policies) == 1:
            first = dict.fromkeys(second, first[0])
        elif second and len(self._row(b[0]).policies) == 1:
            second = dict.fromkeys(first, second[0])
        tables = _paired([first, second])
        if tables is None:
            return None
        if self._column(a[1]).is_rate:
            return intervals.rate_difference_over_seeds(*tables)
        return intervals.over_seeds(tables[0] - tables[1])

    def seeds(self, side: Side) -> frozenset[int]:
        """Training seeds of a row, by their places, that were measured in a column."""
        return frozenset(self._measured(side))

    def combination(self, parts: Mapping[Side, float]) -> intervals.Mean | None:
        """A sum of rows in columns, each times its number, seed by seed and episode by episode.

        Those seeds count that every one of them has; None if there is none.
        """
        stacked = _paired([self._measured(side) for side in parts])
        if stacked is None:
            return None
        return intervals.over_seeds(np.tensordot(np.array([*parts.values()]), stacked, 1))

    def decide(self, statement: Statement) -> tuple[Verdict, intervals.Mean | None]:
        """By the interval alone, and the value that is compared with the bound."""
        if statement.b is None:
            found = self.mean(statement.a)
        else:
            found = self.difference(statement.a, statement.b)
        if found is None:
            return "not measured", None
        if statement.at_least is not None:
            holds, fails = found.low >= statement.at_least, found.high < statement.at_least
        else:
            assert statement.at_most is not None, "one of the bounds is given"
            holds, fails = found.high <= statement.at_most, found.low > statement.at_most
        return ("shown" if holds else "refuted" if fails else "open"), found


def _paired(
    rows: Sequence[Mapping[int, dict[int, float]]],
) -> Float[np.ndarray, "rows seeds episodes"] | None:
    """Outcomes of several rows by the training seeds and in the episodes that all of them have."""
    seeds = sorted(set.intersection(*map(set, rows))) if rows else []
    flat = _matrix([row[seed] for row in rows for seed in seeds])
    return None if flat is None else flat.reshape(len(rows), len(seeds), -1)


def _matrix(measured: list[dict[int, float]]) -> Float[np.ndarray, "seeds episodes"] | None:
    """Outcomes in the episodes that all policies met."""
    shared = sorted(set.intersection(*map(set, measured))) if measured else []
    if not shared:
        return None
    return np.array([[outcomes[seed] for seed in shared] for outcomes in measured])


def missing(
    claim: Claim, results: cells.Results, episodes: int, plans: int
) -> dict[cells.Cell, str]:
    """Cells that are not complete: how much of each is there."""
    found = {}
    for cell in claim.cells():
        wanted = episodes if cell.kind == "episodes" else min(plans, episodes)
        there = len(results.seeds(cell))
        if there < wanted:
            found[cell] = f"{there} of {wanted}"
    return found
