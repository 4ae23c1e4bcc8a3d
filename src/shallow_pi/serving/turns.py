"""Observations wait in line and are answered in turn, several at once where that is faster.

A client has one observation in line at a time, first come, first served; one worker thread asks the
policy. Each turn takes as many observations from the front as the policy can answer together
(`--batch`). A turn may begin up to `--batch-wait-ms` after the arrival of its first observation, to
wait for clients that are about to ask: those that have asked in the last second. So a lone client
never waits, and nobody waits for an idle one. What a client sends, or that it leaves, concerns that
client alone: its noise depends on its own calls, and where a batch fails, every observation of it
is answered by itself.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import websockets.exceptions

from shallow_pi.serving import protocol, server_config, telemetry

# Close codes of the websocket protocol.
GOING_AWAY, FAILED, TRY_AGAIN = 1001, 1011, 1013
# Seconds since its last observation within which a client is waited for.
ACTIVE = 1.0
# The key with which RoboArena's clients say what a message is ("infer" or "reset"); an observation
# needs none. A reset is answered by this text.
_ENDPOINT, RESET_DONE = "endpoint", "reset successful"
# Longest text of a refusal, characters: one may name all that a client sent, which is megabytes.
REASON = 4000
# Largest reset, bytes: it is read on the event loop.
_RESET_BYTES = 65_536


class Policy(Protocol):
    """A policy that can be served, such as `deploy.policy.Policy`."""

    @property
    def metadata(self) -> Mapping[str, object]:
        """Sent to clients when they connect: plain values that msgpack knows."""

    def infer_each(
        self, observations: Sequence[Mapping[str, object]], calls: Sequence[int]
    ) -> Sequence[Mapping[str, Any] | ValueError]:
        """For each `{"actions": (ah, rd), "timing": {...}}`, perhaps with `warnings` (texts).

        In place of it a ValueError that says why an observation cannot be answered. `calls` counts
        the observations of the same client answered before.
        """

    def together(self, waiting: int) -> int:
        """Number of the waiting observations, at least 1, to answer at once."""


class Refusal(Exception):
    """An observation is not answered: the kind of reason, the text for the client, a close code."""

    def __init__(self, kind: telemetry.Kind, text: str, code: int = FAILED) -> None:
        if len(text) > REASON:
            text = f"{text[: REASON // 2]} ... {text[-REASON // 2 :]}"
        super().__init__(text)
        self.kind, self.text, self.code = kind, text, code


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of one observation; times in milliseconds."""

    observation: Mapping[str, object]
    actions: np.ndarray
    # The whole answer as it is sent.
    packed: bytes
    warnings: Sequence[str]
    queue_ms: float
    infer_ms: float


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A message that waits for its answer; `client` is the same object for all of a client's."""

    client: object
    message: str | bytes
    # Observations of this client answered before, since its last reset.
    call: int
    # From `time.monotonic`.
    arrived: float
    # Timing of the client's last answer, sent with the next.
    previous: Mapping[str, float]


_Entry = tuple[Request, "asyncio.Future[Answer]"]


