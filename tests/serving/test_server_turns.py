"""Clients take turns, and none of them, nor the end, costs another its answer."""

import concurrent.futures
import contextlib
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import serving
import websockets.exceptions
import websockets.sync.client

from shallow_pi.serving import protocol

HERE = pathlib.Path(__file__).parent

pytestmark = pytest.mark.filterwarnings(serving.OPENPI_WARNS)


class Thinking(serving.Echo):
    """Answers nothing before it is let go."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def infer(self, observation):
        self.go.wait(30)
        return super().infer(observation)


def test_clients_at_once_get_their_own_answers():
    def drive(number):
        client = serving.openpi(running)
        states = np.random.default_rng(number).standard_normal((25, 2)).astype(np.float32)
        for state in states:
            answer = client.infer({"state": state})["actions"]
            np.testing.assert_array_equal(answer, np.tile(state, (4, 1)))

    echo = serving.Echo()
    with serving.running(echo) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(drive, range(8)))
        running.wait_for("shallow_pi_requests_total", 200)
    assert len(echo.threads) == 1
    assert threading.get_ident() not in echo.threads


def test_a_client_that_sends_ahead_does_not_overtake():
    echo = serving.Echo(0.02)
    with (
        serving.running(echo) as running,
        running.connect() as greedy,
        running.connect() as polite,
    ):
        greedy.recv(), polite.recv()
        for _ in range(10):
            serving.ask(greedy, {"state": np.float32([1, 0])})
        for _ in range(4):
            serving.ask(polite, {"state": np.float32([2, 0])})
            polite.recv()
    who = [state[0] for state in echo.asked]
    last = max(place for place, number in enumerate(who) if number == 2)
    assert who[: last + 1].count(1) <= 6


def test_a_client_that_sends_ahead_is_not_kept_in_memory():
    """Data that the server has not read yet stays with the client, which has to wait."""
    sent, policy = [], Thinking()

    def send_all(raw):
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            for number in range(60):
                serving.ask(raw, {"state": np.zeros(2**19, np.float32)})
                sent.append(number)

    with serving.running(policy) as running:
        raw = running.connect(close_timeout=0.1)
        raw.recv()
        sender = threading.Thread(target=send_all, args=(raw,))
        sender.start()
        # Until nothing more is taken for half a second.
        count = -1
        while count < len(sent):
            count = len(sent)
            time.sleep(0.5)
        # Closing properly would wait for the sender.
        raw.socket.shutdown(socket.SHUT_RDWR)
        sender.join(10)
        policy.go.set()
    assert count < 30


def test_a_full_queue_is_said_and_closed_with_1013():
    with (
        serving.running(serving.Echo(0.6), max_waiting=1) as running,
        contextlib.ExitStack() as all_,
    ):
        first, second, third = (all_.enter_context(running.connect()) for _ in range(3))
        for number, raw in enumerate((first, second, third)):
            raw.recv()
            serving.ask(raw, {"state": np.float32([number, 0])})
            time.sleep(0.1)
        assert running.metric("shallow_pi_queue_length") == 1
        text, code = serving.refusal(third)
        assert text.startswith("busy: 1 observations wait already")
        assert code == 1013
        for number, raw in enumerate((first, second)):
            assert protocol.unpack(raw.recv(timeout=10))["actions"][0, 0] == number


def test_a_client_that_vanishes_is_quiet_and_costs_no_inference(caplog):
    echo = serving.Echo(1.5)  # Long enough for three clients to come and go.
    with serving.running(echo) as running:
        for number in range(3):
            raw = running.connect()
            raw.recv()
            serving.ask(raw, {"state": np.float32([number, 0])})
            time.sleep(0.05)
            vanish(raw)
        echo.seconds = 0.0
        assert serving.openpi(running).infer({"state": np.float32([9, 9])})["actions"].shape == (
            4,
            2,
        )
        assert running.metric("shallow_pi_clients") <= 1
    # The first was running when its client left; the others never began.
    assert echo.asked == [[0, 0], [9, 9]]
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def vanish(raw):
    """Leave without a close frame, and with a reset in place of an end."""
    raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1] + [0] * 7))
    raw.close_socket()


@pytest.mark.parametrize("leave", [vanish, lambda raw: raw.close()], ids=["vanish", "close"])
def test_clients_that_leave_while_they_wait_give_up_their_places(leave):
    """As a robot's program that is restarted during a long inference."""
    policy = Thinking()
    with (
        serving.running(policy, max_waiting=1, max_clients=2) as running,
        running.connect() as robot,
    ):
        robot.recv()
        serving.ask(robot, {"state": np.float32([0, 0])})
        running.wait_for("shallow_pi_batch_size_count", 1)
        for number in (1, 2):
            raw = running.connect()
            raw.recv()
            serving.ask(raw, {"state": np.float32([number, 0])})
            running.wait_for("shallow_pi_queue_length", 1)
            leave(raw)
            running.wait_for("shallow_pi_queue_length", 0)
            running.wait_for("shallow_pi_clients", 1)
        with running.connect() as last:
            last.recv()
            serving.ask(last, {"state": np.float32([9, 9])})
            running.wait_for("shallow_pi_queue_length", 1)
            policy.go.set()
            for raw, number in ((robot, 0), (last, 9)):
                assert protocol.unpack(raw.recv(timeout=10))["actions"][0, 0] == number
    assert policy.asked == [[0, 0], [9, 9]]


def test_a_robot_comes_back_while_its_last_observation_is_still_computed():
    policy = Thinking()
    with serving.running(policy, max_clients=1) as running:
        raw = running.connect()
        raw.recv()
        serving.ask(raw, serving.STATE)
        running.wait_for("shallow_pi_batch_size_count", 1)
        vanish(raw)
        running.wait_for("shallow_pi_clients", 0)
        with running.connect() as again:
            assert protocol.unpack(again.recv())["fps"] == 20
        policy.go.set()


