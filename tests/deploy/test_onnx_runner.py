"""The runner without JAX: the policy's actions, openpi's protocol, and bad input."""

import asyncio
import dataclasses
import functools
import json
import pathlib
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import types

import jax
import numpy as np
import openpi_client.websocket_client_policy
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.data.robots import normalize, tokenizer
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import policy
from shallow_pi.deploy.export import export

pytest.importorskip("onnx", reason="onnx is an extra, absent beside openpi's pins")
pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")

ROOT = pathlib.Path(__file__).parents[2]
RUNNER = ROOT / "examples" / "onnx_runtime" / "runner.py"
runner = types.SimpleNamespace(**runpy.run_path(str(RUNNER)))


@pytest.fixture(scope="module")
def folders(own, tiny_params, tmp_path_factory):
    """Step folders of π0 and π0.5, by name."""
    # Gripper cranks, signs and delta actions are ALOHA's.
    model = dataclasses.replace(
        own.model, pi05=True, discrete_state_input=True, max_token_len=80, action_dim=14
    )
    ramp = np.linspace(0.5, 2, 14)
    stats = type(own.stats["state"])(mean=ramp, std=ramp + 1, q01=-ramp, q99=ramp)
    aloha = dataclasses.replace(
        own, model=model, robot=robots.ALOHA, stats={"state": stats, "actions": stats}
    )
    found = {}
    for name, one in (("turntable", own), ("aloha", aloha)):
        found[name] = tmp_path_factory.mktemp(name) / "2"
        params = jax.tree.map(lambda leaf: 0.4 * np.asarray(leaf), tiny_params(one.model))
        weights.save_params(found[name] / "params", params)
        one.save(found[name] / "assets")
    return found


@pytest.fixture(scope="module")
def exported(folders, tmp_path_factory):
    """Exports by name and dtype, made when first asked for; tests must not change them."""
    out = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def made(name, dtype):
        folder = out / f"{name}-{dtype}"
        return export.export(folders[name], "onnx", folder, dtype=dtype, num_steps=2)

    return made


def observation(robot, seed=0):
    generator = np.random.default_rng(seed)
    found = {
        key: generator.integers(0, 256, (20, 30, 3), np.uint8) for key in robot.cameras.values()
    }
    state = generator.uniform(0, 1, robot.state_dim).astype(np.float32)
    return found | {robot.state_key: state, robot.prompt_key: "touch the_red\nblock "}


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("turntable", "float32", 1e-4),
        pytest.param("aloha", "float32", 1e-4, marks=pytest.mark.slow),
        pytest.param("turntable", "float16", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_its_actions_are_the_policys(folders, exported, name, dtype, tolerance):
    robot = robots.ROBOTS[name]
    ours = policy.Policy.from_checkpoint(folders[name], num_steps=2, warm_up=False)
    theirs = runner.OnnxPolicy(exported(name, dtype))
    noise = np.random.default_rng(1).standard_normal(ours.noise_shape).astype(np.float32)
    for seed in range(2):
        found = observation(robot, seed)
        want = ours.infer(found, noise)["actions"]
        got = theirs.infer(found, noise)["actions"]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)
    assert np.abs(want).max() > 0.1
    assert (
        theirs.metadata.items() <= (ours.metadata | {"cameras": theirs.metadata["cameras"]}).items()
    )


@pytest.mark.parametrize(
    ("kind", "quantiles"), [("z_score", False), ("z_score", True), ("quantile", True)]
)
def test_it_keeps_noise_in_still_dimensions_from_the_model(kind, quantiles):
    mean, std = np.array([0.0, 7.0, 300.0, 0.0]), np.array([0.4, 0.0, 0.1, 0.01])
    ends = {"q01": mean - 2 * std, "q99": mean + 2 * std} if quantiles else {}
    stats = normalize.NormStats(mean, std, **ends)
    theirs = runner.OnnxPolicy.__new__(runner.OnnxPolicy)
    theirs.export = {"normalization": kind}
    theirs.stats = {"state": {name: value.tolist() for name, value in stats.items()}}
    for state in (np.array([90.0, 7.01, 400.0, 9.0]), np.array([-90.0, 6.0, 299.9])):
        want = normalize.normalize(normalize.steady(state, stats), stats, kind)
        np.testing.assert_allclose(theirs._normalize(state), want, rtol=1e-6)


def test_it_draws_the_same_noise_after_a_reset(exported):
    theirs = runner.OnnxPolicy(exported("turntable", "float32"))
    found = observation(robots.TURNTABLE)
    first = theirs.infer(found)["actions"]
    assert np.abs(theirs.infer(found)["actions"] - first).max() > 1e-3
    theirs.reset()
    np.testing.assert_array_equal(theirs.infer(found)["actions"], first)


# openpi's client calls websockets the old way.
@pytest.mark.filterwarnings(r"ignore:connect\(\) must be used as a context manager")
def test_openpis_client_drives_it(exported):
    served = runner.OnnxPolicy(exported("turntable", "float32"))
    loop, stop, port, started = asyncio.new_event_loop(), asyncio.Event(), [], threading.Event()

    def ready(number):
        port.append(number)
        started.set()

    def run():
        loop.run_until_complete(runner.serve(served, "127.0.0.1", 0, stop, ready))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(20)
        client = openpi_client.websocket_client_policy.WebsocketClientPolicy("127.0.0.1", port[0])
        assert client.get_server_metadata()["robot"] == "turntable"
        found = observation(robots.TURNTABLE)
        answer = client.infer(found)
        served.reset()
        np.testing.assert_array_equal(answer["actions"], served.infer(found)["actions"])
        with pytest.raises(RuntimeError, match=r"lacks 'observation\.state'"):
            client.infer({k: v for k, v in found.items() if k != "observation.state"})
        client._ws.close()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()


