"""Prometheus metrics of a server, and the recent past for its page.

The server tells `Telemetry` of every client, answer and failure, on its event loop; the policy is
never asked. A robot does not report the actions it executed: a step counts as executed here if it
was due, at the robot's frequency, before the client's next observation came.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import prometheus_client
from jaxtyping import Float

from shallow_pi.deploy import observation_keys

# Numbers of answers, events and (of each client) chunks kept for the page.
SERVED, EVENTS, CHUNKS = 500, 20, 12
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# Seconds over which answers a second are counted.
RATE = 5.0
# Seconds a failure keeps the page red.
ALARM = 10.0

Kind = Literal["message", "observation", "too_large", "busy", "unauthorized", "internal"]
# An entry of the page's list: a refusal or failure of one kind, or a warning in an answer.
Listed = Kind | Literal["warning"]
Level = Literal["good", "idle", "warn", "bad"]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A predicted chunk and where it belongs on its client's axis of control steps."""

    # Control step of its first action.
    start: int
    # (ah, rd).
    actions: Float[np.ndarray, "ah rd"]
    # The state it was predicted from, if the observation has it.
    state: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Served:
    """One answered observation; times in milliseconds, `at` in seconds of `clock`."""

    at: float
    client: int
    queue_ms: float
    infer_ms: float
    total_ms: float


@dataclasses.dataclass(frozen=True)
class Event:
    """An observation or connection that was refused, or an answer with a warning."""

    at: float
    client: str
    kind: Listed
    text: str


@dataclasses.dataclass
class Client:
    """A connection that sends observations."""

    number: int
    address: str
    since: float
    requests: int = 0
    # Time of its last observation, or of its connection before the first.
    last: float = 0.0
    observation: Mapping[str, object] = dataclasses.field(default_factory=dict)
    chunks: collections.deque[Chunk] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=CHUNKS)
    )


