"""Processes meet, or every one of them learns who is missing or does not fit."""

import concurrent.futures
import socket
import threading
import time

import pytest

from shallow_pi.parallel import roll_call


@pytest.fixture
def address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"127.0.0.1:{port}"


def _meet(address, calls, timeout):
    """The result of each (index, processes): None, or its error."""

    def one(call):
        index, processes = call
        try:
            return roll_call.meet(address, processes, index, timeout)
        except (ValueError, OSError) as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(one, calls))


def test_processes_meet_in_any_order_and_leave_the_port_free(address):
    for _ in range(2):
        assert _meet(address, [(2, 3), (1, 3), (0, 3)], 20) == [None] * 3
    with socket.create_server(("127.0.0.1", roll_call.parse(address)[1])):
        pass


def test_an_absent_coordinator_ends_in_the_stated_time(address):
    began = time.monotonic()
    (error,) = _meet(address, [(1, 2)], 1)
    assert time.monotonic() - began < 10
    assert isinstance(error, TimeoutError)
    for words in (f"process 1 of 2 found no coordinator at {address} in 1 s", "nothing listens"):
        assert words in str(error)


def test_a_name_that_does_not_resolve_is_called_one():
    (error,) = _meet("no-such-host.invalid:8476", [(1, 2)], 1)
    assert "its name cannot be resolved" in str(error)


def test_all_learn_who_is_missing(address):
    errors = _meet(address, [(0, 4), (2, 4)], 2)
    for error in errors:
        assert isinstance(error, TimeoutError)
        assert f"process 1, 3 of 4 has not reached process 0 at {address}" in str(error)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([(0, 2), (1, 3)], "process 0 expects 2 processes, process 1 .* expects 3"),
        ([(0, 2), (2, 2)], "says it is process 2, expected 1…1"),
        ([(0, 3), (1, 3), (1, 3)], "two processes, .*, say they are process 1"),
    ],
    ids=["number", "index", "twice"],
)
def test_processes_that_contradict_each_other_all_end_at_once(address, calls, message):
    began = time.monotonic()
    errors = _meet(address, calls, 60)
    assert time.monotonic() - began < 20
    for error in errors:
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=message):
            raise error


def test_a_process_that_was_started_again_takes_its_place(address):
    results = []
    waiting = threading.Thread(target=lambda: results.extend(_meet(address, [(0, 3)], 20)))
    waiting.start()
    host, port = roll_call.parse(address)
    for _ in range(100):
        try:
            first = socket.create_connection((host, port))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    with first:
        first.sendall(b'{"process": 1, "processes": 3}\n')
        time.sleep(0.2)
    # The one that ended is not counted, though all others are there.
    other = threading.Thread(target=lambda: results.extend(_meet(address, [(2, 3)], 20)))
    other.start()
    time.sleep(0.5)
    assert _meet(address, [(1, 3)], 20) == [None]
    waiting.join()
    other.join()
    assert results == [None, None]


def test_strangers_at_the_port_are_passed_over(address):
    host, port = roll_call.parse(address)

    def knock():
        for _ in range(100):
            try:
                with socket.create_connection((host, port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\n")
                return
            except ConnectionRefusedError:
                time.sleep(0.05)

    stranger = threading.Thread(target=knock)
    stranger.start()
    time.sleep(0.1)
    assert _meet(address, [(0, 2), (1, 2)], 20) == [None, None]
    stranger.join()


def test_a_port_that_is_taken_says_so(address):
    host, port = roll_call.parse(address)
    with socket.create_server((host, port)):
        (error,) = _meet(address, [(0, 2)], 1)
    assert f"process 0 cannot listen on port {port}" in str(error)


@pytest.mark.parametrize("wrong", ["node1", ":8476", "node1:", "node1:x", "node1:70000"])
def test_an_address_is_host_and_port(wrong):
    with pytest.raises(ValueError, match="must be host:port"):
        roll_call.parse(wrong)


def test_an_ipv6_host_stands_in_brackets():
    assert roll_call.parse("[::1]:8476") == ("::1", 8476)
