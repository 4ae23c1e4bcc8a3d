"""`evaluate` compares policies on the same episodes, goes on where it was, and refuses misfits."""

import contextlib
import json
import re
import threading
import types

import exact_stats
import numpy as np
import pytest
import websockets.sync.server

from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.commands import evaluate, policy_arguments
from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import policy, robot_observation, step_folder
from shallow_pi.evaluation import served
from shallow_pi.inference import calibration
from shallow_pi.serving import protocol
from shallow_pi.sims import simulator

SMALL = ("--option", "image_size=16", "--parallel", "2", "--processes", "1", "--films", "0")


@pytest.fixture
def failing(capsys):
    """Runs the command, which must fail, and returns its error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as ending:
            evaluate.main(arguments)
        assert ending.value.code == 1
        return capsys.readouterr().err

    return call


@contextlib.contextmanager
def server(answer, metadata=None):
    """A policy server as openpi's: its metadata, then `answer(observation)` for each observation.

    An answer of None ends the connection.
    """

    def talk(connection):
        connection.send(protocol.pack(metadata or {}))
        for message in connection:
            actions = answer(protocol.unpack(message))
            if actions is None:
                return
            told = actions if isinstance(actions, dict) else {"actions": actions}
            connection.send(protocol.pack(told))

    with websockets.sync.server.serve(talk, "127.0.0.1", 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{running.socket.getsockname()[1]}"


def test_policies_meet_the_same_episodes_and_more_are_added(tmp_path, capsys):
    out = tmp_path / "results"
    asked = []

    def hold(observation):
        asked.append(observation)
        return np.tile(np.float32(observation["observation.state"]), (5, 1))

    common = ("--sim", "turntable", *SMALL, "--episodes", "1", "--output", str(out))
    evaluate.main(("expert", *common, "--films", "1"))
    report = json.loads((out / "report.json").read_text())
    assert report["policies"]["expert"]["rate"] == 1
    assert report["episodes"] == 2, "one of each task"
    assert (out / "films" / "expert-1000000.gif").stat().st_size > 1000
    lines = (out / "episodes" / "expert.jsonl").read_text()

    with server(hold) as url:
        evaluate.main((f"still={url}", *common))
    report = json.loads((out / "report.json").read_text())
    assert list(report["policies"]) == ["expert", "still"]
    assert report["policies"]["still"]["rate"] == 0
    assert report["policies"]["still"]["settings"]["source"] == url
    assert report["differences"]["still - expert"]["all tasks"]["difference"] == -1
    # Both episodes last four seconds at 20 Hz, five steps a plan.
    assert len(asked) == 2 * 16
    assert (out / "episodes" / "expert.jsonl").read_text() == lines, "not run again"
    page = (out / "report.md").read_text()
    assert "| still | 0.0 % |" in page
    assert capsys.readouterr().out.split() == [str(out)] * 2


def test_a_server_that_ends_in_mid_episode_costs_nothing_that_was_finished(tmp_path, failing):
    out, calls = tmp_path / "results", []

    def answer(observation):
        calls.append(0)
        over = len(calls) > 20 and not tmp_path.joinpath("again").exists()
        return None if over else np.tile(np.float32(observation["observation.state"]), (5, 1))

    common = ("--sim", "turntable", *SMALL, "--parallel", "1", "--episodes", "1")
    with server(answer) as url:
        command = (f"still={url}", *common, "--output", str(out))
        said = failing(*command)
        assert f"the server at {url} ended in the middle of an episode" in said
        assert "repeat the command" in said
        kept = (out / "episodes" / "still.jsonl").read_text()
        assert len(kept.splitlines()) == 1
        tmp_path.joinpath("again").touch()
        evaluate.main(command)
    assert len(calls) == 16 + 5 + 16
    assert (out / "episodes" / "still.jsonl").read_text().startswith(kept)
    assert json.loads((out / "report.json").read_text())["policies"]["still"]["episodes"] == 2


def test_a_server_that_does_not_answer_is_not_waited_for_forever(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.1)
    waits = threading.Event()
    out = ("--output", str(tmp_path / "results"))
    with server(lambda _: waits.wait(20)) as url:
        said = failing(url, "--sim", "turntable", *SMALL, "--episodes", "1", *out)
        waits.set()
    assert f"the server at {url} has not answered for 0.1 s" in said


def test_no_answer_is_waited_for_after_an_error(tmp_path, failing, monkeypatch):
    asked, ended, plans = threading.Event(), threading.Event(), []

    def silent(_):
        asked.set()
        ended.wait(20)

    def refused(policy, *_, **__):
        message = protocol.pack({})
        plans.append(policy._pool.submit(policy._ask, policy._connections[0], message))
        assert asked.wait(10)
        raise ValueError("refused")

    monkeypatch.setattr(served.Served, "plan", refused)
    out = ("--output", str(tmp_path / "new"), "--episodes", "1")
    with server(silent) as url:
        assert "refused" in failing(f"s={url}", "--sim", "turntable", *SMALL, *out)
        assert isinstance(plans[0].exception(timeout=5), ConnectionError)
        ended.set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((8, 3), np.float32), "plans 8 actions: --execute-steps and --late-ms need 9"),
        ({"action": 3}, r"expected a map with an array of actions from ws://.*, got \['action'\]"),
        ({"actions": "hello"}, "it is not a policy server"),
        (
            np.full((9, 3), np.nan, np.float32),
            "Expected finite actions from 's', got nan in plan 0",
        ),
    ],
)
def test_answers_that_are_no_plans_are_refused(answer, message, failing, tmp_path):
    late = ("--execute-steps", "5", "--late-ms", "200", "--episodes", "1")
    with server(lambda _: answer) as url:
        said = failing(f"s={url}", "--sim", "turntable", *SMALL, *late, "--output", str(tmp_path))
    assert re.search(message, said)
    assert not any(tmp_path.iterdir())


def test_an_evaluation_without_results_leaves_nothing(tmp_path, failing, monkeypatch):
    monkeypatch.setitem(simulator.GROUPS, "both", ("turntable", "tabletop"))
    out = ("--output", str(tmp_path / "evaluations" / "new"), "--episodes", "1")
    with server(lambda _: None) as url:
        for sim in ("turntable", "both"):
            assert "ended in the middle" in failing(f"s={url}", "--sim", sim, *SMALL, *out)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_something_else_or_in_use_is_left_alone(tmp_path, failing):
    common = ("expert", "--sim", "turntable", *SMALL, "--episodes", "1", "--output")
    (tmp_path / "file").write_text("important")
    assert "holds no evaluation but file" in failing(*common, str(tmp_path))
    assert "file is a file, expected a folder: move it away, or give another --output" in failing(
        *common, str(tmp_path / "file")
    )
    (tmp_path / "results").mkdir()
    with run_folder.held(tmp_path / "results"):
        assert "or give another --output" in failing(*common, str(tmp_path / "results"))
    (tmp_path / "results" / "settings.json").write_text("[]")
    assert "not hold the settings of an evaluation" in failing(*common, str(tmp_path / "results"))


def test_a_group_of_simulators_gives_one_table(tmp_path, failing, monkeypatch):
    monkeypatch.setitem(simulator.GROUPS, "both", ("turntable", "tabletop"))
    out = ("--output", str(tmp_path / "results"))
    policies = ("expert", "other=expert", "--sim", "both", "--episodes", "1", *SMALL)
    evaluate.main((*policies, *out))
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    rates = report["policies"]["other"]
    assert (rates["turntable"]["episodes"], rates["tabletop"]["episodes"]) == (2, 7)
    assert rates["average"] == (rates["turntable"]["rate"] + rates["tabletop"]["rate"]) / 2
    difference = report["differences"]["other - expert"]
    assert (difference["difference"], difference["only_a"]) == (0, 0)
    assert difference["both"] + difference["neither"] == 9
    assert (tmp_path / "results" / "tabletop" / "report.md").exists()
    assert "| expert | 100.0 % |" in (tmp_path / "results" / "report.md").read_text()
    (tmp_path / "results" / "mine").touch()
    assert "holds other things than results of turntable, tabletop: mine" in failing(
        *policies, *out
    )


def test_results_of_other_settings_are_not_mixed(tmp_path, failing):
    common = ("expert", "--sim", "turntable", "--episodes", "1", *SMALL)
    out = ("--output", str(tmp_path / "results"))
    evaluate.main((*common, *out))
    said = failing(*common, *out, "--seed", "7")
    assert "holds results of other settings: seed 1000000 (asked for: 7)" in said
    evaluate.main((*common, *out, "--seed", "7", "--overwrite"))
    assert (tmp_path / "results.old-1" / "report.json").exists()


def test_another_policy_behind_a_server_is_another_setting(tmp_path, failing):
    told = {"parameters": "a", "num_steps": 10, "depth": 18}

    def hold(observation):
        return np.tile(np.float32(observation["observation.state"]), (5, 1))

    common = ("--sim", "turntable", "--episodes", "1", *SMALL, "--output", str(tmp_path / "new"))
    with server(hold, told) as url:
        evaluate.main((f"s={url}", *common))
        settings = json.loads((tmp_path / "new" / "settings.json").read_text())["policies"]["s"]
        assert settings == {"source": url, "parameters": "a", "num_steps": 10, "execute_steps": 5}
        told["parameters"] = "b"
        said = failing(f"s={url}", *common)
    assert "results of other settings: s's parameters a (asked for: b). Give another" in said


def test_a_checkpoint_of_another_robot_is_refused_before_it_is_loaded(
    own, params, tmp_path, failing
):
    step = tmp_path / "7"
    weights.save_params(step / "params", params)
    own.save(step / "assets")
    out = ("--output", str(tmp_path / "results"), "--episodes", "1")
    said = failing(str(step), "--sim", "tabletop", *SMALL, *out)
    assert "robot 'turntable' does not fit the simulator's, 'tabletop'" in said
    assert "state dimensions 3 (the simulator's: 4)" in said
    late = ("--late-ms", "45", "--execute-steps", "4")
    evaluate.main((f"tiny={step}", "--sim", "turntable", *SMALL, *out, *late))
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    settings = report["policies"]["tiny"]["settings"]
    assert settings["late_steps"] == 1, "45 ms are one step at 20 Hz"
    assert settings["parameters"] == weights.digest(step)
    said = failing(f"tiny={step}", "--sim", "turntable", *SMALL, *out, "--execute-steps", "6")
    assert "plans 5 actions: --execute-steps 6" in said


def test_openpis_checkpoint_of_another_robot_is_refused(own, params, tmp_path, failing):
    step, four = tmp_path / "theirs", exact_stats.of(np.random.default_rng(0).random((9, 4)))
    weights.save_params(step / "params", params)
    normalize.save(step / "assets" / "org", {"state": four, "actions": four})
    flags = ("--policy.tokenizer", str(own.tokenizer), "--policy.action-horizon", "5")
    out = ("--output", str(tmp_path / "results"))
    said = failing(str(step), "--sim", "turntable", *SMALL, *flags, *out)
    assert "is a policy for a robot other than 'turntable'" in said
    assert "state of 4 dimensions, not 3; actions of 4, not 3" in said


def test_a_server_goes_on_from_a_previous_chunk_if_it_says_so(failing, tmp_path):
    common = ("--sim", "turntable", *SMALL, "--output", str(tmp_path / "results"))
    options = ("--episodes", "1", "--execute-steps", "2", "--late-ms", "50")
    asked = (*common, *options, "--executor", "real-time")
    told = []

    def answer(observation):
        told.append(observation.get("real_time_chunking"))
        return np.full((5, 3), len(told), np.float32)

    with server(answer) as url:
        said = failing(url, *asked)
    assert f"{url} does not continue a previous chunk: start it with --real-time" in said
    assert not told
    with server(answer, {"real_time_chunking": True}) as url:
        evaluate.main((url, *asked))
    assert told[0] is None
    late = [one for one in told if one is not None]
    assert late
    assert {one["delay"] for one in late} == {1}
    # What is left of one of the chunks before, each of which has a number of its own.
    for one in late:
        assert one["previous"].shape == (3, 3)
        assert np.ptp(one["previous"]) == 0


def test_what_is_left_of_a_chunk_reaches_a_server_that_takes_openpis_form():
    told = []

    def answer(observation):
        told.append(observation)
        return np.zeros((5, 7), np.float32)

    image = np.zeros((8, 8, 3), np.uint8)
    seen = {"image": image, "wrist_image": image, "state": np.zeros(8), "task": "wait"}
    with server(answer, {"real_time_chunking": True}) as url:
        plans = served.Served(url, robots.LIBERO, 2, continues=True)
        plans.plan([seen], np.zeros((1, 2), int), [None], previous=[np.ones((3, 7))], delay=2)
        plans.close()
    (found,) = told
    assert found["prompt"] == "wait"
    assert found["real_time_chunking"]["delay"] == 2
    np.testing.assert_array_equal(found["real_time_chunking"]["previous"], np.ones((3, 7)))


def test_a_server_of_another_robot_is_refused(failing, tmp_path):
    common = ("--sim", "turntable", *SMALL, "--output", str(tmp_path / "results"))
    with server(lambda _: np.zeros((5, 14), np.float32)) as url:
        said = failing(url, *common)
    assert "expected actions (horizon, 3) of robot 'turntable'" in said
    assert "got the shape (5, 14)" in said
    metadata = {"robot": "aloha", "action_dim": 14, "state_dim": 14}
    with server(lambda _: None, metadata) as url:
        said = failing("expert", url, *common)
    assert "is of robot 'aloha'" in said
    assert "action_dim 14 (the simulator's: 3)" in said
    metadata = {"action_dim": 3, "state_dim": 3, "action_indices": [2, 1, 0], "state_indices": []}
    with server(lambda _: None, metadata) as url:
        said = failing("expert", url, *common)
    assert "it has action_indices [2, 1, 0] (the simulator's: [])" in said
    assert not (tmp_path / "results" / "episodes" / "expert.jsonl").exists(), "refused before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("expert", "--sim", "turntabel"), "did you mean 'turntable'"),
        (("expert", "--sim", "turntable", "--option", "tasks=tuch"), "expected some of"),
        (("expert", "expert", "--sim", "turntable"), "several policies are called expert"),
        (("nowhere", "--sim", "turntable"), "there is no checkpoint at"),
        (
            ("expert", "ws://127.0.0.1:9", "--sim", "turntable"),
            "no policy server at ws://127.0.0.1:9",
        ),
        (("http://gpu:8000", "--sim", "turntable"), "ws://HOST:PORT (wss://HOST:PORT with TLS)"),
        (("a=gpu:8000", "--sim", "turntable"), "ws://HOST:PORT (wss://HOST:PORT with TLS)"),
        (
            ("expert", "--sim", "turntabel", "--executor", "late"),
            "late has no effect: no plan is late; give --la",
        ),
        (
            ("expert", "--sim", "turntabel", "--execute-steps", "8"),
            "--execute-steps 8 has no effect: the expert plans one action at a time",
        ),
        (
            ("e=expert", "ws://127.0.0.1:9", "--sim", "turntabel", "--policy.seed", "1"),
            "--policy.seed 1 has no effect: none of the policies is a checkpoint",
        ),
        (
            ("nowhere", "--sim", "turntabel", "--policy.seed", "1", "--policy.state-warn", "2"),
            "--policy.seed 1 has no effect: the noise depends only on episode and plan; give --se",
        ),
        (
            ("expert", "--sim", "turntable", "--late-ms", "1", "2", "3"),
            "one for each of 1 policies, got 3",
        ),
        (
            ("ws://127.0.0.1:9", "--sim", "turntable", "--late-ms", "300"),
            "give --execute-steps 6 or more, got 5",
        ),
        (
            ("expert", "--sim", "turntable", "--option", "renderer=gl", "--episodes", "1"),
            'renderer="gl" needs an OpenGL backend',
        ),
    ],
)
def test_what_cannot_be_is_said(arguments, message, failing, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    assert message in failing(*arguments, "--output", str(tmp_path / "results"))


def test_a_run_without_a_robot_is_refused_before_the_first_policy_runs(tmp_path, failing):
    step = tmp_path / "debug" / "first" / "4"
    (step / "params").mkdir(parents=True)
    (step / "params" / "_METADATA").touch()
    (step.parent / "config.json").write_text(json.dumps({"data": {"source": "synthetic"}}))
    results = tmp_path / "results"
    said = failing("expert", str(step), "--sim", "turntable", *SMALL, "--output", str(results))
    assert "4 is not a policy: its run is a trial on synthetic samples" in said
    assert not results.exists()


def test_a_step_of_a_run_is_found_once(own, tmp_path, monkeypatch):
    for number in (2, 5):
        own.save(tmp_path / str(number) / run_folder.ASSETS)
    (tmp_path / run_folder.BEST_FILE).write_text('{"step": 2, "error": 0.1}')
    loaded = types.SimpleNamespace(noise_shape=(5, 6), quantize="none", description="")
    found = []

    def load(path, *, step, **_):
        found.append(step_folder.find(path, step))
        return loaded

    monkeypatch.setattr(weights, "digest", lambda step: "")
    monkeypatch.setattr(policy.Policy, "from_checkpoint", load)
    best = policy_arguments.Loading(step="best")
    given = evaluate.Arguments((str(tmp_path),), "turntable", best)
    suite = simulator.find("turntable", {})
    assert evaluate._entrant(given, suite, str(tmp_path), 0.0).load().policy is loaded
    assert found == [tmp_path / "2"]


def test_activations_rounded_in_other_bounds_are_another_setting(own, tmp_path, monkeypatch):
    folder = tmp_path / run_folder.ASSETS
    own.save(folder)
    monkeypatch.setattr(weights, "digest", lambda step: "")
    suite, found = simulator.find("turntable", {}), {}
    for bounds in ("", "1", "2"):
        if bounds:
            (folder / calibration.FILE_NAME).write_text(bounds)
        for scheme in ("", "w8", "int8"):
            loading = policy_arguments.Loading(quantize=scheme)
            given = evaluate.Arguments((str(tmp_path),), "turntable", loading)
            entrant = evaluate._entrant(given, suite, str(tmp_path), 0.0)
            found.setdefault(scheme, []).append(entrant.settings())
    assert found[""] == found[""][:1] * 3
    assert found["w8"] == found["w8"][:1] * 3
    assert len({str(settings) for settings in found["int8"]}) == 3


@pytest.mark.parametrize("robot", [robots.LIBERO, robots.ALOHA_SIM, robots.TURNTABLE])
def test_openpis_form_of_an_observation_is_read_back(robot):
    generator = np.random.default_rng(0)
    observation = {key: generator.integers(0, 9, (6, 8, 3)) for key in robot.cameras.values()}
    observation = {key: value.astype(np.uint8) for key, value in observation.items()}
    observation[robot.state_key] = generator.standard_normal(robot.state_dim).astype(np.float32)
    if not robot.prompt:
        observation["task"] = "Transfer cube"
    sent = protocol.unpack(protocol.pack(served.openpi_form(robot, observation)))
    read = robot_observation.clean(robot, tuple(robot.cameras), sent, None)
    for key, value in observation.items():
        np.testing.assert_array_equal(read[key], value)
