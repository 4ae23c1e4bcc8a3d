"""Collectives in a compiled program: kinds, how often they run, and how many bytes they move.

Read from the text of the optimized HLO. A collective inside a loop counts as often as the loop
runs: XLA writes the trip count beside it, or else (for TPUs) it is the bound that the loop's
condition compares its counter with. Two more habits of the TPU compiler: a collective that runs
beside other work is named in each fusion it runs beside, with one channel, and counts once; a
reduce-scatter is a fusion of that meaning around an all-reduce. Bytes are those of the result on
one device, whatever the network then makes of them.
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
    # How often one run of the program executes it.
    times: int
    # Of its result on one device, once.
    bytes: int
    # Where it comes from, in JAX's terms.
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
                    # An asynchronous start gives operand, result and marks of its own.
                    size = sorted(arrays)[-2] if kind == "reduce-scatter" else max(arrays)
                if _SCATTER.match(name):
                    kind, size = "reduce-scatter", sum(_sizes(results[name]))
                found.append(Collective(kind, times[name], size, path[1] if path else ""))
    return found


def totals(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Kind → (how many run, bytes they move) in one run of the program."""
    counts = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return {
        kind: (sum(c.times for c in some), sum(c.times * c.bytes for c in some))
        for kind, some in counts.items()
    }


def _computations(text: str) -> tuple[dict[str, list[str]], dict[str, str], str]:
    """The lines and the result's shape of each computation, and the name of the one that is run."""
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
    """How often each computation runs; the caller of a computation comes after it in the text."""
    times: collections.Counter[str] = collections.Counter({entry: 1})
    for name in reversed(bodies):
        for line in bodies[name]:
            trips = _trips(line, bodies)
            for called in _calls(line):
                times[called] += times[name] * trips
    return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often what a line calls runs: once, but for a loop."""
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
