"""Observations that wait are answered at once, each as if its client were alone."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import jax
import numpy as np
import pytest
import serving

from shallow_pi.deploy import policy
from shallow_pi.serving import protocol, server_config, turns

pytestmark = pytest.mark.filterwarnings(serving.OPENPI_WARNS)


@contextlib.contextmanager
def robots(running, count):
    """Raw websockets that have been told the metadata."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(running.connect()) for _ in range(count)]
        for raw in opened:
            raw.recv()
        yield opened


def number(raw):
    """The first number of an answer's actions."""
    return protocol.unpack(raw.recv(timeout=10))["actions"][0, 0]


class Held(serving.Echo):
    """Answers nothing until `go` is set, so that observations gather in line."""

    def __init__(self):
        super().__init__()
        self.go, self.begun = threading.Event(), threading.Event()

    def infer_each(self, observations, calls):
        self.begun.set()
        assert self.go.wait(10)
        return super().infer_each(observations, calls)


@contextlib.contextmanager
def gathered(running, held, states):
    """Websockets whose observations wait behind one that is being answered."""
    with robots(running, len(states) + 1) as (first, *others):
        serving.ask(first, {"state": np.float32([100, 0])})
        assert held.begun.wait(10)
        for raw, state in zip(others, states, strict=True):
            serving.ask(raw, {"state": np.float32([state, 0])})
            # In this order.
            running.wait_for("shallow_pi_queue_length", 1 + others.index(raw))
        yield others


def test_clients_get_the_actions_they_get_alone(own, params):
    """Of their own observations and calls, with others in the batch or none."""
    asked = policy.Policy(own, params, num_steps=1, seed=3)
    asked.warm_up(batch=4)
    # So that batches of three are filled up to four.
    asked.batch_ms = {1: 1.0, 2: 0.9, 4: 0.8}
    generator = np.random.default_rng(0)
    seen = [
        [
            {
                "observation.images.base": generator.integers(0, 256, (24, 24, 3), np.uint8),
                "observation.images.wrist": generator.integers(0, 256, (24, 24, 3), np.uint8),
                "observation.state": generator.standard_normal(3).astype(np.float32),
                "task": "touch the red block",
            }
            for _ in range(4)
        ]
        for _ in range(3)
    ]

    def drive(observations):
        client = serving.openpi(running)
        return [client.infer(observation)["actions"] for observation in observations]

    with (
        serving.running(asked, batch=4, batch_wait_ms=300) as running,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        found = list(pool.map(drive, seen))
        running.wait_for("shallow_pi_batch_size_sum", 12)
        assert running.metric("shallow_pi_batch_size_count") < 12
    key = jax.random.key(3)
    for observations, chunks in zip(seen, found, strict=True):
        for call, (observation, actions) in enumerate(zip(observations, chunks, strict=True)):
            noise = np.asarray(jax.random.normal(jax.random.fold_in(key, call), (5, 6)))
            alone = asked.infer(observation, noise)["actions"]
            np.testing.assert_allclose(actions, alone, rtol=1e-5, atol=1e-5)


def test_those_that_wait_are_answered_at_once_up_to_the_limit():
    held = Held()
    with (
        serving.running(held, batch=4) as running,
        gathered(running, held, range(6)) as waiting,
    ):
        held.go.set()
        assert [number(raw) for raw in waiting] == [0, 1, 2, 3, 4, 5]
        assert running.metric("shallow_pi_batch_size_sum") == 7
        assert running.metric("shallow_pi_batch_size_count") == 3
        assert running.metric('shallow_pi_batch_size_bucket{le="3.0"}') == 2
    assert held.turns == [1, 4, 2]
    # First come, first served.
    assert [state[0] for state in held.asked] == [100, 0, 1, 2, 3, 4, 5]


def test_the_policy_says_how_many_to_answer_at_once():
    held = Held()
    held.together = lambda waiting: 3 if waiting > 3 else 1
    with (
        serving.running(held, batch=8) as running,
        gathered(running, held, range(5)) as waiting,
    ):
        held.go.set()
        assert [number(raw) for raw in waiting] == [0, 1, 2, 3, 4]
    assert held.turns == [1, 3, 1, 1]


def test_a_policy_that_cannot_say_how_many_fails_its_clients_and_keeps_none_waiting():
    def together(waiting):
        raise KeyError("of the policy's own")

    held = Held()
    held.together = together
    with (
        serving.running(held, batch=8) as running,
        gathered(running, held, range(2)) as waiting,
    ):
        held.go.set()
        for raw in waiting:
            said, code = serving.refusal(raw)
            assert "of the policy's own" in said
            assert code == 1011
        running.wait_for("shallow_pi_queue_length", 0)
        del held.together
        assert serving.openpi(running).infer(serving.STATE)["actions"].shape == (4, 2)


def test_a_bad_observation_in_a_batch_is_refused_alone():
    class Strict(Held):
        def infer(self, observation):
            if observation["state"][0] == 1:
                raise ValueError("the observation lacks a camera")
            return super().infer(observation)

    held = Strict()
    with (
        serving.running(held, batch=8) as running,
        gathered(running, held, range(3)) as waiting,
        robots(running, 2) as (text, array),
    ):
        text.send("an observation")
        array.send(protocol.pack([1, 2]))
        running.wait_for("shallow_pi_queue_length", 5)
        held.go.set()
        assert [number(waiting[0]), number(waiting[2])] == [0, 2]
        assert serving.refusal(waiting[1]) == ("the observation lacks a camera", 1011)
        assert "got text" in serving.refusal(text)[0]
        assert "got a list" in serving.refusal(array)[0]
    assert held.turns == [1, 3]


@pytest.mark.parametrize("failure", ["raises", "gives too few answers", "gives what is not finite"])
def test_an_observation_that_breaks_the_policy_breaks_no_other(failure):
    class Fragile(Held):
        def infer_each(self, observations, calls):
            found = super().infer_each(observations, calls)
            if any(observation["state"][0] == 1 for observation in observations):
                if failure == "raises":
                    raise MemoryError("of the policy's own")
                if failure == "gives too few answers":
                    return found[:-1]
            return found

        def infer(self, observation):
            result = super().infer(observation)
            if failure == "gives what is not finite" and observation["state"][0] == 1:
                result["actions"] = np.full((4, 2), np.nan)
            return result

    held = Fragile()
    with (
        serving.running(held, batch=8) as running,
        gathered(running, held, range(3)) as waiting,
    ):
        held.go.set()
        assert [number(waiting[0]), number(waiting[2])] == [0, 2]
        said, code = serving.refusal(waiting[1])
        expected = {
            "raises": "MemoryError: of the policy's own",
            "gives too few answers": "the policy gave 0 answers to 1 clients",
            "gives what is not finite": "not finite; none are sent",
        }
        assert expected[failure] in said
        assert code == 1011


def test_a_client_that_leaves_the_line_or_the_batch_costs_no_other_its_answer():
    held = Held()
    with (
        serving.running(held, batch=2) as running,
        gathered(running, held, range(5)) as waiting,
    ):
        for leaving in (waiting[0], waiting[3]):
            leaving.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1] + [0] * 7))
            leaving.close_socket()
        time.sleep(0.1)
        held.go.set()
        assert [number(waiting[i]) for i in (1, 2, 4)] == [1, 2, 4]
        running.wait_for("shallow_pi_clients", 4)
    assert [state[0] for state in held.asked] == [100, 1, 2, 4]
    assert held.turns == [1, 2, 1]


