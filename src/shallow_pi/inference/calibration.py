"""Bounds of a policy's activations, measured on data and kept beside its parameters.

The sampler runs over observations with its own integration steps, and every product of a layer
counts the magnitudes of what it multiplies in a histogram with logarithmic bins. Tokens that do not
exist (masked cameras, padding of prompts) do not count: nothing reads them. Of each product the
largest magnitude is kept, and a percentile. int8, whose steps are of one size, can round within the
percentile and clip what is beyond; float8, whose steps grow with the number, keeps the largest.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi import atomic, progress
from shallow_pi.inference import forward, prepare, quantize, sampler, tuning
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0, prefixes

FILE_NAME = "calibration.json"
# A scheme; "tuned" is the fastest that was measured on this device.
Asked = quantize.Scheme | Literal["tuned"]
# Of the magnitudes of a product's activations, in percent. Clipping 0.01 % of them was no better on
# small models (docs/quantization.md).
PERCENTILE = 100.0
# A bin is all numbers that share exponent and leading bits of the mantissa: 3 % wide.
_MANTISSA_BITS = 5
_BINS = 2 ** (8 + _MANTISSA_BITS)

# Part, product and layer.
_Name = tuple[str, str, int]
# Largest magnitudes, and histograms.
_Found = tuple[dict[_Name, Array], dict[_Name, Array]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Bounds of the activations of every product, one for each layer."""

    # Observations that were sampled for, and integration steps of each.
    observations: int
    num_steps: int
    percentile: float
    # By part and product (`quantize.PRODUCTS`).
    largest: Mapping[str, Mapping[str, tuple[float, ...]]]
    within: Mapping[str, Mapping[str, tuple[float, ...]]]

    def bounds(self, scheme: quantize.Scheme) -> quantize.Bounds:
        """The bounds that a scheme rounds activations with."""
        chosen = self.within if quantize.format_of(scheme) == "int8" else self.largest
        return {
            part: {name: np.asarray(values, np.float32) for name, values in products.items()}
            for part, products in chosen.items()
        }


def save(folder: pathlib.Path, calibration: Calibration) -> pathlib.Path:
    """Write the file into an `assets` folder; returns it."""
    path = folder / FILE_NAME
    atomic.write(path, json.dumps(dataclasses.asdict(calibration), indent=1) + "\n")
    return path


def load(folder: pathlib.Path, config: pi0.Pi0Config) -> Calibration | None:
    """The calibration in an `assets` folder; None if there is none.

    Raises:
      ValueError: it is damaged, or of a model of other depths.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Calibration(**content)
        for chosen in (found.largest, found.within):
            for part, depth in quantize.depths(config).items():
                for name in quantize.PRODUCTS[part]:
                    values = np.asarray(chosen[part][name], np.float64)
                    if values.shape != (depth,) or not (np.isfinite(values) & (values > 0)).all():
                        raise ValueError(f"expected {depth} positive bounds for {part} {name}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not fit the model beside it ({error!r}): calibrate again with "
            "scripts/calibrate.py"
        ) from error
    return found


def choose(
    config: pi0.Pi0Config,
    asked: Asked | None,
    trained: quantize.Scheme,
    calibration: Calibration | None,
    num_steps: int,
    *,
    schemes: Sequence[quantize.Scheme] = quantize.SCHEMES,
) -> tuple[quantize.Scheme, quantize.Bounds | None]:
    """The scheme of a policy, and its bounds where it rounds activations.

    `asked` None means the scheme that the policy was trained for. Training rounds weights alone, so
    activations are then rounded only where there is a calibration. Errors advise
    one of `schemes`.

    Raises:
      ValueError: activations are to be rounded without a calibration, or "tuned" without a
        measurement.
    """
    scheme = trained if calibration is not None else quantize.weights_alone(trained)
    if asked == "tuned":
        fastest = tuning.fastest_scheme(config)
        if fastest is None:
            raise ValueError(
                "quantize 'tuned' needs a measurement of this model on this device, and there is "
                f"none: run scripts/benchmark.py with its --model, --depths {config.depth} "
                f"--horizons {config.action_horizon} --tune --quantize int8 fp8 w8; or name one of "
                "these, as you must for models it lacks (fewer image tokens, cut halves of layers)"
            )
        scheme = fastest
    elif asked is not None:
        scheme = asked
    quantize.check(scheme)
    if not quantize.rounds_activations(scheme):
        return scheme, None
    if calibration is None:
        alone = quantize.weights_alone(scheme)
        other = f"round weights alone ({alone})" if alone in schemes else "round nothing (none)"
        raise ValueError(
            f"quantize {scheme!r} needs bounds in assets/{FILE_NAME}: run scripts/calibrate.py "
            f"POLICY --data.path DATASET, or {other}"
        )
    if calibration.num_steps != num_steps:
        progress.warn(
            f"the activations of the policy were calibrated at {calibration.num_steps} integration "
            f"steps and it samples in {num_steps}: calibrate it again (scripts/calibrate.py)"
        )
    return scheme, calibration.bounds(scheme)


def calibrate(
    config: pi0.Pi0Config,
    params: PyTree,
    batches: Iterable[tuple[observations.Observation, Float[np.ndarray, "b ah ad"]]],
    *,
    num_steps: int,
    percentile: float = PERCENTILE,
    advance: Callable[[int], None] = lambda count: None,
) -> Calibration:
    """Sample actions for observations, and measure the activations of every product.

    Batches have observations in [-1, 1] and the noise to begin at; another size compiles again.
    `percentile` is in percent, and 100 is the largest magnitude; `advance` is called with the
    number of observations after each batch.

    Raises:
      ValueError: no observations, a percentile outside (0, 100], or activations that are not
        finite.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"--percentile must lie in (0, 100], got {percentile}")
    # Each product of each layer is an equation of its own; the steps share one program.
    options = dataclasses.replace(tuning.ALL_ON, padded_tower=False, time_tables=False)
    times = sampler.integration_times(num_steps)
    prepared = jax.jit(functools.partial(prepare.prepare, config, times=times, options=options))(
        params
    )

    @jax.jit
    def prefix(
        prepared: prepare.Prepared, observation: observations.Observation
    ) -> tuple[tuple[PyTree, Array], _Found]:
        cameras = prefixes.image_valid(config, observation, config.patches)
        watched = _Watched({}, {})
        seen = watched.watch(prepared, cameras, prefixes.valid(config, observation))
        cache, valid = forward.prefill(config, seen, observation)
        cache, valid = forward.append_state(config, seen, observation.state, cache, valid)
        return (cache, valid), (watched.largest, watched.counts)

    @jax.jit
    def step(
        prepared: prepare.Prepared, held: tuple[PyTree, Array], x_t: Array, t: Array
    ) -> tuple[Array, _Found]:
        watched, tables = _Watched({}, {}), prepare.make_tables(config, prepared.params, t[None])
        cache, valid = held
        v, _ = forward.velocity(config, watched.watch(prepared), cache, valid, x_t, tables)
        return x_t - v / num_steps, (watched.largest, watched.counts)

    largest: dict[_Name, float] = {}
    counts: dict[_Name, np.ndarray] = {}
    total = 0

    def add(found: _Found) -> None:
        for name, value in found[0].items():
            largest[name] = max(largest.get(name, 0.0), float(value))
            counts[name] = counts.get(name, np.zeros(_BINS, np.int64)) + np.asarray(found[1][name])

    for observation, noise in batches:
        held, found = prefix(prepared, observation)
        add(found)
        x_t = jnp.asarray(noise, jnp.float32)
        for t in times:
            x_t, found = step(prepared, held, x_t, jnp.asarray(t))
            add(found)
        if not np.isfinite(x_t).all():
            raise ValueError("the policy's actions are not finite: it cannot be calibrated")
        total += len(noise)
        advance(len(noise))
    if not total:
        raise ValueError("there are no observations to calibrate on")
    within = {name: _percentile(counts[name], percentile) for name in counts}
    within = {name: min(value, largest[name]) for name, value in within.items()}
    return Calibration(
        total, num_steps, percentile, _by_part(config, largest), _by_part(config, within)
    )


