"""Change of a policy's actions when its products are rounded to 8 bits."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, PyTree

from shallow_pi.inference import calibration, program, quantize, tuning
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0


class Error(NamedTuple):
    """Relative to the actions without rounding, from the same noise: norm of the difference."""

    # Over all observations together.
    rms: float
    # Of the observations, each by itself.
    median: float
    p95: float


def measure(
    config: pi0.Pi0Config,
    params: PyTree,
    batches: Iterable[tuple[observations.Observation, Float[np.ndarray, "b ah ad"]]],
    bounds: calibration.Calibration,
    *,
    action_dim: int,
    schemes: tuple[quantize.Scheme, ...] = quantize.SCHEMES[1:],
    parts: tuple[quantize.Part, ...] = quantize.PARTS,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[quantize.Scheme, Error]:
    """Sample normalized actions without rounding and with each scheme.

    Batches have observations with uint8 images and the noise to begin at; another size compiles
    again. Only the first `action_dim` actions count, those that the robot has; `advance` is called
    with the number of observations after each batch.
    """

    def made(scheme: quantize.Scheme) -> program.Program:
        options = dataclasses.replace(tuning.ALL_OFF, quantize=scheme, quantized=parts)
        own = bounds.bounds(scheme) if quantize.rounds_activations(scheme) else None
        return program.Program.create(config, params, bounds.num_steps, options, own)

    layout, exact = program.Layout(config), made("none")
    rounded = {scheme: made(scheme) for scheme in schemes}
    size: list[np.ndarray] = []
    off: dict[quantize.Scheme, list[np.ndarray]] = {scheme: [] for scheme in schemes}
    for observation, noise in batches:
        packed = program.pack(layout, observation, noise)
        expected = np.asarray(exact(layout, packed))[..., :action_dim]
        size.append(np.linalg.norm(expected, axis=(1, 2)))
        for scheme, run in rounded.items():
            found = np.asarray(run(layout, packed))[..., :action_dim]
            off[scheme].append(np.linalg.norm(found - expected, axis=(1, 2)))
        advance(len(noise))
    sizes = np.concatenate(size)
    return {scheme: _error(np.concatenate(one), sizes) for scheme, one in off.items()}


def _error(off: Float[np.ndarray, " n"], size: Float[np.ndarray, " n"]) -> Error:
    each = off / size
    together = np.linalg.norm(off) / np.linalg.norm(size)
    return Error(float(together), float(np.median(each)), float(np.quantile(each, 0.95)))
