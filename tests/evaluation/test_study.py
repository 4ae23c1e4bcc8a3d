"""A whole study in miniature, its cache, and the policies a student is compared with."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import types

import jax
import numpy as np
import optax
import pytest

from shallow_pi.checkpoints import run_folder, sizes, weights
from shallow_pi.data import data_config, opening
from shallow_pi.data.lerobot import layout
from shallow_pi.data.robots import assets
from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import layer_map, losses, student
from shallow_pi.distill import spec as specs
from shallow_pi.evaluation import late_plans, report, rollout, study
from shallow_pi.inference import prepare, sampler, tuning
from shallow_pi.models import pi0
from shallow_pi.sims import turntable, workers
from shallow_pi.training import command_line, config, loop, metrics, run, setup

CONFIGS = pathlib.Path(__file__).parents[2] / "train_configs"


def _small(name, folder, **changes):
    """A turntable config with two layers, three steps, three demonstrations, two episodes."""
    experiment = command_line.load(CONFIGS, name)
    model = dataclasses.replace(
        experiment.model, depth=2, image=dataclasses.replace(experiment.model.image, depth=1)
    )
    task = dataclasses.replace(
        experiment.closed_loop, demonstrations=3, episodes=2, num_steps=2, harder=()
    )
    fields = {
        "model": model,
        "closed_loop": task,
        "checkpoint_dir": str(folder),
        "batch_size": 8,
        "draws": 1,
        "remat": "none",
        "num_train_steps": 3,
        "log_interval": 1,
        "save_interval": 3,
        "tensorboard": False,
    }
    return dataclasses.replace(experiment, **(fields | changes))


def _student(folder, teacher, **changes):
    path = dataclasses.replace(
        command_line.load(CONFIGS, "pi0_turntable_l6").teacher, path=str(teacher)
    )
    shallow = config.StudentConfig(depth=1)
    return _small("pi0_turntable_l6", folder, teacher=path, student=shallow, **changes)


def _baselines(experiment, enabled):
    task = dataclasses.replace(experiment.closed_loop, baselines=enabled)
    return dataclasses.replace(experiment, closed_loop=task)


def test_baselines_differ_from_the_student_in_loss_and_start_alone(tmp_path):
    experiment = dataclasses.replace(
        _student(tmp_path, "teacher"),
        losses=losses.Losses(task=0.5, velocity=2.0, attention=0.3),
        gradient_interval=10,
        seed=7,
    )
    found = study.baselines(experiment)
    assert list(found) == ["task_only", "random_init"]
    for name, init in (("task_only", "cut"), ("random_init", "random")):
        baseline = found[name]
        weights_of = (baseline.losses.task, baseline.losses.velocity, baseline.losses.attention)
        assert weights_of == (1.0, 0.0, 0.0)
        assert not baseline.losses.needs_teacher
        assert baseline.student == dataclasses.replace(experiment.student, init=init)
        for field in dataclasses.fields(baseline):
            if field.name not in ("losses", "student", "gradient_interval"):
                assert getattr(baseline, field.name) == getattr(experiment, field.name), field.name


def test_a_scorers_baselines_keep_its_own_loss(tmp_path):
    experiment = _student(tmp_path, "teacher")
    tokens = dataclasses.replace(experiment.student, image_tokens=4, image_token_choice="scored")
    experiment = dataclasses.replace(experiment, student=tokens)
    for baseline in study.baselines(experiment).values():
        terms = setup.make_spec(baseline).losses.weights
        assert {name for name, weight in terms.items() if weight} == {"task", "scorer"}


def test_a_run_with_samples_from_elsewhere_has_a_report(own, tmp_path):
    """Nobody finds the robot of openpi's transforms by name."""
    robot = dataclasses.replace(own.robot, name="openpi:mine", elsewhere="mine")
    source = data_config.DataConfig(source="mine:open_data", robot=robot.name)
    experiment = _student(tmp_path, "teacher", data=source)
    opened = types.SimpleNamespace(
        experiment=experiment, data=opening.Data((), None, dataclasses.replace(own, robot=robot))
    )
    assert study._outcome(opened, {"student": tmp_path}).groups == own.robot.groups


