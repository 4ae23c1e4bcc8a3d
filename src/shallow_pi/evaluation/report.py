"""Results of a run: `report.json` for programs, `report.md` and plots for people.

A `Report` holds measured values only; what derives from them (intervals, differences, ratios) is
computed here in one place, so that the terminal, the page and the file cannot disagree. Policies
are named expert, teacher, student, cut_only, task_only and random_init.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from shallow_pi import figures, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data.robots import robot
from shallow_pi.evaluation import intervals, late_plans, plots, rollout, validation_tables
from shallow_pi.parallel import processes
from shallow_pi.speed import latency as latencies
from shallow_pi.training import validation

# Pairs whose difference is reported, wherever both were evaluated.
COMPARISONS = (("student", "teacher"), ("student", "task_only"))
# Scope of a success rate → evaluation by policy.
Scopes = dict[str, Mapping[str, rollout.Evaluation]]
# Panels of the curves: key in metrics.jsonl → title, and the teacher's own value of it.
PANELS = validation_tables.LOSSES
REFERENCES = {"task_loss": "teacher_task_loss"}
ERROR_PANELS = {
    validation.TO_DATA: "held-out action error to the data",
    validation.TO_TEACHER: "held-out action error to the teacher",
}
ERROR_REFERENCES = {validation.TO_DATA: validation.TEACHER_TO_DATA}


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything measured in one run."""

    # The run's name, e.g. "pi0_turntable_l6/first".
    title: str
    # The resolved config as plain JSON values.
    config: Any
    # By policy, in the order of the table; empty without a simulated task.
    evaluations: Mapping[str, rollout.Evaluation] = dataclasses.field(default_factory=dict)
    # Harder variant of the task, on which nobody was trained → by policy.
    harder: Mapping[str, Mapping[str, rollout.Evaluation]] = dataclasses.field(default_factory=dict)
    # Batch-1 inference of "teacher" and "student".
    latency: latencies.Latency | None = None
    # Success when plans are late; empty where the world does not move.
    late: Sequence[late_plans.LatePlans] = ()
    # Wall-clock seconds of each stage.
    stage_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Trained policy → rows of its metrics.jsonl.
    curves: Mapping[str, plots.Rows] = dataclasses.field(default_factory=dict)
    # One episode of the student.
    recording: rollout.Recording | None = None
    # Groups of the robot's actions, whose held-out errors the rows have.
    groups: Sequence[robot.Group] = ()
    # The held-out error that decides which step is the best.
    criterion: str = validation.TO_DATA


def contents(report: Report) -> dict[str, object]:
    """The content of report.json."""
    values: dict[str, Any] = {
        "success": {policy: success(e) for policy, e in report.evaluations.items()},
        "by_task": {
            policy: {task: success(part) for task, part in e.by_task().items()}
            for policy, e in report.evaluations.items()
        },
        "harder": {
            variant: {policy: success(e) for policy, e in policies.items()}
            for variant, policies in report.harder.items()
        },
        "differences": differences_contents(_every_scope(report), _comparisons(report)),
        "validation": validation_tables.contents(report.curves, report.criterion),
        "stage_seconds": {stage: round(s, 3) for stage, s in report.stage_seconds.items()},
        "config": report.config,
        "versions": latencies.versions(),
        "machine": {"architecture": platform.machine(), "cpus": os.cpu_count()},
    }
    if report.late:
        values["late_plans"] = {
            column.label: {policy: success(e) for policy, e in column.evaluations.items()}
            for column in report.late
        }
    if report.latency is not None:
        values["latency_ms"] = dict(report.latency.median_ms)
        values["latency_p95_ms"] = dict(report.latency.p95_ms)
        values["latency_ratio"] = report.latency.ratio("teacher", "student")
        values["machine"]["device"] = report.latency.device
    return values


def success(evaluation: rollout.Evaluation) -> dict[str, object]:
    """A rate with its interval, for report.json."""
    low, high = evaluation.wilson()
    episodes = len(evaluation.episodes)
    return {"rate": evaluation.rate, "low": low, "high": high, "episodes": episodes}


def _comparisons(report: Report) -> list[tuple[str, str]]:
    return [(a, b) for a, b in COMPARISONS if {a, b} <= set(report.evaluations)]


def scopes(evaluations: Mapping[str, rollout.Evaluation]) -> Scopes:
    """All tasks, and each task where there are several."""
    by_task = {policy: evaluation.by_task() for policy, evaluation in evaluations.items()}
    tasks = sorted({task for split in by_task.values() for task in split})
    found: Scopes = {"all tasks": evaluations}
    for task in tasks if len(tasks) > 1 else []:
        found[task] = {p: split[task] for p, split in by_task.items() if task in split}
    return found


def _every_scope(report: Report) -> Scopes:
    return {**scopes(report.evaluations), **report.harder}


def differences(scopes: Scopes, a: str, b: str) -> dict[str, intervals.Difference]:
    """Paired differences of two policies in every scope that has both."""
    return {
        scope: policies[a].minus(policies[b])
        for scope, policies in scopes.items()
        if {a, b} <= set(policies)
    }


