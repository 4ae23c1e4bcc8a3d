"""Plots of a report: curves, errors by group, success, a strip of frames and an animation.

Figures need matplotlib (the extra `plots`), which is imported when the first one is drawn; the
animation needs only Pillow. A policy has the same colour everywhere. Error bars are 95 % intervals.
"""

import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from shallow_pi import atomic, figures
from shallow_pi.evaluation import rollout

# Okabe and Ito's palette, which stays distinct for colour-blind readers and in print.
COLORS = {
    "expert": "#7f7f7f",
    "teacher": "#0072b2",
    "student": "#d55e00",
    "cut_only": "#b8a68a",
    "task_only": "#009e73",
    "random_init": "#cc79a7",
}
OTHER_COLOR = "#555555"
COMPARISON_COLORS = {
    "to the data": COLORS["student"],
    "to the teacher": "#f0b48a",
    "teacher to the data": COLORS["teacher"],
}
NAMES = {
    "expert": "expert (scripted)",
    "teacher": "teacher",
    "student": "student",
    "cut_only": "cut, not trained",
    "task_only": "cut, task loss only",
    "random_init": "random, task loss only",
}

# Curves of so few points show each of them.
FEW = 30

# A row of metrics.jsonl: numbers by their names, and the step.
Row = Mapping[str, Any]
Rows = Sequence[Row]


def loss_curves(
    path: pathlib.Path,
    curves: Mapping[str, Rows],
    panels: Mapping[str, str],
    references: Mapping[str, str] | None = None,
) -> None:
    """One panel per loss, one line per run: the rows as they are, faint, and a running mean.

    A linear axis begins at 0, so that noise does not look like progress; values that span more than
    a factor of 5 have a logarithmic one.

    Args:
      path: PNG to write.
      curves: run → rows of its `metrics.jsonl`, each with "step".
      panels: key in the rows → title; each key has a value in some row.
      references: key of a panel → key of the teacher's own value, drawn dashed.
    """
    figure, axes = figures.make(1, len(panels), (4.0 * len(panels) + 0.6, 3.5))
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        for run, rows in curves.items():
            steps, values = _series(rows, key)
            if len(steps):
                color = COLORS.get(run, OTHER_COLOR)
                marker = "o" if len(steps) <= FEW else ""
                style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.9}
                axis.plot(steps, values, color=color, alpha=0.22, linewidth=0.9)
                axis.plot(steps, _smooth(values), label=NAMES.get(run, run), **style)
        reference = (references or {}).get(key, "")
        known = [v for v in (_series(rows, reference)[1] for rows in curves.values()) if len(v)]
        if known:
            level = float(np.mean(known[0]))
            axis.axhline(level, color=COLORS["teacher"], linestyle="--", label="teacher (mean)")
        axis.set(title=title, xlabel="step")
        drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines])
        if 0 < 5 * drawn.min() < drawn.max():
            axis.set_yscale("log")
            _plain_ticks(axis)
        else:
            axis.set_ylim(min(0.0, drawn.min()), 1.1 * drawn.max() or 1.0)
        figures.tidy(axis, "both")
        figures.legend(axis)
    figures.save(figure, path)


def _plain_ticks(axis: figures.Axes) -> None:
    """Label a logarithmic axis 0.2, 0.3, 0.5, 1 instead of with powers of ten."""
    from matplotlib import ticker

    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _series(rows: Rows, key: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Steps and values that are finite."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    table = np.asarray(points, float).reshape(-1, 2)
    table = table[np.isfinite(table[:, 1])]
    return table[:, 0], table[:, 1]


def _smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Centered running mean over about a twentieth of the curve; shorter at its ends."""
    radius = len(values) // 40
    padded = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - radius, 0), np.minimum(index + radius + 1, len(values))
    return (padded[high] - padded[low]) / (high - low)


def group_bars(path: pathlib.Path, errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A panel for each group, on a scale of its own; for each joint a bar for each comparison.

    Errors are by group with its unit, joint and comparison (see `validation_tables`).
    """
    counts = [len(rows) for rows in errors.values()]
    size = (7.0, 0.6 + 0.7 * len(errors) + 0.5 * sum(counts))
    figure, axes = figures.make(len(errors), 1, size, gridspec_kw={"height_ratios": counts})
    comparisons = list(
        dict.fromkeys(c for rows in errors.values() for r in rows.values() for c in r)
    )
    drawn: dict[str, Any] = {}
    for axis, (group, rows) in zip(axes[:, 0], errors.items(), strict=True):
        height = 0.8 / len(comparisons)
        for index, words in enumerate(comparisons):
            places = np.arange(len(rows)) + (index - (len(comparisons) - 1) / 2) * height
            values = [bars.get(words, np.nan) for bars in rows.values()]
            color = COMPARISON_COLORS[words]
            drawn[words] = axis.barh(places, values, height=0.9 * height, color=color)
            for place, value in zip(places, values, strict=True):
                if np.isfinite(value):
                    axis.text(value, place, f" {value:.3g}", va="center", fontsize=7)
        largest = max(value for bars in rows.values() for value in bars.values())
        axis.set_title(group, fontsize=10, loc="left")
        axis.set(xlim=(0, 1.3 * max(largest, 1e-12)), ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), list(rows) if len(rows) > 1 else [""] * len(rows))
        axis.tick_params(axis="y", length=0)
        figures.tidy(axis, "x")
    figure.legend(
        list(drawn.values()),
        list(drawn),
        loc="outside lower center",
        ncols=len(drawn),
        frameon=False,
        fontsize=9,
    )
    figures.save(figure, path)


