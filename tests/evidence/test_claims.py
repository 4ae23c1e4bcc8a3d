"""The table of claims is consistent: what a statement or plot names is measured."""

import pytest

from shallow_pi.evidence.claims import catalogue, recipes
from shallow_pi.sims import simulator

EVERY = list(catalogue.CLAIMS.values())


@pytest.mark.parametrize("claim", EVERY, ids=lambda claim: claim.name)
def test_what_statements_and_plots_name_is_measured(claim):
    rows = [row.label for row in claim.variants]
    columns = [column.label for column in claim.columns]
    assert len(set(rows)) == len(rows)
    assert len(set(columns)) == len(columns)
    assert claim.reference in rows
    sides = [side for s in claim.statements for side in (s.a, s.b) if side is not None]
    sides += [side for p in claim.plots for line in p.lines for _, side in line.points]
    for row, column in sides:
        assert row in rows
        assert column in columns
        assert claim.has((row, column))
    for statement in claim.statements:
        assert (statement.at_least is None) != (statement.at_most is None)


def test_every_policy_is_the_expert_a_cut_or_a_recipe_of_its_own():
    slugs = catalogue.students()
    assert slugs[0] == recipes.TEACHER.slug
    assert recipes.EXPERT not in slugs
    assert not [slug for slug in slugs if "--" in slug]
    assert len(set(slugs)) == len(slugs)


def test_cells_come_seed_by_seed():
    claim = catalogue.CLAIMS["late"]
    seeds = [cell.policy[-1] for cell in claim.cells() if cell.policy.startswith("l6")]
    assert seeds == sorted(seeds)
    _, *students = claim.variants
    assert len(seeds) == 3 * len(claim.columns) * len(students)


def test_the_tasks_of_mt10_are_the_simulators():
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    (situation,) = {column.situation for column in catalogue.CLAIMS["metaworld"].columns}
    assert situation.suite.task_names() == simulator.find("metaworld_mt10", {}).task_names()
