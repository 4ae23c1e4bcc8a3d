"""Learning rate and optimizer: openpi's defaults, built from two frozen dataclasses.

The learning rate rises linearly from peak / (warm-up + 1) to the peak, then falls along half a
cosine to `end_lr` at `decay_steps`, counted from step 0. Gradients are clipped by their global norm
before AdamW.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from shallow_pi import flags

# Largest decay of a moment stored in bfloat16 (`_kept_in`).
SLOWEST_BFLOAT16 = 0.99


@dataclasses.dataclass(frozen=True)
class CosineSchedule:
    """Learning rate with linear warm-up and cosine decay."""

    # Number of steps of linear warm-up; 0 starts at the peak.
    warmup_steps: int = 1000
    # Highest learning rate.
    peak_lr: float = 2.5e-5
    # Step at which the rate reaches --schedule.end-lr, counted from step 0.
    decay_steps: int = 30000
    # Learning rate from --schedule.decay-steps on.
    end_lr: float = 2.5e-6

    def __post_init__(self) -> None:
        flags.at_least(self, 0, "warmup_steps", prefix="schedule.")
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                "--schedule.decay-steps counts from step 0 and must exceed --schedule.warmup-steps "
                f"({self.warmup_steps}), got {self.decay_steps}"
            )
        if not (math.isfinite(self.peak_lr) and self.peak_lr > 0):
            raise ValueError(f"--schedule.peak-lr must be a positive number, got {self.peak_lr}")
        if not 0 <= self.end_lr <= self.peak_lr:
            raise ValueError(
                f"--schedule.end-lr must lie in 0…{self.peak_lr} (--schedule.peak-lr), got "
                f"{self.end_lr}"
            )

    @classmethod
    def over(cls, steps: int, peak_lr: float) -> "CosineSchedule":
        """A short training's: a twentieth of it is warm-up, the end a fiftieth of the peak."""
        return cls(max(1, steps // 20), peak_lr, max(2, steps), peak_lr / 50)

    def create(self) -> optax.Schedule:
        """The optax schedule: step → learning rate."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.peak_lr / (self.warmup_steps + 1),
            peak_value=self.peak_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            end_value=self.end_lr,
        )


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW, with gradients clipped by their global norm."""

    # Decay of the first moment.
    b1: float = 0.9
    # Decay of the second moment.
    b2: float = 0.95
    # Added to the root of the second moment.
    eps: float = 1e-8
    # Decoupled weight decay, times the learning rate.
    weight_decay: float = 1e-10
    # Largest global norm of the gradient.
    clip_norm: float = 1.0
    # Dtype that both moments are stored in; updates are computed in float32. With bfloat16 both
    # decays are at most 0.99.
    moments: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--optimizer.{name} must lie in [0, 1), got {getattr(self, name)}"
                )
        for name in ("eps", "clip_norm"):
            if not getattr(self, name) > 0:
                flag = flags.as_flag(f"optimizer.{name}")
                raise ValueError(f"{flag} must be positive, got {getattr(self, name)}")
        if self.moments not in ("float32", "bfloat16"):
            raise ValueError(
                f"--optimizer.moments must be float32 or bfloat16, got {self.moments!r}"
            )
        flags.at_least(self, 0, "weight_decay", prefix="optimizer.")
        if self.moments == "bfloat16" and (slow := max(self.b1, self.b2)) > SLOWEST_BFLOAT16:
            name = "b1" if self.b1 == slow else "b2"
            raise ValueError(
                f"--optimizer.moments bfloat16 rounds away most of what a decay of {slow} changes "
                f"in a step: --optimizer.{name} must be at most {SLOWEST_BFLOAT16}, or give "
                "--optimizer.moments float32"
            )

    def create(self, schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """The clip followed by AdamW at a learning rate."""
        adamw = optax.adamw(
            schedule,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
        if self.moments != "float32":
            adamw = _kept_in(adamw, jnp.dtype(self.moments))
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


def _kept_in(
    transform: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """The transformation with the floating-point arrays of its state stored in `dtype`.

    Bfloat16 has the exponent range of float32, so no moment underflows. Its 8 bits of precision
    round away a change below 1/256 of a moment, so with a decay of β a moment stops up to
    1 / (256·(1 − β)) of itself from its mean: 8 % with 0.95, 39 % with 0.99, and with 0.999 it
    never decays.
    """

    def cast(state: PyTree, to: jnp.dtype) -> PyTree:
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def init(params: PyTree) -> PyTree:
        return cast(transform.init(params), dtype)

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        updates, state = transform.update(updates, cast(state, jnp.dtype("float32")), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
