"""Several policies on the same episodes of one simulator: rates, paired differences, films.

A folder holds everything: `settings.json`, a line for each finished episode under `episodes/`,
`report.json` and `report.md`, and films. Episodes that are there are not run again, so an
interrupted comparison goes on where it was, and one more policy can join it later. Results of
other settings are never mixed with these.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from shallow_pi import figures, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.evaluation import plots, policies, report, rollout, served, validation_tables
from shallow_pi.sims import simulator, workers
from shallow_pi.speed import latency

SETTINGS, EPISODES, FILMS = "settings.json", "episodes", "films"
# A policy's setting that tells trainings in one folder apart (`weights.digest`).
PARAMETERS = "parameters"
# What to do when a file cannot be written.
ADVICE = "repeat the command, or give another --output"
# A film's frames a second at most; GIFs are large.
FILM_FPS = 12.5
# Most panels of the plot of success.
PANELS = 5


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One policy, and its execution."""

    label: str
    # Its step folder or address, and whatever else changes its actions, as plain JSON values.
    origin: Mapping[str, object]
    # Actions of a chunk executed before the next plan.
    execute_steps: int
    delay: rollout.Delay
    # Loads it; called once it is its turn.
    load: Callable[[], policies.Policy]

    def settings(self) -> dict[str, object]:
        """All that its results depend on, as plain JSON values."""
        own: dict[str, object] = {"execute_steps": self.execute_steps}
        if self.delay.steps:
            own |= {"late_steps": self.delay.steps, "executor": self.delay.executor}
        return {**self.origin, **own}


@dataclasses.dataclass(frozen=True)
class Course:
    """The episodes that every policy meets."""

    # The simulator's name and options, as given.
    sim: str
    options: Mapping[str, str]
    suite: simulator.Suite
    # Total number of episodes.
    episodes: int
    # Of the first.
    seed: int
    # Simulators, and processes that hold them.
    parallel: int
    processes: int
    # Films of each policy.
    films: int = 1

    def settings(self) -> dict[str, object]:
        """All that the episodes depend on, as plain JSON values; more of them may be run later."""
        return {"sim": self.sim, "options": dict(self.options), "seed": self.seed}


def prepare(
    folder: pathlib.Path, course: Course, entrants: Sequence[Entrant]
) -> dict[str, dict[str, Any]]:
    """Write down the settings in a folder, or find out that it holds results of these.

    Settings of which there are no results, such as those of a policy that could not be loaded, are
    not kept.

    Returns:
      The settings of every policy in it, by label.

    Raises:
      ValueError: it holds results of others, or something else.
    """
    path = folder / SETTINGS
    every: dict[str, dict[str, Any]] = {}
    found = _settings(folder)
    if found["policies"]:
        differing = [
            f"{name} {found.get(name)} (asked for: {value})"
            for name, value in course.settings().items()
            if found.get(name) != value
        ]
        for entrant in entrants:
            before, now = found["policies"].get(entrant.label), _plain(entrant.settings())
            if before not in (None, now):
                differing += [
                    f"{entrant.label}'s {key} {before.get(key)} (asked for: {now.get(key)})"
                    for key in sorted(before.keys() | now.keys())
                    if before.get(key) != now.get(key)
                ]
        if differing:
            raise ValueError(
                f"{folder} holds results of other settings: {'; '.join(differing)}. Give another "
                "--output, or --overwrite, which renames the old folder"
            )
        every = found["policies"]
    every |= {entrant.label: _plain(entrant.settings()) for entrant in entrants}
    settings = {**course.settings(), "policies": every}
    _write(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return every


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    """Settings in a folder, with those policies of which there are results."""
    path = folder / SETTINGS
    if not path.exists():
        if other := sorted({child.name for child in folder.iterdir()} - {run_folder.LOCK_FILE}):
            raise ValueError(
                f"{folder} holds no evaluation but {', '.join(other[:3])}: give another --output"
            )
        return {"policies": {}}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        policies = found["policies"].items()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold the settings of an evaluation ({error!r}): give another "
            "--output, or --overwrite, which renames the old folder"
        ) from error
    paths = {label: _path(folder, label) for label, _ in policies}
    kept = {k: v for k, v in policies if paths[k].exists() and paths[k].stat().st_size}
    return {**found, "policies": kept}


