"""Intervals for success rates, and for the difference of two policies that saw the same episodes.

A rate gets Wilson's score interval. Two policies evaluated on the same seeds are compared pairwise
with Newcombe's hybrid score interval (his method 10, Statistics in Medicine 17, 1998), which uses
only the four counts of the paired 2×2 table; that is far sharper than two overlapping intervals.
Both behave at 0 % and 100 %, where the textbook normal interval has no width.

These speak of the one policy that was trained. What holds for a recipe must hold for other seeds of
its training too: `over_seeds` takes every training seed's outcome in every episode, and counts both
as drawn at random (two crossed random effects, Satterthwaite's degrees of freedom).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# The 97.5 % point of the standard normal distribution: two-sided 95 %.
Z95 = 1.959963984540054


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's score interval (95 %) for `successes` of `episodes`, as fractions.

    (p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n), p = successes / n.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(
            f"Expected 0 <= successes <= episodes and at least 1 episode, got {successes} of "
            f"{episodes}; evaluate at least one episode."
        )
    p, z = successes / episodes, Z95
    center = p + z * z / (2 * episodes)
    half = z * math.sqrt(p * (1 - p) / episodes + z * z / (4 * episodes * episodes))
    scale = 1 + z * z / episodes
    # At 0 and n the ends are exactly 0 and 1; rounding must not say otherwise.
    low = 0.0 if successes == 0 else (center - half) / scale
    high = 1.0 if successes == episodes else (center + half) / scale
    return low, high


@dataclasses.dataclass(frozen=True)
class Difference:
    """Success rate of `a` minus that of `b` over the same episodes, with its 95 % interval."""

    difference: float
    low: float
    high: float
    # Episodes that only `a`, only `b`, both or neither solved.
    only_a: int
    only_b: int
    both: int
    neither: int

    @property
    def verdict(self) -> str:
        """The conclusion from the interval: `higher`, `lower` or `undecided`."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "undecided"


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """Newcombe's interval for the difference of two paired success rates, `a` − `b`."""
    if len(a) != len(b) or not a:
        raise ValueError(
            f"Expected the same episodes for both policies and at least one, got {len(a)} and "
            f"{len(b)}; evaluate both with the same seed and number of episodes."
        )
    pairs = list(zip(map(bool, a), map(bool, b), strict=True))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    n = len(pairs)
    p_a, p_b = (both + only_a) / n, (both + only_b) / n
    low_a, high_a = wilson(both + only_a, n)
    low_b, high_b = wilson(both + only_b, n)

    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    surplus = float(both * neither - only_a * only_b)
    if surplus > 0:
        surplus = max(surplus - n / 2, 0.0)  # continuity correction
    phi = surplus / math.sqrt(margins) if margins else 0.0

    def half_width(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * phi * first * second + second**2, 0.0))

    difference = (only_a - only_b) / n
    return Difference(
        difference=difference,
        low=difference - half_width(p_a - low_a, high_b - p_b),
        high=difference + half_width(high_a - p_a, p_b - low_b),
        only_a=only_a,
        only_b=only_b,
        both=both,
        neither=neither,
    )


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over training seeds and episodes, with its 95 % interval."""

    mean: float
    low: float
    high: float
    # Training seeds; with one, the interval is over its episodes alone.
    seeds: int
    episodes: int


def over_seeds(values: Float[np.ndarray, "seeds episodes"]) -> Mean:
    """The mean outcome of a recipe, or a paired difference, over training seeds and episodes.

    With outcome = mean + seed + episode + rest, all but the mean random, the variance of the mean
    of k seeds in the same n episodes is (MS_seed + MS_episode − MS_rest) / kn, where MS are the
    mean squares of the two-way table. Its degrees of freedom are Satterthwaite's, so that three
    seeds that differ give an interval as wide as three numbers can support.

    Args:
      values: a seed's outcome in an episode (1 for success); every seed met the same episodes. For
        a difference of two recipes, the differences seed by seed.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"expected finite outcomes (seeds, episodes) of at least one each, got the shape "
            f"{values.shape}"
        )
    k, n = values.shape
    mean = float(values.mean())
    if n == 1:
        return Mean(mean, -math.inf, math.inf, k, n)
    by_seed, by_episode = values.mean(1), values.mean(0)
    episode = k * float(np.sum((by_episode - mean) ** 2)) / (n - 1)
    if k == 1:
        half = student_t(n - 1) * math.sqrt(episode / n)
        return Mean(mean, mean - half, mean + half, k, n)
    seed = n * float(np.sum((by_seed - mean) ** 2)) / (k - 1)
    rest = float(np.sum((values - by_seed[:, None] - by_episode + mean) ** 2)) / (k - 1) / (n - 1)
    # An effect's own variance is never negative, whatever the estimate.
    parts = ((k - 1, max(seed - rest, 0.0)), (n - 1, max(episode - rest, 0.0)))
    variance = (sum(part for _, part in parts) + rest) / (k * n)
    if variance == 0:
        return Mean(mean, mean, mean, k, n)
    squares = sum((part + rest * (part > 0)) ** 2 / degrees for degrees, part in parts) + (
        rest**2 / ((k - 1) * (n - 1))
    )
    degrees = max((variance * k * n) ** 2 / squares, 1.0)
    half = student_t(degrees) * math.sqrt(variance)
    return Mean(mean, mean - half, mean + half, k, n)


def rate_over_seeds(successes: Float[np.ndarray, "seeds episodes"]) -> Mean:
    """`over_seeds` of successes: never beyond 0 and 1, nor narrower than Wilson's of its episodes.

    The seeds share their episodes, so they do not count as more of them.
    """
    found = over_seeds(successes)
    low, high = wilson(round(found.mean * found.episodes), found.episodes)
    return dataclasses.replace(
        found, low=max(min(found.low, low), 0.0), high=min(max(found.high, high), 1.0)
    )


def rate_difference_over_seeds(
    a: Float[np.ndarray, "seeds episodes"], b: Float[np.ndarray, "seeds episodes"]
) -> Mean:
    """`over_seeds` of the successes of `a` minus those of `b`, by training seed and episode.

    Never beyond −1 and 1, nor narrower than Newcombe's interval of all pairs as if they were
    independent, which has a width where no pair differs.
    """
    found = over_seeds(np.asarray(a, float) - b)
    floor = paired_difference(np.ravel(a).astype(bool).tolist(), np.ravel(b).astype(bool).tolist())
    low, high = min(found.low, floor.low), max(found.high, floor.high)
    return dataclasses.replace(found, low=max(low, -1.0), high=min(high, 1.0))


def student_t(degrees: float) -> float:
    """The 97.5 % point of Student's t distribution: two-sided 95 %.

    With t = sqrt(ν)·tan θ the density is proportional to cos(θ)^(ν−1), summed over a fine grid.
    """
    if not degrees >= 1:
        raise ValueError(f"expected degrees >= 1, got {degrees}")
    # The mass lies within a few 1/sqrt(ν): no grid over the whole quarter circle for large ν.
    end = min(math.pi / 2, 12 / math.sqrt(degrees))
    angles = np.linspace(0.0, end, 5_001)
    density = np.maximum(np.cos(angles), 0.0) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp(0.95, mass / mass[-1], angles))
    return math.sqrt(degrees) * math.tan(angle)
