"""What every simulator offers to rollouts and to data collection.

An episode is a function of its seed alone (scene, task, prompt). `observe` gives a robot
observation under flat LeRobot keys; `step` takes one absolute action and advances one control
period.
"""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Float


class Simulator(Protocol):
    """A seeded, picklable control task with a language prompt."""

    def reset(self, seed: int) -> None:
        """Begin the episode that `seed` names."""

    def observe(self) -> dict[str, Any]:
        """Render and return `observation.images.*`, `observation.state` and `task`."""

    def step(self, action: Float[np.ndarray, " ad"]) -> None:
        """Apply one action for one control period."""

    @property
    def task(self) -> str:
        """The task's short name, by which results are grouped."""

    @property
    def prompt(self) -> str:
        """The instruction in words."""

    @property
    def success(self) -> bool:
        """The goal was reached and held."""

    @property
    def done(self) -> bool:
        """Success, failure or time-out."""

    @property
    def time(self) -> float:
        """Seconds since the episode began."""
