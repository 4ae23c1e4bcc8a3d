"""Time one inference: by part, by optimization, and in turns with other samplers.

Weights are random, as no time depends on their values. All variants of a model take turns in one
process (see `latency`), so that ratios hold on a busy machine.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from shallow_pi.inference import forward, image_tower, prepare, program, quantize, tuning
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0
from shallow_pi.speed import flops, latency, made_up, stages, trace


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Rates the device reaches on the simplest loads."""

    # In a large matrix product in the model's dtype.
    flops_per_second: float
    # In copying a large array, reads and writes together.
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """One model's inference at batch 1."""

    depth: int
    cameras: int
    # Tokens of the cameras, and of the prompt.
    visual_tokens: int
    prompt_tokens: int
    horizon: int
    num_steps: int
    # Milliseconds by part: "image tower", "prefix", "one step", "whole" (pixels on the device to
    # actions there), "host transfer" (pixels to the device and actions back, nothing computed),
    # "end to end" (pixels and actions on the host, as a policy runs it).
    median_ms: dict[str, float]
    p95_ms: dict[str, float]
    # Milliseconds of the whole where no call waits for the last one: the device's own.
    device_ms: float
    # Milliseconds by stage from pixels to actions, each waited for (see `stages.PROGRAM`).
    stages_ms: dict[str, float]
    # Milliseconds of the whole inference with one optimization off, by its name in
    # `InferenceOptions`; with one more camera, absent ("masked camera"); and with the prompt padded
    # to the model's own length ("prompt bucket").
    without_ms: dict[str, float]
    # Milliseconds of other samplers on the same weights, observation and noise, by their names.
    others_ms: dict[str, float]
    # Largest difference of any of their actions from ours.
    others_difference: float
    # Milliseconds of the whole inference with products in 8 bits, by scheme.
    quantized_ms: dict[str, float]
    # Operations, and bytes of weights read, by part; the prefix includes the image tower.
    flops: dict[str, int]
    weight_bytes: dict[str, int]
    # Bytes the compiled program needs at once: weights, inputs, results, temporary arrays.
    program_bytes: int
    # Most bytes in use on the device while everything ran; 0 where the backend reports none, or
    # where as many were in use before, for another model.
    peak_bytes: int
    # Seconds of the first call of the whole, and arguments of the program.
    compile_s: float
    arguments: int
    # Kernels of the whole; None unless asked for, or on a CPU.
    kernels: trace.Kernels | None
    options: tuning.InferenceOptions
    device: str

    def shares(self, limit: Ceiling) -> dict[str, tuple[float, float]]:
        """By part, the achieved share of the device's matrix rate and of its copy rate."""
        return {
            part: (
                operations / (self.median_ms[part] / 1e3) / limit.flops_per_second,
                self.weight_bytes[part] / (self.median_ms[part] / 1e3) / limit.bytes_per_second,
            )
            for part, operations in self.flops.items()
            if part in self.median_ms
        }


def ceiling(dtype: str, size: int | None = None, repeats: int = 5, loops: int = 16) -> Ceiling:
    """Measure the device's matrix rate and copy rate on square matrices.

    A `size` of None suits the backend; `loops`, the products or copies of one timed loop, is even.
    """
    small = jax.default_backend() == "cpu"
    size = size or (2048 if small else 8192)
    # Noise, as zeros draw less power and run at a higher clock; products keep its size.
    scale, shape = 1 / (made_up.DEVIATION * size**0.5), (1 if small else 8, size, size)
    # What is copied is larger than any cache.
    noise = jax.jit(lambda seed: scale * made_up.noise(shape, dtype, seed))
    held = {"multiply": noise(made_up.SEED)[0], "copy": noise(made_up.SEED)}
    factor, (multiply, copy) = held["multiply"] + 0, ceiling_loops(loops)

    def again(name: str, loop: Callable[..., Array], *others: Array) -> Array:
        held[name] = loop(held[name], *others)
        return held[name]

    calls = {
        "multiply": functools.partial(again, "multiply", multiply, factor),
        "copy": functools.partial(again, "copy", copy),
    }
    found = latency.median_latency(calls, repeats=repeats, label="Ceiling")
    return Ceiling(
        loops * 2 * size**3 / found.median_ms["multiply"] * 1e3,
        loops * 2 * held["copy"].nbytes / found.median_ms["copy"] * 1e3,
    )


