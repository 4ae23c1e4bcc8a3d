"""A state far from its training data is warned of, an absurd one refused, in the robot's units."""

import dataclasses
import re

import numpy as np
import pytest

from shallow_pi.data.robots import assets, normalize, robot
from shallow_pi.deploy import policy, state_check

STATS = normalize.NormStats(
    mean=np.array([0.0, 5.0, 3.0]),
    std=np.array([0.4, 0.3, 0.0]),
    # The second dimension moves in less than one frame of a hundred, the third never.
    q01=np.array([-1.0, 5.0, 3.0]),
    q99=np.array([1.0, 5.0, 3.0]),
)


def check(state, stats=STATS, of=robot.TURNTABLE, **bounds):
    return state_check.StateCheck.create(of, stats, **bounds)(np.float32(state))


def test_a_state_of_the_training_data_is_neither_warned_of_nor_refused():
    for state in ([0, 5, 3], [1, 5, 3], [12, 5, 3], [0, 13, 3], [0, 5, 3.1]):
        assert check(state) is None


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([14, 5, 3], r"dimension 0 is 14 \(trained on -1 to 1\)"),
        ([0, -5, 3], r"dimension 1 is -5 \(trained on 5 to 5\)"),
        ([0, 5, 4], r"dimension 2 is 4 \(trained on 3 to 3\)"),
        ([14, -5, 4], r"dimension 0 .*, dimension 1 .*, dimension 2"),
    ],
)
def test_a_state_far_outside_is_warned_of(state, said):
    warning = check(state)
    assert warning is not None
    assert warning.startswith("'observation.state' is far from the training data: dimension ")
    assert re.search(said, warning), warning
    assert check(state, warn=0) is None


@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("value", [1e30, -1e30, 500])
def test_an_absurd_state_is_refused(dimension, value):
    state = [0.0, 5, 3]
    state[dimension] = value
    with pytest.raises(ValueError, match=rf"(?s)dimension {dimension} is .*--policy.state-refuse"):
        check(state)
    assert check(state, refuse=0) is not None


def test_a_dimension_without_a_name_is_told_by_its_place_in_the_column():
    some = dataclasses.replace(robot.TURNTABLE, state_indices=(9, 4, 30))
    assert "dimension 9 is 14 (trained" in check([14, 5, 3], of=some)


def test_bounds_are_options():
    assert check([4, 5, 3], warn=1) is not None
    with pytest.raises(ValueError, match="far from the training data"):
        check([4, 5, 3], refuse=1)
    with pytest.raises(ValueError, match=r"or 0 for none, got -1 \(warn\) and 100 \(refuse\)"):
        check([0, 5, 3], warn=-1)


def test_a_converted_state_is_judged_in_the_robots_own_units():
    """A crank's angle saturates at a right angle: in the model's units 1e30 would look usual."""
    rest = np.zeros(14)
    spread = np.full(14, 0.2)
    own = [robot.ALOHA_STATE.forward(rest + sign * spread) for sign in (-1, 1)]
    low, high = np.sort(own, axis=0)
    stats = normalize.NormStats((low + high) / 2, (high - low) / 4, low, high)
    assert check(rest, stats, robot.ALOHA) is None
    gripper = rest.copy()
    gripper[6] = 1e30
    with pytest.raises(ValueError, match=r"dimension 6 is 1e\+30 \(trained on -0\.\d+ to 0\.2\)"):
        check(gripper, stats, robot.ALOHA)


def test_dimensions_are_called_by_their_names():
    assert "'x' is 14 (trained on" in (check([14, 5, 3], names=("x", "y", "z")) or "")


def test_statistics_of_fewer_dimensions_are_refused():
    with pytest.raises(ValueError, match="have 3 dimensions, robot aloha has 14"):
        check([0, 5, 3], of=robot.ALOHA)


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_noise_that_no_warning_is_given_of_is_none_to_the_model(own, params, kind, monkeypatch):
    """A dimension that never moved in training; relative actions still start at the true state."""
    monkeypatch.setattr(assets.Assets, "kind", kind)
    still = dataclasses.replace(own, stats={**own.stats, "state": STATS})
    tiny = policy.Policy(still, params, num_steps=1)
    image, noise = np.zeros((24, 24, 3), np.uint8), np.ones((5, 6), np.float32)

    def ask(state):
        seen = {f"observation.images.{name}": image for name in ("base", "wrist")}
        found = tiny.infer({**seen, "observation.state": np.float32(state), "task": "go"}, noise)
        assert "warnings" not in found
        return found["actions"]

    for off in (-0.05, 1e-4, 0.05):
        moved = ask([0.5, 5, 3]) + np.float32([0, 0, off])
        np.testing.assert_allclose(ask([0.5, 5, 3 + off]), moved, atol=1e-5)
    assert np.abs(ask([0.9, 5, 3])[:, 1:] - ask([0.5, 5, 3])[:, 1:]).max() > 1e-3


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_a_policy_warns_in_its_answer_and_refuses(own, params, kind, monkeypatch):
    monkeypatch.setattr(assets.Assets, "kind", kind)
    image = np.zeros((24, 24, 3), np.uint8)
    seen = {
        "observation.images.base": image,
        "observation.images.wrist": image,
        "observation.state": np.zeros(3),
        "task": "touch the red block",
    }
    tiny = policy.Policy(own, params, num_steps=1)
    assert "warnings" not in tiny.infer(seen)
    # The first dimension's standard deviation is 1.5, and so its spread 7.
    (warning,) = tiny.infer({**seen, "observation.state": np.float32([60, 0, 0])})["warnings"]
    assert "dimension 0 is 60" in warning
    absurd = {**seen, "observation.state": np.float32([1e30, 0, 0])}
    for ask in (tiny.infer, lambda o: tiny.infer_batch([o], np.zeros((1, 5, 6), np.float32))):
        with pytest.raises(ValueError, match=r"dimension 0 is 1e\+30"):
            ask(absurd)
