"""Intervals for success rates, and for the difference of two policies that saw the same episodes.

A rate gets Wilson's score interval. Two policies evaluated on the same seeds are compared pairwise
with Newcombe's hybrid score interval (his method 10, Statistics in Medicine 17, 1998), which uses
only the four counts of the paired 2×2 table; that is far sharper than two overlapping intervals.
Both behave at 0 % and 100 %, where the textbook normal interval has no width.
"""

import dataclasses
import math
from collections.abc import Sequence

# The 97.5 % point of the standard normal distribution: two-sided 95 %.
Z95 = 1.959963984540054


def wilson(successes: int, episodes: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for `successes` of `episodes`, as fractions.

    (p + z²/2n ± z·sqrt(p(1 − p)/n + z²/4n²)) / (1 + z²/n), p = successes / n.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(
            f"Expected 0 <= successes <= episodes and at least 1 episode, got {successes} of "
            f"{episodes}; evaluate at least one episode."
        )
    p = successes / episodes
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


def paired_difference(a: Sequence[bool], b: Sequence[bool], z: float = Z95) -> Difference:
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
    (low_a, high_a), (low_b, high_b) = (
        wilson(sum(map(bool, a)), n, z),
        wilson(sum(map(bool, b)), n, z),
    )

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
