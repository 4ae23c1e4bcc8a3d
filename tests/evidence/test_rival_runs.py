"""Rivals among the policies of studies: made once, loaded without data, told apart by digests."""

import shutil

import jax
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.evidence import frames, miniature, rival_runs, sources
from shallow_pi.evidence.claims import rows
from shallow_pi.models import batch as batches

SLUG = f"{rows.TEACHER}--skip:drop=16,order=similarity"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals") / "runs"
    miniature.make_policies([rows.TEACHER], folder)
    return folder


def test_a_rival_is_made_of_demonstrations_and_loaded_without_them(runs):
    assert not sources.exists(SLUG, runs)
    with pytest.raises(FileNotFoundError, match=r"no rival teacher-.*--skip:drop=16.* of the"):
        sources.load(SLUG, runs, 10)
    before = sources.digest(rows.TEACHER, runs)
    data = frames.Frames(batches.noise(miniature.MODEL, 64, 0), np.array([0, 64]))
    rival_runs.make([SLUG], runs, data)
    assert sources.exists(SLUG, runs)
    made = sources.load(SLUG, runs, 3)
    assert (made.assets.model.depth, made.num_steps) == (2, 3)
    assert sources.digest(SLUG, runs) not in (before, rival_runs.digest(SLUG, runs))
    first = rival_runs.digest(SLUG, runs)
    scores = next(runs.glob("*skip*/similarity-order.json"))
    scores.write_text("[2, 1, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]\n")
    assert rival_runs.digest(SLUG, runs) != first


def test_a_teacher_that_is_trained_again_has_no_rivals_yet(runs, tmp_path):
    again = shutil.copytree(runs, tmp_path / "runs")
    data = frames.Frames(batches.noise(miniature.MODEL, 64, 0), np.array([0, 64]))
    rival_runs.make([SLUG], again, data)
    assert sources.exists(SLUG, again)
    teacher = again / rows.TEACHER
    params = weights.load_params(teacher, weights.stored_params(teacher))
    shutil.rmtree(teacher / "params")
    assert not sources.exists(SLUG, again)
    weights.save_params(teacher / "params", jax.tree.map(lambda leaf: leaf + 1, params))
    assert not sources.exists(SLUG, again)
    rival_runs.make([SLUG], again, data)
    assert sources.exists(SLUG, again)
    assert len(list(again.glob("*skip*"))) == 2


def test_rivals_that_learn_nothing_are_made_when_asked_for(runs, monkeypatch):
    monkeypatch.setattr(rival_runs, "MEASURED", 3)
    names = ("skip:drop=1,order=cka", "mole", "efficientvla:cache=2")
    slugs = [f"{rows.TEACHER}--{name}" for name in names]
    absent = "teacher-l9-s0--efficientvla:cache=2"
    rival_runs.ensure([rows.TEACHER, absent, *slugs], runs, train=False)
    made = [sources.exists(slug, runs) for slug in (*slugs, absent)]
    assert made == [True, False, True, False]


def test_too_few_frames_are_refused(runs):
    data = frames.Frames(batches.noise(miniature.MODEL, 8, 0), np.array([0, 8]))
    with pytest.raises(ValueError, match="at least 64 frames, got 8"):
        rival_runs.make([SLUG], runs, data)


def test_slugs_of_rivals_are_told_from_cuts():
    assert rival_runs.is_rival("teacher--efficientvla:layers=3")
    assert rival_runs.is_rival("teacher--cogvla")
    assert not rival_runs.is_rival("teacher--keep-0.3")
    assert not rival_runs.is_rival("teacher")


def test_a_rivals_demonstrations_do_not_depend_on_the_others(runs, monkeypatch):
    """Only a rival that is trained gets a student's; the others' lines are measured on fewer."""
    made = {}
    monkeypatch.setattr(frames, "collect", lambda suite, count, *_: count)
    monkeypatch.setattr(frames, "samples", lambda assets, count: count)
    monkeypatch.setattr(
        rival_runs, "make", lambda slugs, runs, data: made.update(dict.fromkeys(slugs, data))
    )
    slugs = [f"{rows.TEACHER}--{name}" for name in ("skip:drop=2,order=cka", "mole")]
    rival_runs.ensure(slugs, runs, train=True)
    assert made == dict(zip(slugs, (40, 400), strict=True))
