"""Factorial studies: effects of each direction and of pairs of them, and what each cell costs.

A direction's effect is the mean over all pairs of cells that differ in it alone; an interaction is
the effect of one direction where the other is cut, minus its effect where it is not: below zero,
two cuts cost more together than one by one. Both are sums of outcomes, formed for each training
seed and episode, so that their intervals count seeds and episodes as those of means do.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from shallow_pi import figures
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.evaluation import intervals, plots
from shallow_pi.evidence import outcomes, sources
from shallow_pi.evidence.claim import Claim, Side
from shallow_pi.inference import tuning
from shallow_pi.models import pi0
from shallow_pi.speed import flops

# Results of a claim.
FILE = "{claim}-operations.json"
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
    seeds = [min(table.seeds(side) for side in group) for group in groups]
    most = max(seeds)
    if not most:
        return None
    chosen = [group for group, count in zip(groups, seeds, strict=True) if count == most]
    total: dict[Side, float] = {}
    for side, sign in itertools.chain.from_iterable(group.items() for group in chosen):
        total[side] = total.get(side, 0.0) + sign / len(chosen)
    found = table.combination(total)
    return None if found is None else Effect(cuts, found, len(chosen), len(groups))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one inference at batch 1, counted from the sizes."""

    # Of one inference.
    operations: int
    # Of the weights held, in the 16 bits of a deployed policy or in 8.
    bytes: int


def ensure(chosen: Iterable[Claim], runs: pathlib.Path, results: pathlib.Path) -> None:
    """Count the costs of factorial claims, where their policies are."""
    for claim in chosen:
        if not claim.factors:
            continue
        found = read(claim, results)
        for row in claim.variants:
            base = row.policies[0].partition("--")[0]
            if not sources.exists(base, runs):
                continue
            model = policy_assets.load(runs / base).model
            scheme = sources.scheme(row.policies[0])
            options = dataclasses.replace(tuning.ALL_OFF, quantize=scheme)
            for column in claim.columns:
                found[row.label, column.label] = _cost(model, column.situation.num_steps, options)
        if found:
            lines = [json.dumps([*side, *dataclasses.astuple(c)]) for side, c in found.items()]
            results.mkdir(parents=True, exist_ok=True)
            path = results / FILE.format(claim=claim.name)
            path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _cost(model: pi0.Pi0Config, num_steps: int, options: tuning.InferenceOptions) -> Cost:
    half = dataclasses.replace(model, dtype="bfloat16")
    held = flops.weight_bytes(half, num_steps=1, options=options)
    operations = flops.inference_flops(model, num_steps=num_steps, options=options)
    return Cost(operations.total, held.total)


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
        yield "| effect on success, points | of one cut | cells |"
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
            "The effect of a cut is the mean over all cells that differ in it alone; *together* is "
            "what two cuts cost beyond the sum of both (below zero: they hurt each other)."
        )
    if costs := read(claim, results):
        names = [column.label for column in claim.columns]
        yield ""
        shown: list[list[Cost]] = []
        counted = " | ".join(f"{name}, M operations" for name in names)
        yield f"| one inference, batch 1 | {counted} | weights, kB |"
        yield "|---|" + "---|" * (len(names) + 1)
        for row in claim.variants:
            own = [costs[row.label, name] for name in names if (row.label, name) in costs]
            if len(own) == len(names) and own not in shown:
                shown.append(own)
                numbers = " | ".join(f"{cost.operations / 1e6:.2f}" for cost in own)
                yield f"| {row.label} | {numbers} | {own[0].bytes / 1e3:.0f} |"


def picture(path: pathlib.Path, table: outcomes.Table, results: pathlib.Path) -> bool:
    """Success against operations, the best of each cost named; False, and no file, without any."""
    costs = read(table.claim, results)
    means = {side: table.mean(side) for side in costs}
    # Weights alone in 8 bits have the operations of 16.
    shown = (side for side in means if not side[0].endswith("for weights"))
    measured = {side: mean for side in shown if (mean := means[side]) is not None}
    if not measured:
        return False
    figure, axes = figures.make(1, 1, (8.4, 4.8))
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
    place = {
        "ha": "right",
        "va": "bottom",
        "ma": "left",
        "fontsize": 7,
        "transform": axis.transAxes,
    }
    axis.text(0.99, 0.02, "\n".join(listed), **place)
    for name in names:
        axis.plot([], [], "o", color=colors[name], label=name)
    axis.set(xlabel="operations of one inference, M", ylabel="success, %", ylim=(0, 103))
    axis.set_xscale("log")
    counts = [costs[side].operations / 1e6 for side in measured]
    ticks = [n for n in _TICKS if min(counts) < n < max(counts)]
    axis.minorticks_off()
    axis.set_xticks(ticks, [f"{n:g}" for n in ticks])
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    figures.tidy(axis, "both")
    figure.savefig(path)
    return True


def frontier(points: Mapping[Side, tuple[float, float]]) -> Sequence[Side]:
    """The sides that nothing of at most their cost exceeds in success, the cheapest first."""
    found: list[Side] = []
    for side, (_, success) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not found or success > points[found[-1]][1]:
            found.append(side)
    return found