class Turns:
    """The line; everything but `_answer` runs on the event loop."""

    def __init__(
        self,
        policy: Policy,
        config: server_config.ServerConfig,
        seen: telemetry.Telemetry,
        worker: concurrent.futures.Executor,
    ) -> None:
        self._policy, self._config, self._seen, self._worker = policy, config, seen, worker
        self._line: collections.deque[_Entry] = collections.deque()
        # The turn that the policy is asked for.
        self._asked: Sequence[_Entry] = ()
        self._came = asyncio.Event()
        self._turns: asyncio.Task[None] | None = None
        self._stopping = False
        # Time of the last observation of each client that asked lately.
        self._active: dict[object, float] = {}

    async def answer(self, request: Request) -> Answer:
        """Wait for this request's turn and its answer.

        Raises:
          Refusal: it cannot be answered, or too many wait already.
          websockets.exceptions.ConnectionClosed: the client left before its answer.
          Exception: the policy failed.
        """
        # Those that the next turn takes do not wait for another one.
        room = self._config.max_waiting + (0 if self._asked else self._config.batch)
        if self._stopping:
            raise _stops()
        if len(self._line) >= room:
            raise Refusal(
                "busy",
                f"busy: {len(self._line)} observations wait already, which is the limit "
                "(--max-waiting); connect again later",
                TRY_AGAIN,
            )
        answered = asyncio.get_running_loop().create_future()
        self._line.append((request, answered))
        self._seen.waiting = len(self._line)
        self._active[request.client] = request.arrived
        self._came.set()
        if self._turns is None or self._turns.done():
            self._turns = asyncio.create_task(self._take_turns())
        result: Answer = await answered
        return result

    @property
    def is_asking(self) -> bool:
        """True while the worker thread is busy."""
        return bool(self._asked)

    def left(self, client: object) -> None:
        """Note that a client left: nobody waits for it, and it waits for nothing."""
        self._active.pop(client, None)
        for request, answered in (*self._line, *self._asked):
            if request.client is client:
                _settle(answered, websockets.exceptions.ConnectionClosedError(None, None))
        self._forget_settled()
        self._came.set()

    def stop(self) -> None:
        """Refuse everything that waits; the running turn ends."""
        self._stopping = True
        self._came.set()
        while self._line:
            _settle(self._line.popleft()[1], _stops())
        self._seen.waiting = 0

    async def _take_turns(self) -> None:
        while self._line:
            turn = list(self._line)
            try:
                await self._wait_for_more()
                turn = self._next()
                if not turn:
                    continue
                self._seen.begin_inference(len(turn))
                self._asked = turn
                answers = await asyncio.get_running_loop().run_in_executor(
                    self._worker, self._answer, [request for request, _ in turn]
                )
                for (_, answered), found in zip(turn, answers, strict=True):
                    _settle(answered, found)
            except Exception as error:
                # Of the policy's `together`, or a defect of ours: nobody waits in vain.
                for entry in turn:
                    _settle(entry[1], error)
                self._forget_settled()
            finally:
                self._asked = ()
                self._seen.end_inference()

    async def _wait_for_more(self) -> None:
        """Wait for clients that are about to ask, no longer than the bound."""
        until = self._line[0][0].arrived + self._config.batch_wait_ms / 1000
        while self._line and (left := until - time.monotonic()) > 0:
            if len(self._line) >= self._expected():
                return
            self._came.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._came.wait()

    def _expected(self) -> int:
        """Size of the turn, if all active clients asked now."""
        since = time.monotonic() - ACTIVE
        self._active = {one: at for one, at in self._active.items() if at > since}
        return self._together(max(len(self._active), len(self._line)))

    def _together(self, waiting: int) -> int:
        most = min(waiting, self._config.batch)
        return most if most < 2 else min(most, max(1, self._policy.together(most)))

    def _next(self) -> list[_Entry]:
        """Take a turn's observations from the front."""
        turn = [self._line.popleft() for _ in range(self._together(len(self._line)))]
        self._seen.waiting = len(self._line)
        return turn

    def _forget_settled(self) -> None:
        self._line = collections.deque(entry for entry in self._line if not entry[1].done())
        self._seen.waiting = len(self._line)

    def _answer(self, turn: Sequence[Request]) -> list[Answer | Exception]:
        """One turn, in the worker thread."""
        began = time.monotonic()
        read = [_read(request.message) for request in turn]
        asked = [i for i, found in enumerate(read) if isinstance(found, _Message)]
        messages = [found for found in read if isinstance(found, _Message)]
        results: list[Mapping[str, Any] | Exception] = []
        if asked:
            calls = [turn[i].call for i in asked]
            results = self._ask([message.observation for message in messages], calls)
        answers: list[Answer | Exception] = [f for f in read if isinstance(f, Refusal)]
        # In ascending order, so that each comes to its place between the refusals.
        for i, message, result in zip(asked, messages, results, strict=True):
            answers.insert(i, _pack(turn[i], message, result, began))
        return answers

    def _ask(
        self, observations: Sequence[Mapping[str, object]], calls: Sequence[int]
    ) -> list[Mapping[str, Any] | Exception]:
        try:
            found = list(self._policy.infer_each(observations, calls))
            if len(found) != len(calls):
                raise RuntimeError(f"the policy gave {len(found)} answers to {len(calls)} clients")
        except Exception as error:
            if len(calls) == 1:
                return [error]
            # One of them makes the policy fail: alone it fails alone.
            alone = zip(observations, calls, strict=True)
            return [self._ask([one], [call])[0] for one, call in alone]
        return [*found]


class _Message(NamedTuple):
    observation: dict[str, object]
    # In which its answer is packed, too.
    packing: protocol.Packing


def is_reset(message: str | bytes) -> bool:
    """True for a message that begins an episode anew, which is no observation."""
    if isinstance(message, str) or len(message) > _RESET_BYTES or b"reset" not in message:
        return False
    try:
        found = protocol.unpack(message)
    except ValueError:
        return False
    return isinstance(found, dict) and str(found.get(_ENDPOINT)) == "reset"


def _read(message: str | bytes) -> _Message | Refusal:
    if isinstance(message, str):
        return Refusal("message", "expected an observation in a binary frame, got text")
    try:
        observation, packing = protocol.read(message)
    except ValueError as error:
        return Refusal("message", str(error))
    if not isinstance(observation, dict):
        found = type(observation).__name__
        return Refusal("message", f"expected an observation, which is a map, got a {found}")
    if str(observation.get(_ENDPOINT)) == "infer":
        del observation[_ENDPOINT]
    return _Message(observation, packing)


def _pack(
    request: Request, message: _Message, result: Mapping[str, Any] | Exception, began: float
) -> Answer | Exception:
    if isinstance(result, ValueError):
        return Refusal("observation", str(result))
    if isinstance(result, Exception):
        return result
    try:
        result = dict(result)
        actions = np.asarray(result.pop("actions"))
        if not np.isfinite(actions).all():
            return Refusal("internal", "the policy gave actions that are not finite; none are sent")
        queue_ms, infer_ms = 1000 * (began - request.arrived), 1000 * (time.monotonic() - began)
        timing = {"infer_ms": infer_ms, "queue_ms": queue_ms, **request.previous}
        policy_timing = result.pop("timing", {})
        whole = {"actions": actions, "policy_timing": policy_timing, "server_timing": timing}
        packed = protocol.pack({**whole, **result}, message.packing)
    except Exception as error:
        return error
    warnings = result.get("warnings", ())
    return Answer(message.observation, actions, packed, warnings, queue_ms, infer_ms)


def _settle(answered: "asyncio.Future[Answer]", found: Answer | Exception) -> None:
    if answered.done():
        return
    if isinstance(found, Exception):
        answered.set_exception(found)
    else:
        answered.set_result(found)


def _stops() -> Refusal:
    return Refusal("busy", "the server stops", GOING_AWAY)
