"""A teacher, observations and noise in miniature, and the samplers' oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.evaluation.rivals import rival
from shallow_pi.inference import prepare, sampler

STEPS = 4


@pytest.fixture(scope="session")
def setting(tiny_config, tiny_params, tiny_observation):
    """Makes (config, parameters, observation, noise)."""

    def make(pi05=False, **changes):
        config = tiny_config(pi05=pi05, **changes)
        noise = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
        return config, tiny_params(config), tiny_observation(config), jnp.asarray(noise)

    return make


@pytest.fixture(scope="session")
def weights():
    """Makes a rival's weights for STEPS integration steps."""

    times = sampler.integration_times(STEPS)

    @functools.partial(jax.jit, static_argnums=0)
    def prepared(config, params):
        return prepare.prepare(config, params, times, rival.OPTIONS)

    def make(config, params, extra=()):
        return rival.Weights(prepared(config, params), extra)

    return make


@pytest.fixture(scope="session")
def euler():
    """Integrates a velocity of (x_t (b 1 ah ad), t (b 1)) from noise in STEPS steps."""

    def integrate(velocity, noise):
        x_t, jitted = noise[:, None], jax.jit(velocity)
        for t in sampler.integration_times(STEPS):
            x_t = x_t - jitted(x_t, jnp.full((len(noise), 1), t)) / STEPS
        return x_t[:, 0]

    return integrate
