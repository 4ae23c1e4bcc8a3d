"""One table of several simulators' results, such as LIBERO's four suites and their average."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.evaluation import comparison, report, rollout, validation_tables

# By simulator, then by policy.
Found = Mapping[str, Mapping[str, rollout.Evaluation]]


@contextlib.contextmanager
def folder(path: pathlib.Path, sims: Sequence[str]) -> Iterator[None]:
    """Make the folder of a table and its simulators' folders; nobody else writes there meanwhile.

    Raises:
      ValueError: it holds something else, or another process works there.
    """
    own = {*sims, run_folder.REPORT_FILE, run_folder.REPORT_PAGE, run_folder.LOCK_FILE}
    with run_folder.working(path, "--output"):
        if other := sorted(child.name for child in path.iterdir() if child.name not in own):
            raise ValueError(
                f"{path} holds other things than results of {', '.join(sims)}: "
                f"{', '.join(other[:3])}; give another --output"
            )
        yield


def pooled(found: Found) -> dict[str, rollout.Evaluation]:
    """All episodes of each policy that every simulator has, in the simulators' order."""
    first = next(iter(found.values()))
    labels = [label for label in first if all(label in policies for policies in found.values())]
    return {
        label: dataclasses.replace(
            first[label], episodes=tuple(e for each in found.values() for e in each[label].episodes)
        )
        for label in labels
    }


def _mean_rate(found: Found, label: str) -> float:
    """A policy's mean success over the simulators."""
    return sum(policies[label].rate for policies in found.values()) / len(found)


def table(found: Found) -> validation_tables.Table:
    """Success of each policy on each simulator, and the mean of these."""
    rows = []
    for label in pooled(found):
        rates = [*(policies[label].rate for policies in found.values()), _mean_rate(found, label)]
        rows.append([label, *(f"{100 * rate:.1f} %" for rate in rates)])
    return ["policy", *found, "average"], rows


def write(path: pathlib.Path, name: str, found: Found) -> None:
    """Write report.json and report.md, and print the table."""
    everything, compared = pooled(found), table(found)
    differences = {
        (a, b): everything[a].minus(everything[b]) for a, b in comparison.pairs(everything)
    }
    said = [report.sentence(*pair, "all episodes", d) for pair, d in differences.items()]
    values = {
        "policies": {
            label: {
                **{sim: report.success(policies[label]) for sim, policies in found.items()},
                "average": _mean_rate(found, label),
            }
            for label in everything
        },
        "differences": {f"{a} - {b}": dataclasses.asdict(d) for (a, b), d in differences.items()},
    }
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    run_folder.write_text(path / run_folder.REPORT_FILE, text, comparison.ADVICE)
    lines = [f"# {name}: {', '.join(everything)}", "", "Success; the parts have the rest:"]
    lines += ["", *(f"- [{sim}]({sim}/{run_folder.REPORT_PAGE})" for sim in found), ""]
    lines += [*report.table_lines(compared), "", *(f"- {line}" for line in said), ""]
    page = "\n".join(lines)
    run_folder.write_text(path / run_folder.REPORT_PAGE, page, comparison.ADVICE)
    report.show_table(progress.console, compared)
    for line in said:
        progress.say(line)