def differences_contents(scopes: Scopes, pairs: Sequence[tuple[str, str]]) -> dict[str, object]:
    """The same for several pairs of policies, for report.json."""
    return {
        f"{a} - {b}": {
            scope: {**dataclasses.asdict(d), "verdict": d.verdict}
            for scope, d in differences(scopes, a, b).items()
        }
        for a, b in pairs
    }


def sentence(a: str, b: str, scope: str, difference: intervals.Difference) -> str:
    """A difference in words, claiming no more than its interval does."""
    points, low, high = (
        f"{100 * value:+.1f}".replace("-", "−")
        for value in (difference.difference, difference.low, difference.high)
    )
    verdict = {
        "higher": f"{a} is better than {b}",
        "lower": f"{a} is worse than {b}",
        "undecided": f"no difference between {a} and {b} is shown",
    }[difference.verdict]
    return (
        f"{scope}: {a} − {b} = {points} points (95 % interval {low} to {high}; episodes solved "
        f"only by {a}: {difference.only_a}, only by {b}: {difference.only_b}): {verdict}."
    )


def tables(report: Report) -> list[validation_tables.Table]:
    """Headers and rows of the result: success, held-out errors; losses where there is no task."""
    errors = validation_tables.error_tables(report.curves, report.groups, report.criterion)
    if not report.evaluations:
        return [*errors, *validation_tables.loss_table(report.curves)]
    return [*_success_tables(report), *_late_table(report), *errors]


def _late_table(report: Report) -> list[validation_tables.Table]:
    """Success when plans are late: a row for each way, a column for each policy."""
    if not report.late:
        return []
    episodes = len(next(iter(report.late[0].evaluations.values())).episodes)
    title = f"success when plans are late and the scene moves ({episodes} episodes)"
    header = [title, *late_plans.PAPER_MS]
    rows = []
    for column in report.late:
        shown = []
        for policy in late_plans.PAPER_MS:
            low, high = column.evaluations[policy].wilson()
            rate = column.evaluations[policy].rate
            shown.append(f"{100 * rate:.0f} % ({100 * low:.0f}–{100 * high:.0f})")
        rows.append([column.label, *shown])
    return [(header, rows)]


def _success_tables(report: Report) -> list[validation_tables.Table]:
    """Success and latency, then success scope by scope."""
    whole, *parts = _every_scope(report).items()
    results: validation_tables.Table = (["policy", "success", "95 % interval", "episodes"], [])
    if report.latency is not None:
        results[0].append("ms")
    for policy, evaluation in whole[1].items():
        low, high = evaluation.wilson()
        row = [
            plots.NAMES.get(policy, policy),
            f"{100 * evaluation.rate:.1f} %",
            f"{100 * low:.1f}–{100 * high:.1f}",
            str(len(evaluation.episodes)),
        ]
        if report.latency is not None:
            milliseconds = report.latency.median_ms.get(policy)
            row.append("" if milliseconds is None else f"{milliseconds:.2f}")
        results[1].append(row)
    if not parts:
        return [results]
    rows = [
        [
            plots.NAMES.get(policy, policy),
            *(f"{100 * found[policy].rate:.0f} %" if policy in found else "" for _, found in parts),
        ]
        for policy in whole[1]
    ]
    return [results, (["success in", *(scope for scope, _ in parts)], rows)]


def sentences(report: Report) -> list[str]:
    """The comparisons in words."""
    lines = [
        sentence(a, b, scope, difference)
        for a, b in _comparisons(report)
        for scope, difference in differences(_every_scope(report), a, b).items()
    ]
    if report.latency is not None:
        lines.append(
            f"latency: the student's batch-1 inference takes "
            f"{report.latency.median_ms['student']:.2f} ms, the teacher's "
            f"{report.latency.median_ms['teacher']:.2f} ms (medians of {report.latency.repeats} on "
            f"{report.latency.device}): {report.latency.ratio('teacher', 'student'):.2f} times "
            "as fast."
        )
    return lines


def show_table(console: rich.console.Console, table: validation_tables.Table) -> None:
    """Print one table; its first column holds names, which a narrow terminal wraps."""
    header, rows = table
    display = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(header):
        is_name = index == 0
        display.add_column(column, justify="left" if is_name else "right", no_wrap=not is_name)
    for cells in rows:
        display.add_row(*cells)
    console.print(display)


def show(report: Report, console: rich.console.Console | None = None) -> None:
    """Print the tables and the comparisons."""
    console = console or progress.printer("stdout")
    console.print(report.title, style="bold", highlight=False)
    for table in tables(report):
        show_table(console, table)
    for line in sentences(report):
        console.print(line, highlight=False, markup=False)


