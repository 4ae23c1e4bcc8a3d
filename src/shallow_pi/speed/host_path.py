"""Time `Policy.infer`, with a made-up ALOHA observation and made-up weights, stage by stage.

Tokenizer and statistics are made up too: a small vocabulary, trained on the spot, takes as long as
PaliGemma's for a prompt of as many words.
"""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize, pipelines, tokenizer, transforms
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import policy as policies
from shallow_pi.deploy import robot_observation
from shallow_pi.inference import program
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.speed import latency, made_up, stages

PROMPT = "pick up the red block on the left and put it into the white box in the middle"
IMAGE = (480, 640)
# Stages of the transforms that have one of their own.
NAMED = {transforms.Resize: "resize", transforms.TokenizePrompt: "tokenize"}


@contextlib.contextmanager
def made_up_policy(config: pi0.Pi0Config, num_steps: int) -> Iterator[policies.Policy]:
    """A policy for ALOHA with as many cameras as the model has; π0.5 reads the state as text.

    Raises:
      ValueError: the model is too small for ALOHA or for the prompt.
    """
    cameras = {k: v for k, v in robots.ALOHA.cameras.items() if k in config.cameras}
    robot = dataclasses.replace(robots.ALOHA, name="aloha_made_up", cameras=cameras)
    length = max(config.max_token_len, 200 if config.pi05 else 48)
    config = dataclasses.replace(
        config, cameras=tuple(cameras), max_token_len=length, discrete_state_input=config.pi05
    )
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "tokenizer.model"
        tokenizer.train([PROMPT], file, min(512, config.vocab_size))
        found = policy_assets.Assets(config, robot, file, _statistics(), "aloha", {}, num_steps)
        yield policies.Policy(found, made_up.params(config), num_steps=num_steps, state_refuse=0)


def _statistics() -> dict[str, normalize.NormStats]:
    ones = np.ones(robots.ALOHA.state_dim)
    stats = normalize.NormStats(0 * ones, ones, -2 * ones, 2 * ones)
    return {"state": stats, "actions": stats}


def observation(policy: policies.Policy, seed: int = 0) -> dict[str, Any]:
    """A made-up observation of the policy's robot."""
    generator, robot = np.random.default_rng(seed), policy.assets.robot
    images = {
        key: generator.integers(0, 256, (*IMAGE, 3), dtype=np.uint8)
        for key in robot.cameras.values()
    }
    state = generator.uniform(0.1, 0.9, robot.state_dim).astype(np.float32)
    return {**images, robot.state_keys[0]: state, robot.prompt_key: PROMPT}


def measure(policy: policies.Policy, *, repeats: int = 50, warmup: int = 3) -> stages.HostPath:
    """Time the stages of `infer`, then the whole, each in a row as a robot calls it."""
    given, laps, seconds = observation(policy), stages.Laps(), []
    inputs = policy.assets.inputs(resize=not policy.resize_on_device)
    outputs = policy.assets.outputs()
    for turn in range(warmup + repeats):
        if turn == warmup:
            laps = stages.Laps()
        laps.start()
        layout, packed = _staged(policy, inputs, outputs, given, laps)
    for turn in range(warmup + repeats):
        start = time.perf_counter()
        policy.infer(given)
        if turn >= warmup:
            seconds.append(time.perf_counter() - start)
    on_device = jax.device_put(packed)
    return stages.HostPath(
        depth=layout.config.depth,
        cameras=len(layout.config.cameras),
        prompt_tokens=layout.config.max_token_len,
        image=IMAGE,
        resized_on_device=policy.resize_on_device,
        stages_ms=laps.median_ms(repeats, stages.BEFORE + stages.PROGRAM + stages.AFTER),
        infer_ms=1e3 * float(np.median(seconds)),
        infer_p95_ms=1e3 * float(np.quantile(seconds, 0.95)),
        device_ms=latency.back_to_back(functools.partial(policy.program, layout, on_device)),
    )


def _staged(
    policy: policies.Policy,
    inputs: transforms.Composed,
    outputs: transforms.Transform,
    given: dict[str, Any],
    laps: stages.Laps,
) -> tuple[program.Layout, np.ndarray]:
    """`Policy.infer` in stages; returns what it packed."""
    robot = policy.assets.robot
    clean = robot_observation.clean(robot, policy.assets.model.cameras, given, policy.prompt)
    laps("check")
    sample = dict(clean)
    for part in inputs.parts:
        sample = part(sample)
        laps(NAMED.get(type(part), "normalize"))
    batch = batches.stack([pipelines.to_observation(sample)])
    noise = np.zeros((1, *policy.noise_shape), np.float32)
    layout, packed = policy.pack(batch, noise)
    laps("pack")
    normalized = stages.through_program(laps, policy.program, layout, packed)
    outputs({"actions": normalized, "state": robot.state(clean)[None]})
    laps("output")
    return layout, packed


def measure_batches(
    policy: policies.Policy,
    sizes: Sequence[int],
    *,
    repeats: int = 20,
    ready: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, float]]:
    """By batch size, milliseconds of the device, back to back, and of `infer_batch`.

    `ready` is called when everything is compiled.
    """
    found: dict[int, dict[str, float]] = {}
    calls = {
        size: functools.partial(
            policy.infer_batch,
            [observation(policy, seed) for seed in range(size)],
            np.zeros((size, *policy.noise_shape), np.float32),
        )
        for size in sizes
    }
    named = {str(size): call for size, call in calls.items()}
    latency.compile_all(named)
    ready()
    waited = latency.median_latency(named, repeats=repeats, label="Batches")
    for size, call in calls.items():
        batch = policy.prepare(call.args[0])
        layout, packed = policy.pack(batch, call.args[1])
        run = functools.partial(policy.program, layout, jax.device_put(packed))
        found[size] = {
            "device": latency.back_to_back(run),
            "infer_batch": waited.median_ms[str(size)],
        }
    return found
