"""Costs of rivals on the page: measured once, by row, and drawn against success."""

import json

from shallow_pi.evaluation.rivals import costs
from shallow_pi.evidence import miniature, outcomes, rival_costs
from shallow_pi.evidence.claims import catalogue, cells, rows

CLAIM = catalogue.CLAIMS["rivals"]


def _write(folder):
    one = {"operations": 4_000_000, "parameters": 1_500_000, "median_ms": 2.5, "p95_ms": 3.0}
    names = ("teacher", "skip:drop=12", "mole:layers=6")
    made = [{"name": name, **one, "device": "cpu"} for name in names]
    (folder / rival_costs.FILE.format(claim=CLAIM.name)).write_text(json.dumps(made))


def test_costs_stand_by_the_rows_that_have_them(tmp_path):
    assert rival_costs.read(CLAIM, tmp_path) == {}
    assert list(rival_costs.lines(CLAIM, tmp_path)) == []
    _write(tmp_path)
    found = rival_costs.read(CLAIM, tmp_path)
    students = rows.STUDENT_ROW, rows.SENSITIVE_ROW, rows.BEST_ROW
    own = [row.label for row in (rows.TEACHER_ROW, *students)]
    labels = [*own, "MoLE, 6 of 18 layers routed"]
    assert list(found) == labels
    assert set(found) <= {row.label for row in CLAIM.variants}
    assert list(rival_costs.lines(CLAIM, tmp_path))[-1] == f"| {labels[-1]} | 4 | 1.50 | 2.50 |"
    assert rival_costs.read(catalogue.CLAIMS["late"], tmp_path) == {}
    rival_costs.ensure([CLAIM], tmp_path / "none", tmp_path)  # Nothing is measured again.


def test_a_row_more_has_all_costs_measured_again(tmp_path, monkeypatch):
    asked = []

    def measured(model, params, names):
        asked.append(names)
        return [costs.Cost(name, 1, 1, 1.0, 1.0, "cpu") for name in names]

    monkeypatch.setattr(costs, "measure", measured)  # It compiles all rivals, for minutes.
    miniature.make_policies([rows.TEACHER], tmp_path / "runs")
    _write(tmp_path)
    for _ in range(2):
        rival_costs.ensure([CLAIM], tmp_path / "runs", tmp_path)
    assert len(asked) == 1
    assert list(rival_costs.read(CLAIM, tmp_path)) == [row.label for row in CLAIM.variants]


def test_success_is_drawn_against_operations_where_both_are_known(tmp_path):
    _write(tmp_path)
    plot = tmp_path / "costs.png"
    empty = outcomes.Table(CLAIM, cells.read(tmp_path), 2)
    assert not rival_costs.plot(plot, empty, tmp_path)
    cell = cells.Cell(rows.TEACHER, rows.SUITE)
    names = cells.COLUMNS["episodes"]
    columns = {name: [1.0, 0.0] for name in names}
    origin = {"commit": "", "device": "cpu", "seconds": 1.0}
    block = cells.Block(cell, "d", (1_000_000, 1_000_001), rows.TASKS[:2], columns, origin)
    cells.append(tmp_path / "cells.jsonl", block)
    assert rival_costs.plot(plot, outcomes.Table(CLAIM, cells.read(tmp_path), 2), tmp_path)
    assert plot.exists()