@dataclasses.dataclass(frozen=True)
class _Watched:
    """Statistics of the activations that watched matrices multiply, while one trace runs."""

    largest: dict[_Name, Array]
    counts: dict[_Name, Array]

    def watch(
        self,
        prepared: prepare.Prepared,
        patches: Bool[Array, "b n"] | None = None,
        prefix: Bool[Array, "b s"] | None = None,
    ) -> prepare.Prepared:
        """Prepared weights whose matrices are watched.

        `patches` and `prefix` mark the image patches and prefix tokens that exist: others do not
        count.
        """
        rows = {"vision": patches, "backbone": prefix}

        def of(part: quantize.Part) -> quantize.Change:
            def change(index: int | None, name: str, matrix: Array) -> "_Matrix":
                assert index is not None, "layers are unrolled"
                return _Matrix(matrix, (part, name, index), rows.get(part), self)

            return change

        image = prepared.image
        return prepared._replace(
            image=image._replace(layers=quantize.map_matrices(image.layers, of("vision"))),
            prefix=quantize.map_matrices(prepared.prefix, of("backbone")),
            suffix=quantize.map_matrices(prepared.suffix, of("expert")),
        )

    def add(self, name: _Name, rows: Float[Array, "n i"], there: Bool[Array, "b s"] | None) -> None:
        magnitude = jnp.abs(rows.astype(jnp.float32))
        if there is not None:
            magnitude = jnp.where(there.reshape(-1)[:, None], magnitude, 0.0)
        largest, counts = jnp.max(magnitude), _histogram(magnitude)
        if name in self.largest:
            largest = jnp.maximum(largest, self.largest[name])
            counts = counts + self.counts[name]
        self.largest[name], self.counts[name] = largest, counts


@dataclasses.dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix that reports what it multiplies."""

    array: Array
    name: _Name
    # The rows that exist; None: all.
    there: Bool[Array, "b s"] | None
    watched: _Watched

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def times(self, rows: Float[Array, "n i"]) -> Float[Array, "n o"]:
        self.watched.add(self.name, rows, self.there)
        return rows @ self.array.astype(rows.dtype)


def _histogram(magnitude: Float[Array, "n i"]) -> Int[Array, " bins"]:
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    return jnp.zeros(_BINS, jnp.int32).at[(bits >> (23 - _MANTISSA_BITS)).reshape(-1)].add(1)


def _percentile(counts: np.ndarray, percentile: float) -> float:
    """The upper end of the bin in which a percentile lies; zeros do not count."""
    counts = counts.copy()
    counts[0] = 0
    reached = np.cumsum(counts)
    if not reached[-1]:
        return 1.0
    last = int(np.searchsorted(reached, percentile / 100 * reached[-1]))
    return float(np.array(last + 1 << (23 - _MANTISSA_BITS), np.int32).view(np.float32))


def _by_part(config: pi0.Pi0Config, found: Mapping[_Name, float]) -> dict[str, Any]:
    """Bounds by part and product; 1 where a product is of zeros alone or its layer lacks it."""
    return {
        part: {
            name: tuple(found.get((part, name, i)) or 1.0 for i in range(depth))
            for name in quantize.PRODUCTS[part]
        }
        for part, depth in quantize.depths(config).items()
    }
