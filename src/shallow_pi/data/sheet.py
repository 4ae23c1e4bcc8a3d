"""Samples on one sheet: images as the model sees them, prompts, action chunks and ranges.

`write` puts it into the folder of a new run, and `scripts/inspect_data.py` draws it without a run.
The sheet needs only Pillow; the histograms need matplotlib (the extra `plots`), which is imported
when they are drawn.
"""

import functools
import io
import os
import pathlib
import textwrap

import jax
import numpy as np
from jaxtyping import Array, Key, UInt8
from PIL import Image, ImageDraw, ImageFont

from shallow_pi import atomic, figures
from shallow_pi.data import inspection
from shallow_pi.models import observation

# Samples whose images are drawn.
DRAWN = 6
# Sizes in pixels: images are enlarged to about _SIDE.
_SIDE, _GAP, _LINE, _TEXT, _PLOT, _LEGEND = 192, 8, 18, 330, 300, 190
_INK, _GREY, _RED = "#222222", "#8a8a8a", "#c0392b"
# Of the dimensions of actions, then again from the first: Okabe and Ito's, then others.
_COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000"),
    *("#6a3d9a", "#8c564b", "#66c2a5", "#e31a1c", "#b3a500", "#1b3f8b", "#f4a6c0", "#3d7d1f"),
)


