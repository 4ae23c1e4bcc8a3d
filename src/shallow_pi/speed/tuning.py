"""Measure the fastest inference options on this device; `inference.tuning` keeps them.

Layers unrolled or scanned and integration steps unrolled or scanned are combined, and, with both
unrolled, every choice of attention kernels for image tower, prefix and steps, and of the steps'
buffers; all are timed in turns (see `latency`). Combinations that do not compile (a kernel the
hardware lacks, a program too large) are reported with the reason.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array

from shallow_pi import progress
from shallow_pi.inference import attention, program, quantize, tuning
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.speed import latency, made_up


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The outcome of a measurement."""

    # The fastest that change no result.
    options: tuning.InferenceOptions
    # The fastest scheme of products in 8 bits, "none" if none is faster; None: none was tried.
    quantize: quantize.Scheme | None
    # Milliseconds of each candidate that ran, by name, the fastest first.
    median_ms: dict[str, float]
    # Reasons of those that did not run, by name.
    failed: dict[str, str]


def candidates(
    dtype: str, schemes: Sequence[quantize.Scheme] = ()
) -> dict[str, tuning.InferenceOptions]:
    """Every combination worth trying, by name; with products in 8 bits, everything unrolled."""
    words, found = {True: "unrolled", False: "scanned"}, {}
    # Of this backend, so that its default is among them.
    base = dataclasses.replace(tuning.default(), unrolled_layers=True, unrolled_steps=True)
    for layers, steps in itertools.product((True, False), (True, False)):
        found[f"layers {words[layers]}, steps {words[steps]}"] = dataclasses.replace(
            base, unrolled_layers=layers, unrolled_steps=steps
        )
    kernels = attention.available(dtype)
    for tower, prefix, step in itertools.product(kernels, kernels, kernels):
        if {tower, prefix, step} == {"xla"}:
            continue  # Timed above.
        found[f"all unrolled, attention {tower} (tower), {prefix} (prefix), {step} (steps)"] = (
            dataclasses.replace(
                base, tower_attention=tower, prefix_attention=prefix, step_attention=step
            )
        )
    for buffers in attention.BUFFERS[1:]:
        found[f"all unrolled, buffers {buffers}"] = dataclasses.replace(base, step_buffers=buffers)
    for scheme in schemes:
        found[f"all unrolled, {scheme}"] = dataclasses.replace(base, quantize=scheme)
    return found


def tune(
    config: pi0.Pi0Config,
    *,
    num_steps: int = 10,
    repeats: int = 20,
    tried: Mapping[str, tuning.InferenceOptions] | None = None,
    schemes: Sequence[quantize.Scheme] = (),
) -> Tuned:
    """Time a model with random weights under every combination of options.

    The config has the cameras and the prompt length of a usual observation. `tried` is what to
    time, by name; None times `candidates`, with `schemes` of products in 8 bits among them.

    Raises:
      RuntimeError: nothing compiles.
    """
    tried = candidates(config.dtype, schemes) if tried is None else tried
    noise = np.random.default_rng(0).standard_normal((1, config.action_horizon, config.action_dim))
    layout = program.Layout(config)
    packed = program.pack(layout, batches.noise(config, 1).observation, noise)
    given = layout, jax.device_put(packed)
    # Steps and kernels share their weights.
    weights: dict[tuple[bool, str], program.Program] = {}
    calls: dict[str, Callable[[], Array]] = {}
    failed: dict[str, str] = {}
    with progress.bar("Compile", total=len(tried)) as advance:
        for name, options in tried.items():
            kind = options.unrolled_layers, options.quantize
            try:
                if kind not in weights:
                    weights[kind] = made_up.prepared_program(config, num_steps, options)
                run = dataclasses.replace(weights[kind], options=options)
                call = functools.partial(run, *given)
                jax.block_until_ready(call())
                calls[name] = call
            except (RuntimeError, NotImplementedError, ValueError) as error:
                failed[name] = (str(error).strip() or repr(error)).splitlines()[0]
            advance(1)
    if not calls:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RuntimeError(f"nothing compiles on {jax.devices()[0].device_kind}: {reasons}")
    found = latency.median_latency(calls, repeats=repeats, label="Tune").median_ms
    order = sorted(found, key=lambda name: found[name])
    same = next((tried[name] for name in order if tried[name].quantize == "none"), tuning.default())
    scheme = tried[order[0]].quantize if any(o.quantize != "none" for o in tried.values()) else None
    return Tuned(same, scheme, {name: found[name] for name in order}, failed)
