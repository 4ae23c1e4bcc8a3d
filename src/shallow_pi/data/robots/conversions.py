"""Convert a robot's numbers to the units and signs of a pretrained model, and back.

`model = factor · robot + offset` by dimension. ALOHA needs one step more in front: it reports its
grippers as the linear position of the fingers (0 closed, 1 open), the model knows the angle of the
servo that moves them, and a crank lies in between. A conversion is declared, not programmed, so
that it is saved with a policy and read back without running anybody's code.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from shallow_pi import progress

# The crank of ALOHA's gripper (metres): finger positions closed and open, arm and horn.
FINGERS_CLOSED, FINGERS_OPEN = 0.01844, 0.05800
ARM, HORN = 0.036, 0.022


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Elementwise, by dimension; `crank` names the dimensions that are gripper positions."""

    factor: tuple[float, ...]
    # Empty is zero.
    offset: tuple[float, ...] = ()
    crank: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        dims = len(self.factor)
        if len(self.offset) not in (0, dims):
            raise ValueError(
                f"a conversion of {dims} factors has {len(self.offset)} offsets; give one for each "
                "or none"
            )
        if not all(self.factor):
            raise ValueError(f"a factor of 0 cannot be undone: {self.factor}")
        if not set(self.crank) <= set(range(dims)):
            raise ValueError(f"crank names dimensions {self.crank} of {dims}")

    def forward(self, values: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
        """The robot's numbers to the model's."""
        values = self._checked(values)
        for dim in self.crank:
            values[..., dim] = crank_angle(values[..., dim])
        return (values * self.factor + self._shift).astype(np.float32)

    def inverse(self, values: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
        """The model's numbers to the robot's."""
        values = (self._checked(values) - self._shift) / self.factor
        for dim in self.crank:
            values[..., dim] = crank_position(values[..., dim])
        return values.astype(np.float32)

    @property
    def _shift(self) -> np.ndarray:
        return np.asarray(self.offset or np.zeros(len(self.factor)))

    def _checked(self, values: np.ndarray) -> np.ndarray:
        if values.shape[-1] != len(self.factor):
            raise ValueError(
                f"a conversion of {len(self.factor)} dimensions was given {values.shape[-1]}"
            )
        return np.array(values, np.float64)


def crank_angle(position: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Angle (radians) of the servo at a relative finger position."""
    fingers = position * (FINGERS_OPEN - FINGERS_CLOSED) + FINGERS_CLOSED
    sine = (HORN**2 + fingers**2 - ARM**2) / (2 * HORN * fingers)
    if (np.abs(sine) > 1).any():
        progress.warn(
            "gripper positions are beyond what ALOHA's crank reaches and are cut to its ends: "
            "expected 0 (closed) to 1 (open)"
        )
    return np.arcsin(np.clip(sine, -1.0, 1.0))


def crank_position(angle: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Relative finger position at an angle (radians): the far root of the law of cosines."""
    fingers = HORN * np.sin(angle) + np.sqrt(ARM**2 - (HORN * np.cos(angle)) ** 2)
    return (fingers - FINGERS_CLOSED) / (FINGERS_OPEN - FINGERS_CLOSED)


def to_model(
    conversion: Conversion | None, values: Float[np.ndarray, "*n d"]
) -> Float[np.ndarray, "*n d"]:
    """The robot's numbers to the model's; without a conversion they are the same."""
    return values if conversion is None else conversion.forward(values)


def to_robot(
    conversion: Conversion | None, values: Float[np.ndarray, "*n d"]
) -> Float[np.ndarray, "*n d"]:
    """The model's numbers to the robot's; without a conversion they are the same."""
    return values if conversion is None else conversion.inverse(values)
