"""A robot's observation becomes a model sample, and model actions the robot's actions."""

import dataclasses
import re

import exact_stats
import numpy as np
import pytest

from shallow_pi.data.robots import normalize, pipelines, tokenizer
from shallow_pi.data.robots import robot as robots

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> tokenizer.Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    tokenizer.train(["touch the red block"], path)
    return tokenizer.Tokenizer(path, 48)


@pytest.fixture(scope="module")
def stats() -> dict[str, normalize.NormStats]:
    values = np.random.default_rng(0).normal(size=(100, 3)) * 0.1 + 0.3
    return {"state": exact_stats.of(values), "actions": exact_stats.of(values * 2)}


def _observation(**extra) -> dict:
    rng = np.random.default_rng(1)
    return {
        "observation.images.base": rng.integers(0, 256, (48, 48, 3), np.uint8),
        "observation.images.wrist": rng.integers(0, 256, (48, 48, 3), np.uint8),
        "observation.state": rng.normal(size=3).astype(np.float32),
        "task": "touch the red block",
        "timestamp": 0.5,
        **extra,
    }


def _inputs(tokens, stats, **changes):
    arguments = {"cameras": CAMERAS, "image_size": 48, "action_dim": 8, "tokenizer": tokens}
    arguments |= {"stats": stats, "kind": "z_score"} | changes
    return pipelines.inputs(robots.TURNTABLE, **arguments)


def test_training_sample_has_exactly_the_keys_and_types_of_a_batch(tokens, stats) -> None:
    pad = np.array([False, False, True])
    actions = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)
    observation = _observation(actions=actions, action_is_pad=pad)
    sample = _inputs(tokens, stats)(observation)
    assert set(sample) == {
        *("image", "image_mask", "state", "actions", "action_mask"),
        *("tokenized_prompt", "tokenized_prompt_mask"),
    }
    wrist = observation["observation.images.wrist"]
    np.testing.assert_array_equal(sample["image"]["left_wrist_0_rgb"], wrist)
    assert [bool(sample["image_mask"][camera]) for camera in CAMERAS] == [True, True, False]
    np.testing.assert_array_equal(sample["action_mask"], ~pad)
    relative = actions - observation["observation.state"]
    expected = normalize.normalize(relative, stats["actions"], "z_score")
    np.testing.assert_array_equal(sample["actions"][:, :3], expected)
    np.testing.assert_array_equal(sample["actions"][:, 3:], 0)
    assert sample["state"].shape == (8,)
    assert sample["state"].dtype == sample["actions"].dtype == np.float32


def test_observation_without_actions_is_an_inference_sample(tokens, stats) -> None:
    sample = _inputs(tokens, stats)(_observation())
    assert "actions" not in sample
    assert "action_mask" not in sample


def test_discrete_state_is_the_normalized_state_before_padding(tokens, stats) -> None:
    sample = _inputs(tokens, stats, kind="quantile", discrete_state=True)(
        _observation(**{"observation.state": stats["state"].q01})
    )
    text = tokens.decode(sample["tokenized_prompt"][sample["tokenized_prompt_mask"]])
    assert text == "Task: touch the red block, State: 0 0 0;\nAction: "


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_outputs_invert_inputs(tokens, stats, kind: normalize.Kind) -> None:
    actions = np.random.default_rng(3).normal(size=(10, 3)).astype(np.float32)
    observation = _observation(actions=actions)
    sample = _inputs(tokens, stats, kind=kind)(observation)
    outputs = pipelines.outputs(robots.TURNTABLE, stats=stats, kind=kind)
    raw = {"actions": sample["actions"], "state": observation["observation.state"]}
    np.testing.assert_allclose(outputs(raw)["actions"], actions, atol=1e-5)


def _recording(robot: robots.Robot, seed: int = 0) -> dict:
    """An observation with actions, in the units the robot's grippers and joints have."""
    rng = np.random.default_rng(seed)
    state = rng.uniform(0.05, 0.95, robot.state_dim).astype(np.float32)
    ends = np.cumsum([_STATE_SIZES.get(key, 0) for key in robot.state_keys])
    parts = np.split(state, ends[:-1]) if len(robot.state_keys) > 1 else [state]
    return {
        **{key: rng.integers(0, 256, (6, 8, 3), np.uint8) for key in robot.cameras.values()},
        **dict(zip(robot.state_keys, parts, strict=True)),
        "actions": rng.uniform(-1, 1, (5, robot.action_dim)).astype(np.float32),
        robot.prompt_key: "fold the towel",
    }


