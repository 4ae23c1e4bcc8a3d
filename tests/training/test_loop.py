"""The real loop on eight devices: it resumes exactly, stops when asked, and loses nothing."""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
import signal
import types
import weakref

import jax
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.data import data_config, inspection, loader, opening, sources
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import policy
from shallow_pi.distill import layer_map
from shallow_pi.models import pi0
from shallow_pi.parallel import shapes
from shallow_pi.planning import memory
from shallow_pi.training import (
    checkpoint,
    config,
    loop,
    metrics,
    metrics_buffer,
    setup,
    validation,
)
from shallow_pi.training import run as runs

# Some thirty short runs: a busy machine takes its time.
pytestmark = pytest.mark.timeout(900)
CLOCK = ("seconds_per_step", "data_wait", "checkpoint_stall")


def _train(experiment, **changes):
    experiment = dataclasses.replace(experiment, **changes)
    run = runs.open_run(experiment)
    with runs.claimed(experiment):
        return loop.train(run)


def _rows(folder):
    """The logged rows, without timings."""
    return [
        {name: value for name, value in row.items() if name not in CLOCK}
        for row in metrics.read(folder)
    ]


def _state(experiment, step):
    """A saved state (parameters, moments, EMA, step) as numpy, and its data position."""
    mesh, spec = setup.make_mesh(experiment, jax.devices()), setup.make_spec(experiment)
    with checkpoint.Checkpoints(experiment.folder, keep=None) as checkpoints:
        state, position = checkpoints.restore(shapes.abstract_state(spec, mesh), step)
    return jax.device_get(state), position


def _assert_same_run(a, b, step=4):
    (state, position), (other, other_position) = _state(a, step), _state(b, step)
    leaves, others = weights.leaves(state), weights.leaves(other)
    assert {"step", "opt_state/1/0/mu/state_proj/kernel"} <= set(leaves)
    assert any(path.startswith("ema_params/") for path in leaves)
    assert list(leaves) == list(others)
    for path in leaves:
        np.testing.assert_array_equal(leaves[path], others[path], err_msg=path)
    assert position == other_position
    assert _rows(a.folder) == _rows(b.folder)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory, tiny_experiment):
    return tiny_experiment(tmp_path_factory.mktemp("synthetic"), exp_name="whole")


@pytest.fixture(scope="module")
def whole(synthetic):
    """Four uninterrupted steps."""
    _train(synthetic)
    return synthetic


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, tiny_experiment, tiny_dataset):
    """The same on a dataset, read by threads; a checkpoint after every step."""
    dataset, tokenizer = tiny_dataset
    data = data_config.DataConfig(path=str(dataset), tokenizer=str(tokenizer), num_threads=2)
    folder = tmp_path_factory.mktemp("recorded")
    return tiny_experiment(folder, exp_name="whole", data=data, save_interval=1)


@pytest.fixture(scope="module")
def whole_recorded(recorded):
    _train(recorded, keep=4)
    return recorded


