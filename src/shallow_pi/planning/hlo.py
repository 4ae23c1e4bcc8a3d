"""Collectives of a compiled program: their kinds, how often they run, and the bytes they move.

Read from the text of the optimized HLO. A collective inside a loop counts once per iteration: XLA
states the trip count, or else (for TPUs) it is the bound in the loop's condition. Two peculiarities
of the TPU compiler: a collective that overlaps other work appears in each of those fusions, on one
channel, and counts once; a reduce-scatter is an all-reduce inside a fusion of that
name. Bytes are those of the result on one device; `Collective.sent` is what goes over the network.
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
_DEVICES = re.compile(r"^HloModule .*\bnum_partitions=(\d+)")
# "[2,4]<=[8]" (two groups of four devices) or "{{0,1,2,3},{4,5,6,7}}".
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")
# Bytes that a device sends for each byte of the whole array: a sum is scattered, then gathered.
_TRAFFIC = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}


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
    # Devices that exchange with each other.
    group: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all its executions."""
        # The result of a reduce-scatter is one device's part of the whole array.
        whole = self.bytes * (self.group if self.kind == "reduce-scatter" else 1)
        return self.times * whole * _TRAFFIC[self.kind]


def collectives(text: str) -> list[Collective]:
    """Every collective of a program (`compiled.as_text()`), in the order of the text."""
    devices = _DEVICES.search(text)
    everyone = int(devices[1]) if devices else 1
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
                shape, kind = match[1], match[2]
                # The start of a sum has its results alone.
                begins = match[3] and kind != "all-reduce"
                size = _started(shape) if begins else sum(_sizes(shape))
                if _SCATTER.match(name):
                    kind, size = "reduce-scatter", sum(_sizes(results[name]))
                group = _group(line) or everyone
                source = path[1] if path else ""
                found.append(Collective(kind, times[name], size, source, group))
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


def _started(shape: str) -> int:
    """Bytes of the results of an asynchronous start: operands, as many results, and counters."""
    arrays = list(_sizes(re.sub(r"\b[su]32\[\]", "", shape)))
    return sum(arrays[len(arrays) // 2 :])


def _group(line: str) -> int:
    """Devices of the first group of a collective's line; 0 if it names none."""
    found = _GROUPS.search(line)
    if not found:
        return 0
    return int(found[1]) if found[1] else found[2].count(",") + 1


def _sizes(shape: str) -> Iterator[int]:
    """Bytes of each array of a shape's text, such as `(f32[8,16]{1,0}, u32[])`."""
    for dtype, dimensions in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        count = math.prod(int(n) for n in dimensions.split(",") if n)
        yield count * max(bits // 8, 1)