def test_the_calls_of_a_client_are_counted_from_its_connection():
    echo = serving.Echo()
    with serving.running(echo) as running:
        first, second = serving.openpi(running), serving.openpi(running)
        for client, number in ((first, 1), (first, 1), (second, 2), (first, 1), (second, 2)):
            client.infer({"state": np.float32([number, 0])})
    assert echo.calls == [(1, 0), (1, 1), (2, 0), (1, 2), (2, 1)]


def test_a_reset_counts_the_calls_of_its_client_anew():
    echo = serving.Echo()
    with serving.running(echo) as running, running.connect() as robot, running.connect() as other:
        robot.recv(), other.recv()
        for endpoint in ("infer", "infer", "reset", "infer"):
            said = {"endpoint": endpoint} | (serving.STATE if endpoint == "infer" else {})
            serving.ask(robot, said)
            assert (robot.recv(timeout=10) == "reset successful") == (endpoint == "reset")
        serving.ask(robot, {**serving.STATE, "endpoint": "act"})
        assert isinstance(robot.recv(timeout=10), bytes)
    assert [call for _, call in echo.calls] == [0, 1, 0, 1]
    assert echo.keys == [{"state"}] * 3 + [{"state", "endpoint"}]


def test_stopping_lets_the_running_inference_end_and_says_goodbye():
    with serving.running(serving.Echo(0.5)) as running:
        idle, busy, queued = (running.connect() for _ in range(3))
        for raw in (idle, busy, queued):
            raw.recv()
        serving.ask(busy, {"state": np.float32([7, 0])})
        time.sleep(0.1)
        serving.ask(queued, {"state": np.float32([8, 0])})
        time.sleep(0.1)
        running.stop(wait=False)
        assert serving.close_code(idle) == 1001
        assert protocol.unpack(busy.recv(timeout=10))["actions"][0, 0] == 7
        assert serving.close_code(busy) == 1001
        assert serving.refusal(queued) == ("the server stops", 1001)
        with pytest.raises(OSError, match="refused"):
            running.connect()
        running.stop()


# A server in a process of its own; it says where it is, then that it ended.
PROGRAM = """
import serving
from shallow_pi.serving import server, server_config
policy = serving.Echo(%s)
server.run(policy, server_config.ServerConfig(port=0), ready=lambda url: print(url, flush=True))
print(policy.asked)
"""


@contextlib.contextmanager
def process(seconds):
    """Such a process, and a websocket to it that has been told the metadata."""
    run = [sys.executable, "-c", PROGRAM % seconds]
    with subprocess.Popen(run, cwd=HERE, stdout=subprocess.PIPE, text=True) as started:
        try:
            url = started.stdout.readline().strip()
            options = {"compression": None, "close_timeout": 1}
            with websockets.sync.client.connect(url, **options) as raw:
                raw.recv()
                yield started, raw
        finally:
            started.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_process_after_the_running_inference(number):
    """Also where `uv run` forwards what systemd sends to every process of the service."""
    with process(0.5) as (started, raw):
        serving.ask(raw, serving.STATE)
        time.sleep(0.2)
        started.send_signal(number)
        time.sleep(0.1)
        started.send_signal(number)
        assert protocol.unpack(raw.recv(timeout=10))["actions"].shape == (4, 2)
        assert serving.close_code(raw) == 1001
        assert started.wait(10) == 0
        assert started.stdout.read() == "[[1.0, 2.0]]\n"


@pytest.mark.parametrize(
    ("number", "stays"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False)]
)
def test_a_second_signal_ends_it_at_once(number, stays):
    with process(30) as (started, raw):
        serving.ask(raw, serving.STATE)
        time.sleep(0.2)
        if not stays:
            vanish(raw)
        until = time.monotonic() + 20
        # Of two that come together, Python may see one.
        while started.poll() is None and time.monotonic() < until:
            started.send_signal(number)
            time.sleep(0.3)
        assert started.returncode == -number


@pytest.mark.parametrize("stays", [True, False])
def test_health_says_when_an_inference_is_stuck_and_when_it_is_over(stays):
    """A supervisor restarts the server then, also if the robot has given up."""
    policy = Thinking()
    with serving.running(policy, stuck_seconds=1.0) as running, running.connect() as raw:
        raw.recv()
        serving.ask(raw, serving.STATE)
        running.wait_for("shallow_pi_batch_size_count", 1)
        if not stays:
            vanish(raw)
        until = time.monotonic() + 20
        while (found := running.get("/healthz"))[0] == 200 and time.monotonic() < until:
            time.sleep(0.1)
        status, text, _ = found
        assert (status, text[:40]) == (503, "stuck: an inference has been running for")
        assert running.metric("shallow_pi_inference_running_seconds") > 1
        policy.go.set()
        running.wait_for("shallow_pi_inference_running_seconds", 0)
        assert running.get("/healthz")[:2] == (200, "OK\n")


def test_health_and_metrics_answer_while_the_policy_thinks():
    with serving.running(serving.Echo(1.0)) as running, running.connect() as raw:
        raw.recv()
        serving.ask(raw, serving.STATE)
        time.sleep(0.05)
        start = time.monotonic()
        assert running.get("/healthz")[:2] == (200, "OK\n")
        assert running.metric("shallow_pi_clients") == 1
        assert time.monotonic() - start < 0.8
        raw.recv(timeout=10)
        running.wait_for("shallow_pi_inference_seconds_count", 1)
        assert running.metric("shallow_pi_inference_seconds_sum") >= 1
