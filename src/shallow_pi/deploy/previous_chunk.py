"""What is left of the chunks being executed, as `models.real_time` takes it.

A robot's own actions become guidance in two steps, with the policy's transforms of actions between
them: padded to the action horizon in the robot's units, then, as the model would have predicted
them, put together with how many there are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from shallow_pi.inference import real_time


def padded(
    previous: Sequence[np.ndarray], shape: tuple[int, int, int], delay: int
) -> Float[np.ndarray, "b ah rd"]:
    """What is left of each previous chunk, checked, with zeros behind it.

    Args:
      previous: of each observation, in the robot's units; n may be 0.
      shape: observations, action horizon and the robot's dimensions.
      delay: actions of them that will have been executed when the new chunks arrive.

    Raises:
      ValueError: shapes or numbers that cannot be meant.
    """
    b, horizon, dims = shape
    padded = np.zeros(shape, np.float32)
    if len(previous) != b or delay < 0:
        raise ValueError(
            f"expected a previous chunk for each of {b} observations and a delay of 0 or more, got "
            f"{len(previous)} and {delay}"
        )
    for row, left in zip(padded, previous, strict=True):
        if np.ndim(left) != 2 or np.shape(left)[1] != dims or len(left) > horizon:
            raise ValueError(
                f"a previous chunk must be (n <= {horizon}, {dims}), in the robot's units, got the "
                f"shape {np.shape(left)}"
            )
        if not np.isfinite(left).all():
            raise ValueError("the previous chunk is not finite; begin without one")
        row[: len(left)] = left
    return padded


def guidance(
    actions: Float[np.ndarray, "b ah ad"], lengths: Sequence[int], delay: int, max_weight: float
) -> real_time.Guidance:
    """On the host; a previous chunk shorter than the delay bounds it.

    Args:
      actions: `padded`, as the model would have predicted it: relative, normalized, padded.
      lengths: how many rows of each are actions.
      delay: as above.
      max_weight: upper bound β of the guidance weight.

    Raises:
      ValueError: a weight that is negative or not finite.
    """
    if not 0 <= max_weight < np.inf:
        raise ValueError(f"max_guidance_weight must be finite and 0 or more, got {max_weight}")
    left = np.asarray(lengths, np.int32)
    on_host: dict[str, Any] = {
        "previous": actions,
        "delay": np.minimum(left, np.int32(delay)),
        "executed": np.int32(actions.shape[1]) - left,
        "max_weight": np.float32(max_weight),
    }
    return real_time.Guidance(**on_host)
