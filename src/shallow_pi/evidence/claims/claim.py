"""The structure of a claim: rows, columns, statements and plots, all of them data.

A claim compares variants (a recipe under several training seeds, or one fixed policy) in columns (a
situation and a measure). Its statements are inequalities between two of these, each decided by its
95 % interval alone.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from shallow_pi.evidence.claims import cells


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table: the same recipe under several seeds, or one policy."""

    label: str
    # Slugs; those of several seeds in the order of the seeds.
    policies: tuple[str, ...]

    def at(self, column: "Column") -> "Side":
        """This row in a column."""
        return self.label, column.label


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: a measure in a situation."""

    label: str
    situation: cells.Situation
    # A column of results (`cells.COLUMNS`); rates are "success" and "collided".
    measure: str = "success"
    # Of the situation's tasks this one; "" is all.
    task: str = ""

    def cell(self, policy: str) -> cells.Cell:
        """The cell of a policy that holds it."""
        return cells.Cell(policy, self.situation, self.kind)

    @property
    def kind(self) -> str:
        """Of the cells that hold it."""
        return next(kind for kind, names in cells.COLUMNS.items() if self.measure in names)

    @property
    def is_rate(self) -> bool:
        """A share of episodes."""
        return self.measure in ("success", "collided")


# A variant's label and a column's.
Side = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Statement:
    """`a` − `b` (or `a` alone) is at least, or at most, a bound."""

    text: str
    a: Side
    b: Side | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """Points of a plot: where they stand, and which variant and column gives their height."""

    label: str
    points: tuple[tuple[float | str, Side], ...]
    # Of the palette of policies, and solid, dashed or dotted.
    colour: str = "student"
    style: str = "-"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure of a claim: curves over numbers, or points over names."""

    name: str
    title: str
    x: str
    y: str
    lines: tuple[Line, ...]


def points(name: str, title: str, rows: Mapping[str, Variant], columns: Sequence[Column]) -> Plot:
    """Success by column: a line of points for each row, given by its colour."""
    lines = (
        Line(row.label, tuple((c.label, row.at(c)) for c in columns), colour, "")
        for colour, row in rows.items()
    )
    return Plot(name, title, "", "success, %", tuple(lines))


def points_by_row(
    name: str, title: str, rows: Sequence[Variant], columns: Mapping[str, Column]
) -> Plot:
    """Success by row: a line of points for each column, given by its colour."""
    lines = (
        Line(column.label, tuple((row.label, row.at(column)) for row in rows), colour, "")
        for colour, column in columns.items()
    )
    return Plot(name, title, "", "success, %", tuple(lines))


def curves(
    name: str, title: str, rows: Mapping[str, Variant], columns: Mapping[int, Column]
) -> Plot:
    """Success over the integration steps of columns: a curve for each row, given by its colour."""
    lines = (
        Line(row.label, tuple((float(n), row.at(c)) for n, c in columns.items()), colour)
        for colour, row in rows.items()
    )
    return Plot(name, title, "integration steps", "success, %", tuple(lines))


@dataclasses.dataclass(frozen=True)
class Factor:
    """One direction of a factorial study, and its levels, the usual one first."""

    name: str
    levels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One study."""

    # As on the command line.
    name: str
    question: str
    # The statement of the paper, or ours.
    says: str
    variants: tuple[Variant, ...]
    columns: tuple[Column, ...]
    statements: tuple[Statement, ...]
    plots: tuple[Plot, ...]
    # Row with which the others are compared, pair by pair.
    reference: str
    limits: str
    # Rows and columns that are measured; None is all of them.
    only: frozenset[Side] | None = None
    # Of a factorial study its directions, and the level of each that a row and column has.
    factors: tuple[Factor, ...] = ()
    design: tuple[tuple[tuple[str, ...], Side], ...] = ()

    def has(self, side: Side) -> bool:
        """The claim asks for this pair of row and column."""
        return self.only is None or side in self.only

    def cells(self) -> list[cells.Cell]:
        """All cells, the first seeds of every row first."""
        found = []
        longest = max(len(variant.policies) for variant in self.variants)
        for index, column, variant in itertools.product(
            range(longest), self.columns, self.variants
        ):
            if index < len(variant.policies) and self.has((variant.label, column.label)):
                found.append(column.cell(variant.policies[index]))
        return list(dict.fromkeys(found))