def test_two_steps_and_two_resumed_steps_equal_four(whole, capsys):
    halves = dataclasses.replace(whole, exp_name="halves", resume=True)
    assert _train(halves, num_train_steps=2) == halves.folder / "2"
    told = capsys.readouterr().err
    assert f"Start: cut out of the teacher (--resume finds no step in {halves.folder})\n" in told
    assert _train(halves) == halves.folder / "4"
    assert f"Start: step 2 in {halves.folder}\n" in capsys.readouterr().err
    _assert_same_run(halves, whole)
    assert [row["step"] for row in _rows(whole.folder)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_steps_and_two_resumed_steps_equal_four_on_a_dataset(whole_recorded):
    halves = dataclasses.replace(whole_recorded, exp_name="halves")
    _train(halves, num_train_steps=2)
    cached = dataclasses.replace(halves.data, cache="memory", num_threads=0)
    _train(halves, resume=True, data=cached)
    _assert_same_run(halves, whole_recorded)


@pytest.mark.slow
def test_a_run_sees_every_sample_once_an_epoch_however_it_is_cut(recorded, monkeypatch):
    """24 frames, batches of 8: three steps are an epoch, also over an interruption."""
    seen = []
    read = sources.DatasetSource.__getitem__

    def recording(self, i):
        seen.append(i)
        return read(self, i)

    monkeypatch.setattr(sources.DatasetSource, "__getitem__", recording)
    monkeypatch.setattr(loader.Prefetch, "__init__", functools.partialmethod(_shallow_prefetch))
    experiment = dataclasses.replace(
        recorded, exp_name="epoch", data=dataclasses.replace(recorded.data, num_threads=0)
    )
    _train(experiment, num_train_steps=2)
    # A run looks at samples before it trains.
    first, seen[:] = seen[inspection.SAMPLES :][:16], []
    _train(experiment, num_train_steps=3, resume=True)
    assert sorted(first + seen[inspection.SAMPLES :][:8]) == list(range(24))


_prefetch = loader.Prefetch.__init__


def _shallow_prefetch(self, source, sharding, depth=1):
    _prefetch(self, source, sharding, 1)


@pytest.fixture(scope="module")
def validated(recorded):
    """One of the three episodes is held out and measured after every second step."""
    experiment = dataclasses.replace(
        recorded,
        exp_name="validated",
        data=dataclasses.replace(recorded.data, held_out=0.34),
        validation=config.ValidationConfig(interval=2, samples=8, num_steps=2),
        save_interval=100,
    )
    _train(experiment)
    return experiment


def _errors(folder):
    rows = {row["step"]: row for row in _rows(folder)}
    return {n: row[validation.TO_DATA] for n, row in rows.items() if validation.TO_DATA in row}


@pytest.mark.slow
def test_validation_is_logged_at_its_interval_and_the_best_step_is_kept(validated):
    found = _errors(validated.folder)
    assert list(found) == [0, 2, 4], "before the first step too"
    best = min((2, 4), key=found.get)
    assert (validated.folder / "best").resolve() == validated.folder / str(best)
    kept = json.loads((validated.folder / "best.json").read_text())
    assert kept == {"step": best, "error": found[best]}
    assert {4, best} == {int(c.name) for c in validated.folder.iterdir() if c.name.isdigit()}


@pytest.mark.slow
def test_the_policy_of_a_step_makes_the_error_that_was_logged(validated):
    """From raw observations, with the sampler of deployment, in the robot's units."""
    data = opening.open_data(validated.data, validated.student_model, None)
    source = data.held_out
    deployed = policy.Policy.from_checkpoint(validated.folder / "4", num_steps=2, warm_up=False)
    difference = []
    for place in range(8):
        i = place * len(source) // 8
        sample = source.dataset.read(i, tuple(source.robot.cameras.values()))
        actions, padded = source.dataset.chunk(i, source.horizon, source.robot.action_key)
        shape = deployed.noise_shape
        noise = np.random.default_rng([validated.seed, place]).standard_normal(shape)
        chunk = deployed.infer(sample, noise.astype(np.float32))["actions"]
        difference.append(np.abs(chunk - actions)[~padded])
    logged = _rows(validated.folder)[-1][f"{validation.TO_DATA}/gantry"]
    np.testing.assert_allclose(np.concatenate(difference).mean(), logged, rtol=1e-3)


@pytest.mark.slow
def test_validation_of_a_resumed_run_gives_the_same_numbers(validated):
    halves = dataclasses.replace(validated, exp_name="validated-halves")
    _train(halves, num_train_steps=3)
    assert list(_errors(halves.folder)) == [0, 2, 3], "also at the end"
    _train(halves, resume=True)
    rows, expected = _rows(halves.folder), _rows(validated.folder)
    assert [rows[i] for i in (0, 1, 2, 4)] == [expected[i] for i in (0, 1, 2, 4)]


@pytest.mark.slow
def test_validation_does_not_change_what_is_learned(validated):
    plain = dataclasses.replace(validated, exp_name="not-validated")
    _train(plain, validation=config.ValidationConfig(interval=0))
    assert not (plain.folder / "best.json").exists()
    (state, position), (other, same) = _state(plain, 4), _state(validated, 4)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert position == same


def test_a_finished_run_is_left_unchanged(whole):
    before = _hashes(whole.folder)
    assert _train(whole, resume=True) == whole.folder / "4"
    changed = {name for name, digest in _hashes(whole.folder).items() if before[name] != digest}
    assert changed <= {"config.json"}  # It says resume now.


def test_a_run_cannot_end_before_where_it_is(whole):
    before = _hashes(whole.folder)
    with pytest.raises(ValueError, match=r"is at step 4 already.*--num-train-steps"):
        _train(whole, resume=True, num_train_steps=3)
    assert _hashes(whole.folder) == before, "its config too"


def test_an_existing_run_needs_resume_or_overwrite(whole):
    before = _hashes(whole.folder)
    with pytest.raises(ValueError, match=r"already holds a run.*--resume.*--overwrite"):
        _train(whole)
    assert _hashes(whole.folder) == before


def test_a_resumed_run_with_another_config_names_the_fields(whole):
    before = _hashes(whole.folder)
    with pytest.raises(ValueError, match="another config") as error:
        _train(whole, resume=True, seed=1, student=config.StudentConfig(layers=(1, 2)))
    for field in ("seed: saved 42, now 1", "student.layers", "layer_map: saved [0, 2], now [1, 2]"):
        assert field in str(error.value)
    assert _hashes(whole.folder) == before


@pytest.mark.slow
def test_overwrite_starts_anew_and_keeps_the_old_run(whole_recorded):
    experiment = dataclasses.replace(whole_recorded, exp_name="again")
    _train(experiment, num_train_steps=1)
    _train(experiment, num_train_steps=2, overwrite=True)
    assert checkpoint.Checkpoints(experiment.folder).latest_step() == 2
    assert (experiment.folder.with_name("again.old-1") / "1" / "params").is_dir()


@pytest.mark.slow
def test_a_signal_saves_and_the_run_resumes_exactly(whole, monkeypatch):
    experiment = dataclasses.replace(whole, exp_name="interrupted", save_interval=100)
    with monkeypatch.context() as patch:
        _send(patch, signal.SIGINT, after_step=1)
        with pytest.raises(loop.InterruptedRunError, match=r"SIGINT after step 3.*--resume"):
            _train(experiment)
    assert checkpoint.Checkpoints(experiment.folder).latest_step() == 3
    _train(experiment, resume=True)
    _assert_same_run(experiment, whole)


@pytest.mark.slow
def test_a_signal_in_the_last_step_ends_the_run_too(whole, monkeypatch):
    """A study would otherwise go on with its next stage."""
    experiment = dataclasses.replace(whole, exp_name="last")
    _send(monkeypatch, signal.SIGTERM, after_step=4)
    with pytest.raises(loop.InterruptedRunError, match="SIGTERM after step 4"):
        _train(experiment)
    assert checkpoint.Checkpoints(experiment.folder).latest_step() == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_forwarded_signal_counts_once_and_a_later_one_is_immediate(monkeypatch, number):
    """`uv run` forwards to us what a scheduler sends to the whole process group."""

    class Terminated(Exception):
        pass

    def terminate(*_):
        raise Terminated

    before = signal.signal(number, terminate)
    try:
        with loop._stop_signals() as stopping:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stopping.after(1)
            assert stopping.name == number.name
            monkeypatch.setattr(loop.interrupts, "FORWARDED_SECONDS", 0.0)
            with pytest.raises(Terminated):
                os.kill(os.getpid(), number)
            assert signal.getsignal(number) is terminate
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_does_not_stop_a_run_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with loop._stop_signals() as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping.after(1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_every_process_resumes_from_the_step_of_process_0(monkeypatch):
    """A network file system may show another host the folder as it was."""
    monkeypatch.setattr(loop.processes, "gather", lambda value: [16, value])
    monkeypatch.setattr(loop.shapes, "abstract_state", lambda spec, mesh: None)
    run = types.SimpleNamespace(folder="run", spec=None, mesh=None)
    seen = types.SimpleNamespace(
        latest_step=lambda: 8, restore=lambda abstract, step: (f"state {step}", f"position {step}")
    )
    positions = []
    feed = types.SimpleNamespace(restore=positions.append)
    assert loop.start(run, None, seen, feed) == "state 16"
    assert positions == ["position 16"]


def _send(patch, number, after_step):
    """Send a signal to this process when a step is logged: two steps on, or when it is saved."""
    log = metrics.MetricsLog.log

    def sending(self, step, values):
        log(self, step, values)
        if step == after_step:
            os.kill(os.getpid(), number)

    patch.setattr(metrics.MetricsLog, "log", sending)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(whole, monkeypatch):
    experiment = dataclasses.replace(
        whole,
        exp_name="poisoned",
        data=dataclasses.replace(whole.data, num_threads=0),
        log_interval=100,
    )
    read, count = sources.SyntheticSource.__getitem__, []

    def poisoned(self, i):
        count.append(i)
        sample = read(self, i)
        third_batch = 16 < len(count) - inspection.SAMPLES <= 24
        return sample.replace(actions=sample.actions + np.inf) if third_batch else sample

    with monkeypatch.context() as patch:
        patch.setattr(sources.SyntheticSource, "__getitem__", poisoned)
        with pytest.raises(loop.NonFiniteLossError, match=r"step 3: .*task_loss = .*step 2 is kep"):
            _train(experiment)
    steps = [child.name for child in experiment.folder.iterdir() if child.name.isdigit()]
    assert steps == ["2"]
    _train(experiment, resume=True, log_interval=1)
    state, _ = _state(experiment, 4)
    expected, _ = _state(whole, 4)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_value_that_is_not_finite_passes(tmp_path, value):
    message = rf"step 1: loss = {value}; no checkpoint was written yet\. Check the data"
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        loop._require_finite(checkpoints, 1, {"loss": 1.0})
        with pytest.raises(loop.NonFiniteLossError, match=message):
            loop._require_finite(checkpoints, 1, {"grad_norm": 1.0, "loss": value})


def test_devices_that_are_full_end_a_run_with_what_to_change(synthetic, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(setup, "cut_state", full)
    with pytest.raises(
        memory.DoesNotFitError, match=r"a batch of 8 does not fit .*\ntry --batch-s"
    ):
        _train(synthetic, exp_name="full")


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_only_what_came_after_the_last_checkpoint(
    whole_recorded, monkeypatch
):
    experiment = dataclasses.replace(whole_recorded, exp_name="full")
    save, saved = policy_assets.Assets.save, []

    def full(self, folder):
        save(self, folder)
        saved.append(folder)
        if len(saved) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(policy_assets.Assets, "save", full)
        with pytest.raises(
            checkpoint.SaveError, match=r"/3 could not.*No space left.*step 2 is intact.*--resume"
        ):
            _train(experiment)
    _train(experiment, resume=True)
    _assert_same_run(experiment, whole_recorded)


def test_a_save_that_failed_ends_the_run_at_the_next_step(synthetic, monkeypatch):
    def poll(self):
        raise checkpoint.SaveError("the disk is full")

    monkeypatch.setattr(checkpoint.Checkpoints, "poll", poll)
    with pytest.raises(checkpoint.SaveError, match="the disk is full"):
        _train(synthetic, exp_name="unsaved")


def test_a_validation_that_fails_costs_no_step_that_is_due(synthetic, monkeypatch):
    measured = []

    def failing(self, teacher, state):
        measured.append(int(state.step))
        if measured[-1]:
            raise RuntimeError("out of memory")
        return {validation.TO_DATA: 1.0}

    monkeypatch.setattr(validation.Validation, "measure", failing)
    experiment = dataclasses.replace(
        synthetic,
        exp_name="unmeasured",
        data=dataclasses.replace(synthetic.data, held_out=0.5),
        validation=config.ValidationConfig(interval=2, samples=8, num_steps=2),
        save_interval=2,
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        _train(experiment)
    assert measured == [0, 2]
    assert [child.name for child in experiment.folder.iterdir() if child.name.isdigit()] == ["2"]


def test_a_step_folder_alone_is_the_policy_that_was_trained(whole_recorded):
    experiment = whole_recorded
    step = experiment.folder / "4"
    assert {child.name for child in step.iterdir()} >= {"params", "train_state", "assets", "data"}
    assert (step / "assets" / "turntable" / "norm_stats.json").is_file()
    state, _ = _state(experiment, 4)
    expected = pi0.abstract_params(experiment.student_model)
    stored = weights.load_params(step / "params", expected)
    jax.tree.map(np.testing.assert_array_equal, stored, state.ema_params)

    deployed = policy.Policy.from_checkpoint(step, num_steps=2, warm_up=False)
    trained = policy.Policy(policy_assets.load(step), state.ema_params, num_steps=2)
    generator = np.random.default_rng(0)
    observation = {
        "observation.images.base": generator.integers(0, 256, (24, 24, 3), np.uint8),
        "observation.images.wrist": generator.integers(0, 256, (24, 24, 3), np.uint8),
        "observation.state": generator.standard_normal(3).astype(np.float32),
        "task": "touch the red block",
    }
    noise = generator.standard_normal((1, *deployed.noise_shape)).astype(np.float32)
    actions = deployed.infer_batch([observation], noise)
    assert actions.shape == (1, 8, 3)
    np.testing.assert_allclose(actions, trained.infer_batch([observation], noise), atol=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, synthetic, tiny_params):
    """A teacher's step folder in openpi's layout, bfloat16."""
    step = tmp_path_factory.mktemp("teacher") / "100"
    weights.save_params(step / "params", tiny_params(synthetic.model, dtype="bfloat16"))
    return step


def test_a_teacher_from_disk_is_cut_bit_for_bit_and_left_unchanged(teacher, synthetic):
    experiment = dataclasses.replace(
        synthetic, exp_name="disk", teacher=config.TeacherConfig(str(teacher)), num_train_steps=2
    )
    run = runs.open_run(experiment)
    start = setup.cut_state(run.spec, run.mesh, run.load_teacher())
    stored = weights.leaves(weights.load_params(teacher, pi0.abstract_params(experiment.model)))
    for path, leaf in weights.leaves(start.params).items():
        original = np.asarray(stored[path], np.float32)
        if path.startswith("PaliGemma/llm/layers/"):
            original = original[[0, 2]]
        np.testing.assert_array_equal(leaf, original, err_msg=path)
        np.testing.assert_array_equal(leaf, weights.leaves(start.ema_params)[path])

    before = _hashes(teacher)
    with runs.claimed(experiment):
        loop.train(run)
    assert _hashes(teacher) == before
    (row, _) = _rows(experiment.folder)
    assert row["velocity_cosine"] < 1
    assert row["teacher_task_loss"] > 0


@pytest.mark.slow
def test_the_teacher_leaves_the_devices_when_no_loss_needs_it(teacher, synthetic, monkeypatch):
    """The student is cut and the teacher measured before; the frozen part stays."""
    loaded, held = [], []
    load, add = setup.load_teacher, metrics_buffer.MetricsBuffer.add

    def loading(*args):
        params = load(*args)
        loaded.extend((path, weakref.ref(leaf)) for path, leaf in weights.leaves(params).items())
        return params

    def noting(self, *args):
        held.append({path for path, leaf in loaded if leaf() is not None})
        add(self, *args)

    monkeypatch.setattr(setup, "load_teacher", loading)
    monkeypatch.setattr(metrics_buffer.MetricsBuffer, "add", noting)
    experiment = dataclasses.replace(
        synthetic,
        exp_name="alone",
        teacher=config.TeacherConfig(str(teacher)),
        student=dataclasses.replace(synthetic.student, freeze=("vision",)),
        losses=synthetic.losses.only(task=1.0),
        data=dataclasses.replace(synthetic.data, held_out=0.5),
        validation=config.ValidationConfig(interval=1, samples=8, num_steps=2),
        num_train_steps=2,
    )
    _train(experiment)
    assert held == [{path for path, _ in loaded if "PaliGemma/img" in path}] * 2
    assert validation.TO_TEACHER in _rows(experiment.folder)[-1]


def test_a_params_folder_stands_for_the_step_it_lies_in(teacher, synthetic):
    for path in (teacher, teacher / "params"):
        experiment = dataclasses.replace(synthetic, teacher=config.TeacherConfig(str(path)))
        assert setup.find_teacher(experiment) == teacher


@pytest.mark.slow
def test_a_strategy_that_measures_leaves_the_data_position_untouched(synthetic, monkeypatch):
    """And a resumed run keeps the layers that were measured."""
    experiment = dataclasses.replace(
        synthetic,
        exp_name="measured",
        num_train_steps=1,
        student=config.StudentConfig(depth=2, strategy="similarity"),
    )
    plain = dataclasses.replace(synthetic, exp_name="as-measured", num_train_steps=1)
    _train(experiment)
    saved = json.loads((experiment.folder / "config.json").read_text())["layer_map"]
    layer_map.explicit(saved, 3)
    _train(plain, student=config.StudentConfig(layers=tuple(saved)))
    (row,), (expected,) = _rows(experiment.folder), _rows(plain.folder)
    assert row == expected
    data = [
        json.loads(next((e.folder / "1" / "data").iterdir()).read_text())
        for e in (experiment, plain)
    ]
    assert data[0] == data[1]
    monkeypatch.setattr(runs, "layer_scores", None)
    _train(experiment, resume=True)


@pytest.mark.parametrize(
    ("strategy", "layers"),
    [("similarity", (0, 2)), ("cka", (0, 2)), ("sensitivity", (1, 2)), ("gate", (1, 2))],
)
def test_the_measured_layers_are_those_of_the_scores(synthetic, monkeypatch, strategy, layers):
    asked = []

    def measure(named, model, params, observation, x_t, t, u):
        asked.append((named, x_t.shape, t.shape, u.shape))
        return np.array([0.1, 0.9, 0.5])

    fake = types.SimpleNamespace(measure=measure)
    monkeypatch.setattr(runs, "layer_scores", fake)
    student = config.StudentConfig(depth=2, strategy=strategy)
    experiment = dataclasses.replace(synthetic, exp_name=f"scores-{strategy}", student=student)
    assert runs.open_run(experiment).spec.layer_map.layers == layers
    assert asked == [(strategy, (8, 8, 4), (8,), (8, 8, 4))]


def _hashes(folder: pathlib.Path):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
