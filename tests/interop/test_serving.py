"""Our students behind openpi's own policy, server and client."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import exact_stats
import jax
import numpy as np
import parity
import pytest
import theirs
from openpi.models import gemma as openpi_gemma
from openpi.policies import policy_config
from openpi.serving import websocket_policy_server
from openpi.training import config as openpi_config
from openpi_client import websocket_client_policy

from shallow_pi.checkpoints import sizes, weights
from shallow_pi.commands import evaluate, serve_openpi
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import policy
from shallow_pi.deploy.export import export
from shallow_pi.evaluation import served
from shallow_pi.interop import openpi as interop
from shallow_pi.models import pi0

HERE = pathlib.Path(__file__).parent
SCRIPT = HERE.parents[1] / "scripts" / "serve_openpi.py"


@pytest.fixture
def make_step(tmp_path, data_home):
    """Makes a step folder of a student; its parameters are bfloat16's numbers, as openpi serves."""

    def make(robot, model, seed=0):
        generator = np.random.default_rng(seed)
        stats = {
            key: exact_stats.of(generator.standard_normal((50, dim)))
            for key, dim in (("state", robot.state_dim), ("actions", robot.action_dim))
        }
        tokens = data_home / "big_vision" / "paligemma_tokenizer.model"
        own = policy_assets.Assets(model, robot, tokens, stats, robot.name, num_steps=3)
        own.save(tmp_path / "7/assets")
        params = parity.own_params(model)
        params = theirs.in_dtype(theirs.in_dtype(params, "bfloat16"), "float32")
        weights.save_params(tmp_path / "7" / "params", params)
        return tmp_path / "7"

    return make


def _model(**changes):
    return dataclasses.replace(parity.model(False, 6, "float32"), **changes)


def _observation(robot):
    generator = np.random.default_rng(3)
    images = {
        key: generator.integers(0, 256, (48, 64, 3), np.uint8) for key in robot.cameras.values()
    }
    state = generator.uniform(0.1, 0.9, robot.state_dim).astype(np.float32)
    parts = np.split(state, [robot.state_dim - len(robot.state_more)])
    vectors = {key: part for key, part in zip(robot.state_keys, parts, strict=False) if len(part)}
    return {**images, **vectors, robot.prompt_key: "fold the towel"}


def _sent(robot, observation):
    """The same as openpi's clients for this robot send it."""
    if robot == robots.DROID:
        own = {key: value for key, value in observation.items() if key != "task"}
        return {f"observation/{key}": value for key, value in own.items()} | {
            "prompt": observation["task"]
        }
    if robot != robots.ALOHA:
        return observation
    return {
        # (3, height, width) by camera.
        "images": {
            key.rpartition(".")[2]: np.moveaxis(value, -1, 0)
            for key, value in observation.items()
            if "images" in key
        },
        "state": observation["observation.state"],
        "prompt": observation["task"],
    }


def _close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("robot", "changes"),
    [
        (robots.ALOHA, {}),
        (robots.DROID, {}),
        (dataclasses.replace(robots.ALOHA, name="mine", fps=7), {}),
        (robots.TURNTABLE, {"pi05": True, "discrete_state_input": True, "max_token_len": 60}),
    ],
    ids=["aloha", "droid", "own", "turntable-pi05"],
)
def test_openpis_policy_of_a_step_folder_acts_as_ours(robot, changes, make_step):
    step, observation = make_step(robot, _model(**changes)), _observation(robot)
    interop.register_checkpoint("student_l6", step)
    served = policy_config.create_trained_policy(openpi_config.get_config("student_l6"), step)
    own = policy.Policy.from_checkpoint(step, warm_up=False)
    noise = np.random.default_rng(5).standard_normal(own.noise_shape).astype(np.float32)
    found = served.infer(_sent(robot, observation), noise=noise)["actions"]
    _close(found, own.infer(observation, noise)["actions"])


@pytest.mark.parametrize("layout", ["openpi", "openpi-padded"])
def test_an_exported_student_acts_in_openpi_as_here(layout, make_step, tmp_path):
    """From the exported folder alone; padded, at the depth openpi's own config would have."""
    robot = robots.ALOHA
    step, observation = make_step(robot, _model()), _observation(robot)
    folder = export.export(step, layout, tmp_path / "given", any_size=True)
    interop.register_checkpoint("student_l6", folder)
    served = policy_config.create_trained_policy(openpi_config.get_config("student_l6"), folder)
    kept = sizes.of(weights.stored_params(folder))["depth"]
    assert kept == (18 if layout == "openpi-padded" else 6)
    own = policy.Policy.from_checkpoint(step, warm_up=False)
    noise = np.random.default_rng(5).standard_normal(own.noise_shape).astype(np.float32)
    found = served.infer(_sent(robot, observation), noise=noise)["actions"]
    _close(found, own.infer(observation, noise)["actions"])


