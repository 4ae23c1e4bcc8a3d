"""Factorial studies: effects of each direction and of pairs of them, and what each cell costs.

A direction's effect is the mean over all pairs of cells that differ in it alone; an interaction is
the effect of one direction where the other is cut, minus its effect where it is not: below zero,
two cuts cost more together than one by one. Both are sums of outcomes, formed for each training
seed and episode, so that their intervals count seeds and episodes as those of means do.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from shallow_pi import figures, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.deploy import policy as deployed
from shallow_pi.evaluation import intervals, plots
from shallow_pi.evidence import calibrating, outcomes, sources
from shallow_pi.evidence.claims.claim import Claim, Side
from shallow_pi.inference import tuning
from shallow_pi.models import batch as batches
from shallow_pi.speed import flops, latency

# Results of a claim.
FILE = "{claim}-costs.json"
_TICKS = (0.5, 1, 2, 5, 10, 20, 30, 50, 70, 100, 150, 200, 500)
# Of the columns.
_COLORS = ("teacher", "task_only", "student")
# A factor's place among the claim's, and one of its levels but the first.
Cut = tuple[int, str]


@dataclasses.dataclass(frozen=True)
class Effect:
    """Of one cut, or of two together."""

    cuts: tuple[Cut, ...]
    found: intervals.Mean
    # Pairs (or fours) of cells that it is the mean of, and how many there are in the design.
    count: int
    total: int


def effects(table: outcomes.Table) -> list[Effect]:
    """Main effects, then interactions of two factors; those that were measured."""
    factors = table.claim.factors
    single = [(i, level) for i, factor in enumerate(factors) for level in factor.levels[1:]]
    pairs = [(a, b) for a, b in itertools.combinations(single, 2) if a[0] != b[0]]
    found = (_effect(table, cuts) for cuts in [*((cut,) for cut in single), *pairs])
    return [effect for effect in found if effect is not None]


def _effect(table: outcomes.Table, cuts: tuple[Cut, ...]) -> Effect | None:
    """The mean over the groups of cells with most training seeds."""
    design, factors = dict(table.claim.design), table.claim.factors
    groups: list[dict[Side, float]] = []
    for levels in design:
        if any(levels[i] != factors[i].levels[0] for i, _ in cuts):
            continue
        group: dict[Side, float] = {}
        for made in itertools.product((False, True), repeat=len(cuts)):
            changed = list(levels)
            for (i, level), cut in zip(cuts, made, strict=True):
                changed[i] = level if cut else changed[i]
            group[design[tuple(changed)]] = (-1.0) ** (len(cuts) - sum(made))
        groups.append(group)
    seeds = [frozenset.intersection(*map(table.seeds, group)) for group in groups]
    most = max(seeds, key=len)
    if not most:
        return None
    chosen = [group for group, there in zip(groups, seeds, strict=True) if there == most]
    total: dict[Side, float] = {}
    for side, sign in itertools.chain.from_iterable(group.items() for group in chosen):
        total[side] = total.get(side, 0.0) + sign / len(chosen)
    found = table.combination(total)
    return None if found is None else Effect(cuts, found, len(chosen), len(groups))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one inference at batch 1."""

    # Of one inference, counted from the sizes.
    operations: int
    # Of the weights held, in the 16 bits of a deployed policy or in 8.
    bytes: int
    # Of the policy as the suite runs it, all timed in turns.
    median_ms: float
    device: str


def ensure(chosen: Iterable[Claim], runs: pathlib.Path, results: pathlib.Path) -> None:
    """Measure the costs of factorial claims' policies that are there, unless that was done.

    A policy more, and all are measured again: times compare in one run only.
    """
    for claim in chosen:
        there = {
            (row.label, column.label): (row.policies[0], column.situation.num_steps)
            for row in claim.variants
            for column in claim.columns
            if claim.factors and sources.exists(row.policies[0], runs)
        }
        before = read(claim, results).keys()
        if not there.keys() - before:
            continue
        if lost := before - there.keys():
            progress.say(
                f"{claim.name}: no costs of {len(there.keys() - before)} cells; times compare in "
                f"one run only, and {len(lost)} measured before are not in {runs}"
            )
            continue
        calibrating.ensure([slug for slug, _ in there.values()], runs)
        loaded = {
            side: sources.load(slug, runs, num_steps) for side, (slug, num_steps) in there.items()
        }
        times = latency.median_latency(
            {" ".join(side): _call(policy) for side, policy in loaded.items()}, label="Costs"
        )
        lines = []
        for side, policy in loaded.items():
            median = round(times.median_ms[" ".join(side)], 3)
            cost = Cost(*_counted(policy), median, times.device)
            lines.append(json.dumps([*side, *dataclasses.astuple(cost)]))
        results.mkdir(parents=True, exist_ok=True)
        path = results / FILE.format(claim=claim.name)
        run_folder.write_text(path, "[\n" + ",\n".join(lines) + "\n]\n", run_folder.AGAIN)


def _call(policy: deployed.Policy) -> Callable[[], jax.Array]:
    """Its program, on noise for every camera and a full prompt that are on the device already."""
    batch = batches.noise(policy.assets.model, 1).observation
    noise = np.zeros((1, *policy.noise_shape), np.float32)
    layout, packed = policy.pack(batch, noise)
    return functools.partial(policy.program, layout, jax.device_put(packed))


