"""Where the time of one inference goes: by part, by size, by what is spared, and beside others.

Random weights are the right load: no time depends on their values. All variants of a depth take
turns in one process (see `latency`), so that ratios hold on a machine that is not quiet.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from shallow_pi.evaluation import flops, latency
from shallow_pi.models import inference, pi0, prepare, sampler
from shallow_pi.models import observation as observations


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
    # Milliseconds by part: "image tower", "prefix", "one step", "whole", "host transfer" (pixels to
    # the device and actions back, nothing computed), "end to end" (pixels and actions on the host).
    median_ms: dict[str, float]
    p95_ms: dict[str, float]
    # Milliseconds of the whole inference with one saving switched off, by its name.
    without_ms: dict[str, float]
    # Milliseconds of other samplers on the same weights, observation and noise, by their names.
    others_ms: dict[str, float]
    # Largest difference of any of their actions from ours.
    others_difference: float
    # Operations of the whole inference, and weight bytes it must read.
    flops: int
    weight_bytes: int
    # Bytes in use on the device while it ran, at most; 0 where the backend does not tell.
    peak_bytes: int
    device: str


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What the device reaches on the simplest load there is."""

    # Of a large matrix product in the model's dtype.
    flops_per_second: float
    # Of copying a large array, read and write together.
    bytes_per_second: float


def ceiling(dtype: str, size: int = 8192, repeats: int = 10) -> Ceiling:
    """Measure the device's matrix rate and copy rate."""
    a = jnp.ones((size, size), dtype)
    multiply, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: -x)
    found = latency.median_latency(
        {"multiply": lambda: multiply(a), "copy": lambda: copy(a)}, repeats=repeats, label="Ceiling"
    )
    return Ceiling(
        2 * size**3 / found.median_ms["multiply"] * 1e3,
        2 * a.nbytes / found.median_ms["copy"] * 1e3,
    )


# Makes another sampler ready, from (model, params, batch, noise, integration steps): what it
# returns samples once, from arrays on the device.
Other = Callable[[pi0.Pi0Config, PyTree, Mapping[str, Any], Array, int], Callable[[], Array]]


def measure(
    config: pi0.Pi0Config,
    *,
    num_steps: int = 10,
    repeats: int = 50,
    savings: prepare.Savings | None = None,
    ablate: bool = True,
    others: Mapping[str, Other] | None = None,
) -> Timing:
    """Time one inference of a model with random weights.

    Args:
      config: the model, with the cameras and the prompt length that are really there.
      num_steps: integration steps.
      repeats: timed calls of each part.
      savings: what is spared; None is the fastest on this backend.
      ablate: also time the whole inference with each saving that is on switched off.
      others: other samplers to time in the same turns, by name.
    """
    savings = savings or prepare.best()
    params = _random(config)
    variants = {"whole": savings}
    if ablate:
        variants |= {
            field.name: dataclasses.replace(savings, **{field.name: False})
            for field in dataclasses.fields(savings)
            if getattr(savings, field.name)
        }
    pictures = _pictures(config)
    observation = jax.device_put(observations.Observation.from_batch(pictures))
    shape = (1, config.action_horizon, config.action_dim)
    noise = jax.random.normal(jax.random.key(0), shape)
    calls: dict[str, Callable[[], Any]] = {}
    for name, chosen in variants.items():
        weights = _prepared(config, params, num_steps, chosen)
        run = jax.jit(
            functools.partial(sampler.sample_prepared, config, num_steps=num_steps, savings=chosen)
        )
        calls[name] = functools.partial(run, weights, observation, noise)
        if name == "whole":
            calls |= _parts(config, weights, observation, noise)
            calls["host transfer"] = functools.partial(
                _transfer, jax.jit(jnp.negative), pictures, noise
            )
            calls["end to end"] = functools.partial(_from_host, run, weights, pictures, noise)
    ready = {
        name: prepare_other(config, params, pictures, noise, num_steps)
        for name, prepare_other in (others or {}).items()
    }
    difference = max((_difference(calls["whole"], call) for call in ready.values()), default=0.0)
    calls |= ready
    found = latency.median_latency(calls, repeats=repeats, label=f"{config.depth} layers")
    parts = [n for n in calls if n == "whole" or (n not in variants and n not in ready)]
    statistics = jax.devices()[0].memory_stats() or {}
    return Timing(
        depth=config.depth,
        cameras=len(config.cameras),
        visual_tokens=config.prefix_tokens - config.max_token_len,
        prompt_tokens=config.max_token_len,
        horizon=config.action_horizon,
        num_steps=num_steps,
        median_ms={name: found.median_ms[name] for name in parts},
        p95_ms={name: found.p95_ms[name] for name in parts},
        without_ms={name: found.median_ms[name] for name in variants if name != "whole"},
        others_ms={name: found.median_ms[name] for name in ready},
        others_difference=difference,
        flops=flops.inference_flops(config, num_steps=num_steps, savings=savings).total,
        weight_bytes=flops.weight_bytes(config, num_steps=num_steps).total,
        peak_bytes=int(statistics.get("peak_bytes_in_use", 0)),
        device=found.device,
    )


