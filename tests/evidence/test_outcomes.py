"""Means, paired differences and verdicts from results that are written out."""

import pytest

from shallow_pi.evaluation import intervals
from shallow_pi.evidence import outcomes, page
from shallow_pi.evidence.claims import catalogue, cells
from shallow_pi.evidence.claims.claim import Claim, Column, Statement, Variant

SITUATION = cells.Situation(("touch", "insert"))
ALL, TOUCH = Column("all", SITUATION), Column("touch", SITUATION, task="touch")


def _table(outcomes_by_policy, statements=()):
    rows, tasks = {}, {}
    for policy, successes in outcomes_by_policy.items():
        cell = cells.Cell(policy, SITUATION)
        rows[cell] = {seed: {"success": float(s)} for seed, s in enumerate(successes)}
        tasks[cell] = {seed: SITUATION.tasks[seed % 2] for seed in rows[cell]}
    claim = Claim(
        name="made up",
        question="",
        says="",
        variants=(
            Variant("one", ("one",)),
            Variant("three", ("a", "b", "c")),
            Variant("others", ("x", "y", "z")),
        ),
        columns=(ALL, TOUCH),
        statements=statements,
        plots=(),
        reference="one",
        limits="",
    )
    return outcomes.Table(claim, cells.Results(rows, tasks, {}, {}), 4)


def test_a_row_of_one_policy_has_wilsons_interval_at_full_success():
    found = _table({"one": [1] * 50}).mean(("one", "all"))
    assert (found.mean, found.low) == pytest.approx((1.0, intervals.wilson(50, 50)[0]))


def test_a_task_of_a_column_counts_its_episodes_alone():
    found = _table({"one": [1, 0, 1, 0]}).mean(("one", "touch"))
    assert (found.mean, found.episodes) == (1.0, 2)


def test_seeds_are_compared_in_the_episodes_that_all_met():
    table = _table({"a": [1, 1, 0, 0], "b": [1, 0, 0], "one": [0, 0, 0, 1]})
    found = table.difference(("three", "all"), ("one", "all"))
    # Episodes 0 to 2: a 2 of 3, b 1 of 3, one 0; c is not there.
    assert (found.mean, found.seeds, found.episodes) == (pytest.approx(0.5), 2, 3)
    assert table.difference(("one", "all"), ("three", "all")).mean == pytest.approx(-0.5)


def test_policies_of_one_training_seed_are_compared_with_each_other():
    # The second seed of one row and the third of the other are not measured.
    table = _table({"a": [1, 1], "c": [0, 0], "x": [1, 0], "y": [1, 1]})
    sides = ("three", "all"), ("others", "all")
    found = table.difference(*sides)
    assert (found.mean, found.seeds) == (0.5, 1), "a with x, and not c with y"
    both = table.combination(dict(zip(sides, (1.0, -1.0), strict=True)))
    assert (both.mean, both.seeds) == (0.5, 1)
    apart = _table({"a": [1, 1], "y": [1, 0]})
    assert apart.difference(*sides) is None


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"at_least": 0.5}, "shown"),
        ({"at_least": 0.999}, "open"),
        ({"at_most": 0.5}, "refuted"),
        ({"at_most": 1.0}, "shown"),
    ],
)
def test_an_interval_decides_a_statement(bounds, verdict):
    table = _table({"one": [1] * 60})
    assert table.decide(Statement("", ("one", "all"), **bounds))[0] == verdict


def test_what_was_not_measured_is_not_decided():
    table = _table({"one": [1] * 60})
    statement = Statement("", ("three", "all"), ("one", "all"), at_least=0)
    assert table.decide(statement) == ("not measured", None)


def test_the_page_counts_verdicts_and_the_cells_that_are_not_complete(tmp_path, monkeypatch):
    statements = (
        Statement("all of it", ("one", "all"), at_least=0.1),
        Statement("others", ("others", "all"), at_least=0.1),
    )
    table = _table({"one": [1] * 4, "a": [1] * 4, "b": [1] * 2}, statements)
    monkeypatch.setattr(catalogue, "CLAIMS", {table.claim.name: table.claim})
    monkeypatch.setattr(cells, "read", lambda folder: table.results)
    page.write(tmp_path / "evidence.md", tmp_path, episodes=4)
    text = (tmp_path / "evidence.md").read_text()
    assert "\n| [made up](#made up) |  | 1 |  |  | 1 |\n" in text
    assert "\n| all of it | **shown** (one training seed) | 100.0 % (" in text
    assert "\n| others | not measured | |\n" in text
    assert "\n*Pending:* 5 of 7 cells; `uv run scripts/reproduce.py made up --pending` " in text
    assert page.pending([table.claim], tmp_path, 4)[0] == "made up: x touch+insert N10 x10 (0 of 4)"