def test_a_default_prompt_reaches_a_robot_that_sends_none(make_step):
    step, observation = make_step(robots.TURNTABLE, _model()), _observation(robots.TURNTABLE)
    interop.register_checkpoint("student_l6", step)
    prompt = observation.pop("task")
    named = policy_config.create_trained_policy(
        openpi_config.get_config("student_l6"), step, default_prompt=prompt
    )
    own = policy.Policy.from_checkpoint(step, warm_up=False)
    noise = np.zeros(own.noise_shape, np.float32)
    found = named.infer(observation, noise=noise)["actions"]
    _close(found, own.infer({**observation, "task": prompt}, noise)["actions"])


def test_openpis_script_serves_a_student_to_openpis_client(make_step, tmp_path, data_home):
    # A process of its own, and so with openpi's own vocabulary.
    step = make_step(robots.ALOHA, _model(vocab_size=pi0.PALIGEMMA_VOCAB_SIZE))
    observation = _observation(robots.ALOHA)
    port = _free_port()
    checkout = os.environ.get("OPENPI_DIR", HERE / "checkout")
    command = [sys.executable, HERE / "stand_ins.py", SCRIPT, f"--openpi-dir={checkout}"]
    command += [f"--port={port}", "policy:checkpoint", "--policy.config=pi0_aloha_l6"]
    with open(tmp_path / "log", "w+b") as log:
        server = subprocess.Popen([*command, f"--policy.dir={step}"], stdout=log, stderr=log)
        try:
            _wait(server, port, tmp_path / "log")
            client = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port)
            found = client.infer(_sent(robots.ALOHA, observation))["actions"]
            client._ws.close()
        finally:
            server.terminate()
            server.wait(30)
    own = policy.Policy.from_checkpoint(step, warm_up=False)
    # What openpi draws for a policy's first request.
    key = jax.random.split(jax.random.key(0))[1]
    noise = np.asarray(jax.random.normal(key, (1, *own.noise_shape)))
    _close(found, own.infer_batch([observation], noise)[0])


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def _openpi_serves(step):
    """openpi's server of its policy of a step folder, in a thread; its address."""
    interop.register_checkpoint("student_l6", step)
    policy = policy_config.create_trained_policy(openpi_config.get_config("student_l6"), step)
    port, loop = _free_port(), asyncio.new_event_loop()
    server = websocket_policy_server.WebsocketPolicyServer(policy, "127.0.0.1", port)
    running = loop.create_task(server.run())

    def run():
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(running)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        _listening(port, running.done)
        yield f"ws://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(running.cancel)
        thread.join()
        loop.close()


@pytest.mark.parametrize("robot", [robots.LIBERO, robots.ALOHA_SIM], ids=["libero", "aloha_sim"])
def test_openpis_server_answers_a_benchmark_as_our_policy_does(robot, make_step):
    step, observation = make_step(robot, _model()), _observation(robot)
    if robot.prompt:
        observation["task"] = robot.prompt
    own = policy.Policy.from_checkpoint(step, warm_up=False)
    # What openpi draws for a policy's first request.
    key = jax.random.split(jax.random.key(0))[1]
    noise = np.asarray(jax.random.normal(key, (1, *own.noise_shape)))
    with _openpi_serves(step) as url, contextlib.closing(served.Served(url, robot, 1)) as client:
        found = client.plan([observation], np.zeros((1, 2), np.int64), [None])
    _close(found[0], own.infer_batch([observation], noise)[0])


def test_evaluate_runs_a_policy_behind_openpis_server(make_step, tmp_path):
    model = _model(pi05=True, discrete_state_input=True, max_token_len=60)
    options = ("tasks=touch", "image_size=16", "max_seconds=0.5")
    common = ("--sim", "turntable", "--option", *options, "--episodes", "2", "--films", "0")
    out = tmp_path / "results"
    with _openpi_serves(make_step(robots.TURNTABLE, model)) as url:
        evaluate.main((f"openpi={url}", *common, "--processes", "1", "--output", str(out)))
    report = json.loads((out / "report.json").read_text())
    assert report["policies"]["openpi"]["episodes"] == 2
    assert report["policies"]["openpi"]["settings"]["source"] == url
    lines = (out / "episodes" / "openpi.jsonl").read_text().splitlines()
    assert [json.loads(line)["steps"] for line in lines] == [10, 10]


def _wait(server, port, log):
    _listening(port, lambda: server.poll() is not None, log.read_text)


