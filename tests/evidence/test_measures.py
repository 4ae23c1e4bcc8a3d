"""Measures of chunks and paths against their mathematics."""

import numpy as np
import pytest

from shallow_pi.evidence import measures


def test_energy_distance_of_two_points_each_by_hand():
    # a = {0, 2}, b = {1, 5}: E|a−b| = (1 + 5 + 1 + 3)/4, E|a−a'| = 2, E|b−b'| = 4.
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])
    assert measures.energy_distance(a, b) == pytest.approx(2 * 2.5 - 2 - 4)


def test_energy_distance_of_one_distribution_is_zero_on_average():
    rng = np.random.default_rng(0)
    found = [
        measures.energy_distance(rng.normal(size=(16, 6)), rng.normal(size=(16, 6)))
        for _ in range(400)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20


def test_energy_distance_sees_lost_modes_that_the_mean_does_not_show():
    # Both have the mean 0; one of them has lost the two modes.
    rng = np.random.default_rng(0)
    modes = np.where(np.arange(64)[:, None] % 2, 1.0, -1.0) + 0.1 * rng.normal(size=(64, 1))
    mean = 0.1 * rng.normal(size=(64, 1))
    assert measures.energy_distance(modes, mean) > 0.5
    assert abs(measures.energy_distance(modes[:32], modes[32:])) < 0.1


def test_energy_distance_of_normals_that_are_shifted_is_the_known_integral():
    # In one dimension it is 2·∫(F − G)² dx.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2000, 1)), 1.0 + rng.normal(size=(2000, 1))
    x = np.linspace(-8, 9, 4001)
    cdf = np.cumsum(np.exp(-(x**2) / 2)) * (x[1] - x[0]) / np.sqrt(2 * np.pi)
    shifted = np.interp(x - 1.0, x, cdf)
    expected = 2 * np.sum((cdf - shifted) ** 2) * (x[1] - x[0])
    assert measures.energy_distance(a, b) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("shapes", [((1, 2), (3, 2)), ((3, 2), (3, 1)), ((3,), (3,))])
def test_energy_distance_refuses_what_is_no_pair_of_samples(shapes):
    with pytest.raises(ValueError, match="two samples"):
        measures.energy_distance(*(np.zeros(shape) for shape in shapes))


def test_chunks_that_are_apart_all_along_are_that_far_apart():
    # Two points each: E|a−b| is the shift, in mm, whatever the number of steps.
    chunks = np.zeros((2, 7, 3))
    shifted = chunks + np.array([0.0, 0.003, 0.004])
    assert measures.chunk_distance(chunks, shifted) == pytest.approx(2 * 5.0)


def test_sideways_spread_is_across_the_way_alone():
    # Halfway the chunks are 3 mm left and right of the way, and far apart along it.
    chunks = np.zeros((2, 4, 3))
    chunks[:, 2] = [[0.1, 0.003, 0.0], [-0.1, -0.003, 0.5]]
    towards = np.array([2.0, 0.0])
    assert measures.sideways_spread(chunks, towards) == pytest.approx(3 * np.sqrt(2))


def test_path_length_and_jerk_of_a_cubic():
    # x = t³: the third derivative is 6 everywhere.
    times = np.arange(9) / 20
    path = np.stack([times**3, np.zeros(9), np.zeros(9)], 1)
    assert measures.jerk(path, 20.0) == pytest.approx(6.0)
    assert measures.path_length(path) == pytest.approx(1000 * times[-1] ** 3)
    assert measures.jerk(path[:3], 20.0) == 0
