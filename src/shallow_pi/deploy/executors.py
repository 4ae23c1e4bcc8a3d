"""From chunks to single actions: when to ask for a chunk, and which action of which is due now.

An executor is called once every control step and gives one action. It asks a policy: anything that
has `infer(observation)` and answers with a mapping of "actions" (horizon, dimensions), such as
`policy.Policy` or a client of openpi's server. Executors have `infer` and `reset` themselves, so
that they fit where openpi's `ActionChunkBroker` fits.

    ActionChunkBroker    asks when the chunk is used up; the robot waits for the next
    SkipLateActions      asks in the background; a chunk that comes d steps late loses its first d
    RealTimeChunking     the same, and the chunk goes on from the actions executed meanwhile

Control steps are counted, not timed: a step is an action that was given to the robot. A robot that
runs out of actions stands until the next chunk comes, so only those of its actions are skipped that
the robot executed others for; to skip by the clock would make it jump. Any thread may call an
executor: a call waits for the one before it.
"""

import collections
import concurrent.futures
import copy
import dataclasses
import functools
import inspect
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from shallow_pi import progress
from shallow_pi.deploy import observation_keys

# Seconds without an answer, after which a robot that waits for one says so.
SILENT = 10.0


class Policy(Protocol):
    """Predicts a chunk of actions for one observation."""

    def infer(self, observation: Mapping[str, object], /) -> Mapping[str, object]:
        """A mapping with `actions` (horizon, robot's dimensions), the first one due now."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk, and the control step of its first action."""

    actions: Float[np.ndarray, "ah rd"]
    result: Mapping[str, object]
    start: int
    # Control steps between its observation and its arrival, with those the robot waited.
    late: int = 0

    def at(self, step: int) -> dict[str, object]:
        """The executor's answer at a control step."""
        action = self.actions[step - self.start].copy()
        return {**self.result, "actions": action, "late_steps": self.late}


class ActionChunkBroker:
    """One action a call; a new chunk when `execute_steps` actions of the last are executed.

    With fewer steps than the chunk has actions this is receding horizon control.

    Args:
      policy: predicts the chunks.
      execute_steps: actions executed of each chunk; None is all of them.
    """

    def __init__(self, policy: Policy, execute_steps: int | None = None) -> None:
        _check_positive(execute_steps)
        self._policy, self._execute_steps = policy, execute_steps
        self._chunk: _Chunk | None = None
        self._step = 0
        self._lock = threading.Lock()

    def infer(self, observation: Mapping[str, object]) -> dict[str, object]:
        """The action due now, (robot's dimensions), as `actions`, beside the policy's answer."""
        with self._lock:
            chunk, steps = self._chunk, self._execute_steps
            if chunk is None or self._step - chunk.start >= (steps or len(chunk.actions)):
                result = self._policy.infer(observation)
                chunk = self._chunk = _Chunk(_actions(result, steps or 1), result, self._step)
            self._step += 1
            return chunk.at(self._step - 1)

    def reset(self) -> None:
        """Begin an episode; waits for a chunk that is under way, and drops it."""
        with self._lock:
            self._chunk, self._step = None, 0
            _reset(self._policy)