def _parts(
    config: pi0.Pi0Config,
    weights: prepare.Prepared,
    observation: observations.Observation,
    noise: Array,
) -> dict[str, Callable[[], Any]]:
    tower = jax.jit(
        lambda held, images: pi0.Pi0(config).apply(
            {"params": held}, jnp.concatenate(images), method=lambda m, x: m.PaliGemma.img(x)
        )
    )
    prefill = jax.jit(functools.partial(inference.prefill, config))
    cache, valid = prefill(weights, observation)

    def one(held: prepare.Prepared, cache: Any, valid: Array, x_t: Array) -> Array:
        tables = held.tables
        if tables is None:
            tables = prepare.make_tables(config, held.params, jnp.ones(1))
        tables = jax.tree.map(lambda leaf: leaf[:1], tables)
        return inference.velocity(config, held, cache, valid, x_t, tables)

    step = jax.jit(one)
    images = [observation.images[name] for name in config.cameras]
    return {
        "image tower": functools.partial(tower, weights.params, images),
        "prefix": functools.partial(prefill, weights, observation),
        "one step": functools.partial(step, weights, cache, valid, noise),
    }


def _difference(ours: Callable[[], Array], theirs: Callable[[], Array]) -> float:
    a, b = (np.asarray(call(), np.float64) for call in (ours, theirs))
    return float(np.abs(a - b).max())


def _transfer(touch: Callable[[Array], Array], pictures: Mapping[str, Any], noise: Array) -> Any:
    """Pixels to the device, and as many numbers as the actions have back to the host."""
    jax.block_until_ready(jax.device_put(pictures))
    return np.asarray(touch(noise))


def _from_host(
    run: Callable[..., Array],
    weights: prepare.Prepared,
    pictures: Mapping[str, Any],
    noise: Array,
) -> np.ndarray:
    """Pixels on the host to actions on the host."""
    observation = observations.Observation.from_batch(jax.device_put(pictures))
    return np.asarray(run(weights, observation, noise))


def _random(config: pi0.Pi0Config) -> PyTree:
    """Parameters in the compute dtype, made leaf by leaf: never all of them in float32."""

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> Array:
        key = jax.random.key(abs(hash(str(path))) % 2**31)
        return 0.02 * jax.random.normal(key, shape.shape, config.dtype)

    return jax.tree_util.tree_map_with_path(leaf, pi0.abstract_params(config))


def _prepared(
    config: pi0.Pi0Config, params: PyTree, num_steps: int, savings: prepare.Savings
) -> prepare.Prepared:
    times = sampler.integration_times(num_steps)
    return jax.jit(functools.partial(prepare.prepare, config, times=times, savings=savings))(params)


def _pictures(config: pi0.Pi0Config) -> dict[str, Any]:
    """A batch of one as the loader would give it: every camera there, the prompt full."""
    side, prompt = config.image_size, config.max_token_len
    generator = np.random.default_rng(0)
    return {
        "image": {
            name: generator.integers(0, 256, (1, side, side, 3), np.uint8)
            for name in config.cameras
        },
        "image_mask": {name: np.ones(1, bool) for name in config.cameras},
        "state": np.zeros((1, config.action_dim), np.float32),
        "tokenized_prompt": np.ones((1, prompt), np.int32),
        "tokenized_prompt_mask": np.ones((1, prompt), bool),
    }
