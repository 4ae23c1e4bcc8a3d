"""Any openpi client drives a policy, and nothing it sends ends the server."""

import contextlib
import socket
import sys
import time
import types

import jax
import msgpack
import numpy as np
import pytest
import serving
import websockets.exceptions

from shallow_pi.deploy import policy
from shallow_pi.serving import protocol, recorder

with pytest.MonkeyPatch.context() as patch:
    # Of this package, which has to be compiled, openpi's broker uses one function.
    if "tree" not in sys.modules:
        patch.setitem(sys.modules, "tree", types.SimpleNamespace(map_structure=jax.tree.map))
    from openpi_client import action_chunk_broker

pytestmark = pytest.mark.filterwarnings(serving.OPENPI_WARNS)


@pytest.fixture(scope="module")
def tiny(own, params):
    return policy.Policy(own, params, num_steps=2)


@pytest.fixture(scope="module")
def served(tiny):
    with serving.running(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def echo():
    with serving.running(serving.Echo()) as running:
        yield running


@pytest.fixture
def observation():
    generator = np.random.default_rng(0)
    return {
        "observation.images.base": generator.integers(0, 256, (24, 24, 3), np.uint8),
        "observation.images.wrist": generator.integers(0, 256, (24, 24, 3), np.uint8),
        "observation.state": generator.standard_normal(3).astype(np.float32),
        "task": "touch the red block",
    }


def test_openpis_client_gets_the_policys_metadata(tiny, served):
    assert serving.openpi(served).get_server_metadata() == tiny.metadata


def test_openpis_client_gets_the_policys_own_actions(tiny, served, observation):
    client = serving.openpi(served)
    first, second = (client.infer(observation)["actions"] for _ in range(2))
    tiny.reset()
    np.testing.assert_array_equal(first, tiny.infer(observation)["actions"])
    np.testing.assert_array_equal(second, tiny.infer(observation)["actions"])
    assert first.dtype == np.float32
    assert first.shape == (5, 3)


def test_openpis_broker_walks_through_the_chunk(served, observation):
    broker = action_chunk_broker.ActionChunkBroker(serving.openpi(served), action_horizon=5)
    walked = [broker.infer(observation)["actions"] for _ in range(6)]
    chunk = serving.openpi(served).infer(observation)["actions"]
    assert chunk.shape == (5, 3)
    assert all(step.shape == (3,) for step in walked)
    assert np.abs(walked[5] - walked[0]).max() > 0  # Of a new chunk.


def test_timings_come_as_from_openpis_server(served, observation):
    client = serving.openpi(served)
    first, second = client.infer(observation), client.infer(observation)
    assert first["policy_timing"]["infer_ms"] > 0
    assert first["server_timing"].keys() == {"infer_ms", "queue_ms"}
    assert second["server_timing"].keys() == {"infer_ms", "queue_ms", "prev_total_ms"}
    assert first["server_timing"]["infer_ms"] <= second["server_timing"]["prev_total_ms"]


def test_a_client_of_msgpack_numpy_is_answered_in_its_own_packing(echo):
    with echo.connect() as connection:
        connection.recv()
        connection.send(protocol.pack(serving.STATE, "msgpack-numpy"))
        found, packing = protocol.read(connection.recv())
    assert packing == "msgpack-numpy"
    np.testing.assert_array_equal(found["actions"], [[1, 2]] * 4)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"observation.images.wrist": None}, "lacks camera 'observation.images.wrist'"),
        ({"observation.state": None}, "lacks state 'observation.state'"),
        ({"task": None}, "lacks prompt 'task'"),
        ({"task": 5}, "'task' must be the instruction as a str, got int"),
        ({"observation.images.base": np.ones((24, 24, 3), np.int64)}, "must be uint8"),
        ({"observation.images.base": np.zeros((24, 24), np.uint8)}, "must be one RGB image"),
        ({"observation.state": np.zeros(4, np.float32)}, "must have 3 dimensions"),
        ({"observation.state": np.float32([0, np.nan, 0])}, "is not finite"),
        ({"observation.state": np.array(["a", "b", "c"])}, "must be a vector of numbers"),
        ({"observation.state": np.float32([0, 1e30, 0])}, r"dimension 1 is 1e\+30 .trained on"),
    ],
)
def test_a_bad_observation_is_refused_with_the_reason_alone(served, observation, changes, why):
    before = served.metric('shallow_pi_errors_total{kind="observation"}')
    bad = {k: v for k, v in (observation | changes).items() if v is not None}
    client = serving.openpi(served)
    with pytest.raises(RuntimeError, match=f"Error in inference server:\n.*{why}") as raised:
        client.infer(bad)
    assert "Traceback" not in str(raised.value)
    with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
        client.infer(observation)
    assert closed.value.rcvd.code == 1011
    assert serving.openpi(served).infer(observation)["actions"].shape == (5, 3)
    assert served.metric('shallow_pi_errors_total{kind="observation"}') == before + 1


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "not a readable msgpack message"),
        (np.random.default_rng(1).bytes(500), "not a readable msgpack message"),
        (protocol.pack(serving.STATE)[:-3], "incomplete input"),
        (b"\xdd\xff\xff\xff\xff" + bytes(20), "not a readable msgpack message"),
        (msgpack.packb([1, 2]), "expected an observation, which is a map, got a list"),
        (msgpack.packb({b"__ndarray__": True, b"dtype": "|O"}), "dtype '|O' is refused"),
        ("an observation", "expected an observation in a binary frame, got text"),
    ],
)
def test_a_malformed_frame_is_refused_and_the_server_continues(echo, message, why):
    with echo.connect() as connection:
        connection.recv()
        connection.send(message)
        text, code = serving.refusal(connection)
    assert why in text
    assert code == 1011
    assert serving.openpi(echo).infer(serving.STATE)["actions"].shape == (4, 2)


