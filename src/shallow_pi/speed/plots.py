"""Plots of the benchmarks: an inference by part and by size, and a training step."""

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from shallow_pi import figures
from shallow_pi.speed import inference, stages, step

# One for each stage of the host path.
COLOURS = (
    *("#8c564b", "#e377c2", "#bcbd22", "#7f7f7f", "#ff7f0e"),
    *("#2ca02c", "#9467bd", "#1f77b4", "#17becf", "#d62728"),
)
PARTS = ("image tower", "rest of the prefix", "steps")


def breakdown(path: pathlib.Path, timings: Sequence[inference.Timing]) -> None:
    """Plot milliseconds of one inference by part, a bar for each timing."""
    figure, axes = figures.make(1, 1, (6.4, 1.2 + 0.5 * len(timings)))
    axis = axes[0][0]
    names = labels(timings)
    left = np.zeros(len(timings))
    for part in PARTS:
        widths = np.array([_share(timing.median_ms, part) for timing in timings])
        axis.barh(names, widths, left=left, height=0.6, label=part)
        left += widths
    for label, timing in zip(names, timings, strict=True):
        axis.plot([timing.median_ms["whole"]] * 2, [label] * 2, "|", color="#222222", markersize=14)
    axis.set(xlabel="ms (the mark: measured as a whole)", xlim=(0, None))
    figures.legend(axis, loc="lower right")
    axis.invert_yaxis()
    figures.tidy(axis, "x")
    figures.save(figure, path)


def growth(path: pathlib.Path, timings: Sequence[inference.Timing]) -> None:
    """Plot milliseconds over depth, a line for each number of visual tokens, and the reverse.

    This is the paper's Figure 2. Other samplers of the same run are dashed. What does not vary has
    no panel.
    """
    depth = ("depth", "layers", lambda timing: timing.visual_tokens, "{} visual tokens")
    tokens = ("visual_tokens", "visual tokens", lambda timing: timing.depth, "{} layers")
    panels = [
        panel
        for panel in (depth, tokens)
        if len({getattr(timing, panel[0]) for timing in timings}) > 1
    ] or [depth]
    figure, axes = figures.make(1, len(panels), (0.6 + 4.2 * len(panels), 3.4), sharey=True)
    for axis, (field, title, line, label) in zip(axes[0], panels, strict=True):
        for name in ("", *timings[0].others_ms):
            axis.set_prop_cycle(None)
            for of, group in itertools.groupby(sorted(timings, key=line), key=line):
                points = sorted(_points(group, field, name))
                style = {"linestyle": "--" if name else "-", "marker": "o", "markersize": 4}
                axis.plot(
                    *zip(*points, strict=True), label=f"{name} {label.format(of)}".strip(), **style
                )
        axis.set_xticks(sorted({getattr(timing, field) for timing in timings}))
        axis.set(xlabel=title, ylim=(0, None))
        figures.legend(axis)
        figures.tidy(axis, "y")
    axes[0][0].set(ylabel="ms, whole inference")
    figures.save(figure, path)


def host_path(
    path: pathlib.Path,
    timings: Mapping[str, inference.Timing],
    policies: Mapping[str, stages.HostPath],
) -> None:
    """Plot milliseconds by stage: pixels to actions of each timing, `Policy.infer` of each policy.

    The mark is the whole, measured as it runs.
    """
    bars = {f"{name}: pixels to actions": one.stages_ms for name, one in timings.items()}
    bars |= {f"{name}: Policy.infer": one.stages_ms for name, one in policies.items()}
    wholes = [one.median_ms["end to end"] for one in timings.values()]
    wholes += [one.infer_ms for one in policies.values()]
    figure, axes = figures.make(1, 1, (8.0, 1.4 + 0.45 * len(bars)))
    axis, left = axes[0][0], np.zeros(len(bars))
    order = (*stages.BEFORE, *stages.PROGRAM, *stages.AFTER)
    axis.set_prop_cycle(color=COLOURS)
    for stage in order:
        widths = np.array([found.get(stage, 0.0) for found in bars.values()])
        if widths.any():
            axis.barh(list(bars), widths, left=left, height=0.6, label=stage)
            left += widths
    for label, whole in zip(bars, wholes, strict=True):
        axis.plot([whole] * 2, [label] * 2, "|", color="#222222", markersize=14)
    axis.set(xlabel="ms, each stage timed alone (the mark: a whole call)", xlim=(0, None))
    figures.legend(axis, fontsize=7, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    axis.invert_yaxis()
    figures.tidy(axis, "x")
    figures.save(figure, path)


def training_step(path: pathlib.Path, timing: step.Timing) -> None:
    """Plot milliseconds of both kinds of step, and the planned memory of a device by part."""
    figure, axes = figures.make(1, 2, (9.0, 2.2), sharey=True)
    kinds, (times, memory) = list(timing.median_ms), axes[0]
    for kind in kinds:
        times.barh([kind], [timing.median_ms[kind]], height=0.6, color="#0072b2")
        times.plot([timing.p95_ms[kind]], [kind], "|", color="#222222", markersize=14)
    times.set(xlabel=f"ms, batch {timing.batch_size} (the mark: 95th percentile)", xlim=(0, None))
    left = np.zeros(len(kinds))
    for part in [part for part in timing.plan[kinds[0]] if part != "in all"]:
        widths = np.array([timing.plan[kind][part] for kind in kinds]) / 1e9
        memory.barh(kinds, widths, left=left, height=0.6, label=part)
        left += widths
    memory.set(xlabel="GB a device, as planned", xlim=(0, 1.5 * left.max()))
    figures.legend(memory, fontsize=7, loc="center right")
    times.invert_yaxis()
    for axis in (times, memory):
        figures.tidy(axis, "x")
    figures.save(figure, path)


def _points(timings: Iterable[inference.Timing], field: str, name: str) -> list[tuple[int, float]]:
    return [
        (getattr(timing, field), timing.others_ms[name] if name else timing.median_ms["whole"])
        for timing in timings
    ]


def labels(timings: Sequence[inference.Timing]) -> list[str]:
    """Of each timing the depth, and every other size that differs between them."""
    words = {
        "cameras": lambda one: f"{one.cameras} camera{'s' * (one.cameras > 1)}",
        "prompt_tokens": lambda one: f"prompt {one.prompt_tokens}",
        "horizon": lambda one: f"horizon {one.horizon}",
        "num_steps": lambda one: f"{one.num_steps} steps",
    }
    differing = [
        word for field, word in words.items() if len({getattr(t, field) for t in timings}) > 1
    ]
    return [
        ", ".join([f"{one.depth} layers", *(word(one) for word in differing)]) for one in timings
    ]


def _share(median: Mapping[str, float], part: str) -> float:
    """Milliseconds of a part; the prefix includes the image tower, and the steps are the rest."""
    tower, prefix, whole = (median[name] for name in ("image tower", "prefix", "whole"))
    return max(0.0, {PARTS[0]: tower, PARTS[1]: prefix - tower, PARTS[2]: whole - prefix}[part])
