"""What a policy has to be compiled for before its first observation: shapes that are likely.

`prepare.trim` leaves the cameras a robot has and the prompt up to a multiple of 16 tokens; each
length is a program of its own. The cameras are known. The prompt's length is known where the policy
has a prompt, but for π0.5's state, which is written into it with more or fewer digits.
"""

import dataclasses

import numpy as np

from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import tokenizer
from shallow_pi.inference import prepare
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations

# Instructions as short and as long as they usually are: for a policy without a prompt of its own.
LIKELY_PROMPTS = (
    "pick up the cup",
    "pick up the red block on the left and put it into the white box in the middle of the table",
)


def prompt_lengths(assets: policy_assets.Assets, prompt: str | None) -> list[int]:
    """Prompt lengths (tokens, after `prepare.trim`) from the shortest to the longest likely one."""
    model, robot = assets.model, assets.robot
    encode = tokenizer.Tokenizer(assets.tokenizer, model.max_token_len).encode
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


def observation(assets: policy_assets.Assets, length: int) -> observations.Observation:
    """A made-up batch of one on the host: black pictures, and a prompt of that many tokens."""
    model = assets.model
    return dataclasses.replace(
        batches.zeros(model, 1).observation,
        image_masks={name: np.array([name in assets.robot.cameras]) for name in model.cameras},
        tokenized_prompt_mask=np.arange(model.max_token_len)[None] < length,
    )
