"""Plans that arrive late: what a robot executes until then, and of the plan after.

Simulators wait for the policy; robots do not. Here an observation's plan arrives a number of
control steps after it, and meanwhile the chunk before is executed further, as
`deploy.executors` does it on a robot. The first plan of an episode is waited for.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Executor = Literal["skip", "late", "real-time"]


@dataclasses.dataclass(frozen=True)
class Delay:
    """How late plans are, and what becomes of a late one."""

    # Control steps between an observation and the arrival of its plan.
    steps: int = 0
    # "skip" drops the actions whose time is over, "late" executes a plan from its first action,
    # "real-time" skips, and has the plan go on from what is executed meanwhile.
    executor: Executor = "skip"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"a plan is 0 or more control steps late, got {self.steps}")

    def horizon(self, execute_steps: int) -> int:
        """Actions a chunk needs.

        Raises:
          ValueError: plans would arrive after the next was asked for.
        """
        if self.steps > execute_steps:
            raise ValueError(
                f"plans that are {self.steps} control steps late arrive after the next is asked "
                f"for: execute at least as many, got execute_steps {execute_steps}"
            )
        return execute_steps + self.steps

    def due(
        self,
        before: Float[np.ndarray, "n rd"] | None,
        chunk: Float[np.ndarray, "ah rd"],
        execute_steps: int,
    ) -> tuple[Float[np.ndarray, "execute rd"], Float[np.ndarray, "m rd"]]:
        """The actions until the next observation, and what is left of the chunk then.

        Args:
          before: what was left of the chunk before at the observation; None at the first.
          chunk: the plan for that observation.
          execute_steps: control steps between two observations.
        """
        if before is None:
            return chunk[:execute_steps], chunk[execute_steps:]
        start = 0 if self.executor == "late" else self.steps
        end = start + execute_steps - self.steps
        return np.concatenate([before[: self.steps], chunk[start:end]]), chunk[end:]

    def conditions(self, before: list[Float[np.ndarray, "n rd"] | None]) -> dict[str, Any]:
        """What an actor is given beside the observations: nothing, but for "real-time".

        Args:
          before: what is left of each episode's chunk; None at the first plan.
        """
        seen = next((left for left in before if left is not None), None)
        if self.executor != "real-time" or seen is None:
            return {}
        previous = [seen[:0] if left is None else left for left in before]
        return {"previous": previous, "delay": self.steps}
