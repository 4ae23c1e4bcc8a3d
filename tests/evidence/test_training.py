"""Policies that are missing are trained, teachers first, and come out as step folders."""

import dataclasses

import pytest

from shallow_pi.deploy import policy
from shallow_pi.evidence import claims, miniature, recipes, rows, training
from shallow_pi.sims import tabletop


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_missing_teachers_and_students_are_trained_once(tmp_path):
    model = dataclasses.replace(miniature.MODEL, depth=2)
    few = {"steps": 1, "demonstrations": 2}
    teacher = dataclasses.replace(recipes.TEACHER, depth=2, **few)
    student = dataclasses.replace(recipes.STUDENT, depth=1, teacher=teacher.slug, **few)
    suite = tabletop.Suite(tasks=("touch",))
    training.ensure([student, teacher], model, suite, tmp_path, 1)
    for recipe in (teacher, student):
        made = policy.Policy.from_checkpoint(tmp_path / recipe.slug, warm_up=False)
        assert made.assets.model.depth == recipe.depth
    before = (tmp_path / student.slug / training.RECIPE_FILE).stat().st_mtime_ns
    training.ensure([student, teacher], model, suite, tmp_path, 1)
    assert (tmp_path / student.slug / training.RECIPE_FILE).stat().st_mtime_ns == before


def test_every_trained_policy_of_a_claim_has_its_recipe():
    for slug in claims.students():
        assert rows.RECIPES[slug].slug == slug
