"""A whole experiment: demonstrations, student, reference policies, closed-loop success, report.

Every stage leaves its result in the run's folder and is skipped when it is there, so an interrupted
study picks up where it was:

    <run>/demonstrations        a LeRobot dataset, made by the simulated task's expert
    <run>/<step>                the trained policy
    <run>/baselines/<name>      what it is compared with, trained by the same loop
    <run>/evaluations           one line an episode
    <run>/report.{json,md}      and the plots

Without a simulated task it is training, and a report of losses and held-out errors.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import robot, tokenizer
from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import step, student
from shallow_pi.evaluation import late_plans, policies, report, rollout
from shallow_pi.models import pi0
from shallow_pi.parallel import processes, sharding
from shallow_pi.sims import recording, simulator, workers
from shallow_pi.training import config, loop, metrics, setup, validation
from shallow_pi.training import run as runs


def run(experiment: config.DistillConfig) -> pathlib.Path:
    """Run or resume an experiment; returns the trained policy's step folder.

    The report lies in the run's folder, and its tables are printed; without `closed_loop` it holds
    what training measured.

    Raises:
      ValueError, FileNotFoundError, OSError: something does not fit, is missing or is not writable.
      loop.NonFiniteLossError, loop.InterruptedRunError: the training ended early.
    """
    folder, task = experiment.folder, experiment.closed_loop
    label = "Distil" if experiment.losses.needs_teacher else "Train"
    if task is None:
        opened = runs.open_run(experiment)
        with runs.claimed(experiment):
            final = loop.train(opened, label)
            if processes.is_main():
                _tell(_outcome(opened, {_trained_name(experiment): folder}), folder)
        return final
    suite, demonstrated = find_suites(task)
    experiment = check(experiment, task, suite)
    run_folder.check(folder, experiment.resume, experiment.overwrite)
    if experiment.resume and _is_finished(experiment):
        progress.say(
            f"Finished already: {folder / run_folder.REPORT_FILE}; delete it to measure again"
        )
        return folder / str(experiment.num_train_steps)
    makes_data = not experiment.data.path
    with contextlib.ExitStack() as working:
        if makes_data:
            working.enter_context(runs.claimed(experiment))
            experiment = _with_data(experiment, task, demonstrated)
        opened = runs.open_run(experiment, is_claimed=makes_data)
        if not makes_data:
            working.enter_context(runs.claimed(experiment))
        stages = report.Stages(folder / run_folder.STAGES_FILE)
        with stages.timed("training"):
            final = loop.train(opened, label)
        folders = {_trained_name(experiment): folder}
        if experiment.teacher is not None and task.baselines:
            for name, baseline in baselines(opened.experiment).items():
                folders[name] = folder / run_folder.BASELINES / name
                with stages.timed(f"training {name}"):
                    loop.train(runs.variant(opened, baseline, folders[name]), name)
        if processes.is_main():
            _measure(opened, task, suite, folders, stages)
    return final


def check(
    experiment: config.DistillConfig, task: config.ClosedLoopConfig, suite: simulator.Suite
) -> config.DistillConfig:
    """Find out what cannot work before the run's folder is touched; sizes are the teacher's."""
    simulator.harder(suite, task.set_harder())
    simulator.check_robot(suite, robot.find(experiment.data.robot))
    if not experiment.data.path and suite.expert() is None:
        raise ValueError(
            f"simulator {task.sim!r} has no expert that demonstrates its tasks: give --data.path"
        )
    runs.check(experiment)
    teacher_step = setup.teacher_on_disk(experiment)
    experiment = setup.resolve(experiment, teacher_step)
    if teacher_step is not None and not experiment.data.norm_stats:
        # Raises if the teacher is of another robot, before demonstrations are made for it.
        policy_assets.teacher_statistics(
            teacher_step, experiment.data.asset_id, suite.robot, experiment.model
        )
    if jax.process_count() > 1 and not experiment.data.path:
        raise ValueError(
            f"{experiment.name} makes its demonstrations itself, in one process: give --data.path"
        )
    if task.execute_steps > experiment.model.action_horizon:
        raise ValueError(
            f"--closed-loop.execute-steps must be at most the action horizon "
            f"{experiment.model.action_horizon}, got {task.execute_steps}"
        )
    return experiment


def train_teacher(
    experiment: config.DistillConfig, own: config.DistillConfig
) -> config.DistillConfig:
    """Train an experiment's teacher by its `own` config; returns the experiment with it.

    What is wrong with the student's side is found out before the teacher's long training.
    """
    teacher = experiment.teacher
    assert teacher is not None, "asked for by teacher.train"
    made_up = dataclasses.replace(teacher, path=setup.RANDOM)
    runs.check(dataclasses.replace(experiment, teacher=made_up))
    run_folder.check(experiment.folder, experiment.resume, experiment.overwrite)
    trained = dataclasses.replace(teacher, path=str(run(own)), train=False)
    return dataclasses.replace(experiment, teacher=trained)


def package(experiment: config.DistillConfig, step: pathlib.Path, target: pathlib.Path) -> None:
    """Put a trained policy where it can be kept: bfloat16 parameters, assets, and how it was made.

    The report lies beside the step folder. An existing target is put aside as `<target>.old-<n>`.
    """
    made = json.loads((experiment.folder / run_folder.REPORT_FILE).read_text(encoding="utf-8"))
    assets = policy_assets.load(step)
    expected = pi0.abstract_params(assets.model)
    params = weights.load_params(step, expected, dtype=jnp.dtype("bfloat16"), what="policy")
    kept = ("success", "by_task", "stage_seconds", "config", "versions", "machine")
    recipe = {"command": f"uv run scripts/train_teacher.py {experiment.name}"}
    recipe |= {name: made[name] for name in kept}
    text = json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
    with atomic.folder(target) as partial:
        weights.save_params(partial / run_folder.PARAMS, params)
        assets.save(partial / run_folder.ASSETS)
        (partial / "recipe.json").write_text(text, encoding="utf-8")
        run_folder.prepare(target, resume=False, overwrite=True, meet=processes.sync)
    progress.console.print(f"Packaged: {target}", soft_wrap=True)


def find_suites(task: config.ClosedLoopConfig) -> tuple[simulator.Suite, simulator.Suite]:
    """The simulator that a config names, with the options it sets: evaluated, and demonstrated."""
    try:
        evaluated, demonstrated = task.set_options(), task.set_demonstrated()
        suite = simulator.find_evaluated(task.sim, evaluated)
        return suite, simulator.find(task.sim, demonstrated)
    except ValueError as error:
        raise ValueError(f"closed loop: {error}") from error


def baselines(experiment: config.DistillConfig) -> dict[str, config.DistillConfig]:
    """Students by the task loss alone, from the cut and from random weights; all else the same.

    A scorer keeps its own loss, without which it learns nothing, and which trains nothing else.
    """
    alone = dataclasses.replace(
        experiment,
        losses=experiment.losses.only(task=1.0, scorer=experiment.losses.scorer),
        gradient_interval=0,
        profile="",
    )
    random = dataclasses.replace(alone.student, init="random")
    return {"task_only": alone, "random_init": dataclasses.replace(alone, student=random)}


def _is_finished(experiment: config.DistillConfig) -> bool:
    """True if the folder holds a report of this very config."""
    path = experiment.folder / run_folder.REPORT_FILE
    if not path.exists():
        return False
    try:
        reported = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (TypeError, KeyError, ValueError) as error:
        progress.warn(f"{path} is damaged ({error!r}): it is written anew", tolerated=True)
        return False
    wanted = json.loads(json.dumps(dataclasses.asdict(experiment)))
    # Set by hand for one command, or by the study itself.
    for values in (reported, wanted):
        for name in ("resume", "overwrite", "checkpoint_dir"):
            del values[name]
    if not experiment.data.path:
        reported["data"] |= {name: wanted["data"][name] for name in ("path", "tokenizer")}
    return bool(reported == wanted)


def _trained_name(experiment: config.DistillConfig) -> str:
    return "teacher" if experiment.teacher is None else "student"


def _with_data(
    experiment: config.DistillConfig, task: config.ClosedLoopConfig, suite: simulator.Suite
) -> config.DistillConfig:
    """Make demonstrations, and for a run without teacher the tokenizer; name them in the config."""
    path = experiment.folder / run_folder.DEMONSTRATIONS
    # Until there is a config, files may be of a start with another one.
    began = run_folder.read_config(experiment.folder) is not None
    if not path.exists():
        with report.Stages(experiment.folder / run_folder.STAGES_FILE).timed("demonstrations"):
            recording.write(path, suite, task.demonstrations, task.seed, task.noise)
    elif not began:
        recording.check(path, suite, task.demonstrations, task.seed, task.noise)
    named = experiment.data.tokenizer
    if not named and experiment.teacher is None:
        model = experiment.folder / policy_assets.TOKENIZER_NAME
        if not (began and model.exists()):
            tokenizer.train(suite.prompts(), model, vocab_size=experiment.model.vocab_size)
        named = str(model)
    data = dataclasses.replace(experiment.data, path=str(path), tokenizer=named)
    return dataclasses.replace(experiment, data=data)


def episodes_name(experiment: config.DistillConfig, task: config.ClosedLoopConfig) -> str:
    """The end of the names of files of episodes.

    It tells apart the episodes of what a resumed run may change (`config.SAFE_TO_CHANGE`).
    """
    steps = f"-in-{task.num_steps}" if task.num_steps else ""
    return f"{experiment.num_train_steps}{steps}"


def _measure(
    opened: runs.Run,
    task: config.ClosedLoopConfig,
    suite: simulator.Suite,
    folders: Mapping[str, pathlib.Path],
    stages: report.Stages,
) -> None:
    experiment, folder = opened.experiment, opened.folder
    trained, tested = _trained_name(experiment), _policies(opened, task, folders)
    acting: dict[str, policies.Policy] = {}
    if (expert := suite.expert()) is not None:
        acting["expert"] = policies.Scripted(expert)
    acting |= {name: policies.Trained(policy) for name, policy in tested.items()}

    name = episodes_name(experiment, task)
    scenes = {"": suite} | simulator.harder(suite, task.set_harder())
    found: dict[str, dict[str, rollout.Evaluation]] = {}
    batch = workers.fitting(suite, min(rollout.BATCH, task.episodes))
    with stages.timed("evaluation"):
        for scene, variant in scenes.items():
            found[scene] = {}
            for role, policy in acting.items():
                label = f"{role} {scene}".strip()
                file = f"{label.replace(' ', '-')}-{name}.jsonl"
                found[scene][role] = rollout.evaluate(
                    variant.make,
                    policy,
                    episodes=task.episodes,
                    seed=task.eval_seed,
                    execute_steps=1 if role == "expert" else task.execute_steps,
                    label=label,
                    batch=batch,
                    path=folder / run_folder.EVALUATIONS / file,
                )
        recording = rollout.record(
            suite.make,
            acting[trained],
            seed=task.eval_seed,
            execute_steps=task.execute_steps,
            label=trained,
        )
    whole = found.pop("")
    measured, late = None, []
    if "student" in tested:
        with stages.timed("latency"):
            pair = {role: tested[role] for role in ("teacher", "student")}
            measured = policies.measure_latency(pair, suite.make())
        if (world := simulator.moving(suite)) is not None:
            with stages.timed("late plans"):
                late = late_plans.evaluate(
                    world,
                    {role: acting[role] for role in pair},
                    measured,
                    execute_steps=task.execute_steps,
                    seed=task.eval_seed,
                    folder=folder / run_folder.EVALUATIONS,
                    name=name,
                    episodes=min(task.episodes, late_plans.EPISODES),
                )
    outcome = dataclasses.replace(
        _outcome(opened, folders),
        evaluations=whole,
        harder=found,
        latency=measured,
        late=late,
        stage_seconds=stages.seconds,
        recording=recording,
    )
    _tell(outcome, folder)


def _outcome(opened: runs.Run, folders: Mapping[str, pathlib.Path]) -> report.Report:
    """Report of what training measured."""
    experiment, assets = opened.experiment, opened.data.assets
    curves = {name: metrics.read(path) for name, path in folders.items()}
    seconds, before = 0.0, 0
    for row in next(iter(curves.values())):  # Each a mean over the steps since the last.
        seconds += row.get("seconds_per_step", 0.0) * (row["step"] - before)
        before = int(row["step"])
    against = experiment.validation.against
    return report.Report(
        title=f"{experiment.name}/{experiment.exp_name}",
        config=dataclasses.asdict(experiment),
        stage_seconds={"training": seconds},
        curves=curves,
        groups=() if assets is None else assets.robot.action_groups,
        criterion=validation.TO_DATA if against == "data" else validation.TO_TEACHER,
    )


def _tell(outcome: report.Report, folder: pathlib.Path) -> None:
    written = report.write(folder, outcome)
    report.show(outcome)
    progress.console.print("Written: " + ", ".join(map(str, written)), soft_wrap=True)


def _policies(
    opened: runs.Run, task: config.ClosedLoopConfig, folders: Mapping[str, pathlib.Path]
) -> dict[str, deployed.Policy]:
    """Every policy under test, in the order of the table."""
    experiment, spec = opened.experiment, opened.spec
    last = str(experiment.num_train_steps)
    steps = {name: path / last for name, path in folders.items()}
    asked = task.num_steps or None

    def trained(name: str) -> deployed.Policy:
        return deployed.Policy.from_checkpoint(steps[name], num_steps=asked, warm_up=False)

    if spec.teacher is None or spec.layer_map is None:
        return {"teacher": trained("teacher")}
    own = policy_assets.load(steps["student"])
    whole = dataclasses.replace(
        own, model=spec.teacher, num_steps=step.TEACHER_STEPS, quantize="none"
    )
    mesh = sharding.MeshConfig().create(jax.local_devices()[:1])
    held = setup.load_teacher(experiment, opened.teacher_step, mesh)
    # As a deployed policy has them (`Policy.from_checkpoint`), so that times compare.
    teacher = jax.tree.map(lambda leaf: leaf.astype(experiment.model.dtype), held)
    cut = student.cut(spec.teacher, teacher, spec.layer_map, spec.student)
    found = {
        "teacher": deployed.Policy(whole, teacher, num_steps=asked),
        "student": trained("student"),
        "cut_only": deployed.Policy(own, cut, num_steps=asked),
    }
    return found | {name: trained(name) for name in folders if name != "student"}
