"""Compare a robot's state with the statistics its policy was trained on.

A policy answers any state with actions, and those for a state far from all of its training data
mean nothing: the usual reasons are degrees for radians, another robot, or a broken sensor. The
distance of a value from the range q01 to q99 is counted in spreads of its dimension, the width of
that range, so that both normalizations (z-score and quantile) judge alike. Values are compared in
the robot's own units.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots

# Spreads outside the range, beyond which a state is warned of and refused.
WARN, REFUSE = 6.0, 100.0


@dataclasses.dataclass(frozen=True, eq=False)
class StateCheck:
    """The range of every dimension of a state in training, and how far outside is too far."""

    # Name of the state in messages, such as "'observation.state'".
    named: str
    low: Float[np.ndarray, " sd"]
    high: Float[np.ndarray, " sd"]
    spread: Float[np.ndarray, " sd"]
    # The dimensions in messages, such as names of joints.
    names: Sequence[str]
    # Spreads outside; 0 checks nothing.
    warn: float = WARN
    refuse: float = REFUSE

    def __post_init__(self) -> None:
        if self.warn < 0 or self.refuse < 0:
            raise ValueError(
                "the bounds of a state's distance from its training data must be positive, or 0 "
                f"for none, got {self.warn:g} (warn) and {self.refuse:g} (refuse)"
            )

    @classmethod
    def create(
        cls,
        robot: robots.Robot,
        stats: normalize.NormStats,
        *,
        names: Sequence[str] = (),
        warn: float = WARN,
        refuse: float = REFUSE,
    ) -> "StateCheck":
        """The check for a robot whose converted states have these statistics."""
        dims = robot.state_dim
        if len(stats.mean) < dims:
            raise ValueError(
                f"the statistics of the state have {len(stats.mean)} dimensions, robot "
                f"{robot.name} has {dims}: they are another robot's"
            )
        bounds = np.stack([*stats.span(), stats.mean - stats.std, stats.mean + stats.std])
        bounds = bounds[:, :dims]
        if robot.state_conversion is not None:
            bounds = robot.state_conversion.inverse(bounds).astype(np.float64)
        quantiles = np.sort(bounds[:2], axis=0)
        deviation = np.abs(bounds[3] - bounds[2]) / 2
        size = np.maximum(1.0, np.abs(quantiles).max(axis=0))
        spread = np.maximum(quantiles[1] - quantiles[0], normalize.NORMAL_RANGE * deviation)
        return cls(
            named=robot.state_vector.named,
            low=quantiles[0],
            high=quantiles[1],
            spread=np.maximum(spread, normalize.SMALLEST_SPREAD * size),
            names=[repr(name) for name in names]
            or [f"dimension {place}" for place in robot.state_vector.places],
            warn=warn,
            refuse=refuse,
        )

    def __call__(self, state: Float[np.ndarray, " sd"]) -> str | None:
        """A warning for a state far outside; None for one that is not.

        Raises:
          ValueError: a state so far outside that no actions for it would mean anything.
        """
        values = np.asarray(state, np.float64)
        outside = np.maximum(self.low - values, values - self.high) / self.spread
        if self.refuse and outside.max() > self.refuse:
            raise ValueError(
                f"{self._describe(values, outside, self.refuse)}\n"
                "the policy was not asked: compare the robot's units and order of joints with the "
                "training data (a larger --policy.state-refuse, or 0, lets it through)"
            )
        if self.warn and outside.max() > self.warn:
            return self._describe(values, outside, self.warn)
        return None

    def _describe(self, values: np.ndarray, outside: np.ndarray, bound: float) -> str:
        far: Sequence[int] = np.flatnonzero(outside > bound).tolist()
        found = [
            f"{self.names[i]} is {values[i]:.4g} (trained on {self.low[i]:.4g} to "
            f"{self.high[i]:.4g})"
            for i in far[:3]
        ]
        more = f" and {len(far) - 3} more" if len(far) > 3 else ""
        return f"{self.named} is far from the training data: {', '.join(found)}{more}"