def queue_ms(raw):
    return protocol.unpack(raw.recv(timeout=10))["server_timing"]["queue_ms"]


def test_a_lone_client_never_waits_for_idle_ones(monkeypatch):
    monkeypatch.setattr(turns, "ACTIVE", 0.1)
    with (
        serving.running(serving.Echo(), batch=8, batch_wait_ms=5000) as running,
        robots(running, 3) as (lone, idle, _),
    ):
        serving.ask(idle, serving.STATE)
        idle.recv()
        time.sleep(0.2)
        for _ in range(3):
            serving.ask(lone, serving.STATE)
            assert queue_ms(lone) < 1000


def test_an_active_client_is_waited_for_but_no_longer_than_the_bound():
    with (
        serving.running(serving.Echo(), batch=8, batch_wait_ms=600) as running,
        robots(running, 2) as (one, other),
    ):
        serving.ask(other, serving.STATE)
        other.recv()
        serving.ask(one, serving.STATE)
        assert 590 < queue_ms(one) < 3000
        # One that has left is not.
        other.close()
        running.wait_for("shallow_pi_clients", 1)
        serving.ask(one, serving.STATE)
        assert queue_ms(one) < 500


def test_a_client_that_sends_ahead_has_one_place_in_line():
    held = Held()
    with serving.running(held, batch=2) as running, robots(running, 3) as (greedy, *others):
        for state in range(100, 104):
            serving.ask(greedy, {"state": np.float32([state, 0])})
        assert held.begun.wait(10)
        for i, raw in enumerate(others):
            serving.ask(raw, {"state": np.float32([i, 0])})
            running.wait_for("shallow_pi_queue_length", 1 + i)
        held.go.set()
        assert [number(raw) for raw in others] == [0, 1]
        assert [number(greedy) for _ in range(4)] == [100, 101, 102, 103]
    assert [state[0] for state in held.asked] == [100, 0, 1, 101, 102, 103]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"batch_wait_ms": -1.0}, "--batch-wait-ms must be finite and not negative, got -1"),
        ({"batch_wait_ms": float("nan")}, "--batch-wait-ms must be finite"),
    ],
)
def test_limits_that_are_none_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        server_config.ServerConfig(**given)
