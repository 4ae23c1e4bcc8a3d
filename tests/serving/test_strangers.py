"""Connections that never become a robot keep no robot out, and are closed in time."""

import contextlib
import socket
import struct
import time

import numpy as np
import pytest
import serving
import websockets.exceptions

from shallow_pi.serving import page, protocol, server, sessions

pytestmark = pytest.mark.filterwarnings(serving.OPENPI_WARNS)

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)
TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@contextlib.contextmanager
def strangers(running, count, *says):
    """Sockets that send each of these and nothing more, and never read."""
    host, port = running.url.split("://")[1].split(":")
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            for said in says:
                one.sendall(said)
            opened.append(one)
        yield opened


def drives(running):
    """Seconds until openpi's client has its actions."""
    start = time.monotonic()
    assert serving.openpi(running).infer(serving.STATE)["actions"].shape == (4, 2)
    return time.monotonic() - start


def is_closed(one):
    """Wait until the server closes."""
    until = time.monotonic() + 10
    with contextlib.suppress(ConnectionResetError):
        while one.recv(2**20):
            assert time.monotonic() < until, "the server goes on sending"
    return True


def test_half_open_websockets_make_room_for_a_robot_in_seconds():
    with (
        serving.running(serving.Echo(), handshake_seconds=1) as running,
        running.connect() as robot,
        strangers(running, 31, UPGRADE) as opened,
    ):
        robot.recv()
        running.wait_for("shallow_pi_clients", 32)
        assert drives(running) < 3
        # A robot that answers pings keeps its place.
        serving.ask(robot, serving.STATE)
        assert isinstance(robot.recv(timeout=10), bytes)
        assert all(map(is_closed, opened))


def frame(observation):
    """A masked binary frame, with a mask of zeros."""
    message = protocol.pack(observation)
    return struct.pack("!BBQ", 0x82, 0x80 | 127, len(message)) + bytes(4) + message


def test_clients_that_vanish_after_an_answer_make_room_too():
    with (
        serving.running(serving.Echo(), handshake_seconds=0.5, max_clients=1) as running,
        strangers(running, 1, UPGRADE, frame(serving.STATE)),
    ):
        running.wait_for("shallow_pi_requests_total", 1)
        assert drives(running) < 2


def test_a_client_too_busy_to_answer_pings_is_answered_when_it_asks(monkeypatch):
    monkeypatch.setattr(server, "PING", 0.05)
    with (
        serving.running(serving.Echo()) as running,
        strangers(running, 1, UPGRADE, frame(serving.STATE)) as (one,),
    ):
        running.wait_for("shallow_pi_requests_total", 1)
        time.sleep(0.3)
        one.sendall(frame(serving.STATE))
        running.wait_for("shallow_pi_requests_total", 2)


def test_a_client_that_does_not_read_is_dropped(monkeypatch):
    """Its answer is larger than the buffers of two sockets."""
    monkeypatch.setattr(sessions, "READ", 0.3)
    large = frame({"state": np.zeros(2**21, np.float32)})
    with (
        serving.running(serving.Echo()) as running,
        strangers(running, 1, UPGRADE, large),
    ):
        running.wait_for("shallow_pi_clients", 1)
        running.wait_for("shallow_pi_clients", 0)
        assert drives(running) < 1


def test_a_page_that_does_not_read_is_closed(monkeypatch):
    monkeypatch.setattr(page, "PATIENCE", 0.3)
    monkeypatch.setattr(page, "message", lambda *_: "x" * 2**24)
    look = UPGRADE.replace(b"GET / ", b"GET /live ")
    with (
        serving.running(serving.Echo()) as running,
        strangers(running, 1, look) as (one,),
    ):
        time.sleep(1)
        assert is_closed(one)


def test_a_client_that_never_asks_makes_room_in_the_end(monkeypatch):
    monkeypatch.setattr(sessions, "UNUSED", 0.3)
    with (
        serving.running(serving.Echo(), max_clients=2) as running,
        running.connect() as first,
        running.connect() as second,
    ):
        first.recv(), second.recv()
        time.sleep(0.4)
        assert drives(running) < 2
        assert serving.close_code(first) == 1013
        # The other keeps its place.
        serving.ask(second, serving.STATE)
        assert isinstance(second.recv(timeout=10), bytes)


@pytest.mark.parametrize("said", [b"", b"G", UPGRADE[:-2]], ids=["nothing", "a letter", "half"])
def test_a_request_that_never_ends_is_closed_in_time(said):
    with (
        serving.running(serving.Echo(), handshake_seconds=0.5) as running,
        strangers(running, 40, said) as opened,
    ):
        start = time.monotonic()
        assert drives(running) < 0.5
        assert all(map(is_closed, opened))
        assert time.monotonic() - start < 3


def test_a_request_that_comes_byte_by_byte_is_closed_in_time():
    with (
        serving.running(serving.Echo(), handshake_seconds=0.5) as running,
        strangers(running, 1) as (one,),
    ):
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in UPGRADE:
                one.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("said", [b"", TLS_HELLO], ids=["nothing", "half a hello"])
def test_a_tls_handshake_that_never_ends_is_closed_in_time(said, certificate):
    cert, key = certificate
    options = {"tls_cert": str(cert), "tls_key": str(key), "handshake_seconds": 0.5}
    with (
        serving.running(serving.Echo(), **options) as running,
        strangers(running, 40, said) as opened,
    ):
        start = time.monotonic()
        assert all(map(is_closed, opened))
        assert time.monotonic() - start < 3


def test_of_too_many_handshakes_the_oldest_is_dropped():
    with (
        serving.running(serving.Echo(), max_handshakes=4, handshake_seconds=60) as running,
        strangers(running, 12, b"GET / HT") as opened,
    ):
        start = time.monotonic()
        assert all(map(is_closed, opened[:8]))
        # The robot's own handshake drops one more.
        assert drives(running) < 2
        assert is_closed(opened[8])
        assert time.monotonic() - start < 10


def test_a_page_that_says_much_without_a_key_stops_no_robot(monkeypatch):
    """Megabytes of JSON take seconds to read, in which nobody would be answered."""
    read = []
    monkeypatch.setattr(page.json, "loads", lambda text: read.append(len(text)) or {})
    with (
        serving.running(serving.Echo(), api_key="secret") as running,
        running.connect("/live") as stranger,
    ):
        stranger.send('{"a": [' + 2**20 * "[]," + "1]}")
        assert serving.close_code(stranger) == page.WRONG_KEY
    assert not read


def test_pages_are_bounded_apart_from_clients():
    with serving.running(serving.Echo()) as running:
        look = UPGRADE.replace(b"GET / ", b"GET /live ")
        with strangers(running, page.MAX_PAGES, look):
            assert drives(running) < 1
            assert running.get("/healthz")[0] == 200
            with pytest.raises(websockets.exceptions.InvalidStatus, match="503"):
                running.connect("/live")
