"""From chunks to single actions: when to plan, and which action of which chunk is due now.

An executor is called once every control step and gives one action. It asks anything that has
`infer(observation)` and answers with a mapping of "actions" (horizon, dimensions): a `Policy`, or a
client of openpi's server. Executors have `infer` and `reset` themselves, so that they fit where
openpi's `ActionChunkBroker` fits.

    ActionChunkBroker    plans when the chunk is used up; the robot waits for the plan
    SkipLateActions      plans in the background; a plan that comes d steps late loses its first d
    RealTimeChunking     the same, and the plan goes on from the actions executed meanwhile

Control steps are counted, not timed: an action belongs to the step it was predicted for. Time is
looked at only where the robot runs out of actions and has to wait.
"""

import collections
import concurrent.futures
import dataclasses
import inspect
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float


class Planner(Protocol):
    """Plans a chunk of actions for one observation."""

    def infer(self, observation: Mapping[str, Any], /) -> Mapping[str, Any]:
        """A mapping with `actions` (horizon, robot's dimensions), the first one due now."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A plan, and the control step of its first action."""

    actions: Float[np.ndarray, "ah rd"]
    result: Mapping[str, Any]
    start: int
    # Control steps between its observation and its arrival.
    late: int = 0

    def at(self, step: int) -> dict[str, Any]:
        """What the executor answers at a control step."""
        index = step - self.start
        return {**self.result, "actions": self.actions[index], "late_steps": self.late}


