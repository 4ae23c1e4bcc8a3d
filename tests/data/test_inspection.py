"""Errors in a batch are reported by dimension, camera and prompt; a sound one gives none."""

import dataclasses
import re

import numpy as np
import pytest

from shallow_pi.data import inspection, sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import assets, normalize, pipelines, tokenizer
from shallow_pi.data.robots import robot as robots

NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
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


def _samples(own, state, actions, mask=None, prompts=PROMPTS, images=None):
    """Samples through the robot's own transforms."""
    mask = np.ones(actions.shape[:2], bool) if mask is None else mask
    transform, samples = own.inputs(), []
    for i in range(len(state)):
        image = NOISE if images is None else images[i]
        observation = dict.fromkeys(own.robot.cameras.values(), image)
        observation |= {"observation.state": state[i], "task": prompts[i % len(prompts)]}
        observation |= {"actions": actions[i], "action_is_pad": ~mask[i]}
        samples.append(pipelines.to_batch(transform(observation)))
    return inspection.draw(samples, own, len(samples))


def _numbers(own, count=6, seed=0):
    """States and actions in the robot's units that the statistics fit."""
    generator, horizon = np.random.default_rng(seed), own.model.action_horizon
    mean, std = own.stats["state"].mean, own.stats["state"].std
    state = mean + std * generator.uniform(-1, 1, (count, 3))
    chunk = mean + std * generator.uniform(-1, 1, (count, horizon, 3))
    return state.astype(np.float32), (state[:, None] + chunk).astype(np.float32)


def test_a_sound_batch_has_nothing_doubtful(own):
    samples = _samples(own(), *_numbers(own()))
    assert inspection.doubtful(samples, inspection.ranges(samples)) == []


def test_normalized_ranges_are_those_of_the_models_numbers(own):
    state, actions = _numbers(own())
    found = inspection.ranges(_samples(own(), state, actions))
    assert [one.name for one in found] == [
        f"{k}[{i}]" for k in ("state", "actions") for i in range(3)
    ]
    mean, std = own().stats["state"].mean, own().stats["state"].std
    delta = actions - state[:, None]  # The turntable's actions are differences.
    for one, column in zip(found, [*state.T, *delta.reshape(-1, 3).T], strict=True):
        dim = int(one.name[-2])
        after = (column - mean[dim]) / std[dim]
        expected = [after.min(), after.mean(), after.max()]
        np.testing.assert_allclose(one.normalized, expected, rtol=1e-4, atol=1e-5)
    assert {one.beyond for one in found} == {0.0}
    assert {one.recorded for one in found} == {None}


@pytest.fixture(scope="module")
def aloha(tmp_path_factory, tiny_config, words):
    """Makes a source of ALOHA's recordings, and its assets; grippers at `opening` times 0 to 1."""

    def make(opening, names=None):
        generator = np.random.default_rng(0)
        folder = tmp_path_factory.mktemp("aloha") / "dataset"
        both = dict.fromkeys(("observation.state", "action"), names) if names else None
        with lerobot_writer.Writer(folder, 50, names=both) as writer:
            for prompt in PROMPTS:
                vectors = generator.uniform(-1, 1, (20, 14)).astype(np.float32)
                vectors[:, [6, 13]] = opening * np.linspace(0.01, 1, 20)[:, None]
                pixels = generator.integers(0, 256, (2, 20, 8, 8, 3), np.uint8)
                images = {"cam_high": pixels[0], "cam_low": pixels[1]}
                writer.add_episode(images, vectors, vectors, prompt)
        cameras = {"base_0_rgb": "observation.images.cam_high"}
        robot = dataclasses.replace(robots.ALOHA, cameras=cameras)
        dataset = reader.Dataset(folder)
        model = tiny_config(vocab_size=320, action_dim=14, max_token_len=24)
        stats = sources.norm_stats([dataset], robot, model.action_horizon)
        every = {} if names is None else {"state": tuple(names), "actions": tuple(names)}
        own = assets.Assets(model, robot, words, stats, "aloha", every)
        return sources.DatasetSource(dataset, robot, model.action_horizon, own.inputs()), own

    return make


def test_recorded_ranges_are_over_all_frames_in_the_robots_own_units(aloha):
    source, own = aloha(1.0)
    samples = inspection.draw(sources.Cached(sources.Mixture([source, source])), own, 4)
    found = {one.name: one for one in inspection.ranges(samples)}
    for key, column in (("state", "observation.state"), ("actions", "action")):
        recorded = source.dataset.columns[column]
        for dim in (0, 6):
            part = recorded[:, dim]
            expected = [part.min(), part.mean(), part.max()]
            np.testing.assert_allclose(found[f"{key}[{dim}]"].recorded, expected, rtol=1e-5)
    assert inspection.doubtful(samples, list(found.values())) == []
    row = inspection.table(list(found.values())).splitlines()[2 + 6]
    assert row.split()[:4] == ["state[6]", "0.010", "0.505", "1.000"]


