"""Layers along the denoising path: how alike their inputs and outputs are, and how missed they are.

The data and the three pictures of the question whether skipping layers could replace a trained cut:
a heat map of similarity over integration steps, similarity against sensitivity, and success with
layers left out in several orders (`skipping`).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shallow_pi import figures
from shallow_pi.distill import flow, layer_scores
from shallow_pi.evaluation.rivals import rival
from shallow_pi.inference import sampler
from shallow_pi.models import pi0

BACKBONE, EXPERT = "#0072b2", "#d55e00"
ORDERS = {
    "oracle": "#d55e00",
    "sensitivity": "#009e73",
    "gate": "#cc79a7",
    "cka": "#56b4e9",
    "similarity": "#0072b2",
}
OTHER = "#555555"


@dataclasses.dataclass(frozen=True)
class Likeness:
    """Of every layer, at the times of the sampler on the teacher's own paths."""

    times: Float[np.ndarray, " n"]
    # Cosine between a layer's input and output; the backbone's are the same at all times.
    backbone: Float[np.ndarray, " l"]
    expert: Float[np.ndarray, "n l"]
    # Mean squared change of the velocity when the layer alone is skipped, in both streams.
    sensitivity: Float[np.ndarray, "n l"]

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of the expert's similarity and sensitivity (mean over times); −1 would do."""
        first, second = (
            np.argsort(np.argsort(x.mean(axis=0))) for x in (self.expert, self.sensitivity)
        )
        return float(np.corrcoef(first, second)[0, 1])

    def to_json(self) -> str:
        """One line."""
        rounded = {k: np.round(v, 6).tolist() for k, v in dataclasses.asdict(self).items()}
        return json.dumps(rounded, separators=(",", ":"))


def from_json(line: str) -> Likeness:
    """The inverse of `to_json`."""
    return Likeness(**{name: np.array(values) for name, values in json.loads(line).items()})


def measure(material: rival.Material, num_steps: int = 10) -> Likeness:
    """Measure a teacher on the first batch, from one noise an observation."""
    model, params = material.model, material.params
    batch = next(iter(material.feed()))
    observation = jax.tree.map(jnp.asarray, batch.observation).as_float()
    noise = flow.sample_noise(jax.random.key(0), batch.actions.shape)
    times = sampler.integration_times(num_steps)

    @jax.jit
    def step(x_t: Array, t: Array) -> tuple[Array, layer_scores.Cosines, Array]:
        given = (model, params, observation, x_t, jnp.broadcast_to(t, (len(x_t),)))
        v, _ = pi0.velocity(*given)
        behind = x_t - v / jnp.float32(num_steps)
        return behind, layer_scores.cosines(*given), layer_scores.sensitivity(*given)

    x_t, rows = noise, []
    for t in times:
        x_t, cosines, missed = step(x_t, jnp.float32(t))
        rows.append((np.asarray(cosines.expert), np.asarray(missed)))
    expert, sensitivity = (np.stack(column) for column in zip(*rows, strict=True))
    return Likeness(times, np.asarray(cosines.backbone), expert, sensitivity)


def heat_map(path: pathlib.Path, found: Likeness) -> None:
    """Cosine by layer and integration time, the backbone's one row above."""
    layers = len(found.backbone)
    figure, axes = figures.make(
        2, 1, (1.8 + 0.36 * layers, 4.2), gridspec_kw={"height_ratios": [1, len(found.times)]}
    )
    both = np.concatenate([found.backbone, found.expert.ravel()])
    span = {"vmin": float(both.min()), "vmax": 1.0, "cmap": "cividis", "aspect": "auto"}
    rows = {"backbone": found.backbone[None], "action expert": found.expert}
    image: Any = None
    for axis, (name, values) in zip(axes[:, 0], rows.items(), strict=True):
        image = axis.imshow(values, **span)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xticks(range(layers), range(layers) if name == "action expert" else [""] * layers)
        axis.tick_params(length=0)
    axes[0][0].set_yticks([])
    axes[1][0].set_yticks(range(len(found.times)), [f"{t:.1f}" for t in found.times])
    axes[1][0].set(xlabel="layer", ylabel="time t (1 is noise)")
    figure.colorbar(image, ax=axes, label="cosine of input and output")
    figure.savefig(path)


def scatter(path: pathlib.Path, found: Likeness) -> None:
    """Similarity against sensitivity, a point for each layer and stream, means over times."""
    figure, axes = figures.make(1, 1, (5.2, 4.0))
    axis, missed = axes[0][0], found.sensitivity.mean(axis=0)
    for name, cosine, color in (
        ("backbone", found.backbone, BACKBONE),
        ("action expert", found.expert.mean(axis=0), EXPERT),
    ):
        axis.scatter(cosine, missed, s=26, color=color, label=name)
        for layer, point in enumerate(zip(cosine, missed, strict=True)):
            axis.annotate(str(layer), point, (3, 3), textcoords="offset points", fontsize=7)
    axis.set_yscale("log")
    axis.set(xlabel="cosine of the layer's input and output", ylabel="velocity error when skipped")
    figures.tidy(axis, "both")
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def dropped(
    path: pathlib.Path, rates: Mapping[str, Mapping[int, tuple[float, float, float]]]
) -> None:
    """Success against the number of layers left out without training.

    Args:
      path: PNG to write.
      rates: order → layers left out → success rate, and the low and high end of its interval.
    """
    figure, axes = figures.make(1, 1, (5.6, 3.8))
    axis = axes[0][0]
    for name, points in rates.items():
        counts = sorted(points)
        rate, low, high = (100 * np.array([points[c][i] for c in counts]) for i in range(3))
        color = ORDERS.get(name, OTHER)
        axis.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(counts, rate, "o-", color=color, label=name, markersize=4)
    axis.set(xlabel="layers left out, no training", ylabel="success, %", ylim=(-2, 102))
    figures.tidy(axis, "both")
    axis.legend(frameon=False, fontsize=9, title="order by")
    figure.savefig(path)