_STATE_SIZES = {"joint_position": 7, "gripper_position": 1, "joints": 6, "gripper": 1}


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
@pytest.mark.parametrize("name", sorted(robots.ROBOTS))
def test_outputs_invert_inputs_for_every_robot(tokens, name, kind: normalize.Kind) -> None:
    robot = robots.find(name)
    rng = np.random.default_rng(1)
    stats = {
        "state": exact_stats.of(rng.normal(size=(50, robot.state_dim))),
        "actions": exact_stats.of(rng.normal(size=(50, robot.action_dim))),
    }
    recording = _recording(robot)
    arguments = {"cameras": CAMERAS, "image_size": 8, "action_dim": 32, "tokenizer": tokens}
    sample = pipelines.inputs(robot, **arguments, stats=stats, kind=kind)(recording)
    assert set(sample["image"]) == set(CAMERAS)
    for camera in CAMERAS:
        assert sample["image_mask"][camera] == (camera in robot.cameras), "absent is masked"
    back = pipelines.outputs(robot, stats=stats, kind=kind)(
        {"actions": sample["actions"], "state": robot.state(recording)}
    )
    np.testing.assert_allclose(back["actions"], recording["actions"], atol=2e-5)
    np.testing.assert_array_equal(back["state"], robot.state(recording))


def test_deltas_are_taken_in_the_models_units() -> None:
    """ALOHA's second joint turns the other way; its grippers are not differences."""
    state, actions = np.full(14, 0.5, np.float32), np.full((1, 14), 0.7, np.float32)
    sample = pipelines.ToModel(robots.ALOHA)({"state": state, "actions": actions})
    arm = [0.2, -0.2, -0.2, 0.2, 0.2, 0.2, 0.7 * 2.1123 - 1.1689]
    np.testing.assert_allclose(sample["actions"], [arm * 2], atol=1e-6)
    np.testing.assert_allclose(sample["state"][:6], [0.5, -0.5, -0.5, 0.5, 0.5, 0.5])


def test_a_robot_that_says_its_prompt_needs_none(tokens, stats) -> None:
    robot = dataclasses.replace(robots.TURNTABLE, prompt="touch the red block")
    arguments = {"cameras": CAMERAS, "image_size": 48, "action_dim": 8, "tokenizer": tokens}
    inputs = pipelines.inputs(robot, **arguments, stats=stats, kind="z_score")
    expected = _inputs(tokens, stats)(_observation())["tokenized_prompt"]
    observation = _observation(task="something else")
    np.testing.assert_array_equal(inputs(observation)["tokenized_prompt"], expected)
    del observation["task"]
    np.testing.assert_array_equal(inputs(observation)["tokenized_prompt"], expected)


def test_a_state_in_parts_is_joined_and_its_size_checked(tokens) -> None:
    recording = _recording(robots.DROID)
    joined = robots.DROID.state(recording)
    assert joined.shape == (8,)
    recording["gripper_position"] = recording["gripper_position"][0]  # a plain number
    np.testing.assert_array_equal(robots.DROID.state(recording), joined)
    stats = {key: exact_stats.of(np.eye(8)) for key in ("state", "actions")}
    arguments = {"cameras": CAMERAS, "image_size": 8, "action_dim": 32, "tokenizer": tokens}
    inputs = pipelines.inputs(robots.DROID, **arguments, stats=stats, kind="quantile")
    wrong = recording | {"joint_position": np.zeros(6, np.float32)}
    message = r"got 'joint_position' \(6\) \+ .* robot droid expects 'joint_position' \(7\)"
    with pytest.raises(ValueError, match=message):
        inputs(wrong)
    del wrong["gripper_position"]
    with pytest.raises(ValueError, match=r"lacks \['gripper_position'\]"):
        inputs(wrong)


def test_an_absent_instruction_is_refused_and_an_empty_one_told(tokens, stats, capsys) -> None:
    inputs = _inputs(tokens, stats)
    with pytest.raises(ValueError, match=r"must be a str, got NoneType \(None\)"):
        inputs(_observation(task=None))
    inputs(_observation(task=" "))
    assert "an instruction is empty" in capsys.readouterr().err


def test_a_camera_the_model_lacks_is_reported_once(tokens, stats, capsys) -> None:
    cameras = {"base_rgb": "top", "left_wrist_0_rgb": "observation.images.wrist"}
    robot = dataclasses.replace(robots.TURNTABLE, cameras=cameras)
    arguments = {"cameras": CAMERAS, "image_size": 8, "action_dim": 8, "tokenizer": tokens}
    for _ in range(2):
        pipelines.inputs(robot, **arguments, stats=stats, kind="z_score")
    message = r"warning: 'top' of robot turntable is not used.*did you mean 'base_0_rgb'\?\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_bad_input_raises(tokens, stats) -> None:
    with pytest.raises(ValueError, match="dimension 3, more than the model's action_dim 2"):
        _inputs(tokens, stats, action_dim=2)
    with pytest.raises(ValueError, match="none in common"):
        _inputs(tokens, stats, cameras=("front",))
    with pytest.raises(ValueError, match="statistics lack 'actions'"):
        _inputs(tokens, {"state": stats["state"]})
    inputs = _inputs(tokens, stats)
    observation = _observation()
    del observation["observation.images.wrist"]
    with pytest.raises(ValueError, match=r"'observation.images.wrist' \(for left_wrist_0_rgb\)"):
        inputs(observation)
    with pytest.raises(ValueError, match=r"'observation.state' has 4 dimensions, robot turntable"):
        inputs(_observation(**{"observation.state": np.zeros(4)}))
    with pytest.raises(ValueError, match=r"lacks \['task'\]"):
        inputs({key: value for key, value in _observation().items() if key != "task"})