def test_the_share_of_padding_is_over_all_frames(aloha):
    source, own = aloha(1.0)
    padded = [1 - source[i].action_mask.mean() for i in range(len(source))]
    for few in (1, 7):
        samples = inspection.draw(sources.Mixture([source, source]), own, few)
        assert samples.padding == pytest.approx(np.mean(padded))


@pytest.mark.parametrize(
    ("opening", "message"),
    [
        (0.057, "is recorded from 0.00057 to 0.057, a small part of the robot's 0 to 1"),
        (80.0, "is recorded from 0.8 to 80, outside the robot's 0 to 1"),
    ],
)
def test_numbers_in_another_unit_than_the_robots_are_named(aloha, opening, message):
    names = [f"{arm}_{i}" for arm in ("left", "right") for i in range(7)]
    samples = inspection.draw(*aloha(opening, names), 8)
    lines = inspection.doubtful(samples, inspection.ranges(samples))
    for name in ("state[6] left_6", "state[13] right_6", "actions[6] left_6"):
        assert f"{name} {message}: is it in another unit?" in lines
    assert sum("another unit" in line for line in lines) == 4


def test_an_unused_depth_camera_is_reported(aloha):
    source, own = aloha(1.0)
    assert inspection.draw(source, own, 2).depth == {}
    source, own = aloha(1.0)
    source.dataset.features["observation.images.cam_low"]["info"] = {"is_depth_map": True}
    facts = inspection.facts(inspection.draw(source, own, 2))
    told = "observation.images.cam_low records depth (info.json marks it as a depth map)"
    assert told in facts


def test_one_number_is_shown_if_all_are_equal(own):
    numbers = _numbers(own())
    equal = inspection.facts(_samples(own(), *numbers, prompts=PROMPTS[:1]))
    assert equal[0] == "6 samples, 1 instruction"
    assert re.fullmatch(r"prompts take \d+ of \d+ tokens", equal[1])
    uneven = inspection.facts(_samples(own(), *numbers, prompts=("go", "go to the red block")))
    assert uneven[0] == "6 samples, 2 different instructions"
    assert re.fullmatch(r"prompts take \d+ to \d+ of \d+ tokens", uneven[1])


def test_padded_actions_count_as_padding_and_nowhere_else(own):
    state, actions = _numbers(own())
    mask = np.ones(actions.shape[:2], bool)
    mask[:, 2:] = False
    actions[~mask] = 1e6
    samples = _samples(own(), state, actions, mask)
    found = inspection.ranges(samples)
    assert max(one.normalized[2] for one in found) < 2
    (line,) = inspection.doubtful(samples, found)
    assert line.startswith("60% of the actions lie beyond an episode's end: episodes are short")
    counted = "lie beyond an episode's end: the last one repeated; the losses count them"
    assert any(counted in fact for fact in inspection.facts(samples))
    left_out = dataclasses.replace(samples, masks_padding=True)
    assert any("the losses leave them out" in fact for fact in inspection.facts(left_out))


def test_samples_in_which_the_robot_stands_still_are_counted(own):
    """Teleoperation that begins late: noise of the sensors is no motion, and one action is none."""
    state, actions = _numbers(own(), count=8)
    actions[:2] = actions[:2, :1]
    actions[1] += np.random.default_rng(0).normal(0, 1e-4, actions[1].shape)
    mask = np.ones(actions.shape[:2], bool)
    mask[7, 1:] = False
    samples = _samples(own(), state, actions, mask)
    assert "in 2 of 8 samples the robot stands still" in inspection.facts(samples)
    assert inspection.doubtful(samples, inspection.ranges(samples)) == []
    actions[2] = actions[2, :1]
    samples = _samples(own(), state, actions, mask)
    (line,) = inspection.doubtful(samples, inspection.ranges(samples))
    assert line.startswith("in 38% of the samples the robot stands still (all actions")