def test_no_random_frame_ends_the_server(echo):
    generator = np.random.default_rng(0)
    for n in range(30):
        with echo.connect() as connection:
            connection.recv()
            connection.send(generator.bytes(2 * n + 1))
            assert serving.refusal(connection)[1] == 1011
    assert serving.openpi(echo).infer(serving.STATE)["actions"].shape == (4, 2)


def test_bytes_that_are_no_websocket_do_not_end_the_server(echo, caplog):
    host, port = echo.url.removeprefix("ws://").split(":")
    for said in (b"\x16\x03\x01\x02", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n", bytes(200)):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(said)
    assert echo.get("/healthz")[:2] == (200, "OK\n")
    assert not caplog.records


def test_an_observation_that_is_too_large_is_closed_with_1009():
    with serving.running(serving.Echo(), max_request_mb=1) as running, running.connect() as raw:
        raw.recv()
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            serving.ask(raw, {"state": np.zeros(2**19, np.float32)})
        assert serving.close_code(raw) == 1009
        running.wait_for('shallow_pi_errors_total{kind="too_large"}', 1)
        assert serving.openpi(running).infer(serving.STATE)["actions"].shape == (4, 2)


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (KeyError("of the policy's own"), "of the policy's own"),
        ({}, "KeyError: 'actions'"),
        ({"actions": np.zeros((4, 2)), "timing": {"infer_ms": object()}}, "cannot send a object"),
    ],
)
def test_a_failing_policy_sends_its_traceback(caplog, result, why):
    class Broken(serving.Echo):
        def infer(self, observation):
            if isinstance(result, Exception):
                raise result
            return result

    with serving.running(Broken()) as running:
        for _ in range(2):
            with running.connect() as raw:
                raw.recv()
                serving.ask(raw, serving.STATE)
                text, code = serving.refusal(raw)
            assert code == 1011
            assert text.startswith("Traceback")
            assert why in text
    assert "could not be answered" in caplog.text


def test_actions_that_are_not_finite_are_never_sent():
    with serving.running(serving.Echo()) as running:
        with pytest.raises(RuntimeError, match="not finite; none are sent"):
            serving.openpi(running).infer({"state": np.float32([0, np.inf])})
        assert running.metric('shallow_pi_errors_total{kind="internal"}') == 1


def test_a_state_far_from_training_is_answered_with_a_warning(served, observation):
    client = serving.openpi(served)
    assert "warnings" not in client.infer(observation)
    before = served.metric("shallow_pi_warnings_total")
    (warning,) = client.infer({**observation, "observation.state": np.float32([60, 0, 0])})[
        "warnings"
    ]
    assert "'observation.state' is far from the training data: dimension 0 is 60" in warning
    served.wait_for("shallow_pi_warnings_total", before + 1)


def test_openpis_broker_passes_a_warning_on(served, observation):
    far = {**observation, "observation.state": np.float32([60, 0, 0])}
    broker = action_chunk_broker.ActionChunkBroker(serving.openpi(served), action_horizon=5)
    for _ in range(2):
        found = broker.infer(far)
        assert found["actions"].shape == (3,)
        assert "far from the training data" in found["warnings"][0]


def test_a_refusal_that_names_what_was_sent_is_short(served):
    with served.connect() as robot:
        robot.recv(timeout=10)
        serving.ask(robot, {f"{number} {'x' * 10_000}": 1 for number in range(100)})
        text, code = serving.refusal(robot)
    assert code == 1011
    assert text.startswith("the observation lacks camera")
    assert len(text) < 5000


def test_messages_are_recorded_unchanged(served, tiny, observation, tmp_path):
    record = recorder.Recorder(tmp_path, tiny.metadata)
    with serving.running(tiny, record=record) as running:
        clients = [serving.openpi(running) for _ in range(2)]
        for client in clients:
            answers = [client.infer(observation) for _ in range(3)]
    record.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    for file in files:
        records = list(recorder.read(file))
        assert len(records) == 3
        np.testing.assert_equal(records[0].observation, observation)
    np.testing.assert_equal([found.answer for found in records], answers)


def test_a_record_has_the_time_its_observation_arrived(tmp_path):
    record = recorder.Recorder(tmp_path, {})
    with serving.running(serving.Echo(seconds=1.0), record=record) as running:
        client, sent = serving.openpi(running), time.time()
        client.infer(serving.STATE)
    record.close()
    (found,) = recorder.read(next(tmp_path.iterdir()))
    assert found.time - sent < 0.8
