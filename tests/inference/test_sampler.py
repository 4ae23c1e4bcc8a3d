"""Sampling from a prefix cache equals integrating the velocity without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.inference import forward, prepare, sampler, tuning
from shallow_pi.models import layer_table, pi0

_sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps", "options"))
EVERYTHING = tuning.ALL_ON
NOTHING = tuning.ALL_OFF
CHOICES = {
    "all": EVERYTHING,
    "none": NOTHING,
    **{f"no {name}": dataclasses.replace(EVERYTHING, **{name: False}) for name in EVERYTHING.on},
    "joined": dataclasses.replace(EVERYTHING, step_buffers="joined"),
    "queries": dataclasses.replace(EVERYTHING, step_buffers="joined with queries"),
    "scanned queries": dataclasses.replace(NOTHING, step_buffers="joined with queries"),
}


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def setting(request, tiny_config, tiny_params, tiny_observation):
    """A model, an observation whose second camera is absent, noise, and Euler without a cache."""
    config = tiny_config(pi05=request.param, max_token_len=40)
    params, observation = tiny_params(config), tiny_observation(config)
    masks = {**observation.image_masks, config.cameras[1]: jnp.zeros(2, bool)}
    words = jnp.arange(40) < jnp.array([[19], [11]])
    observation = dataclasses.replace(observation, image_masks=masks, tokenized_prompt_mask=words)
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)
    return config, params, observation, noise, _euler(config, params, observation, noise)


def _euler(config, params, observation, noise):
    velocity = jax.jit(functools.partial(pi0.velocity, config))
    x_t = noise
    for t in (1.0, 0.5):
        v, _ = velocity(params, observation, x_t, jnp.full(2, t))
        x_t = x_t - 0.5 * v
    return x_t


def _assert_same(actions, setting):
    noise, expected = setting[3:]
    assert actions.dtype == jnp.float32
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(actions / scale, expected / scale, atol=1e-5)
    assert np.abs(actions - noise).max() > 0.1


@pytest.mark.parametrize("name", CHOICES)
def test_sampling_equals_euler_on_the_velocity_for_all_options(setting, name):
    config, params, observation, noise, _ = setting
    actions = _sample(config, params, observation, noise, num_steps=2, options=CHOICES[name])
    _assert_same(actions, setting)


@pytest.mark.parametrize("name", ["all", "none", "no fused"])
def test_halves_of_layers_that_are_cut_change_nothing_but_the_work(setting, name):
    """Their parameters may be anything; with zeros for them, whole layers give the same actions."""
    config, params, observation, noise, _ = setting
    cut = dataclasses.replace(
        config,
        backbone_layers=("whole", "whole", "keys_values"),
        expert_layers=("whole", "absent", "whole"),
    )
    given, options = (observation, noise), CHOICES[name]
    actions = _sample(cut, params, *given, num_steps=2, options=options)
    padded = layer_table.zero_cut(cut.layers, params)
    _assert_same(actions, (*setting[:4], _euler(cut, params, observation, noise)))
    whole = _sample(config, padded, *given, num_steps=2, options=options)
    np.testing.assert_allclose(actions, whole, atol=1e-4)


@pytest.mark.parametrize("field", ["pooled_tokens", "scored_tokens"])
def test_fewer_image_tokens_are_those_of_training(setting, field, tiny_params):
    config, params, observation, noise, _ = setting
    pooled = dataclasses.replace(config, **{field: 2})
    params = tiny_params(pooled)
    actions = _sample(pooled, params, observation, noise, num_steps=2)
    expected = _euler(pooled, params, observation, noise)
    _assert_same(actions, (*setting[:4], expected))
    small, trimmed = prepare.trim(pooled, observation)
    _assert_same(_sample(small, params, trimmed, noise, num_steps=2), (*setting[:4], expected))


def test_what_nobody_attends_to_can_be_dropped(setting):
    config, params, observation, noise, _ = setting
    small, trimmed = prepare.trim(config, observation)
    assert small.cameras == config.cameras[:1]
    assert small.max_token_len == 32  # 19 words in buckets of 16.
    assert trimmed.tokenized_prompt.shape == (2, 32)
    _assert_same(_sample(small, params, trimmed, noise, num_steps=2), setting)


def test_trimming_never_leaves_nothing_nor_more_than_there_was(setting):
    config, _, observation, *_ = setting
    absent = {name: jnp.zeros(2, bool) for name in config.cameras}
    everything = jnp.ones((2, 40), bool)
    small, _ = prepare.trim(
        config,
        dataclasses.replace(observation, image_masks=absent, tokenized_prompt_mask=everything),
    )
    assert (small.cameras, small.max_token_len) == (config.cameras[:1], 40)


def test_weights_prepared_once_serve_every_observation(setting):
    config, params, observation, noise, _ = setting
    times = sampler.integration_times(2)
    prepared = jax.jit(lambda p: prepare.prepare(config, p, times, EVERYTHING))(params)
    sample = jax.jit(sampler.sample_prepared, static_argnames=("config", "num_steps", "options"))
    actions = sample(config, prepared, observation, noise, num_steps=2, options=EVERYTHING)
    _assert_same(actions, setting)


def test_what_the_last_layer_makes_of_the_prefix_is_never_computed(setting):
    """Its MLP may be as wide as it likes."""
    config, params, observation, *_ = setting
    prepared = prepare.prepare(config, params, sampler.integration_times(2), EVERYTHING)

    def flops(widened):
        wide = list(prepared.prefix)
        for i in widened:
            gate_up = (jnp.tile(wide[i].gate_up[0], 3),)
            wide[i] = wide[i]._replace(gate_up=gate_up, down=jnp.tile(wide[i].down, (3, 1)))
        run = jax.jit(functools.partial(forward.prefill, config))
        compiled = run.lower(prepared._replace(prefix=wide), observation).compile()
        analysis = compiled.cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    assert flops([config.depth - 1]) == flops([])
    assert flops([0]) > flops([])


@pytest.mark.parametrize("num_steps", [1, 3, 10, 64])
def test_times_are_those_of_openpi_s_loop(num_steps):
    """openpi continues while t >= -dt/2, in float32."""
    dt, t, times = np.float32(-1.0 / num_steps), np.float32(1.0), []
    while t >= -dt / 2:
        times.append(t)
        t = t + dt
    assert sampler.integration_times(num_steps).dtype == np.float32
    np.testing.assert_array_equal(sampler.integration_times(num_steps), times)


def test_no_steps_raise():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        sampler.integration_times(0)
