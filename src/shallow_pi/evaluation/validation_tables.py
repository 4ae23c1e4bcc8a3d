"""Tables of the errors on held-out episodes, from the rows of metrics.jsonl.

Pure functions from rows (see `training.validation`) to tables and plain values: of every trained
policy the step with the lowest error and the last one, the errors by group of joints and by joint
in the robot's units, and the losses.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shallow_pi.data.robots import robot
from shallow_pi.evaluation import plots
from shallow_pi.training import validation

# Header and rows of a table.
Table = tuple[list[str], list[list[str]]]
# Error in metrics.jsonl → actions that are compared.
ERRORS = {
    validation.TO_DATA: "to the data",
    validation.TO_TEACHER: "to the teacher",
    validation.TEACHER_TO_DATA: "teacher to the data",
}
# Stands for the mean over a group's joints.
ALL = "all"
# Explains the tables, below them on the page.
NOTE = """Action errors are mean absolute differences on episodes that training does not see, with
the same noise for teacher and student: of normalized actions, and by group and joint in the robot's
units. The policy of the best step is kept as `best` in the run's folder."""
# Loss in metrics.jsonl → its name in words.
LOSSES = {name: name.replace("_", " ") for name in validation.LOSSES}


def measured(rows: plots.Rows) -> plots.Rows:
    """The rows of the steps at which held-out errors were measured."""
    return [row for row in rows if row.get(validation.TO_DATA) is not None]


def best(rows: plots.Rows, criterion: str) -> plots.Row | None:
    """The row of the step with the lowest error `criterion`, which is the one that is kept.

    Not step 0, which is measured for comparison and has no checkpoint, nor one whose error is not
    finite.
    """
    found = [
        row
        for row in measured(rows)
        if row["step"] and row.get(criterion) is not None and math.isfinite(row[criterion])
    ]
    return min(found, key=lambda row: row[criterion], default=None)


def labels(groups: Sequence[robot.Group]) -> dict[str, str]:
    """Name of a group → its label with the unit."""
    return {g.name: f"{g.name.replace('_', ' ')} ({g.unit})".replace(" ()", "") for g in groups}


def error_tables(
    curves: Mapping[str, plots.Rows], groups: Sequence[robot.Group], criterion: str
) -> list[Table]:
    """Errors of every policy at its best and last step; those of the first one by group and joint.

    `groups` are of the robot's actions, none for made-up samples; `criterion` names the error that
    decides which step is the best.
    """
    rows, teacher = [], None
    for policy, curve in curves.items():
        top, seen = best(curve, criterion), measured(curve)
        if top is None:
            continue
        name, last = plots.NAMES.get(policy, policy), seen[-1]
        steps = {} if seen[0]["step"] else {"before training": seen[0]}
        one = {"best and last step": top}
        steps |= one if top is last else {"best step": top, "last step": last}
        for which, row in steps.items():
            cells = [_cell(row.get(key)) for key in (validation.TO_DATA, validation.TO_TEACHER)]
            rows.append([f"{name}, {which}", str(int(row["step"])), *cells])
        teacher = teacher or top.get(validation.TEACHER_TO_DATA)
    if not rows:
        return []
    if teacher is not None:
        rows.insert(0, ["teacher", "", _cell(teacher), ""])
    tables = [(["held-out action error", "step", "to the data", "to the teacher"], rows)]
    parts = [
        (label if joint == ALL else f"· {joint}", errors)
        for label, joints in group_errors(curves, groups, criterion).items()
        for joint, errors in joints.items()
    ]
    if parts:
        keys = list(dict.fromkeys(key for _, errors in parts for key in errors))
        body = [[label, *(_cell(errors.get(key)) for key in keys)] for label, errors in parts]
        tables.append((["at the best step", *keys], body))
    return tables


def group_errors(
    curves: Mapping[str, plots.Rows], groups: Sequence[robot.Group], criterion: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Group with its unit → ALL or a joint → comparison → error, of the first policy's best step.

    Joints are those that the rows name.
    """
    row = next((top for rows in curves.values() if (top := best(rows, criterion))), {})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, label in labels(groups).items():
        for key, words in ERRORS.items():
            whole = f"{key}/{name}"
            for at, value in row.items():
                if value is not None and (at == whole or at.startswith(f"{whole}/")):
                    joint = at.removeprefix(whole).removeprefix("/") or ALL
                    found.setdefault(label, {}).setdefault(joint, {})[words] = value
    return found


def loss_table(curves: Mapping[str, plots.Rows]) -> list[Table]:
    """Each loss at the first and last logged step, and on held-out samples at the last one."""
    header, table = ["loss", "first", "last", "held out"], []
    for policy, rows in curves.items():
        for name, words in LOSSES.items():
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                held_out = [row.get(f"{validation.PREFIX}{name}") for row in measured(rows)]
                cells = [_cell(value) for value in (values[0], values[-1], *held_out[-1:])]
                title = f"{plots.NAMES.get(policy, policy)}, {words}"
                table.append([title, *cells, *[""] * (3 - len(cells))])
    return [(header, table)] if table else []


def contents(curves: Mapping[str, plots.Rows], criterion: str) -> dict[str, Any]:
    """Policy → everything measured before training, at its best and at its last measured step.

    None stands for a value that is not finite, as in metrics.jsonl.
    """

    def values(row: plots.Row) -> dict[str, object]:
        prefix = validation.PREFIX
        kept = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in kept.items()}
        return {"step": row["step"], **finite}

    found = {}
    for policy, rows in curves.items():
        top = best(rows, criterion)
        if top is not None:
            first, last = measured(rows)[0], measured(rows)[-1]
            found[policy] = {} if first["step"] else {"start": values(first)}
            found[policy] |= {"best": values(top), "last": values(last)}
    return found


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