def _counted(policy: deployed.Policy) -> tuple[int, int]:
    """Operations and bytes."""
    program = policy.program
    options = dataclasses.replace(tuning.ALL_OFF, quantize=program.options.quantize)
    model = policy.assets.model
    half = dataclasses.replace(model, dtype="bfloat16")
    held = flops.weight_bytes(half, num_steps=1, options=options)
    operations = flops.inference_flops(model, num_steps=program.num_steps, options=options)
    return operations.total, held.total


def read(claim: Claim, results: pathlib.Path) -> dict[Side, Cost]:
    """By row and column; empty where nothing was counted."""
    path = results / FILE.format(claim=claim.name)
    if not claim.factors or not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {(row, column): Cost(*numbers) for row, column, *numbers in kept}


def lines(table: outcomes.Table, results: pathlib.Path) -> Iterator[str]:
    """The page's tables of effects and of costs; nothing for other claims."""
    claim = table.claim
    if found := effects(table) if claim.factors else []:
        yield ""
        yield "| cut | effect on success, points | cells |"
        yield "|---|---|---|"
        for effect in found:
            name = " × ".join(f"{claim.factors[i].name} {level}" for i, level in effect.cuts)
            name = name if len(effect.cuts) == 1 else f"*together:* {name}"
            mean, low, high = (
                f"{100 * v:+.1f}".replace("-", "−")
                for v in (effect.found.mean, effect.found.low, effect.found.high)
            )
            seeds = f"{effect.found.seeds} seeds" if effect.found.seeds > 1 else "1 seed"
            groups = f"{effect.count} of {effect.total}, {seeds}"
            yield f"| {name} | {mean} ({low} to {high}) | {groups} |"
        yield ""
        yield (
            "The effect of a cut is the mean over all pairs of cells that differ only in this cut. "
            "*Together* is the effect of two cuts beyond the sum of both: below zero, they make "
            "each other worse."
        )
    if costs := read(claim, results):
        names = [column.label for column in claim.columns]
        device = next(iter(costs.values())).device
        yield ""
        yield f"| one inference, batch 1 | M operations | ms on {device} | weights, kB |"
        yield "|---|---|---|---|"
        for row in claim.variants:
            own = [costs[row.label, name] for name in names if (row.label, name) in costs]
            if own:
                counts = " / ".join(f"{cost.operations / 1e6:.1f}" for cost in own)
                times = " / ".join(f"{cost.median_ms:.2f}" for cost in own)
                yield f"| {row.label} | {counts} | {times} | {own[0].bytes / 1e3:.0f} |"
        yield ""
        yield f"Operations and times: {' / '.join(names)}."


def plot(path: pathlib.Path, table: outcomes.Table, results: pathlib.Path) -> bool:
    """Success against operations, the best of each cost named; False, and no file, without any."""
    costs = read(table.claim, results)
    means = {side: table.mean(side) for side in costs}
    # Weights alone in 8 bits have the operations of 16.
    shown = (side for side in means if not side[0].endswith("for weights"))
    measured = {side: mean for side in shown if (mean := means[side]) is not None}
    if not measured:
        return False
    figure, axes = figures.make(1, 1, (11.6, 4.8))
    axis = axes[0][0]
    names = [column.label for column in table.claim.columns]
    colors = dict(zip(names, map(plots.COLORS.get, _COLORS), strict=False))
    for side, mean in measured.items():
        row, column = side
        x, y = costs[side].operations / 1e6, 100 * mean.mean
        color, filled = colors[column], not row.endswith("8 bits")
        marker = "*" if row.startswith("teacher") else "o" if row.startswith("6") else "s"
        axis.plot([x, x], [100 * mean.low, 100 * mean.high], color=color, linewidth=0.6, alpha=0.5)
        face = color if filled else "white"
        axis.plot(x, y, marker, color=color, markersize=7, markerfacecolor=face)
    best = frontier({side: (costs[side].operations, mean.mean) for side, mean in measured.items()})
    points = [(costs[side].operations / 1e6, 100 * measured[side].mean) for side in best]
    axis.plot(*zip(*points, strict=True), color="#999999", linewidth=1, zorder=0)
    for number, point in enumerate(points, 1):
        axis.annotate(str(number), point, (-8, 7), textcoords="offset points", fontsize=8)
    listed = [f"{number}  {row}, {column}" for number, (row, column) in enumerate(best, 1)]
    beside = {"ha": "left", "va": "center", "fontsize": 7, "transform": axis.transAxes}
    axis.text(1.02, 0.5, "\n".join(listed), **beside)
    for name in names:
        axis.plot([], [], "o", color=colors[name], label=name)
    axis.set(xlabel="operations of one inference, M", ylabel="success, %", ylim=(0, 103))
    axis.set_xscale("log")
    counts = [costs[side].operations / 1e6 for side in measured]
    ticks = [n for n in _TICKS if min(counts) < n < max(counts)]
    axis.minorticks_off()
    axis.set_xticks(ticks, [f"{n:g}" for n in ticks])
    figures.legend(axis, loc="upper left")
    figures.tidy(axis, "both")
    figures.save(figure, path)
    return True


def frontier(points: Mapping[Side, tuple[float, float]]) -> Sequence[Side]:
    """The sides that nothing of at most their cost exceeds in success, the cheapest first."""
    found: list[Side] = []
    for side, (_, success) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not found or success > points[found[-1]][1]:
            found.append(side)
    return found