def _plain(values: Mapping[str, object]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _write(path: pathlib.Path, text: str) -> None:
    run_folder.write_text(path, text, ADVICE)


def run(
    folder: pathlib.Path, course: Course, entrants: Sequence[Entrant]
) -> dict[str, rollout.Evaluation]:
    """Evaluate every policy, and write the report after each.

    Returns:
      All that the report tells of, by label.

    Raises:
      ValueError, OSError: from a policy, a server or the simulator; finished episodes are kept,
        and without any the folder is left as it was.
    """
    with run_folder.working(folder, "--output"):
        settings = prepare(folder, course, entrants)
        try:
            return _run(folder, course, entrants, settings)
        except BaseException:
            if not _settings(folder)["policies"]:  # No episode was finished.
                (folder / SETTINGS).unlink()
                shutil.rmtree(folder / EPISODES, ignore_errors=True)
            raise


def _run(
    folder: pathlib.Path,
    course: Course,
    entrants: Sequence[Entrant],
    settings: Mapping[str, Mapping[str, object]],
) -> dict[str, rollout.Evaluation]:
    found: dict[str, rollout.Evaluation] = {}
    for label in settings:
        before = rollout.stored(_path(folder, label), label, course.seed, course.episodes)
        if before is not None:
            found[label] = before
        elif label not in {entrant.label for entrant in entrants}:
            progress.say(
                f"{label} is left out of the report, as it has fewer episodes: evaluate it again "
                "with these"
            )
    count = workers.fitting(course.suite, min(course.parallel, course.episodes))
    with workers.Workers(course.suite, count, course.processes) as pool:
        for entrant in entrants:
            policy = entrant.load()
            with contextlib.ExitStack() as stack:
                if isinstance(policy, served.Served):
                    stack.callback(policy.close)  # After an error no answer is waited for.
                found[entrant.label] = rollout.evaluate(
                    iter(pool.simulators).__next__,
                    policy,
                    episodes=course.episodes,
                    seed=course.seed,
                    execute_steps=entrant.execute_steps,
                    label=entrant.label,
                    batch=count,
                    path=_path(folder, entrant.label),
                    delay=entrant.delay,
                    threads=count,
                    scene=simulator.scene(course.suite),
                )
                for seed in range(course.seed, course.seed + min(course.films, course.episodes)):
                    _film(folder, entrant, policy, pool.simulators[0], seed, count)
            del policy  # Two large ones may not fit on the device.
            found = in_order(found, settings)
            write(folder, course, settings, found)
    show(course, found)
    return found


def in_order(
    found: Mapping[str, rollout.Evaluation], settings: Mapping[str, object]
) -> dict[str, rollout.Evaluation]:
    """The evaluations in the order in which their policies joined, whichever ended last."""
    return {label: found[label] for label in settings if label in found}


def _path(folder: pathlib.Path, label: str) -> pathlib.Path:
    return folder / EPISODES / f"{label}.jsonl"


def _film(
    folder: pathlib.Path,
    entrant: Entrant,
    policy: policies.Policy,
    sim: simulator.Simulator,
    seed: int,
    batch: int,
) -> None:
    """Make a GIF of one episode, unless it is there."""
    path = folder / FILMS / f"{entrant.label}-{seed}.gif"
    if path.exists():
        return
    recording = rollout.record(
        lambda: sim,
        policy,
        seed=seed,
        execute_steps=entrant.execute_steps,
        label=entrant.label,
        batch=batch,
        delay=entrant.delay,
    )
    with run_folder.writing(path, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        plots.animation(path, thinned(recording))


def thinned(recording: rollout.Recording) -> rollout.Recording:
    """The same with at most FILM_FPS frames a second, its last frame among them."""
    period = float(np.median(np.diff(recording.times))) if len(recording.times) > 1 else 1.0
    stride = max(1, int(np.ceil(1 / FILM_FPS / max(period, 1e-6) - 1e-9)))
    kept = np.arange(len(recording.times) - 1, -1, -stride)[::-1]
    frames = {camera: images[kept] for camera, images in recording.frames.items()}
    return dataclasses.replace(recording, times=recording.times[kept], frames=frames)


def contents(
    course: Course,
    settings: Mapping[str, Mapping[str, object]],
    found: Mapping[str, rollout.Evaluation],
) -> dict[str, object]:
    """The content of report.json; `settings` are those of each policy."""
    return {
        **course.settings(),
        "episodes": course.episodes,
        "policies": {
            label: {
                **report.success(evaluation),
                "steps": float(np.mean([e.steps for e in evaluation.episodes])),
                "settings": settings[label],
                "by_task": {
                    task: report.success(part) for task, part in evaluation.by_task().items()
                },
            }
            for label, evaluation in found.items()
        },
        "differences": report.differences_contents(report.scopes(found), pairs(found)),
        "versions": latency.versions(),
    }


def pairs(found: Mapping[str, object]) -> list[tuple[str, str]]:
    """Each two policies, the later one first: what it gains on the earlier one is reported."""
    labels = list(found)
    return [(b, a) for i, a in enumerate(labels) for b in labels[i + 1 :]]


def tables(found: Mapping[str, rollout.Evaluation]) -> list[validation_tables.Table]:
    """Headers and rows: success of each policy, then task by task."""
    rows = []
    for label, evaluation in found.items():
        low, high = evaluation.wilson()
        steps = [e.steps for e in evaluation.episodes if e.success]
        rows.append(
            [
                label,
                f"{100 * evaluation.rate:.1f} %",
                f"{100 * low:.1f}–{100 * high:.1f}",
                str(len(evaluation.episodes)),
                f"{np.mean(steps):.0f}" if steps else "",
            ]
        )
    whole: validation_tables.Table = (
        ["policy", "success", "95 % interval", "episodes", "steps to success"],
        rows,
    )
    _, *tasks = report.scopes(found).items()
    solved = [
        [task, *(f"{part.successes}/{len(part.episodes)}" for part in by_label.values())]
        for task, by_label in tasks
    ]
    return [whole, (["task", *found], solved)] if tasks else [whole]


def sentences(found: Mapping[str, rollout.Evaluation]) -> list[str]:
    """The overall differences in words."""
    return [report.sentence(a, b, "all tasks", found[a].minus(found[b])) for a, b in pairs(found)]


def write(
    folder: pathlib.Path,
    course: Course,
    settings: Mapping[str, Mapping[str, object]],
    found: Mapping[str, rollout.Evaluation],
) -> None:
    """Write report.json, report.md and the plot of success."""
    values = json.dumps(contents(course, settings, found), indent=2, ensure_ascii=False)
    _write(folder / run_folder.REPORT_FILE, values + "\n")
    options = "".join(f", {name} {value}" for name, value in course.options.items())
    lines = [
        f"# {course.sim}: {', '.join(found)}",
        "",
        f"{course.episodes} episodes from seed {course.seed}{options}; every policy met the same "
        "initial states. Intervals of rates are Wilson's, those of differences Newcombe's for "
        "pairs.",
    ]
    for table in tables(found):
        lines += ["", *report.table_lines(table)]
    if said := sentences(found):
        lines += ["", *(f"- {line}" for line in said)]
    lines += ["", "## Policies", ""]
    for label in found:
        lines += [f"- {label}: " + ", ".join(f"{k} {v}" for k, v in settings[label].items())]
    try:
        with run_folder.writing(folder / "success.png", ADVICE):
            plots.success(folder / "success.png", _panels(found))
        lines += ["", "## Success", "", "![Success](success.png)"]
    except figures.PlotsMissingError as error:
        lines += ["", str(error)]
    for film in sorted((folder / FILMS).glob("*.gif")) if (folder / FILMS).is_dir() else []:
        lines += ["", f"![{film.stem}]({FILMS}/{film.name})"]
    lines += ["", ", ".join(f"{package} {v}" for package, v in latency.versions().items()), ""]
    _write(folder / run_folder.REPORT_PAGE, "\n".join(lines))


def _panels(found: Mapping[str, rollout.Evaluation]) -> report.Scopes:
    """Scopes of the plot: all tasks, and each where they are few."""
    every = report.scopes(found)
    return every if len(every) <= PANELS else {"all tasks": found}


def show(course: Course, found: Mapping[str, rollout.Evaluation]) -> None:
    """Print the tables and the differences."""
    progress.say(f"{course.sim}, {course.episodes} episodes from seed {course.seed}")
    for table in tables(found):
        report.show_table(progress.console, table)
    for line in sentences(found):
        progress.say(line)
