"""Real-time chunking: sample a chunk that continues the one being executed.

After "Real-Time Execution of Action Chunking Flow Policies" (arXiv 2506.07339). While a chunk is
computed, the robot executes d more actions of the previous one. Those are fixed, the rest of the
previous chunk is a target whose weight decays, and sampling is inpainting: at every integration
step, pseudoinverse guidance (ΠGDM) pulls the velocity towards chunks that agree with the previous
one. It runs through the action expert alone: the prefix cache does not depend on noisy actions.

The paper's time is τ = 1 − t and its velocity v = a − ε = −u (see `distill.flow`). It integrates

    v + min(β, (1−τ) / (τ r²)) · (Y − Â)ᵀ diag(W) ∂Â/∂x,    Â = x + (1−τ) v,
    r² = (1−τ)² / (τ² + (1−τ)²).

With τ = 1 − t, and the sign turned because we integrate u = −v from t = 1 down to 0:

    u − min(β, k(t)) · (W ∘ (Y − Â))ᵀ ∂Â/∂x,    Â = x − t u,    k(t) = ((1−t)² + t²) / (t (1−t)).

Since ∂Â/∂x = 1 − t ∂u/∂x, the guidance for e = W ∘ (Y − Â) is e − t · (eᵀ ∂u/∂x): one
vector-Jacobian product of the velocity. k is exact where actions are standard normal: with W = 1
and no β the guided velocity is (x − Y) / t, the one of the path that ends in Y.

An integration step of 1/N moves Â by the weight over N of its error, so that β is at most N
(`for_steps`): the paper's 5 would throw a policy of one or two steps beyond the previous chunk. One
step at weight 1 ends in Y exactly where the policy maps noise to actions of the same distribution.
"""

import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

# The paper's choice: enough with few integration steps, and more does harm.
MAX_WEIGHT = 5.0
# Bound of a previous chunk: divided by the smallest spread (1e-6), its square is still finite.
_LARGEST = 1e9
# Kinds of NumPy's dtypes that are real numbers.
_REAL = "fiu"


class Guidance(NamedTuple):
    """The previous chunks that new ones continue; all traced, so one program serves every delay."""

    # Normalized actions of the previous chunk from now on; anything in the last `executed` rows.
    previous: Float[Array, "b ah ad"]
    # d: leading actions that will have been executed before the new chunk arrives.
    delay: Int[Array, " b"]
    # s: actions of the previous chunk executed so far, so that its last s say nothing.
    executed: Int[Array, " b"]
    # β: upper bound of the guidance weight; 0 turns it off.
    max_weight: Float[Array, ""]


def soft_mask(
    delay: Int[Array, " b"], executed: Int[Array, " b"], horizon: int
) -> Float[Array, "b {horizon}"]:
    """W: 1 for i < d, 0 for i ≥ H − s, and c (eᶜ − 1) / (e − 1) between, where c falls from 1 to 0.

    c = (H − s − i) / (H − s − d + 1).
    """
    i, d, end = jnp.arange(horizon)[None], delay[:, None], horizon - executed[:, None]
    c = (end - i).astype(jnp.float32) / jnp.maximum(end - d + 1, 1).astype(jnp.float32)
    # Outside the ramp the exponential could overflow.
    c = jnp.clip(c, 0.0, 1.0)
    ramp = c * jnp.expm1(c) / jnp.expm1(jnp.float32(1.0))
    return jnp.where(i >= end, 0.0, jnp.where(i < d, 1.0, ramp))


def guidance_weight(t: Float[Array, ""], max_weight: Float[Array, ""]) -> Float[Array, ""]:
    """min(β, k(t)) of the module's docstring; k is infinite at t = 1."""
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.minimum(max_weight, ((1 - t) ** 2 + t**2) / jnp.maximum(t * (1 - t), tiny))


def for_steps(guidance: Guidance, num_steps: int) -> Guidance:
    """The guidance with β at most the number of integration steps."""
    return guidance._replace(max_weight=jnp.minimum(guidance.max_weight, float(num_steps)))


def guided(
    velocity: Callable[[Array], Array],
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, ""],
    guidance: Guidance,
) -> Float[Array, "b ah ad"]:
    """The guided velocity at one time, float32."""
    u, pull_back = jax.vjp(velocity, x_t)
    mask = soft_mask(guidance.delay, guidance.executed, x_t.shape[1])
    error = mask[..., None] * (guidance.previous - (x_t - t * u))
    (through_velocity,) = pull_back(error)
    return u - guidance_weight(t, guidance.max_weight) * (error - t * through_velocity)


def pad_previous(
    previous: Float[np.ndarray, "n rd"], shape: tuple[int, int]
) -> Float32[np.ndarray, "ah rd"]:
    """A previous chunk with zeros behind it, checked; on the host, in the robot's units.

    `previous` is the rest of the chunk that is being executed, and may be empty; `shape` is action
    horizon and the robot's dimensions.

    Raises:
      ValueError: no numbers, another shape, or not finite or absurdly large.
    """
    try:
        left = np.asarray(previous)
    except (ValueError, TypeError, RuntimeError):  # Lists of unequal lengths; foreign tensors.
        left = np.asarray(None)
    horizon, dims = shape
    if left.shape == (0,):  # An empty list.
        left = left.reshape(0, dims)
    if (
        left.ndim != 2
        or left.shape[1] != dims
        or len(left) > horizon
        or left.dtype.kind not in _REAL
    ):
        raise ValueError(
            f"a previous chunk must be numbers (n <= {horizon}, {dims}), in the robot's units, got "
            f"{left.dtype} of the shape {left.shape}"
        )
    padded = np.zeros(shape, np.float32)
    with np.errstate(over="ignore"):
        padded[: len(left)] = left
    if not (np.abs(padded) < _LARGEST).all():
        raise ValueError(
            f"the previous chunk is not finite, or beyond {_LARGEST:g}; begin without one"
        )
    return padded


def check_delay(delay: object) -> int:
    """A delay as an integer.

    Raises:
      ValueError: it is none, or negative.
    """
    if isinstance(delay, bool) or not isinstance(delay, (int, np.integer)) or delay < 0:
        got = reprlib.repr(delay)  # Of a client it may be megabytes of text.
        raise ValueError(f"the delay must be a whole number of actions, 0 or more, got {got}")
    return int(delay)


def make_guidance(
    actions: Float[np.ndarray, "b ah ad"],
    lengths: Sequence[int],
    delays: Sequence[int],
    max_weight: float,
) -> Guidance:
    """The guidance towards previous chunks, on the host; one shorter than its delay bounds it.

    Args:
      actions: `pad_previous`, as the model would have predicted it: relative, normalized, padded.
      lengths: how many rows of each are actions; where none is, the new chunk is free.
      delays: actions of each that will have been executed when the new chunk arrives.
      max_weight: upper bound β of the guidance weight.

    Raises:
      ValueError: a weight that is negative or not finite.
    """
    if not 0 <= max_weight < np.inf:
        raise ValueError(f"max_guidance_weight must be finite and 0 or more, got {max_weight}")
    left = np.asarray(lengths, np.int32)
    on_host: dict[str, Any] = {
        "previous": actions,
        "delay": np.minimum(left, np.clip(delays, 0, actions.shape[1]).astype(np.int32)),
        "executed": np.int32(actions.shape[1]) - left,
        "max_weight": np.float32(max_weight),
    }
    return Guidance(**on_host)