class ActionChunkBroker:
    """One action a call; a new plan when `execute_steps` actions of the last are executed.

    With fewer steps than the chunk has actions this is receding horizon control.

    Args:
      policy: what plans.
      execute_steps: actions executed of each chunk; None is all of them.
    """

    def __init__(self, policy: Planner, execute_steps: int | None = None) -> None:
        _check_positive(execute_steps)
        self._policy, self._execute_steps = policy, execute_steps
        self._chunk: _Chunk | None = None
        self._step = 0

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The action due now, (robot's dimensions), as `actions`, beside the rest of its plan."""
        chunk = self._chunk
        if chunk is None or self._step - chunk.start >= (self._execute_steps or len(chunk.actions)):
            result = self._policy.infer(observation)
            chunk = _Chunk(_actions(result, self._execute_steps or 1), result, self._step)
            self._chunk = chunk
        self._step += 1
        return chunk.at(self._step - 1)

    def reset(self) -> None:
        """Begin an episode."""
        self._chunk, self._step = None, 0
        _reset(self._policy)


class SkipLateActions:
    """Plans in the background while the last chunk is executed, and skips what came too late.

    A plan is asked for as soon as `execute_steps` actions of the last one were due and none is
    under way. When it arrives d control steps after its observation, its action d is executed next.
    The robot waits for the first plan, and where a chunk is used up before the next is there; if
    that is over too when it comes, a new one is asked for, and what goes by until then is not
    counted, since the robot stands. What goes wrong in the background is raised by the next call.

    Args:
      policy: what plans; called from one other thread, one plan at a time.
      execute_steps: actions of a chunk that are due before the next plan is asked for.
      control_hz: control steps a second. Given, the steps that go by while the robot waits count as
        late too; None for a world that waits with the robot.
      worker: runs the planning; None is a thread of its own, ended by `close`.
      clock: seconds, from anywhere.
    """

    def __init__(
        self,
        policy: Planner,
        execute_steps: int,
        *,
        control_hz: float | None = None,
        worker: concurrent.futures.Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_positive(execute_steps)
        if control_hz is not None and not control_hz > 0:
            raise ValueError(f"control_hz must be positive, got {control_hz}")
        self._policy, self._execute_steps = policy, execute_steps
        self._control_hz, self._clock = control_hz, clock
        self._owns_worker = worker is None
        self._worker = worker or concurrent.futures.ThreadPoolExecutor(1, "plan")
        self._chunk: _Chunk | None = None
        self._pending: tuple[concurrent.futures.Future[Mapping[str, Any]], int] | None = None
        self._step = 0
        self._closed = False
        self._lock = threading.Lock()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The action due now, (robot's dimensions), as `actions`, beside the rest of its plan.

        `late_steps` says how late that plan was.

        Raises:
          Whatever the policy raised since the last call; the next call plans anew.
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
        """Begin an episode; waits for a plan that is under way, and drops it."""
        with self._lock:
            self._drop()
            self._chunk, self._step = None, 0
            _reset(self._policy)

    def close(self) -> None:
        """Wait for a plan that is under way, and end the thread; closing twice is no error."""
        with self._lock:
            self._drop()
            self._closed = True
            if self._owns_worker:
                self._worker.shutdown()

    def __enter__(self) -> "SkipLateActions":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _executed(self) -> float:
        """How many actions of the chunk were due; without one, more than any chunk has."""
        return np.inf if self._chunk is None else self._step - self._chunk.start

    def _conditions(self) -> dict[str, Any]:
        """What the policy is given beside the observation."""
        return {}

    def _ask(self, observation: Mapping[str, Any]) -> None:
        # A robot may fill the same buffers with the next observation.
        kept = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in observation.items()}
        asked = self._worker.submit(self._policy.infer, kept, **self._conditions())
        self._pending = asked, self._step

    def _take_arrived(self) -> None:
        if self._pending is not None and self._pending[0].done():
            (asked, start), self._pending = self._pending, None
            result = asked.result()
            actions = _actions(result, self._execute_steps)
            self._chunk = _Chunk(actions, result, start, late=self._step - start)

    def _wait(self, observation: Mapping[str, Any]) -> _Chunk:
        """The chunk that has an action for this step."""
        while self._chunk is None or self._executed() >= len(self._chunk.actions):
            if self._pending is None:
                self._chunk = None
                self._ask(observation)
                continue
            began = self._clock()
            concurrent.futures.wait([self._pending[0]])
            seconds = self._clock() - began
            if self._chunk is not None and self._control_hz is not None:
                self._step += round(seconds * self._control_hz)
            self._take_arrived()
        return self._chunk

    def _drop(self) -> None:
        if self._pending is not None:
            asked, _ = self._pending
            self._pending = None
            if not asked.cancel():
                concurrent.futures.wait([asked])


class RealTimeChunking(SkipLateActions):
    """`SkipLateActions` whose plans go on from the chunk they replace (see `models.real_time`).

    The policy is given what is left of the chunk and how many of these actions it will find
    executed: the largest of the last delays. It must take both, `infer(observation, previous=...,
    delay=...)`, as `Policy` does; call its `warm_up(guided=True)` first, so that no plan has to
    wait for the compiler.

    Args:
      policy: what plans.
      execute_steps: as there.
      delay: control steps the first plans are expected to be late.
      remember: how many of the last delays the expectation is made of.
      options: `control_hz`, `worker` and `clock`, as there.
    """

    def __init__(
        self,
        policy: Planner,
        execute_steps: int,
        *,
        delay: int = 1,
        remember: int = 10,
        **options: Any,
    ) -> None:
        taken = inspect.signature(policy.infer).parameters
        if not {"previous", "delay"} <= set(taken):
            raise ValueError(
                f"{type(policy).__name__}.infer takes {list(taken)}: real-time chunking needs a "
                "policy that takes previous= and delay= (deploy.policy.Policy); others can be "
                "executed by SkipLateActions"
            )
        if delay < 0 or remember < 1:
            raise ValueError(f"expected delay >= 0 and remember >= 1, got {delay} and {remember}")
        super().__init__(policy, execute_steps, **options)
        self._expected = delay
        self._delays: collections.deque[int] = collections.deque([delay], maxlen=remember)

    def reset(self) -> None:
        """Begin an episode; delays are expected as at first."""
        super().reset()
        self._delays.clear()
        self._delays.append(self._expected)

    def _conditions(self) -> dict[str, Any]:
        chunk = self._chunk
        left = () if chunk is None else chunk.actions[self._step - chunk.start :]
        if not len(left):
            return {}
        return {"previous": left, "delay": min(max(self._delays), len(left))}

    def _take_arrived(self) -> None:
        before = self._chunk
        super()._take_arrived()
        if before is not None and self._chunk is not None and self._chunk is not before:
            self._delays.append(self._chunk.late)


def _actions(result: Mapping[str, Any], execute_steps: int) -> Float[np.ndarray, "ah rd"]:
    actions = np.asarray(result["actions"])
    if actions.ndim != 2 or len(actions) < execute_steps:
        raise ValueError(
            f"expected a chunk of actions (horizon >= {execute_steps} executed steps, dimensions), "
            f"got the shape {actions.shape}"
        )
    return actions


def _check_positive(execute_steps: int | None) -> None:
    if execute_steps is not None and execute_steps < 1:
        raise ValueError(f"execute_steps must be at least 1, got {execute_steps}")


def _reset(policy: Planner) -> None:
    reset = getattr(policy, "reset", None)
    if reset is not None:
        reset()
