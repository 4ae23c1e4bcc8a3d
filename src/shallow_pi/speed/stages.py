"""Time the stages between images on the host and actions on the host.

Each stage is waited for before the next begins, so that the times add up to a little more than the
whole takes in use, where the device works beside the host.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

from shallow_pi.inference import program

# In order. Those of a policy's own work on the host, around those of the program.
BEFORE = ("check", "tokenize", "resize", "normalize")
PROGRAM = ("pack", "transfer", "dispatch", "device", "fetch")
AFTER = ("output",)


@dataclasses.dataclass(frozen=True)
class HostPath:
    """`Policy.infer` on one observation: its stages, and the whole."""

    depth: int
    cameras: int
    # After `prepare.trim`.
    prompt_tokens: int
    # Height and width of the robot's images.
    image: tuple[int, int]
    # Images are brought to the model's size on the device; then there is no stage "resize".
    resized_on_device: bool
    # Median milliseconds by stage, each waited for.
    stages_ms: dict[str, float]
    # Of `Policy.infer`.
    infer_ms: float
    infer_p95_ms: float
    # Of its programs alone, back to back.
    device_ms: float

    @property
    def overhead_ms(self) -> float:
        """Milliseconds of `infer` beyond the device's."""
        return self.infer_ms - self.device_ms


class Laps:
    """A stop watch: seconds of every stage since the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin anew."""
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        """End a stage; one of this name that has already ended in this round goes on."""
        now = time.perf_counter()
        self.seconds.setdefault(name, []).append(now - self._last)
        self._last = now

    def median_ms(self, rounds: int, order: Sequence[str]) -> dict[str, float]:
        """Median milliseconds a round; a stage may be there several times in one."""
        return {
            name: 1e3 * float(np.median(np.reshape(self.seconds[name], (rounds, -1)).sum(axis=1)))
            for name in order
            if name in self.seconds
        }


def through_program(
    laps: Laps, run: program.Program, layout: program.Layout, packed: UInt8[np.ndarray, "b n"]
) -> Float[np.ndarray, "b ah ad"]:
    """Run a program in stages: `PROGRAM` without "pack"."""
    given = jax.block_until_ready(jax.device_put(packed))
    laps("transfer")
    actions = run(layout, given)
    laps("dispatch")
    actions.block_until_ready()
    laps("device")
    found = np.asarray(actions)
    laps("fetch")
    return found