def test_another_robots_observation_is_refused(exported):
    theirs = runner.OnnxPolicy(exported("turntable", "float32"))
    with pytest.raises(ValueError, match=r"lacks 'observation.images.base', 'observation.images.w"):
        theirs.infer(observation(robots.ALOHA))
    found = observation(robots.TURNTABLE) | {"observation.state": np.zeros(14, np.float32)}
    # The second is a batch of one, whose length is no number of dimensions.
    for shape in ((14,), (1, 3)):
        said = f"must have 3 dimensions for robot turntable, got the shape {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=said):
            theirs.infer(found | {"observation.state": np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match="not finite"):
        theirs.infer(found | {"observation.state": np.full(3, np.nan, np.float32)})
    with pytest.raises(ValueError, match="must be one RGB image"):
        theirs.infer(observation(robots.TURNTABLE) | {"observation.images.base": np.zeros((4, 4))})


def test_a_prompt_that_stands_for_none_is_refused(exported):
    """As the policy does, and not asked with as if "None" were an instruction."""
    theirs = runner.OnnxPolicy(exported("turntable", "float32"))
    found = observation(robots.TURNTABLE)
    for text in sorted(tokenizer._ABSENT):
        with pytest.raises(ValueError, match=f"'task' is '{text}', which is no instruction: send"):
            theirs.infer(found | {"task": text})
    with pytest.raises(ValueError, match="lacks 'task', which robot turntable sends"):
        theirs.infer(found | {"task": None})
    with pytest.raises(ValueError, match="'task' must be the instruction as a str, got int"):
        theirs.infer(found | {"task": 3})
    noise = np.zeros((theirs.export["action_horizon"], theirs.export["action_dim"]), np.float32)
    expected = theirs.infer(found, noise)["actions"]
    theirs.prompt = found["task"]
    for text in ("None", None):
        np.testing.assert_array_equal(
            theirs.infer(found | {"task": text}, noise)["actions"], expected
        )


def test_a_state_in_parts_of_other_sizes_is_refused(exported):
    theirs = runner.OnnxPolicy(exported("turntable", "float32"))
    theirs.robot = {**theirs.robot, "state_more": ["height"], "state_sizes": [2, 1]}
    found = observation(robots.TURNTABLE) | {"observation.state": np.zeros(2), "height": 0.1}
    assert theirs.infer(found)["actions"].shape[1] == 3
    found |= {"observation.state": np.zeros(1), "height": np.zeros(2)}
    with pytest.raises(ValueError, match=r"must have 2 \+ 1 dimensions for .*, got 1 \+ 2"):
        theirs.infer(found)


def test_a_state_takes_its_places_of_a_longer_column(exported):
    theirs = runner.OnnxPolicy(exported("turntable", "float32"))
    found = observation(robots.TURNTABLE)
    noise = np.zeros((theirs.export["action_horizon"], theirs.export["action_dim"]), np.float32)
    expected = theirs.infer(found, noise)["actions"]
    theirs.robot = {**theirs.robot, "state_indices": [4, 0, 2], "state_sizes": [5]}
    column = np.full(5, np.nan, np.float32)
    column[[4, 0, 2]] = found["observation.state"]
    wide = found | {"observation.state": column}
    np.testing.assert_array_equal(theirs.infer(wide, noise)["actions"], expected)
    assert theirs.metadata["state_indices"] == [4, 0, 2]
    theirs.robot["state_sizes"] = []
    with pytest.raises(ValueError, match=r"takes some from \(up to place 4\), got 3"):
        theirs.infer(found)


def test_a_prompt_that_does_not_fit_is_cut_with_a_warning(exported):
    theirs = runner.OnnxPolicy(exported("turntable", "float32"))
    found = observation(robots.TURNTABLE) | {"task": 9 * "touch the red block "}
    with pytest.warns(UserWarning, match=r"the prompt has \d+ tokens, \d+ fit"):
        theirs.infer(found)


def test_what_is_mistyped_is_one_error(exported, monkeypatch):
    """Not another provider than the one asked for, nor a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--providers", "CUDAExecutionProvidr"], "no CUDAExecutionProvidr here, only .*CPU"),
            (["--port", port], "address already in use"),
            (["--port", "99999"], "port must be 0-65535"),
        ):
            folder = str(exported("turntable", "float32"))
            monkeypatch.setattr(sys, "argv", ["runner.py", folder, *arguments])
            with pytest.raises(SystemExit, match=f"^error: .*{message}"):
                runner.main()


def test_a_copy_that_was_cut_short_is_refused(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported("turntable", "float32"), folder)
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:-4096])
    with pytest.raises(ValueError, match=r"weights\.bin has .* the copy is not whole"):
        runner.OnnxPolicy(folder)
    with pytest.raises(FileNotFoundError, match=r"no .*onnx\.json"):
        runner.OnnxPolicy(tmp_path)


def test_transforms_of_openpis_own_are_refused(exported, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported("turntable", "float32"), folder)
    path = folder / "assets" / "shallow_pi.json"
    content = json.loads(path.read_text())
    content["robot_fields"]["elsewhere"] = "pi0_mine"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="are code of openpi's config pi0_mine"):
        runner.OnnxPolicy(folder)


def test_it_imports_neither_jax_nor_this_package(exported):
    code = (
        "import sys, json, runpy; m = runpy.run_path(sys.argv[1]); m['OnnxPolicy'](sys.argv[2]);"
        "print(json.dumps([n for n in ('jax', 'flax', 'shallow_pi') if n in sys.modules]))"
    )
    command = [sys.executable, "-c", code, str(RUNNER), str(exported("turntable", "float32"))]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []
