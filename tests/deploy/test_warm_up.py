"""The shapes a policy is compiled for ahead are those of its observations."""

import dataclasses

import numpy as np
import pytest

from shallow_pi.data.robots import tokenizer
from shallow_pi.deploy import warm_up
from shallow_pi.inference import prepare

PROMPT = "touch the red block"


@pytest.fixture
def longer(own):
    """The policy's assets with room for several prompt lengths."""
    return dataclasses.replace(own, model=dataclasses.replace(own.model, max_token_len=200))


def tokens(assets, prompt, state):
    """The mask of one observation's prompt, through all transforms."""
    observation = {key: np.zeros((24, 24, 3), np.uint8) for key in assets.robot.cameras.values()}
    found = assets.inputs()({**observation, "observation.state": state, "task": prompt})
    return found["tokenized_prompt_mask"]


def test_a_known_prompt_has_one_length_without_the_state_in_it(longer):
    length, longest = warm_up.prompt_lengths(longer, PROMPT)
    words = tokens(longer, PROMPT, np.zeros(3)).sum()
    assert length == prepare.prompt_length(longer.model, words) == 16
    # Of an observation that has another prompt.
    assert longest == longer.model.max_token_len


def test_states_in_the_prompt_are_allowed_for(longer):
    model = dataclasses.replace(longer.model, pi05=True, discrete_state_input=True)
    spoken = dataclasses.replace(longer, model=model)
    lengths = warm_up.prompt_lengths(spoken, PROMPT)
    stats = spoken.stats["state"]
    for state in np.random.default_rng(3).uniform(stats.q01, stats.q99, (20, 3)):
        words = tokens(spoken, PROMPT, state).sum()
        assert prepare.prompt_length(model, words) in lengths


@pytest.mark.parametrize("words", range(1, 17))
def test_states_of_the_most_digits_are_allowed_for(longer, words):
    """A robot in the middle of its range has three digits in every dimension."""
    model = dataclasses.replace(longer.model, pi05=True, discrete_state_input=True)
    robot = dataclasses.replace(longer.robot, state_dim=24, prompt=words * "x")
    spoken = dataclasses.replace(longer, model=model, robot=robot)
    encode = tokenizer.Tokenizer(spoken.tokenizer, 200).encode
    most = max(len(encode(robot.prompt, np.full(24, state))) for state in np.linspace(-1, 1, 256))
    assert warm_up.prompt_lengths(spoken, None)[-1] == prepare.prompt_length(model, most)


def test_unknown_prompts_are_expected_short_and_long(longer):
    *lengths, longest = warm_up.prompt_lengths(longer, None)
    assert len(lengths) > 1
    np.testing.assert_array_equal(np.diff(lengths), 16)
    assert longest == longer.model.max_token_len
    always = dataclasses.replace(longer.robot, prompt=PROMPT)
    fixed = dataclasses.replace(longer, robot=always)
    assert warm_up.prompt_lengths(fixed, None) == [16]


def test_a_synthetic_observation_is_trimmed_like_a_real_one(longer):
    robot = dataclasses.replace(longer.robot, cameras={"base_0_rgb": "front"})
    one_camera = dataclasses.replace(longer, robot=robot)
    small, trimmed = prepare.trim(longer.model, warm_up.observations(one_camera, 32))
    assert (small.cameras, small.max_token_len) == (("base_0_rgb",), 32)
    assert trimmed.tokenized_prompt_mask.all()
    assert trimmed.images["base_0_rgb"].dtype == np.uint8
