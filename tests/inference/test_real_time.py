"""Guidance towards the previous chunk: its formula, its exact cases, and both models under it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.inference import forward, real_time, sampler, tuning

_sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps", "options"))
HORIZON = 5


def make(previous, delay, executed, max_weight=real_time.MAX_WEIGHT):
    b = len(previous)
    return real_time.Guidance(
        previous=jnp.asarray(previous, jnp.float32),
        delay=jnp.full(b, delay, jnp.int32),
        executed=jnp.full(b, executed, jnp.int32),
        max_weight=jnp.float32(max_weight),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def setting(request, tiny_config, tiny_params, tiny_observation):
    """A model, its parameters, two observations, noise, and an arbitrary previous chunk."""
    config = tiny_config(pi05=request.param)
    shape = (2, config.action_horizon, config.action_dim)
    generator = np.random.default_rng(0)
    noise, previous = generator.standard_normal((2, *shape)).astype(np.float32)
    return config, tiny_params(config), tiny_observation(config), noise, previous


def sample(setting, guidance, **options):
    config, params, observation, noise, _ = setting
    return _sample(config, params, observation, noise, num_steps=3, guidance=guidance, **options)


def test_the_mask_is_the_papers():
    """Equation 5, term by term; a delay of everything that is left has no ramp."""
    horizon, cases = 8, [(2, 3), (0, 4), (5, 3), (0, 8), (1, 1)]
    delays, executed = jnp.array(cases).T
    found = real_time.soft_mask(delays, executed, horizon)
    expected = np.zeros((len(cases), horizon))
    for row, (d, s) in enumerate(cases):
        for i in range(horizon):
            c = (horizon - s - i) / (horizon - s - d + 1)
            ramp = c * (np.exp(c) - 1) / (np.e - 1)
            expected[row, i] = 1 if i < d else ramp if i < horizon - s else 0
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == jnp.float32


@pytest.mark.parametrize("t", [0.1, 0.4, 0.9])
def test_standard_normal_actions_are_guided_exactly_onto_the_path_to_the_previous_chunk(t, strict):
    """Their velocity is (x − E[a | x]) / t with E[a | x] = (1 − t) x / ((1 − t)² + t²)."""
    x, y = np.random.default_rng(1).standard_normal((2, 3, HORIZON, 2)).astype(np.float32)
    t = jnp.float32(t)

    def velocity(x_t):
        return (x_t - (1 - t) * x_t / ((1 - t) ** 2 + t**2)) / t

    guidance = make(y, delay=HORIZON, executed=0, max_weight=1e6)
    found = real_time.guided(velocity, x, t, guidance)
    np.testing.assert_allclose(found, (x - y) / t, rtol=2e-5, atol=1e-5)


def test_the_correction_is_the_gradient_of_the_weighted_error_of_the_estimate():
    """By finite differences, for correlated actions, at a weight that β bounds."""
    generator = np.random.default_rng(2)
    x, y = generator.standard_normal((2, 1, HORIZON, 2))
    mixing = 0.3 * generator.standard_normal((2 * HORIZON, 2 * HORIZON))
    t, beta, d, s = 0.6, 0.7, 1, 2

    def velocity(x_t):
        return jnp.tanh(x_t.reshape(1, -1) @ mixing).reshape(x_t.shape)

    with jax.enable_x64() if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        mask = np.asarray(real_time.soft_mask(jnp.array([d]), jnp.array([s]), HORIZON))[..., None]

        def agreement(x_t):
            return float(-0.5 * np.sum(mask * (y - (x_t - t * np.asarray(velocity(x_t)))) ** 2))

        slope, h = np.zeros_like(x), 1e-5
        for index in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[index] = h
            slope[index] = (agreement(x + step) - agreement(x - step)) / (2 * h)
        guidance = make(y, d, s, beta)._replace(previous=jnp.asarray(y))
        found = real_time.guided(velocity, jnp.asarray(x), jnp.asarray(t), guidance)
        expected = np.asarray(velocity(jnp.asarray(x))) - beta * slope
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_weight_is_bounded_at_noise_and_the_papers_below():
    beta = jnp.float32(5)
    assert real_time.guidance_weight(jnp.float32(1), beta) == 5
    for t in (0.9, 0.5, 0.1):
        tau = 1 - t
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        found = real_time.guidance_weight(jnp.float32(t), jnp.float32(1e6))
        assert found == pytest.approx((1 - tau) / (tau * r2), rel=1e-5)


def test_no_weight_or_nothing_left_is_plain_sampling(setting):
    previous, plain = setting[-1], sample(setting, None)
    off = sample(setting, make(previous, delay=2, executed=1, max_weight=0))
    np.testing.assert_allclose(off, plain, atol=1e-6)
    used_up = sample(setting, make(previous, delay=0, executed=HORIZON))
    np.testing.assert_allclose(used_up, plain, atol=1e-6)


def test_guided_chunks_agree_with_the_previous_one_most_where_it_is_frozen(setting):
    previous = setting[-1]
    d, s = 2, 1
    plain = sample(setting, None)
    found = sample(setting, make(previous, d, s))
    before, after = (np.abs(chunk - previous).mean((0, 2)) for chunk in (plain, found))
    assert (after[: HORIZON - s] < before[: HORIZON - s]).all()
    assert after[:d].sum() < 0.5 * before[:d].sum()


@pytest.mark.parametrize("num_steps", [1, 2])
def test_guidance_of_few_steps_does_not_go_beyond_the_previous_chunk(num_steps):
    """Of a policy that maps noise to itself and says so at every time, as reflow teaches it."""
    noise, previous = np.random.default_rng(3).standard_normal((2, 1, HORIZON, 2))
    guidance = real_time.for_steps(make(previous, delay=HORIZON, executed=0), num_steps)
    x = jnp.asarray(noise, jnp.float32)
    for t in sampler.integration_times(num_steps):
        x -= real_time.guided(jnp.zeros_like, x, jnp.float32(t), guidance) / num_steps
    np.testing.assert_allclose(x, previous, atol=1e-5)


def test_many_steps_keep_the_given_weight():
    guidance = make(np.zeros((1, HORIZON, 2)), delay=0, executed=0)
    assert real_time.for_steps(guidance, 10).max_weight == real_time.MAX_WEIGHT
    assert real_time.for_steps(guidance, 2).max_weight == 2


def test_what_lies_behind_the_previous_chunk_is_not_looked_at(setting):
    previous = setting[-1]
    other = previous.copy()
    other[:, -2:] = 1e3
    found = sample(setting, make(previous, delay=1, executed=2))
    np.testing.assert_array_equal(found, sample(setting, make(other, delay=1, executed=2)))


def test_every_observation_of_a_batch_has_its_own_previous_chunk(setting):
    """The first is guided, the second has nothing left: it is sampled as if alone."""
    guidance = make(setting[-1], delay=2, executed=1)
    mixed = guidance._replace(
        delay=jnp.array([2, 0], jnp.int32), executed=jnp.array([1, HORIZON], jnp.int32)
    )
    found = sample(setting, mixed)
    np.testing.assert_allclose(found[0], sample(setting, guidance)[0], atol=1e-5)
    np.testing.assert_allclose(found[1], sample(setting, None)[1], atol=1e-5)


def test_loops_and_written_out_steps_are_the_same_function(setting):
    guidance = make(setting[-1], delay=2, executed=1)
    loops = sample(setting, guidance)
    scale = float(np.abs(loops).max())
    unrolled = sample(setting, guidance, options=tuning.ALL_ON)
    np.testing.assert_allclose(loops / scale, unrolled / scale, atol=2e-5)


def test_one_program_serves_every_delay_and_runs_the_prefix_once(setting, monkeypatch):
    config, params, observation, noise, previous = setting
    traced = []
    prefill = forward.prefill

    def counted(*arguments):
        traced.append(1)
        return prefill(*arguments)

    monkeypatch.setattr(forward, "prefill", counted)
    sampling = functools.partial(
        sampler.sample_actions, config, num_steps=2, options=tuning.SCANNED
    )
    run = jax.jit(lambda guidance: sampling(params, observation, noise, guidance=guidance))
    found = [
        run(make(previous, delay, executed, weight))
        for delay, executed, weight in ((0, 1, 5), (2, 1, 5), (2, 3, 1))
    ]
    assert len(traced) == 1
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(found))
