"""From lines of results to numbers: means, paired differences and decisions, with their intervals.

A row's outcomes are a table of training seeds × episodes; its interval counts both as drawn at
random (`intervals.over_seeds`). Two rows are compared in the episodes that both met, seed by seed;
one that has a single policy (the teacher) meets every seed of the other.
"""

import dataclasses
from collections.abc import Mapping
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

    def _measured(self, side: Side) -> list[dict[int, float]]:
        """Of each policy of the row that was measured at all: outcome by episode."""
        column, found = self._column(side[1]), []
        for policy in self._row(side[0]).policies:
            cell = cells.Cell(policy, column.situation, column.kind)
            rows, tasks = self.results.rows.get(cell, {}), self.results.tasks.get(cell, {})
            outcomes = {
                seed: row[column.measure]
                for seed, row in rows.items()
                if column.task in ("", tasks[seed])
            }
            if outcomes:
                found.append(outcomes)
        return found

    def mean(self, side: Side) -> intervals.Mean | None:
        """Of a row in a column; None where nothing was measured."""
        values = _matrix(self._measured(side))
        if values is None:
            return None
        rate = self._column(side[1]).is_rate
        return intervals.rate_over_seeds(values) if rate else intervals.over_seeds(values)

    def difference(self, a: Side, b: Side) -> intervals.Mean | None:
        """`a` − `b`, paired; None where one of them was not measured."""
        first, second = self._measured(a), self._measured(b)
        if not first or not second:
            return None
        count = max(len(first), len(second))
        # A row that has one policy, not one of which one seed was measured so far.
        if len(self._row(a[0]).policies) == 1:
            first = first * count
        elif len(self._row(b[0]).policies) == 1:
            second = second * count
        shared = min(len(first), len(second))
        table = _matrix([*first[:shared], *second[:shared]])
        if table is None:
            return None
        found = intervals.over_seeds(table[:shared] - table[shared:])
        if self._column(a[1]).is_rate:  # Two rates differ by no more than 1.
            found = dataclasses.replace(found, low=max(found.low, -1.0), high=min(found.high, 1.0))
        return found

    def seeds(self, side: Side) -> int:
        """Training seeds of a row that were measured in a column."""
        return len(self._measured(side))

    def combination(self, parts: Mapping[Side, float]) -> intervals.Mean | None:
        """A sum of rows in columns, each times its number, seed by seed and episode by episode.

        As many seeds count as every one of them has; None where one was not measured.
        """
        measured = [self._measured(side) for side in parts]
        shared = min(map(len, measured), default=0)
        flat = _matrix([outcomes for found in measured for outcomes in found[:shared]])
        if flat is None:
            return None
        stacked = flat.reshape(len(parts), shared, -1)
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


def _matrix(measured: list[dict[int, float]]) -> Float[np.ndarray, "seeds episodes"] | None:
    """Outcomes in the episodes that all policies met."""
    shared = sorted(set.intersection(*map(set, measured))) if measured else []
    if not shared:
        return None
    return np.array([[outcomes[seed] for seed in shared] for outcomes in measured])


def missing(claim: Claim, results: cells.Results, episodes: int, plans: int) -> dict[str, str]:
    """Cells that are not complete, by name: how much of each is there."""
    found = {}
    for cell in claim.cells():
        wanted = episodes if cell.kind == "episodes" else min(plans, episodes)
        there = len(results.seeds(cell))
        if there < wanted:
            found[cell.name] = f"{there} of {wanted}"
    return found