def test_the_teacher_of_a_student_in_8_bits_is_not_rounded(own, tiny_config, tmp_path, monkeypatch):
    teacher = tiny_config(vocab_size=320)
    spec = specs.Spec(
        student=own.model,
        optimizer=optax.sgd(0.1),
        schedule=optax.constant_schedule(0.1),
        losses=losses.Losses(),
        teacher=teacher,
        layer_map=layer_map.explicit((0, 2), 3),
        quantize="int8",
    )
    in_8_bits = dataclasses.replace(own, quantize="int8")
    monkeypatch.setattr(assets, "load", lambda folder: in_8_bits)
    monkeypatch.setattr(setup, "load_teacher", lambda *_: {})
    monkeypatch.setattr(student, "cut", lambda *_: {})
    monkeypatch.setattr(deployed.Policy, "from_checkpoint", lambda folder, **_: "student's")
    monkeypatch.setattr(
        deployed.Policy, "__init__", lambda self, own, _, **__: setattr(self, "assets", own)
    )
    experiment = _student(tmp_path, "teacher")
    opened = types.SimpleNamespace(experiment=experiment, spec=spec, teacher_step=None)
    found = study._policies(opened, experiment.closed_loop, {"student": tmp_path})
    assert found["teacher"].assets.model == teacher
    assert found["teacher"].assets.quantize == "none"
    assert found["cut_only"].assets.quantize == "int8"


def test_no_more_simulators_run_at_once_than_fit_in_memory(tmp_path, monkeypatch):
    experiment, batches = _small("pi0_turntable", tmp_path), []
    monkeypatch.setattr(workers, "fitting", lambda suite, wanted: wanted - 1)
    monkeypatch.setattr(study, "_policies", lambda *_: {"teacher": None})
    monkeypatch.setattr(study, "_outcome", lambda *_: report.Report("", {}))
    monkeypatch.setattr(study, "_tell", lambda *_: None)
    monkeypatch.setattr(rollout, "evaluate", lambda *_, batch, **__: batches.append(batch))
    monkeypatch.setattr(rollout, "record", lambda *_, **__: None)
    opened = types.SimpleNamespace(experiment=experiment, folder=tmp_path)
    task = dataclasses.replace(experiment.closed_loop, episodes=9)
    suite, _ = study.find_suites(task)
    stages = report.Stages(tmp_path / "stages.json")
    study._measure(opened, task, suite, {}, stages)
    assert batches == [8, 8], "the expert and the teacher"


def test_episodes_of_what_a_resumed_run_may_change_are_told_apart(tmp_path):
    experiment = _small("pi0_turntable", tmp_path)
    safe = {name for name in config.SAFE_TO_CHANGE if name.startswith("closed_loop.")}
    # The others add episodes or policies, and change none.
    assert safe - {f"closed_loop.{name}" for name in ("baselines", "episodes", "harder")} == {
        "closed_loop.num_steps"
    }
    tasks = [dataclasses.replace(experiment.closed_loop, num_steps=n) for n in (0, 1, 2)]
    assert len({study.episodes_name(experiment, task) for task in tasks}) == 3


