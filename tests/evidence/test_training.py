"""Policies that are missing are trained, teachers first, and come out as step folders."""

import dataclasses
import errno
import json

import jax
import numpy as np
import pytest

from shallow_pi.commands import reproduce
from shallow_pi.deploy import policy
from shallow_pi.evidence import many, miniature, sources, training
from shallow_pi.evidence.claims import catalogue, recipes, rows
from shallow_pi.sims import tabletop
from shallow_pi.training import command_line


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


def test_a_teacher_is_there_once_its_layers_are_measured(own, tiny_params, tmp_path, monkeypatch):
    recipe = dataclasses.replace(recipes.TEACHER, depth=own.model.depth)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "measure_layers", interrupted)
    trained = [(recipe, jax.device_get(tiny_params(own.model)), {})]
    monkeypatch.setattr(many, "train", lambda *_, **__: iter(trained))
    with pytest.raises(KeyboardInterrupt):
        training.teach([recipe], own, None, tmp_path)
    assert training.missing([recipe], tmp_path) == [recipe]
    monkeypatch.setattr(training, "measure_layers", lambda *_: {"cka": np.ones(2)})
    training.teach([recipe], own, None, tmp_path)
    _, teacher = training.load_teacher(recipe.slug, tmp_path)
    assert {name: score.tolist() for name, score in teacher.scores.items()} == {"cka": [1, 1]}


def test_a_policy_appears_whole_and_replaces_none(own, tiny_params, tmp_path, monkeypatch):
    recipe, params = recipes.STUDENT, jax.device_get(tiny_params(own.model))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(own), "save", full)
        with pytest.raises(OSError, match=rf"{recipe.slug} cannot be written"):
            training.save(tmp_path, recipe, params, own, {})
    assert not sources.exists(recipe.slug, tmp_path)
    training.save(tmp_path, recipe, params, own, {"loss": 1.0})
    training.save(tmp_path, recipe, params, own, {"loss": 2.0})  # Of another process.
    kept = json.loads((tmp_path / recipe.slug / training.RECIPE_FILE).read_text())
    assert kept["metrics"] == {"loss": 1.0}
    (tmp_path / recipe.slug / training.RECIPE_FILE).unlink()  # As a folder of the user's own.
    with pytest.raises(FileExistsError, match="never overwritten: move it away"):
        training.missing([recipe], tmp_path)


def test_every_trained_policy_of_a_claim_has_its_recipe_and_a_config_of_its_suite():
    configs = {}
    for slug in catalogue.students():
        recipe = rows.RECIPES[slug]
        assert recipe.slug == slug
        configs[recipes.config(recipe)] = recipe
    for name, recipe in configs.items():
        task = command_line.load(command_line.configs(), name).closed_loop
        assert task.sim == recipe.suite
        assert task.set_demonstrated().get("tasks", ()) == recipe.tasks


def test_policies_of_every_suite_that_are_there_are_left_alone(tmp_path):
    for slug in catalogue.students():
        (tmp_path / "runs" / slug).mkdir(parents=True)
        (tmp_path / "runs" / slug / training.RECIPE_FILE).write_text("{}")
    before = sorted((tmp_path / "runs").rglob("*"))
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    reproduce.main(["all", "--train", "--episodes", "0", "--page", "", *folders])
    assert sorted((tmp_path / "runs").rglob("*")) == before