def write(
    path: pathlib.Path,
    samples: inspection.Samples,
    augmentation: observation.Augmentation,
    seed: int = 0,
) -> UInt8[np.ndarray, "h w 3"]:
    """Write the `sheet` of samples to a PNG and return it.

    Args:
      path: of the file; its folder is made if absent.
      samples: to draw.
      augmentation: of the training images.
      seed: of the augmentation.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    image, png = sheet(samples, augmentation, seed), io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, png.getvalue())
    return image


def sheet(
    samples: inspection.Samples, augmentation: observation.Augmentation, seed: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """The samples as an image: a row for each of a few, then the ranges, warnings and facts.

    Args:
      samples: to draw.
      augmentation: of the training images.
      seed: of the augmentation.
    """
    batch, seen = samples.batch, samples.batch.observation
    count = min(DRAWN, len(batch.actions))
    drawn = np.linspace(0, len(batch.actions) - 1, count).round().astype(int).tolist()
    images = _augmented(jax.tree.map(lambda leaf: leaf[drawn], seen), augmentation, seed)
    shown, cut = inspection.prompts(samples), inspection.truncated(samples)
    found = inspection.ranges(samples)
    table = inspection.rows(found)
    doubtful = {own.name for own in found if own.is_doubtful}
    notes = [(line, _RED) for line in inspection.doubtful(samples, found)]
    notes += [(line, _INK) for line in inspection.facts(samples)]
    side = max(1, round(_SIDE / next(iter(images.values())).shape[1]))
    side *= next(iter(images.values())).shape[1]
    dims = samples.values["actions"].shape[1]

    top, pitch = 2 * _LINE, side + _GAP
    text_left = _GAP + len(images) * pitch
    plot_left = text_left + _TEXT + _GAP
    legend_left = plot_left + _PLOT + 2 * _GAP
    width = legend_left + _LEGEND
    table_top = top + max(count * pitch, min(dims, len(_COLORS)) * _LINE) + _LINE
    columns = max(1, min(width // _COLUMN, -(-len(found) // 8)))
    per_column = -(-len(found) // columns)
    width = max(width, columns * _COLUMN + 2 * _GAP)
    lines = [
        (part, color)
        for line, color in notes
        for part in textwrap.wrap(line, max(40, width // 8), subsequent_indent="    ")
    ]
    notes_top = table_top + (per_column + 2) * _LINE + _GAP
    height = notes_top + len(lines) * _LINE + _GAP
    canvas = Image.new("RGB", (width, height), "white")
    pen = _Pen(ImageDraw.Draw(canvas))

    for column, name in enumerate(images):
        pen.text(_GAP + column * pitch, _GAP, name)
    pen.text(text_left, _GAP, "prompt, decoded from its tokens")
    pen.text(plot_left, _GAP, f"actions, normalized, within ±{_CHUNK_LIMIT:g} (grey: past the end)")
    pen.legend(legend_left, top, [samples.name("actions", dim) for dim in range(dims)])
    for row, sample in enumerate(drawn):
        y = top + row * pitch
        for column, (name, own) in enumerate(images.items()):
            x = _GAP + column * pitch
            pen.frame(x, y, side)
            if seen.image_masks[name][sample]:
                enlarged = Image.fromarray(own[row]).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(enlarged, (x, y))
            else:
                pen.absent(x, y, side)
        used = int(seen.tokenized_prompt_mask[sample].sum())
        budget = seen.tokenized_prompt.shape[1]
        length = f"{used} of {budget} tokens"
        pen.prompt(text_left, y, side, shown[sample], length, bool(cut[sample]))
        pen.chunk(plot_left, y, side, batch.actions[sample, :, :dims], batch.action_mask[sample])
    for start in range(columns):
        body = table[2 + start * per_column : 2 + (start + 1) * per_column]
        pen.table(_GAP + start * _COLUMN, table_top, [*table[:2], *body], doubtful)
    for i, (line, color) in enumerate(lines):
        pen.text(_GAP, notes_top + i * _LINE, line, color)
    return np.asarray(canvas)


def _augmented(
    drawn: observation.Observation, augmentation: observation.Augmentation, seed: int
) -> dict[str, np.ndarray]:
    """Images by camera as the model gets them, as bytes again."""
    seen = _augment(jax.random.key(seed), drawn.as_float(), augmentation)
    return {
        name: np.asarray(np.round((np.asarray(seen.images[name]) + 1) * 127.5), np.uint8)
        for name in drawn.images
    }


@functools.partial(jax.jit, static_argnums=2)
def _augment(
    key: Key[Array, ""], seen: observation.Observation, augmentation: observation.Augmentation
) -> observation.Observation:
    return observation.augment(key, seen, augmentation)


# Of a block of ranges: the name, then numbers that end at these places.
_NAME = 190
_ENDS = tuple(_NAME + end for end in (64, 136, 208, 270, 332, 394, 456))
_COLUMN = _ENDS[-1] + 36
_CHUNK_LIMIT = 3.0


class _Pen:
    """Draws the parts of the sheet at given places."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        self._draw = draw
        self._font = ImageFont.load_default(size=13)

    def text(self, x: float, y: float, text: str, color: str = _INK, anchor: str = "la") -> None:
        self._draw.text((x, y), text, fill=color, font=self._font, anchor=anchor)

    def _fitting(self, text: str, room: float) -> str:
        """The text, shortened so that it is no wider than `room` pixels."""
        if self._font.getlength(text) <= room:
            return text
        while text and self._font.getlength(text + "…") > room:
            text = text[:-1]
        return text + "…"

    def frame(self, x: int, y: int, side: int) -> None:
        """A line around an image, outside it."""
        self._draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#bbbbbb")

    def absent(self, x: int, y: int, side: int) -> None:
        """A camera the robot does not have: the model sees black, and is told not to look."""
        self._draw.rectangle((x, y, x + side - 1, y + side - 1), fill="#dddddd")
        for shift in range(-side, side, 16):
            start, end = max(0, shift), min(side, side + shift)
            ends = (x + start, y + start - shift, x + end - 1, y + end - shift - 1)
            self._draw.line(ends, fill="#c4c4c4")
        self.text(x + side / 2, y + side / 2, "absent, masked", _INK, "mm")

    def prompt(self, x: int, y: int, side: int, text: str, tokens: str, is_cut: bool) -> None:
        """The prompt, as much of it as there is room for, over its length in tokens."""
        lines = textwrap.wrap(text, 46)
        room = max(1, side // _LINE - 2)
        if len(lines) > room:
            lines = [*lines[: room - 1], lines[room - 1][:42] + " …"]
        for i, line in enumerate(lines):
            self.text(x, y + i * _LINE, line)
        below = y + (len(lines) + 0.4) * _LINE
        self.text(x, below, tokens + (", CUT" if is_cut else ""), _RED if is_cut else _GREY)

    def chunk(
        self,
        x: int,
        y: int,
        side: int,
        actions: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        """A line for each action dimension over the horizon, grey beyond the episode's end."""
        horizon, dims = actions.shape
        step = _PLOT / max(1, horizon - 1)
        if not mask.all():
            left = x + step * (int(mask.sum()) - 0.5)
            self._draw.rectangle((left, y, x + _PLOT, y + side - 1), fill="#e6e6e6")
        middle, scale = y + side / 2, (side / 2 - 2) / _CHUNK_LIMIT
        self._draw.line((x, middle, x + _PLOT, middle), fill="#bbbbbb")
        for dim in range(dims):
            heights = np.clip(np.nan_to_num(actions[:, dim]), -_CHUNK_LIMIT, _CHUNK_LIMIT)
            points = [(x + i * step, middle - h * scale) for i, h in enumerate(heights.tolist())]
            if horizon == 1:
                points.append((x + _PLOT, points[0][1]))
            self._draw.line(points, fill=_COLORS[dim % len(_COLORS)], width=2)
        self._draw.rectangle((x, y, x + _PLOT, y + side - 1), outline="#999999")

    def legend(self, x: int, y: int, names: list[str]) -> None:
        """The colour of each action dimension; dimensions beyond the colours share them."""
        for dim, color in enumerate(_COLORS[: len(names)]):
            top = y + dim * _LINE
            self._draw.rectangle((x, top + 6, x + 14, top + 9), fill=color)
            others = "".join(f", [{i}]" for i in range(dim, len(names), len(_COLORS))[1:])
            name = names[dim].removeprefix("actions") + others
            self.text(x + 20, top, self._fitting(name, _LEGEND - 24))

    def table(self, x: int, y: int, rows: list[tuple[str, ...]], doubtful: set[str]) -> None:
        """Names on the left, numbers right-aligned below each other; doubtful rows are red."""
        for i, (name, *cells) in enumerate(rows):
            top = y + i * _LINE
            color = _GREY if i < 2 else _RED if name in doubtful else _INK
            self.text(x, top, self._fitting(name, _NAME), color)
            for end, cell in zip(_ENDS, cells, strict=True):
                self.text(x + end, top, cell, color, "ra")


def histograms(path: str | os.PathLike[str], samples: inspection.Samples) -> None:
    """A panel for each dimension of state and actions, normalized; doubtful ones are red.

    Args:
      path: PNG to write.
      samples: to draw.

    Raises:
      figures.PlotsMissingError: matplotlib is not installed.
    """
    found, owns = samples.values, inspection.ranges(samples)
    columns = min(8, max(value.shape[1] for value in found.values()))
    heights = [-(-value.shape[1] // columns) for value in found.values()]
    size = (1.8 * columns, 1.6 * sum(heights) + 0.4)
    figure, axes = figures.make(sum(heights), columns, size, dpi=110)
    figure.suptitle("after normalization; −1 to 1 is grey", fontsize=9)
    for axis in axes.flat:
        axis.axis("off")
    panels = [
        (axes[top + dim // columns][dim % columns], column)
        for top, value in zip((0, heights[0]), found.values(), strict=True)
        for dim, column in enumerate(value.T)
    ]
    for (axis, column), own in zip(panels, owns, strict=True):
        color = "#c0392b" if own.is_doubtful else "#0072b2"
        finite = column[np.isfinite(column)]
        axis.axis("on")
        axis.axvspan(-1, 1, color="#eeeeee")
        if finite.size:
            low, high = min(-3.0, finite.min()), max(3.0, finite.max())
            axis.hist(finite, bins=40, range=(low, high), color=color)
        axis.set_title(own.name.replace(" ", "\n", 1), fontsize=8, color=color)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
        axis.spines[["top", "left", "right"]].set_visible(False)
    figures.save(figure, path)
