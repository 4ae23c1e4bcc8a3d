"""What a policy is compiled for before a robot asks: sizes, prompt lengths, images; its times."""

import dataclasses
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np

from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import tokenizer as tokenizers
from shallow_pi.inference import prepare, real_time
from shallow_pi.models import batch as batches
from shallow_pi.models import observation

# Instructions as short and as long as they usually are: for a policy without a prompt of its own.
LIKELY_PROMPTS = (
    "pick up the cup",
    "pick up the red block on the left and put it into the white box in the middle of the table",
)
# Height and width of most robots' images, for which the program that resizes them is compiled.
USUAL_SIZE = (480, 640)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8 ... and the largest."""
    if largest < 1:
        raise ValueError(f"a batch holds at least 1 observation, got {largest}")
    return [size for i in range(largest.bit_length()) if (size := 2**i) < largest] + [largest]


def prompt_lengths(assets: policy_assets.Assets, prompt: str | None) -> list[int]:
    """Prompt lengths to compile for, ascending: tokens after `prepare.trim`.

    The likely ones are multiples of 16. With a prompt of the policy there is one, or a few with
    π0.5's state, which is written into it with more or fewer digits. The last is the longest
    possible, which any prompt of an observation fits.
    """
    model, robot = assets.model, assets.robot
    encode = tokenizers.Tokenizer(assets.tokenizer, model.max_token_len).encode
    known = robot.prompt or prompt
    states: list[np.ndarray | None] = [None]
    if model.discrete_state_input:
        # The last has the most digits.
        random = np.random.default_rng(0).uniform(-1, 1, (8, robot.state_dim))
        states = [*random, np.ones(robot.state_dim)]
    words = [
        len(encode(text, state))
        for text in ([known] if known else LIKELY_PROMPTS)
        for state in states
    ]
    longest = max(words) if robot.prompt else model.max_token_len
    every = [*range(min(words), max(words) + 1), longest]
    return sorted({prepare.prompt_length(model, count) for count in every})


def observations(
    assets: policy_assets.Assets, length: int, size: int = 1, *, resized: bool = True
) -> observation.Observation:
    """A made-up batch on the host: black images, and prompts of that many tokens.

    Args:
      assets: of the policy.
      length: tokens of every prompt.
      size: number of observations.
      resized: images have the model's size, else a camera's.
    """
    model = assets.model
    words = np.arange(model.max_token_len)[None] < length
    made = dataclasses.replace(
        batches.zeros(model, size).observation,
        image_masks={n: np.full(size, n in assets.robot.cameras) for n in model.cameras},
        tokenized_prompt_mask=np.repeat(words, size, axis=0),
    )
    if resized:
        return made
    black = np.zeros((size, *USUAL_SIZE, 3), np.uint8)
    return dataclasses.replace(made, images=dict.fromkeys(made.images, black))


def guidance(assets: policy_assets.Assets, size: int) -> real_time.Guidance:
    """Of made-up previous chunks, without weight."""
    nothing = np.zeros((size, assets.model.action_horizon, assets.model.action_dim), np.float32)
    return real_time.make_guidance(nothing, size * [1], size * [0], max_weight=0)


def times(calls: Mapping[int, Callable[[], jax.Array]]) -> dict[int, float]:
    """Milliseconds of each call: the fastest of up to ten, in turn, in some seconds."""
    fastest, until = dict.fromkeys(calls, np.inf), time.perf_counter() + 2.0
    for _ in range(10):
        for size, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            fastest[size] = min(fastest[size], 1e3 * (time.perf_counter() - start))
        if time.perf_counter() > until:
            break
    return fastest


def filled_size(times: Mapping[int, float], count: int) -> int:
    """The next size in `times`, which a batch of `count` is filled up to; else `count`."""
    return min((size for size in times if size >= count), default=count)


def milliseconds(times: Mapping[int, float], count: int) -> float:
    """Time of a batch of `count`, filled up; 0 for none, infinite beyond the largest size."""
    return times.get(filled_size(times, count), np.inf) if count else 0.0
