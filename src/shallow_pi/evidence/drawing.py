"""Plots of claims, drawn from their results: curves over numbers, points over names, layers."""

import json
import pathlib
from collections.abc import Mapping

import numpy as np

from shallow_pi import figures
from shallow_pi.evaluation import plots
from shallow_pi.evidence import outcomes
from shallow_pi.evidence.claims.claim import Plot


def plot(path: pathlib.Path, table: outcomes.Table, drawn: Plot) -> bool:
    """What is measured of a claim's figure, with 95 % intervals; False, and no file, if nothing."""
    means = [[(x, table.mean(side)) for x, side in line.points] for line in drawn.lines]
    lines = [[(x, mean) for x, mean in found if mean is not None] for found in means]
    names = [x for measured in lines for x, _ in measured if isinstance(x, str)]
    if not any(lines):
        return False
    places = {name: float(i) for i, name in enumerate(dict.fromkeys(names))}
    # A long legend stands beside the curves.
    many = sum(map(bool, lines)) > 3
    wide = max(5.2, 0.5 * len(places) + 2) + 2.6 * many
    figure, axes = figures.make(1, 1, (wide, 3.9 if not places else 4.4))
    axis = axes[0][0]
    percent = drawn.y.endswith("%")
    for index, (line, measured) in enumerate(zip(drawn.lines, lines, strict=True)):
        if not measured:
            continue
        scale = 100 if percent else 1
        offset = 0.12 * (index - (len(drawn.lines) - 1) / 2) if places else 0.0
        x = np.array([places[x] + offset if isinstance(x, str) else x for x, _ in measured])
        y = scale * np.array([mean.mean for _, mean in measured])
        ends = [(scale * mean.low, scale * mean.high) for _, mean in measured]
        # One observation has no interval.
        ends = [
            (low, high) if np.isfinite(low) else (v, v)
            for (low, high), v in zip(ends, y, strict=True)
        ]
        errors = np.abs(np.array(ends).T - y)
        color = plots.COLORS.get(line.colour, plots.OTHER_COLOR)
        axis.errorbar(
            x, y, yerr=errors, label=line.label, color=color, linestyle=line.style,
            marker="o", markersize=4.5, linewidth=1.6, elinewidth=1.0, capsize=2.0,
        )  # fmt: skip
    if places:
        axis.set_xticks(list(places.values()), list(places), rotation=35, ha="right", fontsize=8)
    elif all(x > 0 for line in drawn.lines for x, _ in line.points if isinstance(x, float)):
        _logarithmic(axis, sorted({float(x) for line in drawn.lines for x, _ in line.points}))
    axis.set(xlabel=drawn.x, ylabel=drawn.y)
    axis.set_title(drawn.title, fontsize=11)
    if percent:
        axis.set_ylim(0, 103)
    else:
        axis.set_ylim(bottom=0)
    figures.tidy(axis, "y")
    if len(drawn.lines) > 1:
        figures.legend(axis, beside=many, handlelength=3.2)
    figures.save(figure, path)
    return True


def _logarithmic(axis: figures.Axes, values: list[float]) -> None:
    """Values that span a factor of 4 or more on a logarithmic axis, each with its number."""
    if values[-1] >= 4 * values[0]:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(values, [f"{value:g}" for value in values])


def layer_scores(path: pathlib.Path, scores: pathlib.Path) -> bool:
    """Likeness of layers at each integration step, and likeness against sensitivity."""
    if not scores.exists():
        return False
    found: Mapping[str, list[list[float]]] = json.loads(scores.read_text(encoding="utf-8"))
    figure, axes = figures.make(1, 2, (10.5, 3.9))
    by_step = np.array(found["expert_similarity_by_step"])
    image = axes[0][0].imshow(by_step, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes[0][0], label="cosine of input and output")
    axes[0][0].set(xlabel="layer", ylabel="integration step (0 is noise)")
    axes[0][0].set_title("Likeness of the expert's layers over the denoising steps", fontsize=11)
    similarity, sensitivity = np.array(found["similarity"]), np.array(found["sensitivity"])
    axis = axes[0][1]
    axis.scatter(similarity, sensitivity, color=plots.COLORS["teacher"], s=22)
    for layer, point in enumerate(zip(similarity, sensitivity, strict=True)):
        axis.annotate(str(layer), point, xytext=(4, 3), textcoords="offset points", fontsize=8)
    axis.set(xlabel="mean cosine of input and output", ylabel="rise of the velocity error")
    if sensitivity.min() > 0:
        axis.set_yscale("log")
    axis.set_title("Likeness against sensitivity", fontsize=11)
    figures.tidy(axis, "both")
    figures.save(figure, path)
    return True