def markdown(report: Report, files: Mapping[str, str]) -> str:
    """The content of report.md; `files` maps a caption to a plot beside it."""
    lines = [f"# {report.title}"]
    if made := origin(report.config):
        lines += ["", made]
    for table in tables(report):
        lines += ["", *table_lines(table)]
    if report.evaluations:
        lines += [
            "",
            "All policies met the same episodes. Intervals of rates are Wilson's, those of",
            "differences are Newcombe's for pairs. ms: median time of one plan for one robot.",
        ]
    if validation_tables.contents(report.curves, report.criterion):
        lines += ["", validation_tables.NOTE]
    said = sentences(report)
    lines += ["", *(f"- {line}" for line in said)] if said else []
    for caption, name in files.items():
        lines += ["", f"## {caption}", "", f"![{caption}]({name})"]
    if report.stage_seconds:
        seconds = {**report.stage_seconds, "total": sum(report.stage_seconds.values())}
        times = [[stage, f"{s:.1f}"] for stage, s in seconds.items()]
        lines += ["", "## Time", "", *table_lines((["stage", "seconds"], times))]
    lines += ["", "## Versions", ""]
    lines += [
        ", ".join(f"{package} {version}" for package, version in latencies.versions().items()),
        "",
    ]
    return "\n".join(lines)


def origin(config: Mapping[str, Any]) -> str:
    """One line about teacher, dataset, layers and training of a config; "" if it tells none."""
    teacher, data = config.get("teacher") or {}, config.get("data") or {}
    depth, student = (config.get("model") or {}).get("depth"), config.get("student") or {}
    parts = [f"teacher {teacher['path']}"] if teacher.get("path") else []
    if data.get("path"):
        parts += ["dataset " + " + ".join([data["path"], *data.get("more", ())])]
    if depth and teacher:
        depths = [student.get(f"{s}_depth") or student.get("depth") for s in ("backbone", "expert")]
        chosen = len(student.get("layers") or ()) or max(depth or 0 for depth in depths)
        parts += [f"{chosen} of the teacher's {depth} layers"] if chosen else []
    elif depth:
        parts += [f"{depth} layers"]
    for key, unit in (("num_train_steps", "steps"), ("batch_size", "samples a step")):
        parts += [f"{config[key]:,} {unit}"] if config.get(key) else []
    return ", ".join(parts)


def table_lines(table: validation_tables.Table) -> list[str]:
    """A table in Markdown; its first column holds names."""
    header, rows = table
    every = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in every]


def write(folder: pathlib.Path, report: Report) -> list[pathlib.Path]:
    """Write report.json, the plots and report.md into `folder`; return what was written.

    Without matplotlib the figures are left out, and the page and the terminal say how to get them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, tuple[str, Callable[[pathlib.Path], None]]] = {}
    curves, recording = report.curves, report.recording
    if report.evaluations:
        drawings["Success"] = (
            "success.png",
            lambda path: plots.success(path, _every_scope(report)),
        )
    rows = [row for curve in curves.values() for row in curve]
    # Everything in a row is a number.
    keys = {key for row in rows for key, v in row.items() if v is not None and math.isfinite(v)}
    for caption, name, every, references in (
        ("Losses", "losses.png", PANELS, REFERENCES),
        ("Held-out errors", "validation.png", ERROR_PANELS, ERROR_REFERENCES),
    ):
        panels = {key: title for key, title in every.items() if key in keys}
        if panels:
            drawings[caption] = (
                name,
                functools.partial(
                    plots.loss_curves, curves=curves, panels=panels, references=references
                ),
            )
    by_group = validation_tables.group_errors(curves, report.groups, report.criterion)
    if by_group:
        bars = functools.partial(plots.group_bars, errors=by_group)
        drawings["Held-out errors at the best step, by group and joint"] = (
            "validation_groups.png",
            bars,
        )
    if recording is not None:
        drawings["One episode"] = ("episode.png", lambda path: plots.strip(path, recording))
        drawings["The same, moving"] = (
            "episode.gif",
            lambda path: plots.animation(path, recording),
        )
    files: dict[str, str] = {}
    missing = ""
    for caption, (name, draw) in drawings.items():
        try:
            with run_folder.writing(folder / name):
                draw(folder / name)
            files[caption] = name
        except figures.PlotsMissingError as error:
            missing = str(error)
    page = markdown(report, files)
    if missing:
        page += f"\n{missing}\n"
        progress.say(missing)
    run_folder.write_text(folder / run_folder.REPORT_PAGE, page)
    # Last: with it, a study is finished.
    content = json.dumps(contents(report), indent=2, ensure_ascii=False, allow_nan=False)
    run_folder.write_text(folder / run_folder.REPORT_FILE, content + "\n")
    written = (run_folder.REPORT_FILE, run_folder.REPORT_PAGE, *files.values())
    return [folder / name for name in written]


class Stages:
    """Seconds of every stage, added up over interruptions, in a JSON file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8")
            try:
                self.seconds = {name: float(seconds) for name, seconds in json.loads(text).items()}
            except (AttributeError, TypeError, ValueError) as error:
                progress.warn(f"{self.path} is damaged ({error!r}): the times start anew")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside the block towards a stage, also when it is left by an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if processes.is_main():
                run_folder.write_text(self.path, json.dumps(self.seconds, indent=2) + "\n")