def success(path: pathlib.Path, scopes: Mapping[str, Mapping[str, rollout.Evaluation]]) -> None:
    """Success of every policy with its interval, a panel for each scope (see `report.scopes`)."""
    evaluations = next(iter(scopes.values()))
    height = 1.1 + 0.42 * len(evaluations)
    figure, axes = figures.make(1, len(scopes), (1.8 + 2.9 * len(scopes), height), sharey=True)
    places = {policy: i for i, policy in enumerate(evaluations)}
    for axis, (title, column) in zip(axes[0], scopes.items(), strict=True):
        for policy, evaluation in column.items():
            rate = 100 * evaluation.rate
            low, high = (100 * end for end in evaluation.wilson())
            place = places[policy]
            axis.barh(place, rate, height=0.62, color=COLORS.get(policy, OTHER_COLOR), alpha=0.85)
            axis.plot([low, high], [place, place], color="#222222", linewidth=1.3)
            axis.plot([low, high], [place, place], "|", color="#222222", markersize=6)
            axis.text(104, place, f"{rate:.0f} %", va="center", fontsize=9)
        episodes = sorted({len(evaluation.episodes) for evaluation in column.values()})
        axis.set(xlim=(0, 100), xlabel="success, %")
        axis.set_title(f"{title} (n = {'/'.join(map(str, episodes))})", fontsize=10)
        axis.set_yticks(list(places.values()), [NAMES.get(policy, policy) for policy in places])
        axis.tick_params(axis="y", length=0)
        figures.tidy(axis, "x")
    axes[0][0].invert_yaxis()
    figures.save(figure, path)


def strip(path: pathlib.Path, recording: rollout.Recording) -> None:
    """Up to eight evenly spaced frames of one episode, a row per camera, the last one included."""
    total = len(recording.times)
    chosen = np.unique(np.linspace(0, total - 1, min(8, total)).round().astype(int))
    cameras = list(recording.frames)
    size = (1.35 * len(chosen) + 0.5, 1.4 * len(cameras) + 0.6)
    figure, axes = figures.make(len(cameras), len(chosen), size)
    for row, camera in zip(axes, cameras, strict=True):
        for axis, frame in zip(row, chosen, strict=True):
            axis.imshow(recording.frames[camera][frame], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(camera)
    for axis, frame in zip(axes[0], chosen, strict=True):
        axis.set_title(f"{recording.times[frame]:.2f} s", fontsize=9)
    figure.suptitle(_caption(recording), fontsize=10)
    figures.save(figure, path)


def _caption(recording: rollout.Recording) -> str:
    ending = "success" if recording.episode.success else "failure"
    label = NAMES.get(recording.label, recording.label)
    return f"{label}: “{recording.prompt}”, {ending} after {recording.times[-1]:.2f} s"


def animation(path: pathlib.Path, recording: rollout.Recording, side: int = 240) -> None:
    """The episode in real time as a GIF, cameras side by side over the prompt and the clock.

    The file is there once it is whole.
    """
    font = ImageFont.load_default(size=13)
    images = []
    for index, time in enumerate(recording.times):
        views = [_enlarge(frames[index], side) for frames in recording.frames.values()]
        canvas = Image.new("RGB", (sum(v.width for v in views) + 4 * (len(views) - 1), side + 44))
        left = 0
        for view in views:
            canvas.paste(view, (left, 0))
            left += view.width + 4
        draw = ImageDraw.Draw(canvas)
        draw.text((8, side + 5), recording.prompt, fill="white", font=font)
        note = f"{NAMES.get(recording.label, recording.label)}   {time:.2f} s"
        last = index == len(recording.times) - 1
        if last:
            note += "   success" if recording.episode.success else "   failure"
        color = "#9fe0b0" if last and recording.episode.success else "#bbbbbb"
        draw.text((8, side + 23), note, fill=color, font=font)
        images.append(canvas.quantize(128, dither=Image.Dither.NONE))
    # GIF counts in hundredths of a second; the ending is held so that it can be read.
    gaps = np.diff(recording.times) if len(images) > 1 else np.zeros(0)
    durations = [max(10 * math.floor(100 * gap + 0.5), 20) for gap in gaps]
    durations.append(1500)
    film = io.BytesIO()
    images[0].save(
        film,
        "GIF",
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
        optimize=True,
    )
    atomic.write(path, film.getvalue())


def _enlarge(frame: UInt8[np.ndarray, "h w 3"], side: int) -> Image.Image:
    """Scale to height `side` without blurring, so that one sees the pixels the policy sees."""
    width = round(frame.shape[1] * side / frame.shape[0])
    return Image.fromarray(frame).resize((width, side), Image.Resampling.NEAREST)
