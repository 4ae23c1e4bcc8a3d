"""A server in a thread of the test, on a free port; and policies to put behind it."""

import asyncio
import contextlib
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import websockets.exceptions
import websockets.sync.client
from openpi_client import websocket_client_policy

from shallow_pi.serving import protocol, server, server_config

METADATA = {
    "action_horizon": 4,
    "action_dim": 2,
    "fps": 20,
    "state_keys": ["state"],
    "action_names": ["shoulder", "elbow"],
}


# openpi's client connects so, and so do raw websockets here.
OPENPI_WARNS = "ignore:connect\\(\\) must be used:DeprecationWarning"
STATE = {"state": np.float32([1, 2])}


class Echo:
    """A policy whose actions are its observation's state; `seconds` is how long it thinks."""

    def __init__(self, seconds=0.0):
        self.metadata, self.seconds, self.asked, self.threads = METADATA, seconds, [], set()
        # Size of each turn, and (first number of the state, call) of each observation.
        self.turns, self.calls, self.keys = [], [], []

    def together(self, waiting):
        return waiting

    def infer_each(self, observations, calls):
        self.threads.add(threading.get_ident())
        self.turns.append(len(calls))
        time.sleep(self.seconds)
        answers = []
        for observation, call in zip(observations, calls, strict=True):
            try:
                answers.append(self.infer(observation))
                self.calls.append((int(observation["state"][0]), call))
            except ValueError as error:
                answers.append(error)
        return answers

    def infer(self, observation):
        self.asked.append(observation["state"].tolist())
        self.keys.append(set(observation))
        return {"actions": np.tile(observation["state"], (4, 1)), "timing": {"infer_ms": 1.0}}


class Running:
    """A server's address, and a way to stop it."""

    def __init__(self, url, loop, stop, thread):
        self.url, self._loop, self._stop, self._thread = url, loop, stop, thread
        self.http = url.replace("ws", "http", 1)

    def stop(self, wait=True):
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        if wait:
            self._thread.join(20)
            assert not self._thread.is_alive(), "the server does not end"

    def get(self, path, **headers):
        """(status, body, headers) of a plain HTTP request."""
        request = urllib.request.Request(self.http + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), dict(error.headers)

    def connect(self, path="", **options):
        """A raw websocket."""
        return websockets.sync.client.connect(
            self.url + path, compression=None, max_size=None, **options
        )

    def metric(self, name):
        """The value of one line of /metrics."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines)}[name]

    def wait_for(self, name, value):
        """Until that line of /metrics has this value."""
        until = time.monotonic() + 10
        while (found := self.metric(name)) != value:
            assert time.monotonic() < until, (name, found)
            time.sleep(0.02)


@contextlib.contextmanager
def running(policy, record=None, **config):
    """A server of that policy, until the block ends."""
    config = server_config.ServerConfig(**({"port": 0} | config))
    found, ready = {}, threading.Event()

    def serve():
        async def until_stopped():
            found.update(loop=asyncio.get_running_loop(), stop=asyncio.Event())

            def listening(url):
                found["url"] = url
                ready.set()

            await server.serve(policy, config, stop=found["stop"], ready=listening, record=record)

        try:
            asyncio.run(until_stopped())
        except BaseException as error:
            found["error"] = error
        ready.set()

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(20)
    if "error" in found:
        raise found["error"]
    server_ = Running(found["url"], found["loop"], found["stop"], thread)
    try:
        yield server_
    finally:
        server_.stop()
    if "error" in found:
        raise found["error"]


def openpi(running, api_key=None):
    """openpi's client, as robots use it."""
    return websocket_client_policy.WebsocketClientPolicy(running.url, api_key=api_key)


def ask(connection, observation):
    """Send an observation over a raw websocket."""
    connection.send(protocol.pack(observation))


def refusal(connection):
    """The text a raw websocket is refused with, and the code it is closed with."""
    text = connection.recv(timeout=10)
    assert isinstance(text, str), text
    return text, close_code(connection)


def close_code(connection):
    """The code with which the server closes."""
    try:
        message = connection.recv(timeout=10)
    except websockets.exceptions.ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None
    raise AssertionError(f"not closed: {message[:80]!r}")
