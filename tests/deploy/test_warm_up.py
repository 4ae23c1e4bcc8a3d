"""The shapes a policy is compiled for ahead are those of its observations."""

import dataclasses

import numpy as np
import pytest

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
    (length,) = warm_up.prompt_lengths(longer, PROMPT)
    words = tokens(longer, PROMPT, np.zeros(3)).sum()
    assert length == prepare.prompt_length(longer.model, words) == 16


def test_states_in_the_prompt_are_allowed_for(longer):
    model = dataclasses.replace(longer.model, pi05=True, discrete_state_input=True)
    spoken = dataclasses.replace(longer, model=model)
    lengths = warm_up.prompt_lengths(spoken, PROMPT)
    stats = spoken.stats["state"]
    for state in np.random.default_rng(3).uniform(stats.q01, stats.q99, (20, 3)):
        words = tokens(spoken, PROMPT, state).sum()
        assert prepare.prompt_length(model, words) in lengths


def test_unknown_prompts_are_expected_short_and_long(longer):
    lengths = warm_up.prompt_lengths(longer, None)
    assert len(lengths) > 1
    np.testing.assert_array_equal(np.diff(lengths), 16)
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
