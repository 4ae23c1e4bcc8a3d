"""A robot's observation becomes a model sample, and model actions the robot's actions."""

import numpy as np
import pytest

from shallow_pi.data import normalize, robots, tokenizer

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> tokenizer.Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    tokenizer.train(["touch the red block"], path)
    return tokenizer.Tokenizer(path, 48)


@pytest.fixture(scope="module")
def stats() -> dict[str, normalize.NormStats]:
    values = np.random.default_rng(0).normal(size=(100, 3)) * 0.1 + 0.3
    return {"state": normalize.compute(values), "actions": normalize.compute(values * 2)}


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
    return robots.inputs(robots.TURNTABLE, **arguments)


def test_training_sample_has_exactly_the_keys_and_types_of_a_batch(tokens, stats) -> None:
    pad = np.array([False, False, True])
    actions = np.random.default_rng(2).normal(size=(3, 3)).astype(np.float32)
    observation = _observation(action=actions, action_is_pad=pad)
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
    observation = _observation(action=actions)
    sample = _inputs(tokens, stats, kind=kind)(observation)
    outputs = robots.outputs(robots.TURNTABLE, stats=stats, kind=kind)
    raw = {"actions": sample["actions"], "state": observation["observation.state"]}
    np.testing.assert_allclose(outputs(raw)["actions"], actions, atol=1e-5)


def test_aloha_maps_its_three_cameras() -> None:
    keys = {camera: key.removeprefix("observation.images.") for camera, key in _aloha().items()}
    assert keys == {
        "base_0_rgb": "cam_high",
        "left_wrist_0_rgb": "cam_left_wrist",
        "right_wrist_0_rgb": "cam_right_wrist",
    }


def _aloha() -> dict[str, str]:
    return dict(robots.find("aloha").cameras)


def test_bad_input_raises(tokens, stats) -> None:
    with pytest.raises(ValueError, match=r"unknown robot 'turntabel'.*did you mean 'turntable'"):
        robots.find("turntabel")
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