@pytest.mark.parametrize("damaged", ["", "[]", '{"conf', "{}"])
def test_a_damaged_report_finishes_no_study(tmp_path, capsys, damaged):
    experiment = _student(tmp_path, "teacher")
    experiment.folder.mkdir(parents=True)
    (experiment.folder / run_folder.REPORT_FILE).write_text(damaged)
    assert not study._is_finished(experiment)
    assert "report.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execute_steps": 11}, "execute-steps must be at most the action horizon 10, got 11"),
        ({"clearance_mm": 20.0}, "clearance_mm: expected 0.5 to 8"),
        ({"tasks": ("juggle",)}, "tasks: expected some of"),
        ({"demonstrated": ("juggle",)}, "tasks: expected some of"),
        ({"tasks": ("touch", "insert", "touch")}, "to evaluate name touch more than once"),
        ({"sim": "turntabel"}, "unknown simulator 'turntabel'.* did you mean 'turntable'"),
        ({"options": ("size=9",)}, "no option 'size'; there are .*'image_size'"),
        ({"harder": ("thigt",)}, "no harder variant 'thigt'.* did you mean 'tight'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_task_that_cannot_be_leaves_an_old_run_alone(tmp_path, changes, message):
    experiment = _small("pi0_turntable", tmp_path, overwrite=True)
    task = dataclasses.replace(experiment.closed_loop, **changes)
    _refused(dataclasses.replace(experiment, closed_loop=task), message)


def test_data_that_cannot_be_used_leave_an_old_run_alone(tmp_path, tiny_dataset):
    experiment = _small("pi0_turntable", tmp_path, overwrite=True)
    data = dataclasses.replace(experiment.data, path=str(tmp_path / "nowhere"))
    _refused(dataclasses.replace(experiment, data=data), "no LeRobot dataset at")
    data = dataclasses.replace(experiment.data, path=str(tiny_dataset[0]))
    _refused(dataclasses.replace(experiment, data=data), r"no tokenizer .*--data\.tokenizer")


def test_losses_without_a_teacher_leave_an_old_run_alone(tmp_path):
    experiment = _small("pi0_turntable", tmp_path, overwrite=True, losses=losses.Losses())
    _refused(experiment, "need a teacher")


def test_a_teacher_that_is_absent_leaves_an_old_run_alone(tmp_path):
    experiment = _student(tmp_path, tmp_path / "nowhere", overwrite=True)
    _refused(experiment, "there is no checkpoint at", FileNotFoundError)


def test_a_teacher_of_another_robot_leaves_an_old_run_alone(tmp_path):
    teacher = CONFIGS.parent / "assets" / "pi0_tabletop"
    model = command_line.load(CONFIGS, "pi0_turntable_l6").model
    experiment = _student(tmp_path, teacher, overwrite=True)
    experiment = dataclasses.replace(experiment, model=model)
    _refused(experiment, "(?s)was trained for robot tabletop, not for turntable: .*--teacher.path")


def _refused(experiment, message, kind=(ValueError, FileNotFoundError)):
    old = experiment.folder / "3" / "precious"
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_text("")
    with pytest.raises(kind, match=message):
        study.run(experiment)
    assert [path.name for path in experiment.folder.parent.iterdir()] == ["first"]
    assert [path.name for path in experiment.folder.iterdir()] == ["3"]
    assert old.exists()


def test_a_start_that_another_one_overtakes_leaves_that_ones_config(
    tmp_path, tiny_experiment, monkeypatch
):
    experiment = tiny_experiment(tmp_path, closed_loop=None)
    theirs = dataclasses.asdict(dataclasses.replace(experiment, log_interval=7))
    prepare, other = run_folder.prepare, contextlib.ExitStack()

    def prepared(folder, *args, **kwargs):
        prepare(folder, *args, **kwargs)
        other.enter_context(run_folder.held(folder))
        run_folder.save_config(folder, theirs | {"layer_map": [0, 2]})

    monkeypatch.setattr(run_folder, "prepare", prepared)
    with other, pytest.raises(ValueError, match="another process works in"):
        study.run(experiment)
    assert run_folder.read_config(experiment.folder)["log_interval"] == 7


def test_a_study_holds_its_folder_at_every_stage(tmp_path, monkeypatch):
    experiment = _small("pi0_turntable", tmp_path)
    stages = []

    def stage(name, result=None):
        def work(*_, **__):
            other = run_folder.held(experiment.folder)
            with pytest.raises(ValueError, match="another process works in"), other:
                pass
            stages.append(name)
            return result

        return work

    monkeypatch.setattr(study.recording, "write", stage("demonstrations"))
    monkeypatch.setattr(study.tokenizer, "train", stage("tokenizer"))
    monkeypatch.setattr(run, "open_run", stage("data"))
    monkeypatch.setattr(loop, "train", stage("training", experiment.folder / "3"))
    monkeypatch.setattr(study, "_measure", stage("evaluation"))
    assert study.run(experiment) == experiment.folder / "3"
    assert stages == ["demonstrations", "tokenizer", "data", "training", "evaluation"]


def test_files_of_a_start_without_a_config_are_reused_for_the_same_settings_alone(
    tmp_path, monkeypatch
):
    experiment = _small("pi0_turntable", tmp_path)
    opened, tokenizer = [], experiment.folder / "tokenizer.model"

    def stop(experiment, **_):
        opened.append(tokenizer.read_bytes())
        raise ValueError("stopped")

    def start(message, resume=True, **changes):
        task = dataclasses.replace(experiment.closed_loop, **changes)
        with pytest.raises(ValueError, match=message):
            study.run(dataclasses.replace(experiment, closed_loop=task, resume=resume))

    monkeypatch.setattr(run, "open_run", stop)
    monkeypatch.setattr(study.recording.demonstrations, "cpus", lambda: 1)
    start("stopped", resume=False)
    tokenizer.write_bytes(b"of other prompts")
    before = _hashes(experiment.folder / "demonstrations")
    start("stopped")
    assert opened[0] == opened[1] != b"of other prompts"
    start(r"other settings:\n  seed: recorded 0, now 5\ndelete them", seed=5)
    start("episodes: recorded 3, now 2", demonstrations=2)
    start(r"options.tasks: recorded \['touch', 'insert'\], now \['touch'\]", tasks=("touch",))
    assert len(opened) == 2
    assert _hashes(experiment.folder / "demonstrations") == before

    (experiment.folder / "demonstrations" / "meta" / "recording.json").unlink()
    start("seed: recorded 'unknown', now 0")


@pytest.mark.slow
def test_training_alone_ends_with_a_report(tmp_path, tiny_experiment, tiny_dataset, capsys):
    """And so does the same run when it is resumed."""
    dataset, tokenizer = tiny_dataset
    data = data_config.DataConfig(path=str(dataset), tokenizer=str(tokenizer), held_out=0.34)
    experiment = tiny_experiment(
        tmp_path,
        data=data,
        validation=config.ValidationConfig(interval=1, samples=8, num_steps=2),
        num_train_steps=2,
    )
    assert study.run(experiment) == experiment.folder / "2"
    shown = capsys.readouterr().out
    for words in ("student, ", "held-out action error", "gantry (m)", "task loss"):
        assert words in shown
    written = _report(experiment)
    assert written["success"] == {}
    assert written["stage_seconds"]["training"] > 0
    best = written["validation"]["student"]["best"]
    kept = json.loads((experiment.folder / "best.json").read_text())
    assert kept == {"step": best["step"], "error": best["error_to_data"]}
    for name in ("report.md", "losses.png", "validation.png", "validation_groups.png"):
        assert (experiment.folder / name).stat().st_size > 100
    study.run(dataclasses.replace(experiment, resume=True))
    assert _report(experiment)["validation"] == written["validation"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The teacher's study and its packaged policy."""
    folder = tmp_path_factory.mktemp("study")
    experiment = _small("pi0_turntable", folder)
    task = dataclasses.replace(experiment.closed_loop, demonstrated=("touch", "touch"))
    experiment = dataclasses.replace(experiment, closed_loop=task)
    step = study.run(experiment)
    study.package(experiment, step, folder / "packaged")
    return experiment, step, folder / "packaged"


@pytest.fixture(scope="module")
def studied(taught):
    """The student's study without the reference policies, and what it left."""
    experiment = _baselines(_student(*_places(taught)), False)
    study.run(experiment)
    return experiment, _report(experiment)


def _places(taught):
    experiment, _, packaged = taught
    return experiment.checkpoint_dir, packaged


def _report(experiment):
    return json.loads((experiment.folder / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_teachers_study_leaves_a_report_and_a_policy(taught):
    experiment, step, packaged = taught
    assert step == experiment.folder / "3"
    written = _report(experiment)
    assert list(written["success"]) == ["expert", "teacher"]
    assert "latency_ms" not in written
    shown = layout.read(experiment.folder / "demonstrations").tasks.values()
    assert shown
    assert all("block" in prompt for prompt in shown), "as the config's `demonstrated` says"
    assert {"demonstrations", "training", "evaluation"} <= set(written["stage_seconds"])

    stored = weights.load_params(packaged, pi0.abstract_params(experiment.model))
    trained = weights.load_params(step, pi0.abstract_params(experiment.model))
    for path, leaf in weights.leaves(stored).items():
        assert leaf.dtype == "bfloat16"
        np.testing.assert_array_equal(leaf, weights.leaves(trained)[path].astype("bfloat16"))
    assert assets.load(packaged).model == experiment.model
    recipe = json.loads((packaged / "recipe.json").read_text())
    assert recipe["success"] == written["success"]
    assert recipe["command"] == "uv run scripts/train_teacher.py pi0_turntable"
    assert recipe["config"]["seed"] == experiment.seed


@pytest.mark.slow
def test_a_packaged_policy_is_put_aside_as_often_as_needed(taught):
    experiment, step, packaged = taught
    before = (packaged / "recipe.json").read_bytes()
    for _ in range(2):
        study.package(experiment, step, packaged)
    for name in ("packaged", "packaged.old-1", "packaged.old-2"):
        assert (packaged.with_name(name) / "recipe.json").read_bytes() == before
        assert sizes.of(weights.stored_params(packaged.with_name(name)))["depth"] == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_students_study_leaves_the_numbers_it_must(studied):
    experiment, written = studied
    assert list(written["success"]) == ["expert", "teacher", "student", "cut_only"]
    for rate in written["success"].values():
        assert sorted(rate) == ["episodes", "high", "low", "rate"]
        assert rate["episodes"] == 2
        assert 0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1
    assert sorted(written["latency_ms"]) == ["student", "teacher"]
    late = written["late_plans"]
    assert next(iter(late)) == "in time"
    assert list(late)[-1] == "364 and 110 ms (the paper's), real-time chunking"
    assert {len(rates) for rates in late.values()} == {2}
    assert {"success", "latency_ms", "stage_seconds", "config", "versions"} <= set(written)
    assert written["config"]["name"] == "pi0_turntable_l6"
    for name in ("report.md", "success.png", "losses.png", "episode.png", "episode.gif"):
        assert (experiment.folder / name).stat().st_size > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_policies_under_test_are_what_the_table_calls_them(studied):
    experiment, _ = studied
    data = dataclasses.replace(experiment.data, path=str(experiment.folder / "demonstrations"))
    opened = run.open_run(dataclasses.replace(experiment, data=data, resume=True))
    folders = {"student": experiment.folder}
    found = study._policies(opened, experiment.closed_loop, folders)
    assert list(found) == ["teacher", "student", "cut_only"]
    expected = pi0.abstract_params(experiment.model)
    teacher = weights.load_params(experiment.teacher.path, expected, dtype="float32")
    _assert_holds(found["teacher"], teacher)
    cut = student.gather(teacher, np.array([0]))
    _assert_holds(found["cut_only"], cut)
    trained = weights.load_params(
        experiment.folder / "3", pi0.abstract_params(experiment.student_model)
    )
    _assert_holds(found["student"], trained)
    for policy in found.values():
        leaves = jax.tree.leaves(policy.program.weights.params)
        assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def _assert_holds(policy, params):
    """The policy's weights are those of `params`, layer by layer."""
    times = sampler.integration_times(2)
    expected = prepare.prepare(policy.assets.model, params, times, tuning.default())
    held = policy.program.weights
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), held, expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_resumed_study_does_no_stage_again(studied, monkeypatch):
    experiment, written = studied
    experiment = dataclasses.replace(experiment, resume=True)
    before = _hashes(experiment.folder)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
        assert study.run(experiment) == experiment.folder / "3"
    assert _hashes(experiment.folder) == before

    # Without its report it is measured again, from the episodes that are on disk.
    (experiment.folder / "report.json").unlink()
    seeds, reset = [], turntable.Turntable.reset

    def counting(self, seed):
        seeds.append(seed)
        reset(self, seed)

    monkeypatch.setattr(turntable.Turntable, "reset", counting)
    study.run(experiment)
    assert seeds == [experiment.closed_loop.eval_seed, 0], "the recording and the latency"
    for key in ("success", "by_task", "differences"):
        assert _report(experiment)[key] == written[key]
    after = _hashes(experiment.folder)
    same = [n for n in before if n.startswith(("demonstrations/", "evaluations/", "3/"))]
    assert same
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert [row["step"] for row in metrics.read(experiment.folder)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reference_policies_can_be_added_to_a_finished_study(studied, monkeypatch):
    """Same data, same episodes; what was measured before stands."""
    experiment, written = studied
    evaluated, evaluate = [], rollout.evaluate

    def noting(make_sim, policy, **arguments):
        done = arguments["path"].exists()
        found = evaluate(make_sim, policy, **arguments)
        evaluated.append((arguments["label"], done))
        return found

    monkeypatch.setattr(rollout, "evaluate", noting)
    more = dataclasses.replace(_baselines(experiment, True), resume=True)
    study.run(more)
    names = ["expert", "teacher", "student", "cut_only", "task_only", "random_init"]
    own, late = evaluated[: len(names)], evaluated[len(names) :]
    assert own == [(name, name in written["success"]) for name in names]
    assert len(late) > 1
    ways = (", in time", *(f" steps late, {way}" for way in late_plans.EXECUTORS.values()))
    assert all(done and label.endswith(ways) for label, done in late)
    found = _report(more)["success"]
    assert list(found) == names
    assert {name: found[name] for name in written["success"]} == written["success"]

    rows = {n: metrics.read(more.folder / "baselines" / n) for n in ("task_only", "random_init")}
    assert all("velocity_loss" not in row for name in rows for row in rows[name])
    first = metrics.read(more.folder)[0]
    np.testing.assert_allclose(rows["task_only"][0]["task_loss"], first["task_loss"], rtol=1e-5)
    assert abs(rows["random_init"][0]["task_loss"] / first["task_loss"] - 1) > 1e-3


def _hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
