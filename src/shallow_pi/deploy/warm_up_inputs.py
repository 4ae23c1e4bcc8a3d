"""The inputs that a policy is compiled for before a robot asks: sizes, prompt lengths, pictures."""

import dataclasses

import numpy as np

from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import tokenizer as tokenizers
from shallow_pi.inference import prepare
from shallow_pi.models import batch as batches
from shallow_pi.models import observation

# Instructions as short and as long as they usually are: for a policy without a prompt of its own.
LIKELY_PROMPTS = (
    "pick up the cup",
    "pick up the red block on the left and put it into the white box in the middle of the table",
)
# Height and width of most robots' pictures, for which the program that resizes them is compiled.
USUAL_SIZE = (480, 640)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8 ... and the largest."""
    if largest < 1:
        raise ValueError(f"a batch holds at least 1 observation, got {largest}")
    return [size for i in range(largest.bit_length()) if (size := 2**i) < largest] + [largest]


def prompt_lengths(assets: policy_assets.Assets, prompt: str | None) -> list[int]:
    """Prompt lengths to compile for: tokens after `prepare.trim`, a multiple of 16 each.

    The length is known where the policy has a prompt, but for π0.5's state, which is written into
    it with more or fewer digits.
    """
    model, robot = assets.model, assets.robot
    encode = tokenizers.Tokenizer(assets.tokenizer, model.max_token_len).encode
    known = robot.prompt or prompt
    states: list[np.ndarray | None] = [None]
    if model.discrete_state_input:
        states = list(np.random.default_rng(0).uniform(-1, 1, (8, robot.state_dim)))
    words = [
        len(encode(text, state))
        for text in ([known] if known else LIKELY_PROMPTS)
        for state in states
    ]
    every = range(min(words), max(words) + 1)
    return sorted({prepare.prompt_length(model, count) for count in every})


def observations(
    assets: policy_assets.Assets, length: int, size: int = 1
) -> observation.Observation:
    """A made-up batch on the host: black pictures, and prompts of that many tokens."""
    model = assets.model
    words = np.arange(model.max_token_len)[None] < length
    return dataclasses.replace(
        batches.zeros(model, size).observation,
        image_masks={n: np.full(size, n in assets.robot.cameras) for n in model.cameras},
        tokenized_prompt_mask=np.repeat(words, size, axis=0),
    )
