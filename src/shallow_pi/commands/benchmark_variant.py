"""Measure one variant in a process of its own, which `scripts/benchmark_all.py` starts.

python -m shallow_pi.commands.benchmark_variant VARIANT TINY OUTPUT

VARIANT is the JSON of a `speed.variants.Variant`, TINY 0 or 1, OUTPUT the JSON file to write. When
everything is compiled, an empty file says so, and the device is left alone until a line comes from
standard input.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from shallow_pi import atomic
from shallow_pi.commands import benchmark_step
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.parallel import processes
from shallow_pi.speed import inference, latency, made_up, report, step, turns, variants
from shallow_pi.training import command_line

Ready = Callable[[], None]
# Side of the ceiling's matrices in miniature.
CEILING = 256


def measure(variant: variants.Variant, tiny: bool, ready: Ready) -> dict[str, Any]:
    """Measure a variant; the result is the content of its JSON file.

    `ready` is called when everything is compiled.
    """
    began = time.perf_counter()
    waited: list[float] = []

    def turn() -> None:
        start = time.perf_counter()
        waited.append(start - began)
        ready()
        waited.append(time.perf_counter() - start)

    kinds = {
        "inference": _inference,
        "policy": _policy,
        "openpi": _openpi,
        "step": _step,
    }
    found = kinds[variant.kind](variant, tiny, turn)
    device = jax.devices()[0]
    return {
        "variant": dataclasses.asdict(variant),
        **found,
        "device": device.device_kind,
        "compile_seconds": waited[0],
        "timing_seconds": time.perf_counter() - began - sum(waited),
        **report.surroundings(),
    }


def _inference(variant: variants.Variant, tiny: bool, ready: Ready) -> dict[str, Any]:
    config, options = variant.config(tiny), variant.inference_options()
    timing = inference.measure(
        config,
        num_steps=variant.num_steps,
        repeats=variant.repeats,
        options=options,
        parts=variant.parts,
        ablate=False,
        profile=variant.profile,
        ready=ready,
    )
    found: dict[str, Any] = {"timing": dataclasses.asdict(timing)}
    if variant.parts:
        limit = inference.ceiling(config.dtype, CEILING if tiny else None)
        found |= {"ceiling": dataclasses.asdict(limit), "shares": timing.shares(limit)}
    return found


def _policy(variant: variants.Variant, tiny: bool, ready: Ready) -> dict[str, Any]:
    # Pillow and SentencePiece, which the rest does without.
    from shallow_pi.speed import host_path

    with host_path.made_up_policy(variant.config(tiny), variant.num_steps) as policy:
        found = host_path.measure_batches(
            policy, variant.sizes, repeats=variant.repeats, ready=ready
        )
        path = host_path.measure(policy, repeats=variant.repeats)
    return {
        "policy": dataclasses.asdict(path) | {"overhead_ms": path.overhead_ms},
        "batches": found,
    }


def _openpi(variant: variants.Variant, tiny: bool, ready: Ready) -> dict[str, Any]:
    from shallow_pi.interop import openpi  # It imports what opens openpi's checkpoints.

    config = variant.config(tiny)
    if tiny:  # openpi hard-codes these.
        config = dataclasses.replace(config, image_size=224, vocab_size=pi0.Pi0Config().vocab_size)
    shape = 1, config.action_horizon, config.action_dim
    call = openpi.sampler(
        config,
        made_up.params(config),
        batches.noise(config, 1).observation,
        jax.random.normal(jax.random.key(0), shape),
        variant.num_steps,
    )
    latency.compile_all({"openpi": call})
    ready()
    found = latency.median_latency({"openpi": call}, repeats=variant.repeats, label="openpi")
    return {
        "openpi": {"median_ms": found.median_ms["openpi"], "device_ms": latency.back_to_back(call)}
    }


def _step(variant: variants.Variant, tiny: bool, ready: Ready) -> dict[str, Any]:
    processes.initialize()
    experiment = command_line.cli(command_line.configs(), __doc__ or "", list(variant.arguments))
    timing = benchmark_step.measure(
        experiment, variant.repeats, profile=variant.profile, ready=ready
    )
    limit = inference.ceiling(experiment.model.dtype, CEILING if tiny else None)
    stated = step.stated_rate(timing.device, experiment.model.dtype)
    rate = stated or limit.flops_per_second
    return {
        "config": experiment.name,
        **report.step_contents(timing, limit),
        "samples_per_second": {kind: timing.samples_per_second(kind) for kind in timing.median_ms},
        "stated_flops_per_second": stated,
        "mfu": {kind: timing.utilization(kind, rate) for kind in timing.median_ms},
    }


def main() -> None:
    """Measure the variant of the command line, and write its JSON file."""
    text, tiny, output = sys.argv[1:]
    values = json.loads(text)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    path = pathlib.Path(output)

    def ready() -> None:
        path.with_suffix(turns.READY).touch()
        if not sys.stdin.readline():
            raise SystemExit("no turn was given")

    found = measure(variants.Variant(**values), bool(int(tiny)), ready)
    atomic.write(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
