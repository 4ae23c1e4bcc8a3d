"""What a robot's observation and the chunk it executes are to the model, and the way back."""

import dataclasses

import numpy as np
import pytest

from shallow_pi.data.robots import normalize
from shallow_pi.deploy import robot_transforms


@pytest.fixture
def seen():
    """An observation."""
    image = np.zeros((24, 24, 3), np.uint8)
    return {
        "observation.images.base": image,
        "observation.images.wrist": image,
        "observation.state": np.float32([0.5, -1, 2]),
        "task": "touch the red block",
    }


@pytest.mark.parametrize(
    ("pi05", "spread", "constant", "farthest"),
    [(False, [2, 0, 0.5], 0, 10), (True, [4, 0, 1], -1, 5)],
    ids=["z-score", "quantile"],
)
def test_targets_lie_in_the_range_of_the_training_actions(
    own, seen, pi05, spread, constant, farthest
):
    """The second never moved, and its sensor is off; a target of the third is absurd."""
    mean, std = np.array([0.5, 0.3, 0.1]), np.array([2, 0, 0.5])
    stats = normalize.NormStats(mean, std, q01=mean - 2 * std, q99=mean + 2 * std)
    model = dataclasses.replace(own.model, pi05=pi05)
    still = dataclasses.replace(own, model=model, stats={**own.stats, "actions": stats})
    robot = robot_transforms.RobotTransforms(
        still, prompt=None, resize=True, state_warn=6, state_refuse=100
    )
    relative = np.array([[1, 0.301, 0.2], [-3, 0.299, 60]])
    asked = robot.to_model(seen, relative + seen["observation.state"], 1)
    assert (asked.left, asked.delay) == (2, 1)
    target = asked.sample["actions"]
    assert target.shape == (5, 6)
    np.testing.assert_allclose(target[:2, 0], (relative[:, 0] - mean[0]) / spread[0], atol=1e-5)
    np.testing.assert_allclose(target[:2, 1], constant, atol=1e-5)
    np.testing.assert_allclose(target[:2, 2], [0.1 / spread[2], farthest], atol=1e-4)
    assert not target[:, 3:].any()


def test_images_of_many_sizes_are_compiled_for_in_a_few_alone(own, seen, capsys):
    """A client that crops its images at random would fill the memory with programs."""
    robot = robot_transforms.RobotTransforms(
        own, prompt=None, resize=False, state_warn=6, state_refuse=100
    )

    def height(rows):
        image = np.zeros((rows, 40, 3), np.uint8)
        images = {f"observation.images.{name}": image for name in ("base", "wrist")}
        batch, _ = robot.stack([robot.to_model({**seen, **images})])
        return {found.shape[1] for found in batch.images.values()}

    few = robot_transforms.MAX_SIZES
    assert [height(30 + i) for i in range(few)] == [{30 + i} for i in range(few)]
    assert [height(100 + i) for i in range(3)] == 3 * [{own.model.image_size}]
    assert height(30) == {30}
    assert capsys.readouterr().err.count("let cameras keep their sizes") == 1


@pytest.mark.parametrize("discrete", [False, True])
def test_a_prompt_that_is_cut_is_warned_of_in_every_answer(own, seen, discrete):
    """For π0.5 the state goes with it, and the robot would move without knowing where it is."""
    model = dataclasses.replace(
        own.model, pi05=discrete, discrete_state_input=discrete, max_token_len=40
    )
    robot = robot_transforms.RobotTransforms(
        dataclasses.replace(own, model=model),
        prompt=None,
        resize=True,
        state_warn=6,
        state_refuse=100,
    )
    assert robot.to_model({**seen, "task": "go"}).warnings == ()
    for previous in (None, np.zeros((2, 3))):
        for _ in range(2):
            (said,) = robot.to_model({**seen, "task": 40 * "go "}, previous).warnings
            assert said.startswith("the prompt is cut to the 40 tokens that the model reads")
            assert ("the state" in said) == discrete
