"""Simulators in processes of their own, so that several of them render and step at once.

Each process holds some of the simulators and answers one call at a time. It is a fresh interpreter
that imports the suite's package and nothing else, reads calls from a pipe, and ends with it.
"""

import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from shallow_pi import interrupts, progress
from shallow_pi.sims import simulator

# Linux's account of this machine's memory.
_MEMORY = pathlib.Path("/proc/meminfo")


class Status(NamedTuple):
    """The properties of a simulator after a call."""

    task: str
    prompt: str
    success: bool
    done: bool
    time: float


def fitting(suite: simulator.Suite, wanted: int) -> int:
    """The number of simulators to run side by side: those that fit in memory, at least one.

    Says so where they are fewer than wanted. Only a suite with large simulators gives their size
    (by a property `memory`, in bytes), and only Linux tells what is free.
    """
    each, free = getattr(suite, "memory", 0), _free_memory()
    if free is None or each * wanted <= free:
        return wanted
    found = max(1, free // each)
    progress.say(
        f"{wanted} simulators side by side need about {each * wanted / 1e9:.0f} GB of memory, and "
        f"{free / 1e9:.1f} GB are free: {found} at once"
    )
    return int(found)


def _free_memory() -> int | None:
    """Bytes that new processes can use without swapping; None if unknown."""
    text = _MEMORY.read_text(encoding="utf-8") if _MEMORY.exists() else ""
    found = re.search(r"MemAvailable: +(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


class Workers:
    """Simulators of one suite, which can be pickled, spread over processes (at most `count`)."""

    def __init__(self, suite: simulator.Suite, count: int, processes: int) -> None:
        self._processes = [_Process(suite) for _ in range(min(processes, count))]
        self.simulators = [
            Remote(self._processes[i % len(self._processes)], i // len(self._processes))
            for i in range(count)
        ]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.close()


class _Process:
    """The near end of one process."""

    def __init__(self, suite: simulator.Suite) -> None:
        self._pipe, far = multiprocessing.Pipe()
        code = f"from {__name__} import main; main({far.fileno()})"
        # The suite's class may lie anywhere that this process imports from.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with interrupts.held():  # Ctrl-C is for the process that asks.
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[far.fileno()], env=environment
            )
        far.close()
        self._lock = threading.Lock()
        self._pipe.send(suite)

    def call(self, index: int, name: str, *arguments: object) -> tuple[Any, Status | None]:
        """Call a method of a simulator.

        Raises:
          ValueError: by the simulator, or because its process has ended.
        """
        try:
            with self._lock:
                self._pipe.send((index, name, arguments))
                error, result, status = self._pipe.recv()
        except (EOFError, OSError) as ended:
            code = self._process.wait(10)
            raise ValueError(
                f"a simulator's process ended with status {code} in {name}(): the reason is "
                "printed above, or it was killed for its memory (give fewer --parallel)"
            ) from ended
        if error is not None:
            raise error
        return result, status

    def close(self) -> None:
        self._pipe.close()
        self._process.wait()


class Remote:
    """A `simulator.Simulator` in another process."""

    def __init__(self, process: _Process, index: int) -> None:
        self._process, self._index = process, index
        self._status: Status | None = None

    def _call(self, name: str, *arguments: object) -> Any:
        result, self._status = self._process.call(self._index, name, *arguments)
        return result

    @property
    def _known(self) -> Status:
        assert self._status is not None, "reset first"
        return self._status

    def reset(self, seed: int) -> None:
        """Start the episode of this seed."""
        self._call("reset", seed)

    def observe(self) -> simulator.Observation:
        """Render, and return the observation."""
        found: simulator.Observation = self._call("observe")
        return found

    def step(self, action: simulator.Action) -> None:
        """Apply one action."""
        self._call("step", np.asarray(action))

    def expert(self) -> simulator.Action:
        """The action of the suite's expert, which sees the true state."""
        return np.asarray(self._call("expert"))

    @property
    def task(self) -> str:
        """The task's short name."""
        return self._known.task

    @property
    def prompt(self) -> str:
        """The instruction."""
        return self._known.prompt

    @property
    def success(self) -> bool:
        """The goal has been reached."""
        return self._known.success

    @property
    def done(self) -> bool:
        """The episode has ended."""
        return self._known.done

    @property
    def time(self) -> float:
        """Seconds since the episode began."""
        return self._known.time


def expert(sim: Any) -> simulator.Action:
    """The expert of a simulator in another process (see `simulator.Expert`)."""
    assert isinstance(sim, Remote), "made by Workers"
    return sim.expert()


def main(descriptor: int) -> None:
    """Answer calls until the pipe is closed."""
    os.dup2(2, 1)  # Some packages print; the output is a command's result.
    pipe = multiprocessing.connection.Connection(descriptor)
    sims: dict[int, simulator.Simulator] = {}
    try:
        suite: simulator.Suite = pipe.recv()
        while True:
            index, name, arguments = pipe.recv()
            error, result, status = None, None, None
            try:
                if index not in sims:
                    sims[index] = suite.make()
                result = _answer(suite, sims[index], name, arguments)
                sim = sims[index]
                status = Status(sim.task, sim.prompt, bool(sim.success), sim.done, sim.time)
            except Exception as raised:
                error = raised if isinstance(raised, ValueError) else _as_text(raised)
            pipe.send((error, result, status))
    except (EOFError, OSError):
        os._exit(0)  # Graphics libraries may not survive an orderly end.


def _answer(
    suite: simulator.Suite, sim: simulator.Simulator, name: str, arguments: tuple[Any, ...]
) -> Any:
    if name == "expert":
        play = suite.expert()
        assert play is not None, "asked only where there is one"
        return play(sim)
    calls: Mapping[str, Any] = {"reset": sim.reset, "observe": sim.observe, "step": sim.step}
    return calls[name](*arguments)


def _as_text(error: Exception) -> ValueError:
    """An error that surely can be pickled."""
    return ValueError(f"the simulator failed with {type(error).__name__}: {error}")