def test_constant_and_far_dimensions_are_named(own):
    state, actions = _numbers(own())
    state[:, 2] = 7.0
    actions[:, :, 1] += 40.0
    samples = _samples(own(), state, actions)
    lines = inspection.doubtful(samples, inspection.ranges(samples))
    assert lines[0].startswith("state[2] is constant")
    assert any(line.startswith("actions[1] reaches 1") for line in lines)
    assert any("100.0% of its values beyond ±5" in line for line in lines)
    assert not any(line.startswith(("state[0]", "state[1]", "actions[0]")) for line in lines)


def test_numbers_that_are_not_finite_are_beyond(own):
    state, actions = _numbers(own())
    samples = _samples(own(), state, actions)
    samples.batch.observation.state[2, 0] = np.nan
    found = inspection.ranges(samples)
    assert found[0].beyond == pytest.approx(1 / 6)
    assert any(line.startswith("state[0] reaches") for line in inspection.doubtful(samples, found))


def test_images_that_show_nothing_are_counted_by_camera_and_an_absent_camera_is_none(own):
    one = own(dataclasses.replace(robots.TURNTABLE, cameras={"base_0_rgb": "base"}))
    images = [NOISE.copy() for _ in range(6)]
    images[0][:] = images[1][:] = 3
    images[2] = np.full((10, 24, 3), [200, 90, 9], np.uint8)  # Made square by black bars.
    samples = _samples(one, *_numbers(one), images=images)
    lines = inspection.doubtful(samples, inspection.ranges(samples))
    assert lines == [
        "2 of 6 images of base_0_rgb are black",
        "1 of 6 images of base_0_rgb are of one colour all over",
    ]
    assert "camera left_wrist_0_rgb is absent: black and masked" in inspection.facts(samples)


@pytest.mark.parametrize("changes", [{}, {"pi05": True, "discrete_state_input": True}])
def test_prompts_are_cut_where_their_end_is_missing(own, changes):
    """A prompt that fills its budget to the last token is whole."""
    state, actions = _numbers(own())
    discrete = "discrete_state_input" in changes
    policy = own(max_token_len=200, **changes)
    samples = _samples(policy, state, actions)
    lengths = samples.batch.observation.tokenized_prompt_mask.sum(axis=1)
    assert not inspection.truncated(samples).any()
    shown = inspection.prompts(samples)
    assert [text.startswith("Task: ") for text in shown] == [discrete] * 6
    assert all(PROMPTS[i % 2] in text for i, text in enumerate(shown))
    short = own(max_token_len=int(lengths.max()), **changes)
    assert not inspection.truncated(_samples(short, state, actions)).any()
    cut = own(max_token_len=int(lengths.min()) - 1, **changes)
    samples = _samples(cut, state, actions)
    assert inspection.truncated(samples).all()
    lines = inspection.doubtful(samples, inspection.ranges(samples))
    assert any(line.startswith("6 of 6 prompts are longer than") for line in lines)


@pytest.mark.parametrize("changes", [{}, {"pi05": True, "discrete_state_input": True}])
def test_equal_prompts_are_told_unless_the_robot_has_one(own, changes):
    policy = own(max_token_len=64, **changes)
    samples = _samples(policy, *_numbers(policy), prompts=PROMPTS[:1])
    lines = inspection.doubtful(samples, inspection.ranges(samples))
    assert any(line.startswith("all 6 prompts are equal: ") for line in lines)
    fixed = own(
        dataclasses.replace(robots.TURNTABLE, prompt=PROMPTS[0]), max_token_len=64, **changes
    )
    samples = _samples(fixed, *_numbers(fixed))
    assert not any("equal" in x for x in inspection.doubtful(samples, []))


def test_drawn_samples_are_others_each_time_and_none_twice(tiny_config):
    made_up = sources.SyntheticSource(tiny_config(), length=10)

    def states(count, seed=0):
        return inspection.draw(made_up, None, count, seed=seed).batch.observation.state

    np.testing.assert_array_equal(states(5), states(5))
    assert not np.array_equal(states(5), states(5, seed=1))
    everything = states(99)
    assert len(np.unique(everything, axis=0)) == len(everything) == 10
    with pytest.raises(ValueError, match="expected at least one sample to look at, got 0"):
        states(0)


def test_synthetic_samples_need_no_assets(tiny_config):
    samples = inspection.draw(sources.SyntheticSource(tiny_config(action_dim=2)), None, 8)
    found = inspection.ranges(samples)
    assert [one.recorded for one in found] == [None] * 4
    assert inspection.prompts(samples)[0].startswith("tokens 2 ")
    assert inspection.doubtful(samples, found) == []
    text = inspection.table(found).splitlines()
    assert len(text) == 6
    assert text[2].split()[0] == "state[0]"
    assert len({line.index("±5") for line in text if "±5" in line}) == 1
