"""Every experiment loads, fits together, and evaluates abstractly at its full size."""

import ast
import dataclasses
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.data.robots import robot as robots
from shallow_pi.distill import step, student
from shallow_pi.evaluation import study
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.parallel import shapes, sharding
from shallow_pi.sims import simulator
from shallow_pi.training import command_line, setup

CONFIGS = pathlib.Path(__file__).parents[1] / "train_configs"
NAMES = sorted(command_line.names(CONFIGS))


@pytest.fixture(params=NAMES)
def experiment(request):
    return command_line.load(CONFIGS, request.param)


def test_the_experiments_of_the_first_release_are_there():
    assert {"debug", "pi0_turntable_l6", "pi05_turntable_l6", "pi0_aloha_l6"} <= set(NAMES)


def test_a_name_says_teacher_task_and_depth(experiment):
    if experiment.name == "debug":
        return
    pattern = r"(pi0|pi05)_([a-z0-9_]+?)(_l(\d+)(?:_fast)?)?"
    kind, task, _, depth = re.fullmatch(pattern, experiment.name).groups()
    assert kind == ("pi05" if experiment.model.pi05 else "pi0")
    # π0's LIBERO policies were trained on differences, which is a robot of its own.
    task = task.removesuffix("_last").removesuffix("_mt10").removesuffix("_around")
    assert experiment.data.robot in (task, f"{task}_delta")
    assert (experiment.teacher is None) == (depth is None)
    if depth is not None:
        layers = experiment.student_model.layers
        assert sum(kind.expert == "whole" for kind in layers) == int(depth)


def test_a_docstring_says_what_it_is_and_how_to_run_it(experiment):
    text = (CONFIGS / f"{experiment.name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(text))
    first = docstring.splitlines()[0]
    assert first.endswith("."), "the line that --help lists is a sentence"
    script = "train_teacher" if experiment.teacher is None else "train_distill"
    assert f"uv run scripts/{script}.py {experiment.name}" in docstring


def test_the_state_evaluates_abstractly(experiment):
    mesh = sharding.MeshConfig().create()
    state = shapes.abstract_state(setup.make_spec(experiment), mesh)
    weights.check_tree(pi0.abstract_params(experiment.student_model), state.params, "state")
    for path, leaf in weights.leaves(state).items():
        assert leaf.dtype == (jnp.int32 if path.endswith(("step", "count")) else jnp.float32), path
        assert leaf.sharding.mesh == mesh
    assert (state.ema_params is None) == (experiment.ema_decay == 0)


@pytest.mark.slow
def test_a_step_evaluates_abstractly(experiment):
    """Traced, not compiled: teacher, student, losses and optimizer fit together."""
    spec = setup.make_spec(experiment)
    state = shapes.abstract_state(spec, sharding.MeshConfig().create())
    teacher = None
    if experiment.teacher is not None:
        teacher = pi0.abstract_params(experiment.model)
        layers = experiment.fixed_layer_map()
        cut = jax.eval_shape(
            lambda params: student.cut(experiment.model, params, layers, spec.student), teacher
        )
        assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, state.params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = batches.spec(experiment.model, experiment.batch_size)
    after, metrics = jax.eval_shape(
        functools.partial(step.distill_step, spec), teacher, state, key, batch
    )
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert {value.shape for value in metrics.values()} == {()}
    assert ("velocity_loss" in metrics) == (experiment.teacher is not None)


def test_robot_and_task_fit_the_model(experiment):
    model, robot = experiment.model, robots.find(experiment.data.robot)
    assert set(model.cameras) & set(robot.cameras)
    assert max(robot.state_dim, robot.action_dim) <= model.action_dim
    task = experiment.closed_loop
    if task is not None:
        if task.sim.startswith("metaworld"):
            pytest.importorskip("metaworld", reason="needs the extra metaworld")
        suite, _ = study.find_suites(task)
        assert task.execute_steps <= model.action_horizon
        simulator.check_robot(suite, robot)
        assert suite.image_size == model.image_size


def test_the_schedule_ends_with_the_run(experiment):
    assert experiment.schedule.decay_steps == experiment.num_train_steps
    assert experiment.num_train_steps >= experiment.save_interval


def test_a_student_is_trained_from_a_teacher_that_its_config_makes(experiment):
    if experiment.teacher is None or not experiment.teacher.config:
        return
    own = command_line.load(CONFIGS, experiment.teacher.config)
    assert own.teacher is None
    assert own.model == experiment.model
    assert dataclasses.replace(own.data, cache=experiment.data.cache) == experiment.data
    assert pathlib.Path(experiment.teacher.path).name == own.name
    assert own.closed_loop.seed != experiment.closed_loop.seed, "other demonstrations"
    assert own.closed_loop.eval_seed == experiment.closed_loop.eval_seed, "the same episodes"


def test_real_robots_hold_episodes_out_for_validation(experiment):
    """A simulated task is measured in closed loop instead."""
    is_real = experiment.closed_loop is None and experiment.data.source == "lerobot"
    assert experiment.data.held_out == (0.02 if is_real else 0)


def test_pi0_aloha_is_openpis_pi0_at_full_size():
    experiment = command_line.load(CONFIGS, "pi0_aloha_l6")
    assert experiment.fixed_layer_map().layers == (0, 3, 7, 10, 14, 17)
    assert experiment.teacher.path == "gs://openpi-assets/checkpoints/pi0_base"
    assert experiment.batch_size == 64

    def count(model):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(pi0.abstract_params(model)))

    assert count(experiment.model) == 3_238_048_528
    assert count(experiment.student_model) == 1_709_150_992


def test_pi0_aloha_is_split_over_eight_devices():
    """Student, moments and teacher: an eighth a device, but for what is too small to matter."""
    experiment = command_line.load(CONFIGS, "pi0_aloha_l6")
    mesh = sharding.MeshConfig(fsdp=8).create()
    state = shapes.abstract_state(setup.make_spec(experiment), mesh)
    teacher = pi0.abstract_params(experiment.model)
    teacher_sharding = weights.leaves(sharding.param_sharding(mesh, teacher))
    pairs = [(leaf.shape, leaf.sharding) for leaf in jax.tree.leaves(state)]
    pairs += [(leaf.shape, teacher_sharding[p]) for p, leaf in weights.leaves(teacher).items()]
    whole = sum(math.prod(shape) for shape, _ in pairs)
    each = sum(math.prod(where.shard_shape(shape)) for shape, where in pairs)
    assert whole == 3 * 1_709_150_992 + 3_238_048_528 + 3
    assert whole / 8 <= each < 1.01 * whole / 8
