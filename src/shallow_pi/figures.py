"""Figures without a display, where matplotlib (the extra `plots`) is installed."""

import io
import os
import pathlib
from typing import Any

from shallow_pi import atomic

# One of a figure's axes, or an array of them; matplotlib is optional and untyped here.
Axes = Any


class PlotsMissingError(ModuleNotFoundError):
    """Matplotlib is not installed."""


def make(
    rows: int, columns: int, size: tuple[float, float], *, dpi: int = 150, **kwargs: Any
) -> tuple[Any, Axes]:
    """A figure of a size in inches, and its (rows, columns) array of axes.

    Raises:
      PlotsMissingError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends import backend_agg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PlotsMissingError(
            "figures need matplotlib: install it with `uv sync --extra plots`, and run the same "
            "command again for them (training with --resume)"
        ) from error
    figure = Figure(figsize=size, layout="constrained", dpi=dpi)
    backend_agg.FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def legend(axis: Axes, *, beside: bool = False, **options: Any) -> None:
    """The legend of an axis without a frame, on its right if `beside`; `options` of matplotlib."""
    given: dict[str, Any] = {"frameon": False, "fontsize": 8, **options}
    if beside:
        given |= {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axis.legend(**given)


def tidy(axis: Axes, grid: str) -> None:
    """No frame but the axes; grid lines of "x", "y" or "both"."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure to a PNG that appears whole.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic.write(pathlib.Path(path), image.getvalue())
