"""Costs of rivals beside their success: operations, parameters in memory, latency at batch 1.

`ensure` measures them on a claim's teacher and keeps them among the results; the page gets a table
and a plot of success against operations from it.
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from shallow_pi import figures
from shallow_pi.checkpoints import run_folder
from shallow_pi.evaluation import plots
from shallow_pi.evaluation.rivals import costs
from shallow_pi.evidence import outcomes, rival_runs, sources
from shallow_pi.evidence.claims.claim import Claim

# Results of a claim.
FILE = "{claim}-costs.json"
# The rival that costs as much as the rows that are compared with: students of 6 layers.
STUDENT = "skip:drop=12"
# By the first word of a row.
COLORS = {
    "teacher": plots.COLORS["teacher"],
    "three": plots.COLORS["student"],
    "student": plots.COLORS["student"],
    "layers": plots.COLORS["student"],
    "best": plots.COLORS["student"],
    "EfficientVLA": plots.COLORS["task_only"],
    "CogVLA": plots.COLORS["random_init"],
    "MoLE": "#e69f00",
    "early": "#56b4e9",
    "skipping": plots.COLORS["cut_only"],
}


def ensure(chosen: Sequence[Claim], runs: pathlib.Path, results: pathlib.Path) -> None:
    """Measure what the rivals of these claims cost, where their teacher is and that was not done.

    A rival's cost does not depend on its training. A row more, and all are measured again: times
    compare in one run only.
    """
    for claim in chosen:
        path, names = results / FILE.format(claim=claim.name), _names(claim)
        measured = read(claim, results).keys() == names.keys()
        if measured or not sources.exists(claim.variants[0].policies[0], runs):
            continue
        assets, params = sources.read(claim.variants[0].policies[0], runs)
        found = [
            cost.to_json()
            for cost in costs.measure(assets.model, params, list(dict.fromkeys(names.values())))
        ]
        results.mkdir(parents=True, exist_ok=True)
        run_folder.write_text(path, "[\n" + ",\n".join(found) + "\n]\n", run_folder.AGAIN)


def read(claim: Claim, results: pathlib.Path) -> dict[str, costs.Cost]:
    """By the row's label; empty where nothing was measured."""
    path, names = results / FILE.format(claim=claim.name), _names(claim)
    if not names or not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    by_name = {one["name"]: costs.Cost(**one) for one in kept}
    return {label: by_name[name] for label, name in names.items() if name in by_name}


def _names(claim: Claim) -> dict[str, str]:
    """Row → rival of a claim about rivals: teacher, students, rivals; empty for other claims."""
    slugs = {row.label: row.policies[0] for row in claim.variants}
    if not any(map(rival_runs.is_rival, slugs.values())):
        return {}
    found = {
        label: slug.partition("--")[2] if rival_runs.is_rival(slug) else STUDENT
        for label, slug in slugs.items()
    }
    return found | {claim.variants[0].label: "teacher"}


def lines(claim: Claim, results: pathlib.Path) -> Iterator[str]:
    """The page's table of costs."""
    found = read(claim, results)
    if not found:
        return
    device = next(iter(found.values())).device
    yield ""
    yield f"| one inference, batch 1 | operations, M | parameters held, M | ms on {device} |"
    yield "|---|---|---|---|"
    for label, cost in found.items():
        operations, held = cost.operations / 1e6, cost.parameters / 1e6
        yield f"| {label} | {operations:.0f} | {held:.2f} | {cost.median_ms:.2f} |"


def plot(path: pathlib.Path, table: outcomes.Table, results: pathlib.Path) -> bool:
    """Success against operations, a mark for each row; False, and no file, without any."""
    column, found = table.claim.columns[0].label, read(table.claim, results)
    points = {label: table.mean((label, column)) for label in found}
    measured = {label: mean for label, mean in points.items() if mean is not None}
    if not measured:
        return False
    figure, axes = figures.make(1, 1, (9.6, 4.6))
    axis = axes[0][0]
    shapes: Mapping[str, Iterator[str]] = collections.defaultdict(
        lambda: itertools.cycle("osD^vPX*")
    )
    for label, mean in measured.items():
        family = label.split()[0].rstrip(",")
        color = COLORS.get(family, plots.OTHER_COLOR)
        x, y = found[label].operations / 1e6, 100 * mean.mean
        axis.plot([x, x], [100 * mean.low, 100 * mean.high], color=color, linewidth=1)
        shape = next(shapes[color])
        axis.plot(x, y, shape, color=color, markersize=6, linestyle="", label=label)
    axis.set(xlabel="operations of one inference, M", ylabel="success, %", ylim=(0, 103))
    figures.legend(axis, beside=True)
    figures.tidy(axis, "both")
    figures.save(figure, path)
    return True
