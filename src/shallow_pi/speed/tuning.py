"""Measure the fastest inference options on this device; `inference.tuning` keeps them.

Layers unrolled or scanned, integration steps unrolled or scanned, and every attention kernel of the
backend are combined and timed in turns (see `latency`). Combinations that do not compile (a kernel
the hardware lacks, a program too large) are reported with the reason.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from shallow_pi import progress
from shallow_pi.inference import attention, prepare, tuning
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.speed import inference, latency


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The outcome of a measurement."""

    # The fastest.
    options: tuning.InferenceOptions
    # Milliseconds of each candidate that ran, by name, the fastest first.
    median_ms: dict[str, float]
    # Reasons of those that did not run, by name.
    failed: dict[str, str]


def candidates(dtype: str) -> dict[str, tuning.InferenceOptions]:
    """Every combination worth trying, by name."""
    words = {True: "unrolled", False: "scanned"}
    return {
        f"layers {words[layers]}, steps {words[steps]}, {kernel} attention": dataclasses.replace(
            tuning.ALL_ON, unrolled_layers=layers, unrolled_steps=steps, attention=kernel
        )
        for kernel, layers, steps in itertools.product(
            attention.available(dtype), (True, False), (True, False)
        )
    }


def tune(
    config: pi0.Pi0Config,
    *,
    num_steps: int = 10,
    repeats: int = 20,
    tried: Mapping[str, tuning.InferenceOptions] | None = None,
) -> Tuned:
    """Time a model with random weights under every combination of options.

    Args:
      config: the model, with the cameras and the prompt length of a usual observation.
      num_steps: integration steps.
      repeats: timed calls of each.
      tried: what to time, by name; None is `candidates`.

    Raises:
      RuntimeError: nothing compiles.
    """
    tried = candidates(config.dtype) if tried is None else tried
    params = inference.random_params(config)
    observation = jax.device_put(batches.noise(config, 1).observation)
    shape = (1, config.action_horizon, config.action_dim)
    noise = jax.random.normal(jax.random.key(0), shape)
    # Steps and kernels share their weights.
    weights: dict[bool, prepare.Prepared] = {}
    calls: dict[str, Callable[[], Array]] = {}
    failed: dict[str, str] = {}
    with progress.bar("Compile", total=len(tried)) as advance:
        for name, options in tried.items():
            if options.unrolled_layers not in weights:
                weights[options.unrolled_layers] = inference.prepare_weights(
                    config, params, num_steps, options
                )
            given = weights[options.unrolled_layers], observation, noise
            try:
                calls[name] = _ready(inference.sampling(config, num_steps, options), given)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                failed[name] = (str(error).strip() or repr(error)).splitlines()[0]
            advance(1)
    if not calls:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RuntimeError(f"nothing compiles on {jax.devices()[0].device_kind}: {reasons}")
    found = latency.median_latency(calls, repeats=repeats, label="Tune").median_ms
    order = sorted(found, key=lambda name: found[name])
    return Tuned(tried[order[0]], {name: found[name] for name in order}, failed)


def _ready(run: Any, given: tuple[Any, ...]) -> Callable[[], Array]:
    """A call without arguments, run once already."""
    jax.block_until_ready(run(*given))
    return lambda: run(*given)