def ceiling_loops(loops: int) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Loops of products and of copies that run on the device, where no launch counts as work.

    The compiled loops copy nothing besides: their first argument is donated, and a body of two
    products writes the second one where it read the first one's factor.
    """
    multiply = jax.jit(
        lambda y, x: jax.lax.fori_loop(0, loops // 2, lambda _, y: (y @ x) @ x, y), donate_argnums=0
    )
    copy = jax.jit(
        lambda y: jax.lax.fori_loop(0, loops, lambda i, y: y + i.astype(y.dtype), y),
        donate_argnums=0,
    )
    return multiply, copy


# Prepares another sampler from (model, params, observation on the host, noise, integration steps);
# the returned function samples once, from arrays on the device.
Other = Callable[[pi0.Pi0Config, PyTree, observations.Observation, Array, int], Callable[[], Array]]


def measure(
    config: pi0.Pi0Config,
    *,
    num_steps: int = 10,
    repeats: int = 50,
    options: tuning.InferenceOptions | None = None,
    parts: bool = True,
    ablate: bool = True,
    padded_to: int = 0,
    others: Mapping[str, Other] | None = None,
    schemes: Sequence[quantize.Scheme] = (),
    profile: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> Timing:
    """Time one inference of a model with random weights.

    Args:
      config: the model, with the cameras and the prompt length that are really there.
      num_steps: integration steps.
      repeats: timed calls of each part.
      options: the optimizations; None is `tuning.best`.
      parts: also time image tower, prefix and one step by themselves.
      ablate: also time the whole inference with each optimization in turn switched off.
      padded_to: the prompt length of a model that pads; more than the config's, it is timed too.
      others: other samplers to time in the same turns, by name.
      schemes: time the whole inference with products in 8 bits, by these schemes, as well.
      profile: also trace the kernels of the whole.
      ready: called when everything is compiled, before anything is timed.
    """
    before, options = _peak_bytes(), options or tuning.best(config)
    on_host = batches.noise(config, 1).observation
    noise = jax.random.normal(jax.random.key(0), (1, config.action_horizon, config.action_dim))
    start, touch, layout = np.asarray(noise), jax.jit(jnp.negative), program.Layout(config)
    # With the parameters only where others need them too.
    params = made_up.params(config) if others else None
    run = (
        program.Program.create(config, params, num_steps, options, quantize.made_up_bounds(config))
        if others
        else made_up.prepared_program(config, num_steps, options)
    )
    packed = jax.device_put(program.pack(layout, on_host, start))
    whole = functools.partial(run, layout, packed)
    began = time.perf_counter()
    jax.block_until_ready(whole())
    compile_s = time.perf_counter() - began
    program_bytes = _program_bytes(run, layout, packed)
    calls: dict[str, Callable[[], PyTree]] = {"whole": whole}
    if parts:
        observation = jax.device_put(on_host).as_float()
        # Vectors are sliced in one program; matrices pass through it as they are.
        unpack = functools.partial(program.unpack_weights, run.shapes)
        calls |= _parts(config, jax.jit(unpack)(run.arrays), observation, noise, options)
    calls["host transfer"] = lambda: _transfer(touch, program.pack(layout, on_host, start), noise)
    calls["end to end"] = lambda: np.asarray(run(layout, program.pack(layout, on_host, start)))
    without: dict[str, Callable[[], Array]] = {}
    if ablate:
        for name in options.on:
            change: dict[str, Any] = {name: False}
            chosen = dataclasses.replace(options, **change)
            one = made_up.prepared_program(config, num_steps, chosen)
            without[name] = functools.partial(one, layout, packed)
        for name, (larger, seen) in _untrimmed(config, padded_to).items():
            more = program.Layout(larger)
            untrimmed = jax.device_put(program.pack(more, seen, start))
            without[name] = functools.partial(run, more, untrimmed)
    in_bits: dict[str, Callable[[], Array]] = {}
    for scheme in schemes:
        chosen = dataclasses.replace(options, quantize=scheme)
        one = made_up.prepared_program(config, num_steps, chosen)
        in_bits[scheme] = functools.partial(one, layout, packed)
    ready_others = {
        name: prepare_other(config, params, on_host, noise, num_steps)
        for name, prepare_other in (others or {}).items()
    }
    differences = [_difference(whole, call) for call in ready_others.values()]
    difference = float(np.max(differences, initial=0.0))  # Python's max passes over a NaN.
    every = {**calls, **without, **ready_others, **in_bits}
    latency.compile_all(every)
    ready()
    found = latency.median_latency(every, repeats=repeats, label=f"{config.depth} layers")
    peak = _peak_bytes()
    return Timing(
        depth=config.depth,
        cameras=len(config.cameras),
        visual_tokens=config.prefix_tokens - config.max_token_len,
        prompt_tokens=config.max_token_len,
        horizon=config.action_horizon,
        num_steps=num_steps,
        median_ms={name: found.median_ms[name] for name in calls},
        p95_ms={name: found.p95_ms[name] for name in calls},
        device_ms=latency.back_to_back(whole),
        stages_ms=_stages(run, layout, on_host, start, repeats),
        without_ms={name: found.median_ms[name] for name in without},
        others_ms={name: found.median_ms[name] for name in ready_others},
        quantized_ms={name: found.median_ms[name] for name in in_bits},
        others_difference=difference,
        flops=flops.inference_flops(config, num_steps=num_steps, options=options).by_part,
        weight_bytes=flops.weight_bytes(config, num_steps=num_steps, options=options).by_part,
        program_bytes=program_bytes,
        peak_bytes=peak if peak > before else 0,
        compile_s=compile_s,
        arguments=len(jax.tree.leaves(run.arrays)) + 1,
        kernels=trace.kernels(whole) if profile else None,
        options=options,
        device=found.device,
    )


def _peak_bytes() -> int:
    """Most bytes in use on the device since the process began; 0 where none are reported."""
    return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))


def _stages(
    run: program.Program,
    layout: program.Layout,
    observation: observations.Observation,
    start: np.ndarray,
    repeats: int,
) -> dict[str, float]:
    laps = stages.Laps()
    for _ in range(repeats):
        laps.start()
        packed = program.pack(layout, observation, start)
        laps("pack")
        stages.through_program(laps, run, layout, packed)
    return laps.median_ms(repeats, stages.PROGRAM)


def _untrimmed(
    config: pi0.Pi0Config, padded_to: int
) -> dict[str, tuple[pi0.Pi0Config, observations.Observation]]:
    """The same observation with what `prepare.trim` drops: an absent camera, prompt padding."""
    more = dataclasses.replace(config, cameras=(*config.cameras, "absent_0_rgb"))
    observation = batches.noise(more, 1).observation
    observation.image_masks["absent_0_rgb"][:] = False
    found = {"masked camera": (more, observation)}
    if padded_to > config.max_token_len:
        padded = dataclasses.replace(config, max_token_len=padded_to)
        observation = batches.noise(padded, 1).observation
        observation.tokenized_prompt_mask[:, config.max_token_len :] = False
        found["prompt bucket"] = padded, observation
    return found


def _program_bytes(run: program.Program, layout: program.Layout, packed: Array) -> int:
    memory = run.run.lower(layout, run.arrays, packed).compile().memory_analysis()
    if memory is None:
        return 0
    given = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(given + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


def _parts(
    config: pi0.Pi0Config,
    weights: prepare.Prepared,
    observation: observations.Observation,
    noise: Array,
    options: tuning.InferenceOptions,
) -> dict[str, Callable[[], PyTree]]:
    seen, kernel = options.tower_attention, options.step_attention
    tower = jax.jit(
        lambda held, images: image_tower.encode(config.image, held, jnp.concatenate(images), seen)
    )
    prefill = jax.jit(
        functools.partial(
            forward.prefill, config, kernel=options.prefix_attention, tower_kernel=seen
        )
    )
    cache, valid = prefill(weights, observation)
    buffers, count = options.step_buffers, config.action_horizon
    cache = jax.jit(functools.partial(forward.step_buffers, config, buffers=buffers, count=count))(
        cache
    )

    def one(held: prepare.Prepared, cache: PyTree, valid: Array, x_t: Array) -> Array:
        tables = held.tables
        if tables is None:
            tables = prepare.make_tables(config, held.params, jnp.ones(1))
        tables = jax.tree.map(lambda leaf: leaf[:1], tables)
        return forward.velocity(config, held, cache, valid, x_t, tables, kernel=kernel)[0]

    step = jax.jit(one)
    images = [observation.images[name] for name in config.cameras]
    return {
        "image tower": functools.partial(tower, weights.image, images),
        "prefix": functools.partial(prefill, weights, observation),
        "one step": functools.partial(step, weights, cache, valid, noise),
    }


def _difference(ours: Callable[[], Array], theirs: Callable[[], Array]) -> float:
    a, b = (np.asarray(call(), np.float64) for call in (ours, theirs))
    return float(np.abs(a - b).max())


def _transfer(touch: Callable[[Array], Array], packed: np.ndarray, noise: Array) -> np.ndarray:
    """The packed buffer to the device, and as many numbers as the actions have back."""
    jax.block_until_ready(jax.device_put(packed))
    return np.asarray(touch(noise))