class Telemetry:
    """Counters, and the recent past.

    Args:
      metadata: the policy's; `fps` and `action_horizon` give the time a chunk lasts.
      stuck_seconds: time after which an inference counts as stuck.
      clock: seconds.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        stuck_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metadata, self.clock = dict(metadata), clock
        self._stuck_seconds = stuck_seconds
        # Start of the running inference.
        self._began: float | None = None
        self.fps = float(metadata.get("fps") or 0)
        self.clients: dict[int, Client] = {}
        self.served: collections.deque[Served] = collections.deque(maxlen=SERVED)
        self.events: collections.deque[Event] = collections.deque(maxlen=EVENTS)
        self.waiting = 0
        self.requests = self.errors = 0
        # Rises with every event, so that a page is sent news only.
        self.version = 0
        self._numbers = itertools.count(1)
        self.start = clock()
        self.registry = registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            "shallow_pi_requests", "Observations answered with actions.", registry=registry
        )
        self._errors = prometheus_client.Counter(
            "shallow_pi_errors", "Refusals and failures.", ["kind"], registry=registry
        )
        self._warnings = prometheus_client.Counter(
            "shallow_pi_warnings",
            "Answers with a warning, such as of a state far from the training data.",
            registry=registry,
        )
        self._clients = prometheus_client.Gauge(
            "shallow_pi_clients", "Connections that send observations.", registry=registry
        )
        self._queue = prometheus_client.Gauge(
            "shallow_pi_queue_length", "Observations that wait for inference.", registry=registry
        )
        self._seconds = {
            name: prometheus_client.Histogram(
                f"shallow_pi_{name}_seconds", text, buckets=_BUCKETS, registry=registry
            )
            for name, text in (
                ("request", "From an observation's arrival to its answer."),
                ("queue", "The part of it before inference began."),
                ("inference", "The part of it in the policy."),
            )
        }
        self._batch = prometheus_client.Histogram(
            "shallow_pi_batch_size",
            "Observations that were answered at once.",
            buckets=_SIZES,
            registry=registry,
        )
        self._running = prometheus_client.Gauge(
            "shallow_pi_inference_running_seconds",
            "Time that the running inference has taken so far; 0 if none runs.",
            registry=registry,
        )
        self._clients.set_function(lambda: len(self.clients))
        self._queue.set_function(lambda: self.waiting)
        self._running.set_function(self.running_seconds)
        for kind in ("message", "observation", "too_large", "busy", "unauthorized", "internal"):
            self._errors.labels(kind)  # Shown from the start, at zero.

    @property
    def chunk_seconds(self) -> float | None:
        """Time the actions of one chunk last on the robot; None if its frequency is unknown."""
        horizon = float(self.metadata.get("action_horizon") or 0)
        return horizon / self.fps if self.fps > 0 and horizon > 0 else None

    def rate(self) -> float:
        """Answers a second lately."""
        now = self.clock()
        recent = [one.at for one in self.served if now - one.at < RATE]
        # Of more answers than are kept the oldest says since when.
        seconds = now - recent[0] if len(recent) == SERVED else RATE
        return len(recent) / max(seconds, 1e-3)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)

    def connect(self, address: str) -> Client:
        """Note a new client."""
        now = self.clock()
        client = Client(next(self._numbers), address, now, last=now)
        self.clients[client.number] = client
        self.version += 1
        return client

    def disconnect(self, client: Client) -> None:
        """Note that a client left."""
        del self.clients[client.number]
        self.version += 1

    def begin_inference(self, size: int) -> None:
        """Note that inference begins for that many observations at once."""
        self._batch.observe(size)
        self._began = self.clock()

    def end_inference(self) -> None:
        """Note that it is over, with or without answers."""
        self._began = None

    def running_seconds(self) -> float:
        """Time that the running inference has taken so far; 0 if none runs."""
        return 0.0 if self._began is None else self.clock() - self._began

    def stuck(self) -> str | None:
        """The reason why a supervisor should restart the server; None if there is none."""
        if (seconds := self.running_seconds()) <= self._stuck_seconds:
            return None
        return (
            f"stuck: an inference has been running for {seconds:.0f} s, longer than "
            f"--stuck-seconds {self._stuck_seconds:g}; restart the server"
        )

    def answer(
        self,
        client: Client,
        observation: Mapping[str, object],
        actions: Float[np.ndarray, "ah rd"],
        *,
        queue_ms: float,
        infer_ms: float,
        total_ms: float,
        warnings: Sequence[str] = (),
    ) -> None:
        """Note an observation that was answered."""
        now = self.clock()
        client.chunks.append(
            Chunk(
                self._next_step(client, now - total_ms / 1000, len(actions)),
                actions,
                find_state(observation, self.metadata),
            )
        )
        client.observation, client.last = observation, now - total_ms / 1000
        client.requests += 1
        self.requests += 1
        self.version += 1
        self.served.append(Served(now, client.number, queue_ms, infer_ms, total_ms))
        self._requests.inc()
        for name, ms in (("request", total_ms), ("queue", queue_ms), ("inference", infer_ms)):
            self._seconds[name].observe(ms / 1000)
        if warnings:
            self._warnings.inc()
            self._list("warning", f"client {client.number}", "; ".join(warnings))

    def fail(self, kind: Kind, client: str, text: str) -> None:
        """Note something that was refused or went wrong."""
        self.errors += 1
        self._list(kind, client, text)
        self._errors.labels(kind).inc()

    def _list(self, kind: Listed, client: str, text: str) -> None:
        last = self.events[-1] if self.events else None
        if kind == "warning" and last is not None and (last.kind, last.client) == (kind, client):
            # A robot that is warned in every answer fills one line of the page, not all.
            self.events.pop()
        self.events.append(Event(self.clock(), client, kind, text))
        self.version += 1

    def _next_step(self, client: Client, arrived: float, horizon: int) -> int:
        """First step of a chunk: as many on as were due since the observation before."""
        if not client.chunks:
            return 0
        due = round((arrived - client.last) * self.fps)
        return client.chunks[-1].start + min(max(due, 1), horizon)

    def health(self) -> tuple[Level, str]:
        """The state of the server for a person beside the robot, the worst news first."""
        now = self.clock()
        if stuck := self.stuck():
            return "bad", stuck.capitalize()
        recent_events = [e for e in self.events if now - e.at < ALARM]
        # A stranger's wrong key does not concern the robot.
        refused = [e for e in recent_events if e.kind not in ("unauthorized", "warning")]
        if refused:
            return "bad", f"Refused: {refused[-1].text.strip().splitlines()[-1]}"
        if (seconds := self.running_seconds()) > ALARM:
            return "warn", f"Waiting: an inference has been running for {seconds:.0f} s"
        if not self.clients:
            return "idle", "Ready; no robot is connected"
        recent = [s.total_ms for s in self.served if now - s.at < ALARM]
        if not recent:
            silent = now - max(client.last for client in self.clients.values())
            if not any(client.requests for client in self.clients.values()):
                return "idle", "Connected; no observation received yet"
            return "warn", f"Silent: no observation for {silent:.0f} s"
        slow = float(np.percentile(recent, 95))
        lasts = self.chunk_seconds
        compared = f"answers take up to {slow:.0f} ms"
        if lasts is not None:
            compared += f", a chunk lasts {1000 * lasts:.0f} ms"
        if lasts is not None and slow > 1000 * lasts:
            return "warn", f"Too slow: {compared}"
        if warned := [e for e in recent_events if e.kind == "warning"]:
            return "warn", f"Warning: {warned[-1].text}"
        return "good", f"Running: {compared}"


def find_state(observation: Mapping[str, object], metadata: Mapping[str, Any]) -> np.ndarray | None:
    """The state of an observation as float32, by the policy's `state_keys` and `state_indices`.

    None if a part of it is missing or no number.
    """
    flat, keys = observation_keys.flatten(observation), metadata.get("state_keys") or ()
    try:
        spelled = observation_keys.find(observation, keys)
        if not keys or len(spelled) < len(keys):
            return None
        parts = [np.asarray(flat[spelled[key]], np.float32).reshape(-1) for key in keys]
        whole, indices = np.concatenate(parts), metadata.get("state_indices")
        return whole[indices] if indices else whole
    except ValueError:
        return None
