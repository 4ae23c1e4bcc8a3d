"""A run with everything that saves memory: frozen parts, an offloaded teacher, bfloat16 moments."""

import dataclasses

import jax
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.distill import losses, student
from shallow_pi.models import pi0
from shallow_pi.parallel import shapes
from shallow_pi.training import checkpoint, config, loop, metrics, setup
from shallow_pi.training import run as runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FREEZE = ("vision", "embedder")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_experiment, tiny_params):
    """A teacher's step folder, bfloat16."""
    step = tmp_path_factory.mktemp("teacher") / "100"
    model = tiny_experiment("anywhere").model
    weights.save_params(step / "params", tiny_params(model, dtype="bfloat16"))
    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_experiment, teacher, offloads):
    """Four uninterrupted steps; the teacher stays where it is where it cannot be offloaded."""
    experiment = tiny_experiment(tmp_path_factory.mktemp("run"), exp_name="whole")
    experiment = dataclasses.replace(
        experiment,
        teacher=config.TeacherConfig(str(teacher), offload=offloads),
        student=dataclasses.replace(experiment.student, freeze=FREEZE),
        optimizer=dataclasses.replace(experiment.optimizer, moments="bfloat16"),
        data=dataclasses.replace(experiment.data, held_out=0.5),
        validation=dataclasses.replace(experiment.validation, interval=2, samples=8, num_steps=2),
    )
    _train(experiment)
    return experiment


def _train(experiment):
    run = runs.open_run(experiment)
    with runs.claimed(experiment):
        loop.train(run)


def _losses(experiment):
    clock = ("seconds_per_step", "data_wait", "checkpoint_stall")
    rows = metrics.read(experiment.folder)
    return [{name: row[name] for name in row if name not in clock} for row in rows]


def test_it_resumes_bit_for_bit(whole):
    halves = dataclasses.replace(whole, exp_name="halves")
    for changes in ({"num_train_steps": 2}, {"resume": True}):
        _train(dataclasses.replace(halves, **changes))
    assert _losses(halves) == _losses(whole)
    expected = pi0.abstract_params(whole.student_model)
    trees = [
        weights.leaves(weights.load_params(one.folder / "4", expected)) for one in (halves, whole)
    ]
    for path, leaf in trees[0].items():
        np.testing.assert_array_equal(leaf, trees[1][path], err_msg=path)


def test_a_step_folder_is_the_whole_student_with_the_teachers_own_parts(whole, teacher):
    model = whole.student_model
    saved = weights.load_params(whole.folder / "4", pi0.abstract_params(model))
    given = weights.load_params(teacher, pi0.abstract_params(whole.model))
    trained, frozen = student.split(saved, FREEZE)
    theirs = weights.leaves(student.split(given, FREEZE)[1])
    for path, leaf in weights.leaves(frozen).items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    start = weights.leaves(student.gather(given, np.array([0, 2])))
    moved = [path for path, leaf in weights.leaves(trained).items() if (leaf != start[path]).any()]
    assert len(moved) >= len(weights.leaves(trained)) - 1  # The prefix's final norm is idle.


def test_the_state_holds_neither_frozen_parts_nor_wide_moments(whole):
    mesh = setup.make_mesh(whole, jax.devices())
    spec = setup.make_spec(whole, mesh)
    frozen = student.split(pi0.abstract_params(whole.model), FREEZE)[1]
    with checkpoint.Checkpoints(whole.folder, keep=None, frozen=_bfloat16(frozen)) as checkpoints:
        state, _ = checkpoints.restore(shapes.abstract_state(spec, mesh), 4)
    paths = weights.leaves(state)
    assert not [path for path in paths if "/img/" in path or "embedder" in path]
    moments = [leaf for path, leaf in paths.items() if "/mu/" in path or "/nu/" in path]
    assert {leaf.dtype.name for leaf in moments} == {"bfloat16"}


def _bfloat16(tree):
    return jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, "bfloat16"), tree)


def test_freezing_without_a_teacher_is_refused(tiny_experiment, tmp_path):
    experiment = tiny_experiment(
        tmp_path,
        teacher=None,
        student=config.StudentConfig(freeze=("vision",)),
        losses=losses.Losses(velocity=0.0, attention=0.0),
    )
    with pytest.raises(ValueError, match="freeze vision keeps parts of a teacher"):
        runs.open_run(experiment)
    assert not experiment.folder.exists() or not any(experiment.folder.iterdir())
