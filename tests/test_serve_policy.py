"""The command that serves a policy, the one that loads it, and what they say."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest

from shallow_pi.commands import load_test, policy_arguments, serve_policy
from shallow_pi.serving import recorder, server_config

ROOT = pathlib.Path(__file__).parents[1]
POLICY = ROOT / "assets" / "pi0_turntable"


def serve(*arguments, key=""):
    """The real command in a separate process, once it accepts connections: (process, output)."""
    process = subprocess.Popen(
        [sys.executable, "scripts/serve_policy.py", "--policy.dir", POLICY, "--port", "0"]
        + [str(argument) for argument in arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "SHALLOW_PI_API_KEY": key},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if "actions = policy.infer" in line:
            return process, "".join(said)
    raise AssertionError(f"it ended with {process.wait()}: {''.join(said)}")


@pytest.mark.filterwarnings("ignore:connect\\(\\) must be used:DeprecationWarning")
def test_a_packaged_policy_is_served_loaded_recorded_and_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openpi_client", reason="no openpi-client here")
    process, said = serve("--record", tmp_path / "kept", key="secret")
    try:
        url = re.search(r"ws://[\d.:]+", said).group()
        assert re.match(r"π0, 18 layers, for turntable: .*\non ws://127\.0\.0\.1:", said)
        assert f"page at {url.replace('ws', 'http')}/" in said
        assert "'observation.images.base', 'observation.images.wrist'" in said
        assert 'api_key="..."' in said
        # The client that it prints works as it stands.
        image = np.zeros((48, 48, 3), np.uint8)
        scope = {
            "observation": {
                "observation.images.base": image,
                "observation.images.wrist": image,
                "observation.state": np.zeros(3),
                "task": "touch the red block",
            }
        }
        example = "\n".join(line.strip() for line in said.splitlines()[3:])
        exec(example.replace('"..."', '"secret"'), scope)
        assert scope["actions"].shape == (10, 3)
        monkeypatch.setenv("SHALLOW_PI_API_KEY", "secret")
        load = ["--url", url, "--clients", "3", "--seconds", "1", "--image-size", "48"]
        load_test.main(load)
        result = json.loads(capsys.readouterr().out)
        assert result["requests"] >= 3 * result["fewest_of_a_client"] > 0
        assert 0 < result["p50_ms"] <= result["p95_ms"] <= result["p99_ms"] <= result["max_ms"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        process.stdout.close()
    counts = [len(list(recorder.read(file))) for file in (tmp_path / "kept").iterdir()]
    assert len(counts) == 4
    assert sum(counts) == 1 + result["requests"]


def test_a_server_says_which_batches_and_keys_it_was_timed_and_started_for(capsys):
    keys = {"cameras": {}, "state_keys": ["state"], "prompt_key": "task"}
    found = keys | {"action_horizon": 4, "action_dim": 2}
    serving = server_config.ServerConfig(batch=2)
    for is_guided in (False, True):
        chosen = types.SimpleNamespace(
            metadata=found,
            is_guided=is_guided,
            batch_ms={1: 1.0, 2: 1.5},
            guided_ms={1: 3.0, 2: 6.0},
            description="π0",
        )
        serve_policy._ready("ws://127.0.0.1:1", serving, chosen)
    free, guided = capsys.readouterr().out.split("π0")[1:]
    assert "several observations at once: 1 in 1.0 ms, 2 in 1.5 ms\non ws" in free
    assert "an observation has 'state', 'task'; a minimal client:" in free
    assert "several observations at once: 1 in 1.0 ms, 2 in 1.5 ms\n" in guided
    assert "several that continue a chunk: 1 in 3.0 ms, 2 in 6.0 ms\non ws" in guided
    assert "an observation has 'state', 'task', and may have 'real_time_chunking'; a" in guided


def test_a_port_in_use_is_known_before_the_policy_is_loaded(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, said = command(serve_policy, "--policy.dir", "nowhere", "--port", port)
    assert status == 1
    assert f"error: port {port} of 127.0.0.1 is in use" in said


def test_what_is_missing_is_named(command, tmp_path):
    (tmp_path / "empty").write_text("\n")
    for arguments, why in (
        (["--policy.dir", tmp_path / "absent"], "error: .*absent"),
        (["--api-key-file", tmp_path / "absent"], "error: no API key file .*absent; expected one"),
        (["--api-key-file", tmp_path / "empty"], "error: the API key file .* is empty"),
        (["--tls-cert", "a.pem"], "error: TLS needs a certificate and its key"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "error: no TLS file a.pem"),
    ):
        given = ["--policy.dir", POLICY, "--port", "0", *arguments]
        status, _, said = command(serve_policy, *given)
        assert status == 1
        assert re.search(why, said), said


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ["--batch-wait-ms", "1"],
            "--batch-wait-ms 1.0 has no effect: --batch 1 answers observations one at a",
        ),
        (
            ["--record-limit-gb", "1"],
            "--record-limit-gb 1.0 has no effect: nothing is recorded; give --record",
        ),
    ],
)
def test_a_flag_without_effect_is_told(command, arguments, why):
    status, _, said = command(serve_policy, "--policy.dir", "nowhere", *arguments)
    assert (status, f"warning: {why}" in said) == (1, True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_client_that_is_shown_connects_to_no_wildcard(host, capsys):
    config = server_config.ServerConfig(host=host, port=9)
    facts = {"cameras": {}, "state_keys": [], "prompt_key": "task"}
    facts |= {"action_horizon": 4, "action_dim": 2}
    chosen = types.SimpleNamespace(metadata=facts, description="a policy", is_guided=False)
    serve_policy._ready(config.url(9), config, chosen)
    shown = capsys.readouterr().out
    assert """WebsocketClientPolicy("<this machine's address>", 9)""" in shown


def test_the_key_comes_from_its_file_before_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("SHALLOW_PI_API_KEY", "of the variable".replace(" ", "-"))
    (tmp_path / "key").write_text("of-the-file\n")
    given = serve_policy.Arguments(policy=serve_policy.PolicyArguments(dir="nowhere"))
    assert given.create().api_key == "of-the-variable"
    given = dataclasses.replace(given, api_key_file=str(tmp_path / "key"))
    assert given.create().api_key == "of-the-file"


def test_a_load_test_sends_a_state_in_the_parts_that_the_policy_reads():
    low, high = np.arange(5.0), np.arange(5.0) + 0.5
    metadata = {"cameras": {}, "prompt_key": "task", "state_keys": ["arm", "hand"]}
    metadata |= {"state_low": low.tolist(), "state_high": high.tolist()}
    for sizes, expected in (([2, 3], 2), ([], 4)):
        given = metadata | {"state_sizes": sizes}
        found = load_test.observation(given, load_test.Arguments(), np.random.default_rng(0))
        arm, hand = found["arm"], found["hand"]
        assert (len(arm), len(hand)) == (expected, 5 - expected)
        state = np.concatenate([arm, hand])
        assert ((low <= state) & (state <= high)).all()
    # A policy that takes some values finds them at their places.
    taken = [6, 0, 1, 4, 5]
    for sizes, expected in (([2, 6], (2, 6)), ([], (6, 1))):
        given = metadata | {"state_sizes": sizes, "state_indices": taken}
        found = load_test.observation(given, load_test.Arguments(), np.random.default_rng(0))
        assert (len(found["arm"]), len(found["hand"])) == expected
        state = np.concatenate([found["arm"], found["hand"]])[taken]
        assert ((low <= state) & (state <= high)).all()


def test_a_load_test_of_nothing_says_so(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    status, said, wrong = command(load_test, "--url", f"ws://127.0.0.1:{port}", "--seconds", "1")
    assert status == 1
    assert not said
    assert f"error: no policy server at ws://127.0.0.1:{port} (" in wrong


def test_loading_and_compiling_begin_and_end_with_a_line(capsys):
    """A log without a terminal says what a server does for minutes."""
    policy_arguments.Loading().load(str(POLICY)).warm_up()
    said = capsys.readouterr().err.splitlines()
    assert [re.sub(r" in \d+\.\d s$", " in … s", line) for line in said] == [
        *("Load: 0/1", "Load: 1/1 in … s", "Compile: 0/1", "Compile: 1/1 in … s")
    ]
