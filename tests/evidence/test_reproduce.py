"""The command runs every study in miniature, resumes, and names what is pending."""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys

import numpy as np
import pytest

from shallow_pi.commands import reproduce
from shallow_pi.evidence import miniature, running, training
from shallow_pi.evidence.claims import catalogue, cells, recipes, rows
from shallow_pi.training import command_line

METAWORLD = importlib.util.find_spec("metaworld") is not None
CHOSEN = [claim for claim in catalogue.CLAIMS.values() if METAWORLD or claim.name != "metaworld"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every study, measured in miniature."""
    folder = tmp_path_factory.mktemp("miniature")
    written = miniature.run(CHOSEN, 1, folder)
    return folder, written


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_study_runs_in_miniature(measured):
    folder, written = measured
    text = (folder / "evidence.md").read_text()
    for claim in CHOSEN:
        assert f"\n## {claim.name}\n" in text
        for statement in claim.statements:
            assert statement.text in text
    # Every claim has rows, a plot and pending cells; none is pending as a whole.
    assert text.count(" cells): ") == len(catalogue.CLAIMS) - len(CHOSEN)
    assert text.count("*Pending:*") == len(CHOSEN)
    assert {path.stem for path in written} >= {"evidence", "late", "layers", "layer_scores"}
    found = cells.read(folder / "results")
    for claim in CHOSEN:
        there = set(found.rows) & set(claim.cells())
        assert {cell.kind for cell in there} == {column.kind for column in claim.columns}
        assert {cell.situation.executor for cell in there} == {
            column.situation.executor for column in claim.columns
        }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_measured_cells_are_not_measured_again(measured):
    folder, _ = measured
    lines = (folder / "results" / "cells.jsonl").read_text().splitlines()
    found = cells.read(folder / "results")
    assert sum(len(seeds) for seeds in found.rows.values()) == len(lines) * miniature.EPISODES
    cell = next(iter(found.rows))
    assert running.jobs([cell], found, rows.teacher_of, miniature.EPISODES) == []
    (job,) = running.jobs([cell], found, rows.teacher_of, miniature.EPISODES + 3)
    assert len(job.seeds) == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_interrupted_cell_goes_on_with_the_same_outcomes(measured):
    folder, _ = measured
    found = cells.read(folder / "results")
    cell = next(c for c in found.rows if c.kind == "episodes" and c.policy.startswith("teacher"))
    seeds = tuple(sorted(found.seeds(cell)))
    job = running.Job(cell, seeds[1:], max_seconds=miniature.SECONDS)
    (block,) = running.measure(job, folder / "runs")
    for name, values in block.columns.items():
        assert list(values) == pytest.approx(found.column(cell, name, seeds[1:]).tolist(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cell_that_fails_does_not_stop_the_others(measured, tmp_path):
    folder, _ = measured
    cell = cells.Cell("expert", cells.Situation(("touch",)))
    broken = dataclasses.replace(cell, policy="nobody")
    jobs = [running.Job(c, (5,), max_seconds=miniature.SECONDS) for c in (broken, cell)]
    with pytest.raises(ValueError, match=r"1 of 2 cells failed: nobody touch .*no policy nobody"):
        running.run(jobs, folder / "runs", tmp_path / "cells.jsonl", 1)
    assert cells.read(tmp_path).seeds(cell) == {5}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_names_pending_cells_and_refreshes_the_page(measured, tmp_path, capsys):
    folder, _ = measured
    at = ["--results", str(folder / "results"), "--runs", str(tmp_path / "none")]
    reproduce.main(["late", "--pending", *at])
    pending = capsys.readouterr().out
    assert re.search(r"^late: l6-s1 moving N10 x10 late8-late \(0 of 500\)$", pending, re.MULTILINE)
    reproduce.main(["late", "--episodes", "0", *at, "--page", str(tmp_path / "page.md")])
    assert "## late" in (tmp_path / "page.md").read_text()


def test_cells_of_a_simulator_that_is_not_installed_are_pending(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.delitem(sys.modules, "shallow_pi.sims.metaworld", raising=False)
    folders = ["--runs", str(tmp_path), "--results", str(tmp_path), "--page", ""]
    reproduce.main(["metaworld", "--only", "^expert", *folders])
    told = " ".join(capsys.readouterr().err.split())
    assert "1 cells are pending: simulator 'metaworld_mt10'" in told
    assert "uv sync --extra metaworld" in told
    assert not list(tmp_path.iterdir())


def test_only_policies_of_the_chosen_cells_are_trained(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reproduce, "train", lambda wanted, _: asked.append(wanted))
    monkeypatch.setattr(reproduce, "unpack", lambda slugs, _: asked.append(slugs))
    folders = ["--runs", str(tmp_path), "--results", str(tmp_path), "--page", ""]
    only = ["parity", "--only", "^l6-demonstrations50-s1 "]
    reproduce.main([*only, "--train", "--episodes", "0", *folders])
    slugs, wanted = asked
    assert [recipe.slug for recipe in wanted] == slugs
    assert slugs == [recipes.TEACHER.slug, "l6-demonstrations50-s1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "expected claims of instrument, .*got 'nonsense'$"),
        (["metawrld"], r"got 'metawrld'; did you mean 'metaworld'\?"),
        (["late", "--part", "3/2"], "--part: expected i/n with i of 1 to n, got '3/2'"),
        (["late", "--only", "l6("], r"--only: expected a regular expression, got 'l6\('"),
        (["late", "--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scores_of_layers_have_a_row_for_each_step(measured):
    folder, _ = measured
    found = json.loads((folder / "results" / "layer_scores.json").read_text())
    assert len(found["similarity_by_step"]) == 10
    # The backbone's likeness is the same at all steps, the expert's is not.
    assert np.ptp(found["expert_similarity_by_step"], axis=0).max() > 1e-4
    assert len(found["similarity"]) == len(found["sensitivity"]) == 18


@pytest.mark.parametrize("teacher", recipes.PACKAGED, ids=lambda recipe: recipe.suite)
def test_packaged_teacher_is_the_one_that_the_claims_name(tmp_path, monkeypatch, teacher):
    slug = teacher.slug

    def interrupted(source, target, **options):
        (target / "params").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reproduce.unpack([slug], tmp_path)
    reproduce.unpack([slug], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [slug]
    written = json.loads((tmp_path / slug / training.RECIPE_FILE).read_text())["recipe"]
    assert recipes.Recipe(**{**written, "tasks": tuple(written["tasks"])}) == teacher
    # It is complete: a student can be cut from it and compared with it.
    assets, loaded = training.load_teacher(slug, tmp_path)
    sizes = command_line.load(command_line.configs(), recipes.config(teacher)).model
    assert assets.model == loaded.model == sizes
    assert {len(score) for score in loaded.scores.values()} == {18}
