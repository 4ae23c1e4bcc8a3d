"""Wilson's and Newcombe's intervals against hand calculations and against their coverage."""

import itertools
import math

import numpy as np
import pytest

from shallow_pi.evaluation import intervals


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        # By hand with z = 1.959964, z² = 3.841459. 5/10: 0.5 ± 1.959964·sqrt(0.025 + 0.00960365)
        # / 1.3841459; 0/n: [0, z²/(n + z²)]; n/n: [n/(n + z²), 1].
        (5, 10, 0.236593, 0.763407),
        (0, 100, 0.0, 0.036994),
        (100, 100, 0.963006, 1.0),
        (1, 1, 0.206543, 1.0),
        # Newcombe 1998 (two-sided intervals for the single proportion), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_values_by_hand(successes, episodes, low, high):
    assert intervals.wilson(successes, episodes) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_solve_the_score_equation():
    # The interval is where |p̂ − p| = z·sqrt(p(1 − p)/n): both ends must satisfy it.
    for end in intervals.wilson(37, 50):
        assert abs(37 / 50 - end) == pytest.approx(
            1.959963984540054 * math.sqrt(end * (1 - end) / 50)
        )


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, episodes):
    with pytest.raises(ValueError, match="0 <= successes <= episodes"):
        intervals.wilson(successes, episodes)


def _pairs(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


def test_paired_difference_counts_the_table():
    found = intervals.paired_difference(*_pairs(5, 3, 1, 2))
    assert (found.both, found.only_a, found.only_b, found.neither) == (5, 3, 1, 2)
    assert found.difference == pytest.approx(2 / 11)


def test_paired_difference_without_correlation_is_the_square_and_add_interval():
    # both·neither = only_a·only_b, so φ = 0: difference ± root of the summed squares of Wilson's
    # two half widths; for two rates of 1/2 over 100 episodes each half width is 0.5 − 0.403832.
    found = intervals.paired_difference(*_pairs(25, 25, 25, 25))
    half = math.sqrt(2) * (0.5 - 0.403832)
    assert (found.low, found.high) == pytest.approx((-half, half), abs=1e-5)


def test_paired_difference_by_hand_with_correlation():
    # n = 20; both 9, only_a 5, only_b 1, neither 5. Rates 14/20 and 10/20; Wilson: a in
    # [0.481027, 0.854522], b in [0.299298, 0.700702]. φ numerator 45 − 5 = 40, corrected by n/2 to
    # 30; φ = 30 / sqrt(14·6·10·10) = 0.327327. δ² = 0.218973² + 0.200702² −
    # 2φ·0.218973·0.200702 = 0.059459, ε² = 0.154522² + 0.200702² − 2φ·0.154522·0.200702 = 0.043855.
    found = intervals.paired_difference(*_pairs(9, 5, 1, 5))
    assert found.low == pytest.approx(0.2 - math.sqrt(0.059459), abs=1e-4)
    assert found.high == pytest.approx(0.2 + math.sqrt(0.043855), abs=1e-4)


def test_paired_difference_of_a_policy_with_itself_is_zero_and_undecided():
    a, _ = _pairs(40, 30, 0, 30)
    found = intervals.paired_difference(a, a)
    assert found.difference == 0
    assert found.low <= 0 <= found.high
    assert found.verdict == "undecided"
    # Sharper than the unpaired comparison of the same two rates.
    low, high = intervals.wilson(70, 100)
    assert found.high - found.low < high - low


def test_paired_difference_changes_sign_with_the_order():
    a, b = _pairs(40, 20, 3, 37)
    forward, backward = intervals.paired_difference(a, b), intervals.paired_difference(b, a)
    assert forward.verdict == "higher"
    assert backward.verdict == "lower"
    assert (backward.low, backward.high) == pytest.approx((-forward.high, -forward.low))


def test_paired_difference_covers_the_truth_about_95_times_in_100():
    # Cells (both, only_a, only_b, neither) of correlated policies, near the ceiling.
    cells = np.array([0.86, 0.07, 0.02, 0.05])
    truth = cells[1] - cells[2]
    draws = np.random.default_rng(0).multinomial(100, cells, size=2000)
    hits = 0
    for counts, times in zip(*np.unique(draws, axis=0, return_counts=True), strict=True):
        found = intervals.paired_difference(*_pairs(*map(int, counts)))
        hits += int(times) * (found.low <= truth <= found.high)
    assert 0.93 <= hits / 2000 <= 0.99


def test_paired_difference_stays_within_possible_values():
    for both, only_a, only_b, neither in itertools.product((0, 1, 7), repeat=4):
        if both + only_a + only_b + neither:
            found = intervals.paired_difference(*_pairs(both, only_a, only_b, neither))
            assert -1 <= found.low <= found.difference <= found.high <= 1


def test_paired_difference_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="same episodes for both"):
        intervals.paired_difference([True], [True, False])


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # From tables of Student's t, two-sided 5 %; the last is the normal distribution's.
    [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (30, 2.042), (1e6, 1.95997)],
)
def test_student_t_equals_the_tables(degrees, expected):
    assert intervals.student_t(degrees) == pytest.approx(expected, abs=1e-3)


