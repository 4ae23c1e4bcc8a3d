"""Configs of real robots run and serve with small data and a small teacher, otherwise unchanged.

One of each kind: π0 on differences and three cameras (ALOHA); on absolute actions, one camera and a
fixed prompt (ALOHA simulated); π0.5 without the state in its prompt (LIBERO), which is interrupted
too; with it (DROID). The others repeat these in parts, and `test_configs.py` traces their steps.

Each is started with the real command on a LeRobot dataset in its robot's keys and a random 18-layer
teacher of tiny widths in openpi's layout. What is overridden is where these lie, and what no test
can keep: the numbers of steps and samples, and the intervals. Model sizes come from the checkpoint.
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.commands import train_distill
from shallow_pi.data import sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import normalize, tokenizer
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import policy
from shallow_pi.training import command_line, metrics

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "train_configs"
PROMPTS = ("pick up the red cup", "open the top drawer", "Transfer cube")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def command(monkeypatch):
    """Calls the command in this process."""
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_distill", *map(str, arguments)])
        train_distill.main()

    return call


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer of the prompts."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    tokenizer.train(PROMPTS, path, vocab_size=320)
    return path


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Makes three short episodes in a robot's own keys, sizes and frame rate."""

    def make(robot):
        generator = np.random.default_rng(0)
        folder = tmp_path_factory.mktemp(robot.name) / "dataset"
        first = robot.state_dim - len(robot.state_more)
        with lerobot_writer.Writer(folder, robot.fps, robot_type=robot.name) as writer:
            for episode, length in enumerate((7, 6, 8)):
                shape = (length, 24, 32, 3)
                images = {
                    key: generator.integers(0, 256, shape, np.uint8)
                    for key in robot.cameras.values()
                }
                # Between a gripper's ends, which ALOHA's conversion takes for granted.
                state = generator.uniform(0.1, 0.9, (length, robot.state_dim)).astype(np.float32)
                action = generator.uniform(0.1, 0.9, (length, robot.action_dim)).astype(np.float32)
                parts = np.split(state, range(first, robot.state_dim), axis=1)
                vectors = dict(zip(robot.state_keys, parts, strict=True))
                vectors[robot.action_key] = action
                writer.add(images, vectors, [PROMPTS[episode]] * length)
        return folder

    return make


@pytest.fixture(scope="module")
def publish(tmp_path_factory, tiny_config, tiny_params):
    """Makes a teacher as openpi publishes them: 18 layers, "value" keys, padded statistics."""

    def make(experiment, dataset):
        model = experiment.model
        small = tiny_config(
            pi05=model.pi05,
            depth=model.depth,
            action_dim=model.action_dim,
            vocab_size=320,
        )
        step = tmp_path_factory.mktemp("teacher") / "29999"
        tree = jax.tree.map(lambda leaf: {"value": np.asarray(leaf)}, tiny_params(small))
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(step / "params", {"params": tree})
        robot = robots.find(experiment.data.robot)
        stats = sources.norm_stats([reader.Dataset(dataset)], robot, model.action_horizon)
        padded = {
            key: normalize.NormStats(
                *(
                    np.pad(values, (0, model.action_dim - len(values)))
                    for values in (own.mean, own.std, own.q01, own.q99)
                )
            )
            for key, own in stats.items()
        }
        normalize.save(step / "assets" / experiment.data.asset_id, padded)
        return step, small

    return make


def _steps(folder):
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())


def _saved(step):
    """Everything a step folder holds: parameters, moments, averages and the data position."""
    arrays = {}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("params", "train_state"):
        shapes = weights.stored_shapes(step / item)
        args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=one), shapes)
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(step / item, restore_args=args)
        arrays |= {f"{item}/{path}": np.asarray(x) for path, x in weights.leaves(tree).items()}
    return arrays, json.loads((step / "data" / "metadata").read_text())


def _rows(folder):
    """The logged rows, without timings."""
    clock = ("seconds_per_step", "data_wait", "checkpoint_stall")
    return [{k: v for k, v in row.items() if k not in clock} for row in metrics.read(folder)]


@pytest.fixture
def start(command, record, publish, words, tmp_path):
    """Runs a config to a step, in a separate folder; returns the run's folder and its parts."""

    def call(name, *arguments):
        experiment = command_line.load(CONFIGS, name)
        dataset = record(robots.find(experiment.data.robot))
        teacher, small = publish(experiment, dataset)
        run = (
            *(name, "--teacher.path", teacher, "--data.path", dataset, "--data.tokenizer", words),
            *("--batch-size", 8, "--log-interval", 1, "--save-interval", 2, "--keep", 2),
            *("--validation.samples", 8, "--validation.num-steps", 2, *arguments),
        )
        command(*run, "--checkpoint-dir", tmp_path / "whole")
        return run, tmp_path / "whole" / name / "first", dataset, small

    return call


def _assert_serves(experiment, step, dataset, small):
    """A step folder is the shallow policy of that robot, at the teacher's widths."""
    trained = policy.Policy.from_checkpoint(step, num_steps=2, warm_up=False)
    model, robot = trained.assets.model, robots.find(experiment.data.robot)
    assert (model.depth, model.pi05) == (experiment.student.depth, experiment.model.pi05)
    assert (model.backbone, model.image) == (small.backbone, small.image)
    assert model.action_horizon == experiment.model.action_horizon
    observation = reader.Dataset(dataset)[3]
    del observation[robot.action_key]
    noise = np.random.default_rng(0).standard_normal((1, *trained.noise_shape), np.float32)
    actions = trained.infer_batch([observation], noise)
    assert actions.shape == (1, model.action_horizon, robot.action_dim)
    assert np.isfinite(actions).all()


@pytest.mark.parametrize("name", ["pi0_aloha_l6", "pi0_aloha_sim_l6", "pi05_droid_l6"])
def test_a_config_runs_and_serves(start, name):
    _, whole, dataset, small = start(name, "--num-train-steps", 2)
    assert [row["step"] for row in _rows(whole)] == [0, 1, 2]
    _assert_serves(command_line.load(CONFIGS, name), whole / "2", dataset, small)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(start, command, tmp_path):
    name = "pi05_libero_l6"
    run, whole, dataset, small = start(name, "--num-train-steps", 4)
    assert _steps(whole) == [2, 4]
    resolved = json.loads((whole / "config.json").read_text())
    assert tuple(resolved["layer_map"]) == (0, 3, 7, 10, 14, 17)
    assert resolved["model"]["backbone"]["width"] == small.backbone.width
    # The same run, as it was when step 2 was its last.
    again = tmp_path / "again" / name / "first"
    shutil.copytree(whole, again, symlinks=True)
    shutil.rmtree(again / "4")
    command(*run, "--checkpoint-dir", tmp_path / "again", "--resume")
    (arrays, position), (expected, expected_position) = _saved(again / "4"), _saved(whole / "4")
    assert sorted(arrays) == sorted(expected)
    assert any(path.startswith("train_state/opt_state/") for path in arrays)
    for path, array in expected.items():
        assert array.tobytes() == arrays[path].tobytes(), path
    assert position == expected_position
    assert _rows(again) == _rows(whole)
    assert [row["step"] for row in _rows(whole)] == [0, 1, 2, 3, 4]
    before, _ = _saved(whole / "2")
    kernel = "params/params/action_out_proj/kernel"
    assert np.any(before[kernel] != expected[kernel]), "steps 3 and 4 change something"
    _assert_serves(command_line.load(CONFIGS, name), again / "4", dataset, small)
