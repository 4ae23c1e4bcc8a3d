"""Statistics are exact over what the model sees, and say where they make a poor scale."""

import dataclasses
import re
import threading

import exact_stats
import numpy as np
import pytest

from shallow_pi.data.robots import pipelines, statistics
from shallow_pi.data.robots import robot as robots

ROBOT = robots.Robot(
    "arm", {"base_0_rgb": "top"}, state_dim=3, action_dim=2, fps=10, delta=(True, False)
)


def _dataset(lengths=(9, 1, 30, 4), dims=(3, 2), seed=0):
    rng = np.random.default_rng(seed)
    n, ends = sum(lengths), np.repeat(np.cumsum(lengths), lengths)
    state, actions = (rng.normal(size=(n, d)).astype(np.float32) * 3 - 1 for d in dims)
    return state, actions, ends


def _seen(state, actions, ends, robot, horizon):
    """Every chunk of every frame through the robot's transforms, as the loader gives it."""
    rows = []
    for i in range(len(state)):
        frames = np.minimum(np.arange(i, i + horizon), ends[i] - 1)
        sample = {"state": state[i], "actions": actions[frames]}
        rows.append(pipelines.ToModel(robot)(sample))
    return {key: np.stack([row[key] for row in rows]) for key in ("state", "actions")}


@pytest.mark.parametrize("block", [7, 2**18])
@pytest.mark.parametrize("horizon", [1, 5, 40])
def test_statistics_are_numpys_over_what_the_model_sees(horizon, block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", block)
    found = statistics.compute(*_dataset(), ROBOT, horizon)
    for key, values in _seen(*_dataset(), ROBOT, horizon).items():
        expected = exact_stats.of(values)
        np.testing.assert_array_equal(found[key].q01, expected.q01)
        np.testing.assert_array_equal(found[key].q99, expected.q99)
        np.testing.assert_allclose(found[key].mean, expected.mean, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found[key].std, expected.std, rtol=1e-6)


def test_statistics_of_aloha_are_of_its_converted_deltas():
    state, actions, ends = (abs(x) / 10 for x in _dataset(dims=(14, 14)))
    ends = _dataset()[2]
    found = statistics.compute(state, actions, ends, robots.ALOHA, 6)
    for key, values in _seen(state, actions, ends, robots.ALOHA, 6).items():
        expected = exact_stats.of(values)
        np.testing.assert_allclose(found[key].q99, expected.q99, rtol=1e-6)
        np.testing.assert_allclose(found[key].mean, expected.mean, rtol=1e-5, atol=1e-7)


def test_constants_zeros_and_few_frames_are_exact():
    state = np.array([[0.0, -0.0, 5], [0, 0, 5]], np.float32)
    actions, ends = np.array([[1.0, -2], [3, -4]], np.float32), np.array([2, 2])
    found = statistics.compute(state, actions, ends, ROBOT, 1)
    np.testing.assert_array_equal(found["state"].q01, [0, 0, 5])
    np.testing.assert_array_equal(found["state"].std, 0)
    np.testing.assert_allclose(found["actions"].q99, [2.98, -2.02])
    one = statistics.compute(state[:1], actions[:1], np.array([1]), ROBOT, 3)
    np.testing.assert_array_equal(one["actions"].q01, [1, -2])


def test_keys_are_in_the_order_of_the_values():
    values = np.array([-np.inf, -3e38, -1, -1e-40, 0, 1e-40, 1, 3e38, np.inf], np.float32)
    keys = statistics._keys(values)
    assert (np.diff(keys) > 0).all()
    assert [statistics._value(int(key)) for key in keys] == values.tolist()


def test_progress_counts_every_dimension():
    counted, lock = [], threading.Lock()

    def advance(amount=1, note=""):
        with lock:
            counted.append(amount)

    statistics.compute(*_dataset(), ROBOT, 2, advance)
    assert sum(counted) == 5


def test_what_cannot_be_computed_is_named():
    state, actions, ends = _dataset()
    with pytest.raises(ValueError, match="at least one frame"):
        statistics.compute(state[:0], actions[:0], ends[:0], ROBOT, 2)
    actions[11, 1] = np.nan
    with pytest.raises(ValueError, match="actions, frame 11, dimension 1 is nan; repair"):
        statistics.compute(state, actions, ends, ROBOT, 2)


def _stats(values):
    return {"state": exact_stats.of(np.asarray(values, float))}


def test_constant_and_hardly_moving_dimensions_are_told():
    grid = np.linspace(0, 1, 1001)
    rare = np.where(np.arange(1001) < 5, 1.0, 0.0)
    values = np.stack([grid, np.full(1001, 7.0), grid * 1e-5, rare], axis=1)
    lines = statistics.doubtful(_stats(values))
    assert [line.partition(" ")[0] for line in lines] == ["state[1]", "state[2]", "state[3]"]
    assert "is constant (7)" in lines[0]
    assert "hardly moves" in lines[1]
    assert "one value (0) in 98 % of the frames" in lines[2]


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_statistics_of_another_unit_or_robot_are_told(kind):
    values = np.random.default_rng(0).normal(size=(500, 3))
    own = _stats(values)
    assert statistics.misfits(own, own, kind) == []
    assert statistics.misfits(_stats(values * 2 + 0.5), own, kind) == [], "another task"
    degrees = _stats(np.degrees(values))
    (first, *_) = statistics.misfits(degrees, own, kind)
    assert re.match(r"state\[0\] is 5\d times narrower than they say", first)
    (first, *_) = statistics.misfits(own, degrees, kind)
    assert "times as wide as they say" in first
    shifted = _stats(values + np.array([0, 30, 0]))
    (line,) = statistics.misfits(own, shifted, kind)
    assert line.startswith("state[1] is far from where they say")
    assert statistics.misfits({}, own, kind) == ["there are no statistics of state; there are []"]
    short = {"state": dataclasses.replace(own["state"], **_first_two(own["state"]))}
    assert statistics.misfits(short, own, kind) == ["state has 2 dimensions, the dataset 3"]


def _first_two(stats):
    return {name: value[:2] for name, value in dataclasses.asdict(stats).items()}