def test_one_seed_gives_the_t_interval_of_its_episodes():
    values = np.array([[1.0, 2.0, 4.0, 5.0]])
    found = intervals.over_seeds(values)
    half = 3.18245 * values.std(ddof=1) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-4)


@pytest.mark.parametrize("episodes", [50, 3])
def test_seeds_that_differ_alike_in_every_episode_give_the_t_interval_of_the_seeds(episodes):
    # outcome = seed's effect alone: n episodes add nothing, three numbers remain.
    values = np.repeat([[0.2], [0.5], [0.8]], episodes, axis=1)
    found = intervals.over_seeds(values)
    half = 4.30265 * 0.3 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)


def test_seeds_that_are_alike_do_not_multiply_the_episodes():
    # Three seeds with the same outcomes know as much as one: the same interval.
    one = np.random.default_rng(0).integers(0, 2, (1, 200)).astype(float)
    alone, thrice = intervals.over_seeds(one), intervals.over_seeds(np.repeat(one, 3, axis=0))
    assert (thrice.low, thrice.high) == pytest.approx((alone.low, alone.high))


def test_the_interval_over_seeds_covers_the_mean_in_about_95_of_100_studies():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        seeds, episodes = rng.normal(0, 0.3, (3, 1)), rng.normal(0, 1, (1, 40))
        found = intervals.over_seeds(seeds + episodes + rng.normal(0, 1, (3, 40)))
        covered += found.low < 0 < found.high
    assert 935 <= covered <= 995


def test_a_rate_of_one_keeps_wilsons_interval():
    found = intervals.rate_over_seeds(np.ones((3, 100)))
    assert (found.low, found.high) == pytest.approx(intervals.wilson(100, 100))


def test_policies_that_never_differ_keep_newcombes_interval():
    ones = np.ones((1, 100))
    found = intervals.rate_difference_over_seeds(ones, ones)
    expected = intervals.paired_difference([True] * 100, [True] * 100)
    assert (found.mean, found.low, found.high) == (0.0, expected.low, expected.high)
    assert found.low < -0.03
    # More seeds tell more, and where pairs differ the interval over seeds is the wider one.
    assert (
        intervals.rate_difference_over_seeds(np.ones((3, 100)), np.ones((3, 100))).low > found.low
    )
    a, b = np.random.default_rng(0).integers(0, 2, (2, 3, 200))
    found, wide = intervals.rate_difference_over_seeds(a, b), intervals.over_seeds(a - b)
    assert (found.low, found.high) == (wide.low, wide.high)


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan]])])
def test_outcomes_that_are_no_table_are_refused(values):
    with pytest.raises(ValueError, match="outcomes"):
        intervals.over_seeds(values)