class SkipLateActions:
    """Asks in the background while the last chunk is executed; skips actions that come too late.

    A chunk is asked for `execute_steps` control steps after the last one was, or, if that one has
    not come by then, as soon as it has. If d actions were given between its observation and its
    arrival, its action d comes next. The robot waits for the first chunk, and wherever a chunk is
    used up before the next is there. An error in the background is raised by the next call.

    Args:
      policy: predicts the chunks; called from one other thread, one chunk at a time.
      execute_steps: control steps from one observation that a chunk is asked for to the next.
      control_hz: control steps a second. With it, `late_steps` (and the delay that real-time
        chunking expects) counts the time the robot waited too; actions are skipped alike.
      worker: runs the policy; None is a thread of its own, ended by `close`.
      clock: seconds, from anywhere; one that is set back counts as standing still.
    """

    def __init__(
        self,
        policy: Policy,
        execute_steps: int,
        *,
        control_hz: float | None = None,
        worker: concurrent.futures.Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_positive(execute_steps)
        if control_hz is not None:
            _check_rate(policy, control_hz)
        self._policy, self._execute_steps = policy, execute_steps
        self._control_hz, self._clock = control_hz, clock
        self._owns_worker = worker is None
        self._worker = worker or concurrent.futures.ThreadPoolExecutor(1, "policy")
        self._chunk: _Chunk | None = None
        self._pending: tuple[concurrent.futures.Future[Mapping[str, object]], int] | None = None
        self._step = 0
        self._closed = False
        self._lock = threading.Lock()

    def infer(self, observation: Mapping[str, object]) -> dict[str, object]:
        """The action due now, (robot's dimensions), as `actions`, beside the policy's answer.

        `late_steps` says how late its chunk was.

        Raises:
          Whatever the policy raised since the last call; the next call asks again.
        """
        with self._lock:
            if self._closed:
                raise ValueError("this executor is closed: make a new one")
            self._take_arrived()
            if self._pending is None and self._executed() >= self._execute_steps:
                self._ask(observation)
                self._take_arrived()
            chunk = self._wait(observation)
            self._step += 1
            return chunk.at(self._step - 1)

    def reset(self) -> None:
        """Begin an episode; waits for a chunk that is under way, and drops it."""
        with self._lock:
            self._begin()
            _reset(self._policy)

    def close(self) -> None:
        """Wait for a chunk that is under way, and end the thread; closing twice is no error."""
        with self._lock:
            self._drop()
            self._closed = True
            if self._owns_worker:
                self._worker.shutdown()

    def __enter__(self) -> "SkipLateActions":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        """Forget the last episode."""
        self._drop()
        self._chunk, self._step = None, 0

    def _executed(self) -> float:
        """Number of actions given of the chunk; without one, more than any chunk has."""
        return np.inf if self._chunk is None else self._step - self._chunk.start

    def _request(self, observation: Mapping[str, object]) -> Callable[[], Mapping[str, object]]:
        """The call for the next chunk, with all that is known now; the worker makes it."""
        return functools.partial(self._policy.infer, observation)

    def _ask(self, observation: Mapping[str, object]) -> None:
        # A robot may fill the same buffers with the next observation.
        asked = self._worker.submit(self._request(_copy(observation)))
        self._pending = asked, self._step

    def _take_arrived(self, waited: int = 0) -> None:
        if self._pending is not None and self._pending[0].done():
            (asked, start), self._pending = self._pending, None
            result = asked.result()
            actions = _actions(result, self._execute_steps)
            self._chunk = _Chunk(actions, result, start, late=self._step - start + waited)

    def _wait(self, observation: Mapping[str, object]) -> _Chunk:
        """The chunk that has an action for this step."""
        while self._chunk is None or self._executed() >= len(self._chunk.actions):
            if self._pending is None:
                self._chunk = None
                self._ask(observation)
                continue
            began = self._clock()
            _wait_for(self._pending[0])
            waited = 0.0
            if self._chunk is not None and self._control_hz is not None:
                waited = max(0.0, self._clock() - began) * self._control_hz
            self._take_arrived(round(waited))
        return self._chunk

    def _drop(self) -> None:
        if self._pending is not None:
            asked, _ = self._pending
            self._pending = None
            if not asked.cancel():
                _wait_for(asked)


class RealTimeChunking(SkipLateActions):
    """`SkipLateActions` whose chunks go on from the one they replace (`inference.real_time`).

    The policy is given what is left of the chunk and how many of these actions it will find
    executed: the largest of the last delays. A policy of this process must take both,
    `infer(observation, previous=..., delay=...)`, as `policy.Policy` does; call its
    `warm_up(guided=True)` first, so that no chunk has to wait for the compiler. To a server, which
    must run with `--real-time-chunking`, openpi's client sends them with the observation.

    Args:
      policy: predicts the chunks.
      execute_steps: control steps from one observation that a chunk is asked for to the next.
      delay: control steps the first chunks are expected to be late.
      remember: number of the last delays of which the largest is expected.
      options: `control_hz`, `worker` and `clock` of `SkipLateActions`.
    """

    def __init__(
        self,
        policy: Policy,
        execute_steps: int,
        *,
        delay: int = 1,
        remember: int = 10,
        **options: Any,
    ) -> None:
        if delay < 0 or remember < 1:
            raise ValueError(f"expected delay >= 0 and remember >= 1, got {delay} and {remember}")
        self._go_on = _goes_on(policy)
        super().__init__(policy, execute_steps, **options)
        self._expected = delay
        self._delays: collections.deque[int] = collections.deque([delay], maxlen=remember)

    def _begin(self) -> None:
        super()._begin()
        # Delays are expected as at first.
        self._delays.clear()
        self._delays.append(self._expected)

    def _request(self, observation: Mapping[str, object]) -> Callable[[], Mapping[str, object]]:
        chunk = self._chunk
        left = () if chunk is None else chunk.actions[self._step - chunk.start :]
        if not len(left):
            return super()._request(observation)
        delay = min(max(self._delays), len(left))
        return functools.partial(self._go_on, observation, previous=left, delay=delay)

    def _take_arrived(self, waited: int = 0) -> None:
        before = self._chunk
        super()._take_arrived(waited)
        if before is not None and self._chunk is not None and self._chunk is not before:
            self._delays.append(self._chunk.late)


def _goes_on(policy: Policy) -> Callable[..., Mapping[str, object]]:
    """The policy's `infer(observation, previous=..., delay=...)`, in its process or on a server.

    Raises:
      ValueError: it takes neither.
    """
    taken = inspect.signature(policy.infer).parameters
    # A wrapper that hands on whatever it is given takes them too.
    hands_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    if hands_on or {"previous", "delay"} <= set(taken):
        return policy.infer
    told: Mapping[str, object] = getattr(policy, "get_server_metadata", dict)()
    if told.get(observation_keys.REAL_TIME_CHUNKING):

        def infer(
            observation: Mapping[str, object], *, previous: Float[np.ndarray, "n rd"], delay: int
        ) -> Mapping[str, object]:
            return policy.infer(observation_keys.with_previous(observation, previous, delay))

        return infer
    server = "a server started with --real-time-chunking"
    raise ValueError(
        f"{type(policy).__name__}.infer takes {list(taken)}: real-time chunking needs previous= "
        f"and delay= (deploy.policy.Policy), or {server}; others can use SkipLateActions"
    )


def _check_rate(policy: Policy, control_hz: float) -> None:
    """Warn of a control rate that is not the one the policy's actions were recorded at.

    Raises:
      ValueError: it is no rate.
    """
    if not 0 < control_hz < math.inf:
        raise ValueError(f"control_hz must be positive and finite, got {control_hz}")
    # Of a policy in this process, or of openpi's client.
    told = getattr(policy, "metadata", None) or getattr(policy, "get_server_metadata", dict)()
    fps = told.get("fps") if isinstance(told, Mapping) else None
    if (
        isinstance(fps, int | float)
        and fps > 0
        and not math.isclose(control_hz, fps, rel_tol=0.005)
    ):
        progress.warn(
            f"the policy was trained at {fps:g} actions a second, and control_hz is "
            f"{control_hz:g}: the robot will move {control_hz / fps:.2g} times as fast as in "
            f"training; call the executor {fps:g} times a second, or resample its actions"
        )


def _actions(result: Mapping[str, object], execute_steps: int) -> Float[np.ndarray, "ah rd"]:
    """The actions of a policy's answer, checked before any of them reaches the robot."""
    if not isinstance(result, Mapping) or "actions" not in result:
        found = sorted(map(str, result)) if isinstance(result, Mapping) else type(result).__name__
        raise ValueError(
            f"expected the policy's answer as a mapping with 'actions' (horizon, dimensions), got "
            f"{found}; is the server a policy's?"
        )
    actions = np.array(result["actions"])
    if actions.ndim != 2 or len(actions) < execute_steps or actions.dtype.kind not in "fiu":
        raise ValueError(
            f"expected a chunk of actions (horizon >= {execute_steps} executed steps, dimensions), "
            f"got {actions.dtype} of the shape {actions.shape}"
        )
    wrong = np.argwhere(~np.isfinite(actions))
    if len(wrong):
        at, dimension = wrong[0]
        raise ValueError(
            f"the policy's actions are not finite: {actions[at, dimension]} in dimension "
            f"{dimension} of action {at} ({len(wrong)} such values); none of this chunk is executed"
        )
    return actions


def _wait_for(asked: concurrent.futures.Future[Mapping[str, object]]) -> None:
    """Wait for an answer as long as it takes, and warn once: the robot stands still meanwhile."""
    if not concurrent.futures.wait([asked], timeout=SILENT).done:
        progress.say(
            f"warning: the policy has not answered for {SILENT:g} s; still waiting: check its "
            "server, and restart both if it is stuck"
        )
        concurrent.futures.wait([asked])


def _copy(observation: Mapping[str, object]) -> dict[str, object]:
    """A copy of an observation with everything in it, nested or not."""
    return {
        name: _copy(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for name, value in observation.items()
    }


def _check_positive(execute_steps: int | None) -> None:
    if execute_steps is not None and execute_steps < 1:
        raise ValueError(f"execute_steps must be at least 1, got {execute_steps}")


def _reset(policy: Policy) -> None:
    reset = getattr(policy, "reset", None)
    if reset is not None:
        reset()
