"""The path between noise and data: sample times and noise, the point x_t, the target velocity.

Time follows openpi, stated here once: t = 1 is noise and t = 0 is data,

    x_t = t·ε + (1 − t)·a,    u = dx_t/dt = ε − a,    t = 0.001 + 0.999·Beta(1.5, 1).

(The Shallow-π paper writes it the other way round: the same loss.) Source: openpi models/pi0.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sample_time(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Times in [0.001, 1], denser near noise."""
    return 0.001 + 0.999 * jax.random.beta(key, 1.5, 1.0, shape)


def sample_line_time(
    key: Array, shape: tuple[int, ...], deployed: Float[np.ndarray, " k"], share: float
) -> Float[Array, "..."]:
    """Times in (0, 1]: uniform, but for a share of them, which are times of the deployed sampler.

    `deployed` has the times at which a sampler of k steps evaluates the velocity; `share` is the
    expected share of times that are among these.
    """
    keys = jax.random.split(key, 3)
    uniform = 1.0 - jax.random.uniform(keys[0], shape)
    among = jnp.asarray(deployed)[jax.random.randint(keys[1], shape, 0, len(deployed))]
    return jnp.where(jax.random.bernoulli(keys[2], share, shape), among, uniform)


def sample_noise(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard normal noise, float32."""
    return jax.random.normal(key, shape)


def interpolate(
    actions: Float[Array, "*b ah ad"], noise: Float[Array, "*b ah ad"], t: Float[Array, " *b"]
) -> Float[Array, "*b ah ad"]:
    """The point x_t on the straight line from data (t = 0) to noise (t = 1)."""
    same_shape("actions", actions, "noise", noise)
    t = t[..., None, None]
    return t * noise + (1.0 - t) * actions


def target_velocity(
    actions: Float[Array, "*b ah ad"], noise: Float[Array, "*b ah ad"]
) -> Float[Array, "*b ah ad"]:
    """The velocity u = ε − a along that line."""
    same_shape("actions", actions, "noise", noise)
    return noise - actions


def integrate(
    velocity: Callable[[Array, Array], Array],
    noise: Float[Array, "*b ah ad"],
    times: Float[np.ndarray, " n"],
) -> Float[Array, "*b ah ad"]:
    """The end, at t = 0, of the path that starts in the noise: Euler steps of 1/n from `times`.

    The velocity is evaluated at `times`, from 1 down (`sampler.integration_times`).
    """
    dt = jnp.float32(-1.0 / len(times))

    def step(x_t: Array, t: Array) -> tuple[Array, None]:
        return x_t + dt * velocity(x_t, jnp.broadcast_to(t, noise.shape[:-2])), None

    return jax.lax.scan(step, noise, jnp.asarray(times))[0]


def same_shape(name_a: str, a: Array, name_b: str, b: Array) -> None:
    """Raise unless two arrays have one shape; broadcasting would hide a mistake."""
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(
            f"{name_a} and {name_b} must have one shape, got {jnp.shape(a)} and {jnp.shape(b)}."
        )
