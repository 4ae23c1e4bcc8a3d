"""Collectives of a compiled program: their kinds, how often they run, and the bytes they move.

Read from the text of the optimized HLO. A collective inside a loop counts once per iteration: XLA
states the trip count, or else (for TPUs) it is the bound in the loop's condition. Two peculiarities
of the TPU compiler: a collective that overlaps other work appears in each of those fusions, on one
channel, and counts once; a reduce-scatter is an all-reduce inside a fusion of that
name. Bytes are those of the result on one device, not those on the network.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?(?:-> (.*))?\{$")
_SCATTER = re.compile(r"all-reduce-scatter(\.|$)")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[^0-9]*"?n"?[^0-9]*(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64|c128)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_PATH = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str
    # Executions in one run of the program.
    times: int
    # Bytes of its result on one device, for one execution.
    bytes: int
    # The JAX operation it comes from.
    source: str


def collectives(text: str) -> list[Collective]:
    """Every collective of a program (`compiled.as_text()`), in the order of the text."""
    bodies, results, entry = _computations(text)
    times = _times(bodies, entry)
    found: list[Collective] = []
    channels: set[tuple[str, str]] = set()
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match and times[name]:
                channel = _CHANNEL.search(line)
                if channel and (match[2], channel[1]) in channels:
                    continue
                if channel:
                    channels.add((match[2], channel[1]))
                path = _PATH.search(line)
                arrays, kind = list(_sizes(match[1])), match[2]
                size = sum(arrays)
                if match[3] and len(arrays) > 1:
                    # An asynchronous start returns operand, result and bookkeeping.
                    size = sorted(arrays)[-2] if kind == "reduce-scatter" else max(arrays)
                if _SCATTER.match(name):
                    kind, size = "reduce-scatter", sum(_sizes(results[name]))
                found.append(Collective(kind, times[name], size, path[1] if path else ""))
    return found


def totals(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Kind → (executions, bytes moved) in one run of the program."""
    counts = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return {
        kind: (sum(c.times for c in some), sum(c.times * c.bytes for c in some))
        for kind, some in counts.items()
    }


def _computations(text: str) -> tuple[dict[str, list[str]], dict[str, str], str]:
    """Lines and result shape of each computation, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    results: dict[str, str] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header[2]
            bodies[name], results[name] = [], header[3] or ""
            entry = name if header[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, results, entry


def _times(bodies: dict[str, list[str]], entry: str) -> collections.Counter[str]:
    """Executions of each computation; a computation comes before its callers in the text."""
    times: collections.Counter[str] = collections.Counter({entry: 1})
    for name in reversed(bodies):
        for line in bodies[name]:
            trips = _trips(line, bodies)
            for called in _calls(line):
                times[called] += times[name] * trips
    return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Executions of the computation that a line calls: one, or the iterations of a loop."""
    known, condition = _TRIPS.search(line), _CONDITION.search(line)
    if known:
        return int(known[1])
    if not condition:
        return 1
    bounds = [_BOUND.search(one) for one in bodies.get(condition[1], [])]
    return max((int(bound[1]) for bound in bounds if bound), default=1)


def _calls(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for group in _BRANCHES.findall(line):
        yield from re.findall(r"%?([\w.\-]+)", group)


def _sizes(shape: str) -> Iterator[int]:
    """Bytes of each array of a shape's text, such as `(f32[8,16]{1,0}, u32[])`."""
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        count = math.prod(int(n) for n in dimensions.split(",") if n)
        yield count * max(bits // 8, 1)
