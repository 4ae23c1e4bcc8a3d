"""Kernels of a compiled call, from a trace of JAX's profiler, on a GPU."""

import collections
import dataclasses
import gzip
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

# Characters of a kernel's name that are kept.
NAME = 110


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One call on the device."""

    count: float
    # Milliseconds in which some kernel runs, and the kernels' own added up.
    busy_ms: float
    sum_ms: float
    # Those that take longest, all runs of one together: name, runs, milliseconds.
    longest: list[tuple[str, float, float]]


def kernels(call: Callable[[], PyTree], *, calls: int = 3, keep: int = 60) -> Kernels | None:
    """Trace a compiled call; None where the profiler reports no kernels, as on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())
        found = sorted(pathlib.Path(folder).rglob("*.trace.json.gz"))
        if not found:
            return None
        with gzip.open(found[0]) as file:
            return read(json.load(file)["traceEvents"], calls, keep)


def read(events: list[dict[str, Any]], calls: int, keep: int) -> Kernels | None:
    """The kernels among the events of a trace, for each of its calls."""

    def names(kind: str) -> dict[tuple[int, ...], str]:
        ids = ("pid",) if kind == "process_name" else ("pid", "tid")
        return {
            tuple(event[name] for name in ids): event["args"]["name"]
            for event in events
            if event.get("ph") == "M" and event.get("name") == kind
        }

    processes, threads = names("process_name"), names("thread_name")
    ran = [
        event
        for event in events
        if event.get("ph") == "X"
        and "GPU" in processes.get((event["pid"],), "")
        and "stream" in threads.get((event["pid"], event["tid"]), "").lower()
    ]
    if not ran:
        return None
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for event in ran:
        groups[event["name"][:NAME]].append(event["dur"])
    busy, until = 0.0, 0.0
    for event in sorted(ran, key=lambda event: event["ts"]):
        end = event["ts"] + event["dur"]
        busy += max(0.0, end - max(until, event["ts"]))
        until = max(until, end)
    each = 1e3 * calls  # Durations are microseconds.
    longest = sorted(groups.items(), key=lambda item: -sum(item[1]))[:keep]
    return Kernels(
        count=len(ran) / calls,
        busy_ms=busy / each,
        sum_ms=sum(event["dur"] for event in ran) / each,
        longest=[(name, len(times) / calls, sum(times) / each) for name, times in longest],
    )
