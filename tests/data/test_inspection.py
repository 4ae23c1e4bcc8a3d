"""What is wrong with a batch is told by dimension, camera and prompt; a sound one is left alone."""

import dataclasses

import numpy as np
import pytest

from shallow_pi.data import inspection, sources
from shallow_pi.data.robots import assets, normalize, pipelines, tokenizer
from shallow_pi.data.robots import robot as robots

PROMPTS = ["touch the red block", "touch the blue block"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    tokenizer.train(PROMPTS, path, vocab_size=320)
    return path


@pytest.fixture
def own(tiny_config, words):
    """Assets of a small policy; its statistics scale by a dimension's own mean and spread."""

    def make(robot=robots.TURNTABLE, **changes):
        ramp = np.linspace(0.5, 2, 3)
        stats = normalize.NormStats(mean=ramp, std=ramp + 1, q01=-ramp, q99=ramp)
        model = tiny_config(vocab_size=320, **{"max_token_len": 24, **changes})
        return assets.Assets(model, robot, words, {"state": stats, "actions": stats}, "turntable")

    return make


def _batch(own, state, actions, mask=None, prompts=PROMPTS, pictures=None):
    """A batch through the robot's own transforms."""
    mask = np.ones(actions.shape[:2], bool) if mask is None else mask
    transform, samples = own.inputs(), []
    for i in range(len(state)):
        picture = np.full((24, 24, 3), 90, np.uint8) if pictures is None else pictures[i]
        observation = dict.fromkeys(own.robot.cameras.values(), picture)
        observation |= {"observation.state": state[i], "task": prompts[i % len(prompts)]}
        observation |= {"action": actions[i], "action_is_pad": ~mask[i]}
        samples.append(pipelines.to_batch(transform(observation)))
    return inspection.draw(samples, len(samples))


def _numbers(own, count=6, seed=0):
    """States and actions in the robot's units that the statistics fit."""
    generator, horizon = np.random.default_rng(seed), own.model.action_horizon
    mean, std = own.stats["state"].mean, own.stats["state"].std
    state = mean + std * generator.uniform(-1, 1, (count, 3))
    chunk = mean + std * generator.uniform(-1, 1, (count, horizon, 3))
    return state.astype(np.float32), (state[:, None] + chunk).astype(np.float32)


def test_a_sound_batch_has_nothing_doubtful(own):
    batch = _batch(own(), *_numbers(own()))
    assert inspection.doubtful(batch, own(), inspection.ranges(batch, own())) == []


def test_ranges_are_those_of_the_robots_numbers_before_and_the_models_after(own):
    state, actions = _numbers(own())
    found = inspection.ranges(_batch(own(), state, actions), own())
    assert [one.name for one in found] == [
        f"{k}[{i}]" for k in ("state", "actions") for i in range(3)
    ]
    mean, std = own().stats["state"].mean, own().stats["state"].std
    delta = actions - state[:, None]  # The turntable's actions are differences.
    for one, column in zip(found, [*state.T, *delta.reshape(-1, 3).T], strict=True):
        np.testing.assert_allclose(
            one.before, [column.min(), column.mean(), column.max()], rtol=1e-4, atol=1e-5
        )
    after = (state[:, 1] - mean[1]) / std[1]
    np.testing.assert_allclose(found[1].after, [after.min(), after.mean(), after.max()], atol=1e-5)
    assert {one.beyond for one in found} == {0.0}


def test_masked_actions_count_as_padding_and_nowhere_else(own):
    state, actions = _numbers(own())
    mask = np.ones(actions.shape[:2], bool)
    mask[:, 2:] = False
    actions[~mask] = 1e6
    batch = _batch(own(), state, actions, mask)
    found = inspection.ranges(batch, own())
    assert max(one.after[2] for one in found) < 2
    (line,) = inspection.doubtful(batch, own(), found)
    assert line.startswith("60% of the actions are padding beyond an episode's end")


def test_constant_and_far_dimensions_are_named(own):
    state, actions = _numbers(own())
    state[:, 2] = 7.0
    actions[:, :, 1] += 40.0
    batch = _batch(own(), state, actions)
    lines = inspection.doubtful(batch, own(), inspection.ranges(batch, own()))
    assert lines[0].startswith("state[2] is constant")
    assert any(line.startswith("actions[1] reaches 1") for line in lines)
    assert any("100.0% of its values beyond ±5" in line for line in lines)
    assert not any(line.startswith(("state[0]", "state[1]", "actions[0]")) for line in lines)


def test_numbers_that_are_not_finite_are_beyond(own):
    state, actions = _numbers(own())
    batch = _batch(own(), state, actions)
    batch.observation.state[2, 0] = np.nan
    found = inspection.ranges(batch, own())
    assert found[0].beyond == pytest.approx(1 / 6)
    assert any(
        line.startswith("state[0] reaches") for line in inspection.doubtful(batch, own(), found)
    )


def test_black_pictures_are_counted_by_camera_and_an_absent_camera_is_none(own):
    one = own(dataclasses.replace(robots.TURNTABLE, cameras={"base_0_rgb": "base"}))
    pictures = np.full((6, 24, 24, 3), 90, np.uint8)
    pictures[:2] = 3
    batch = _batch(one, *_numbers(one), pictures=pictures)
    lines = inspection.doubtful(batch, one, inspection.ranges(batch, one))
    assert lines == ["2 of 6 pictures of base_0_rgb are black"]
    assert "camera left_wrist_0_rgb is absent: black and masked" in inspection.facts(batch, one)


@pytest.mark.parametrize("changes", [{}, {"pi05": True, "discrete_state_input": True}])
def test_prompts_are_cut_where_their_end_is_missing(own, changes):
    """A prompt that fills its budget to the last token is whole."""
    state, actions = _numbers(own())
    discrete = "discrete_state_input" in changes
    policy = own(max_token_len=200, **changes)
    batch = _batch(policy, state, actions)
    lengths = batch.observation.tokenized_prompt_mask.sum(axis=1)
    assert not inspection.truncated(batch, policy).any()
    shown = inspection.prompts(batch, policy)
    assert [text.startswith("Task: ") for text in shown] == [discrete] * 6
    assert all(PROMPTS[i % 2] in text for i, text in enumerate(shown))
    short = own(max_token_len=int(lengths.max()), **changes)
    assert not inspection.truncated(_batch(short, state, actions), short).any()
    cut = own(max_token_len=int(lengths.min()) - 1, **changes)
    batch = _batch(cut, state, actions)
    assert inspection.truncated(batch, cut).all()
    lines = inspection.doubtful(batch, cut, inspection.ranges(batch, cut))
    assert any(line.startswith("6 of 6 prompts are longer than") for line in lines)


@pytest.mark.parametrize("changes", [{}, {"pi05": True, "discrete_state_input": True}])
def test_equal_prompts_are_told_unless_the_robot_has_one(own, changes):
    policy = own(max_token_len=64, **changes)
    batch = _batch(policy, *_numbers(policy), prompts=PROMPTS[:1])
    lines = inspection.doubtful(batch, policy, inspection.ranges(batch, policy))
    assert any(line.startswith("all 6 prompts are equal: ") for line in lines)
    fixed = own(
        dataclasses.replace(robots.TURNTABLE, prompt=PROMPTS[0]), max_token_len=64, **changes
    )
    batch = _batch(fixed, *_numbers(fixed))
    assert not any("equal" in x for x in inspection.doubtful(batch, fixed, []))


def test_drawn_samples_are_others_each_time_and_none_twice(tiny_config):
    made_up = sources.SyntheticSource(tiny_config(), length=10)
    states = [inspection.draw(made_up, 5, seed).observation.state for seed in (0, 0, 1)]
    np.testing.assert_array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2])
    everything = inspection.draw(made_up, 99).observation.state
    assert len(np.unique(everything, axis=0)) == len(everything) == 10
    with pytest.raises(ValueError, match="expected at least one sample to look at, got 0"):
        inspection.draw(made_up, 0)


def test_made_up_samples_need_no_assets(tiny_config):
    batch = inspection.draw(sources.SyntheticSource(tiny_config(action_dim=2)), 8)
    found = inspection.ranges(batch, None)
    assert [one.before for one in found] == [None] * 4
    assert inspection.prompts(batch, None)[0].startswith("tokens 2 ")
    text = inspection.table(found).splitlines()
    assert len(text) == 6
    assert text[2].split()[0] == "state[0]"
    assert len({line.index("±5") for line in text if "±5" in line}) == 1