def _listening(port, ended, told=str):
    """Return when something answers at the port; an error if it has ended before."""
    for _ in range(1200):
        assert not ended(), told()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"no server after two minutes: {told()}")


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls the script's command in this process: (exit status, what it wrote to stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["serve_openpi", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            serve_openpi.main()
        return exit_.value.code, capsys.readouterr().err

    return call


def test_where_the_script_is_missing_the_error_says_where_it_can_be_had(
    refused, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENPI_DIR", str(tmp_path))
    status, said = refused("policy:checkpoint")
    assert status == 1
    assert f"error: no scripts/serve_policy.py in {tmp_path}" in said
    assert "--openpi-dir or OPENPI_DIR" in said


def test_an_absent_step_folder_is_one_error(refused, tmp_path):
    arguments = ["policy:checkpoint", "--policy.config=pi05_libro", f"--policy.dir={tmp_path}"]
    status, said = refused(f"--openpi-dir={HERE / 'checkout'}", *arguments)
    assert status == 1
    assert "error: no shallow_pi.json in" in said
    assert "openpi's own, name its config; did you mean 'pi05_libero'?)" in said


def test_a_model_openpi_cannot_run_is_refused_with_every_reason(make_step):
    cameras = ("base_0_rgb", "left_wrist_0_rgb")
    small = _model(image_size=28, cameras=cameras, vocab_size=400, scored_tokens=2)
    with pytest.raises(ValueError, match="hard-codes") as caught:
        interop.model_config(small)
    reasons = ("image_size 28 (openpi: 224)", "cameras", "vocab_size 400 (openpi: 512)")
    for reason in (*reasons, "scored_tokens 2 (openpi: 0)"):
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 4}, "the checkpoint has 6 layers, the config 4"),
        ({"action_dim": 32}, "the checkpoint has 16 action dimensions, the config 32"),
        ({"pi05": True}, "this is a π0 checkpoint and the config says π0.5"),
    ],
)
def test_parameters_of_another_model_than_described_are_refused(make_step, change, said):
    step = make_step(robots.ALOHA, _model())
    assets = policy_assets.load(step)
    wrong = dataclasses.replace(assets.model, **change)
    shutil.copy(assets.tokenizer, step / "tokenizer")
    described = dataclasses.replace(assets, model=wrong, tokenizer=step / "tokenizer")
    described.save(step / "assets")
    with pytest.raises(ValueError, match=said):
        interop.register_checkpoint("student_l6", step)


def test_another_horizon_than_the_models_is_refused(make_step):
    step = make_step(robots.ALOHA, _model())
    own = policy.Policy.from_checkpoint(step, warm_up=False)
    with pytest.raises(ValueError, match=r"noise must have shape \(1, 6, 16\).*got \(1, 50, 16\)"):
        own.infer_batch([_observation(robots.ALOHA)], np.zeros((1, 50, 16), np.float32))


def test_missing_statistics_are_named_before_openpi_looks_for_them(make_step):
    step = make_step(robots.ALOHA, _model())
    shutil.rmtree(step / "assets" / "aloha")
    with pytest.raises(FileNotFoundError, match=r"no normalization statistics at .*aloha"):
        interop.register_checkpoint("student_l6", step)


def test_a_student_under_its_teachers_config_is_refused_before_openpi_loads_it(make_step, refused):
    step = make_step(robots.ALOHA, _model())
    arguments = ["policy:checkpoint", "--policy.config=pi0_aloha", f"--policy.dir={step}"]
    status, said = refused(f"--openpi-dir={HERE / 'checkout'}", *arguments)
    assert status == 1
    assert "another name, such as pi0_aloha_l6" in said
    # openpi's own config runs a padded student, and a teacher.
    deep = dataclasses.replace(policy_assets.load(step), model=_model(depth=18))
    shutil.copy(step / "assets" / "tokenizer.model", step / "tokenizer")
    dataclasses.replace(deep, tokenizer=step / "tokenizer").save(step / "assets")
    assert interop.runs("pi0_aloha", step)
    assert interop.runs("pi0_aloha", step.parent / "teacher")


def test_the_names_of_openpis_own_configs_stay_theirs(make_step):
    step = make_step(robots.ALOHA, _model())
    with pytest.raises(ValueError, match="'pi0_aloha' is a config of openpi's own"):
        interop.register_checkpoint("pi0_aloha", step)
    assert openpi_config.get_config("pi0_aloha").model.paligemma_variant == "gemma_2b"


def test_openpis_look_up_is_restored_after_a_student_is_made():
    theirs.shapes(parity.model(False, 2, "float32"))
    assert openpi_gemma.get_config("gemma_2b").depth == 18
