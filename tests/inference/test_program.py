"""A buffer of bytes holds an observation, and its program computes what the sampler does."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from shallow_pi.inference import prepare, program, real_time, sampler, tuning
from shallow_pi.models import batch as batches


def noise_of(config, b):
    shape = (b, config.action_horizon, config.action_dim)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def observe(config, b):
    """Random observations with a masked camera and a masked prompt token in the first."""
    observation = batches.noise(config, b).observation
    observation.image_masks[config.cameras[0]][0] = False
    observation.tokenized_prompt_mask[0, -1] = False
    return observation


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_a_buffer_holds_what_was_packed(tiny_config):
    config = tiny_config()
    observation, noise = observe(config, 2), noise_of(config, 2)
    guidance = real_time.make_guidance(noise, lengths=[1, 2], delays=[1, 1], max_weight=2.0)
    layout = program.Layout(config, guided=True)
    packed = program.pack(layout, observation, noise, guidance)
    assert packed.shape == (2, layout.dtype.itemsize)
    found = jax.jit(program.unpack, static_argnums=0)(layout, packed)
    observation.tokenized_prompt[0, -1] = 0  # A masked token is not kept.
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, found[0], observation.as_float())
    np.testing.assert_array_equal(found[1], noise)
    jax.tree.map(np.testing.assert_array_equal, found[2], guidance)


def test_noise_is_drawn_from_the_seed_and_the_call(tiny_config):
    config = tiny_config()
    layout, key = program.Layout(config), jax.random.key(3)
    seed = program.Seed(np.asarray(jax.random.key_data(key)), 7)
    _, noise, _ = program.unpack(layout, program.pack(layout, observe(config, 1), seed))
    shape = (1, config.action_horizon, config.action_dim)
    expected = jax.random.normal(jax.random.fold_in(key, 7), shape)
    np.testing.assert_allclose(noise, expected, rtol=1e-6)


@pytest.mark.parametrize("options", [tuning.SCANNED, tuning.ALL_ON])
@pytest.mark.parametrize("pi05", [False, True])
def test_actions_are_the_samplers(tiny_config, tiny_params, options, pi05):
    config = tiny_config(pi05=pi05)
    params, observation, noise = tiny_params(config), observe(config, 2), noise_of(config, 2)
    run = program.Program.create(config, params, 2, options)
    layout = program.Layout(config)
    found = run(layout, program.pack(layout, observation, noise))
    sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps"))
    expected = sample(config, params, observation.as_float(), noise, num_steps=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_come_back_from_few_arguments(tiny_config, tiny_params):
    """Every vector is in one argument; matrices are separate arguments, uncopied."""
    config = tiny_config(pi05=True)
    params, times = tiny_params(config), sampler.integration_times(2)
    prepared = prepare.prepare(config, params, times, tuning.ALL_ON)
    run = program.Program.create(config, params, 2, tuning.ALL_ON)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), run.weights, prepared)
    assert [vector.ndim for vector in run.arrays.vectors] == [1]
    assert min(leaf.ndim for leaf in run.arrays.others) > 1
    vectors = sum(leaf.ndim == 1 for leaf in jax.tree.leaves(prepared))
    assert len(jax.tree.leaves(run.arrays)) == len(jax.tree.leaves(prepared)) - vectors + 1


def test_tables_stand_in_for_the_weights_of_time(tiny_config, tiny_params):
    """π0.5's: they are in no argument of the program, and actions are the same to the bit."""
    config = tiny_config(pi05=True)
    params, observation, noise = tiny_params(config), observe(config, 2), noise_of(config, 2)
    timed = prepare.time_weights(config, params)
    run = program.Program.create(config, params, 2, tuning.ALL_ON)
    whole = run.weights._replace(params={**run.weights.params, **timed})
    sample = jax.jit(sampler.sample_prepared, static_argnames=("config", "num_steps", "options"))
    found, expected = (
        sample(config, weights, observation.as_float(), noise, num_steps=2, options=tuning.ALL_ON)
        for weights in (run.weights, whole)
    )
    np.testing.assert_array_equal(found, expected)
    computed = dataclasses.replace(tuning.ALL_ON, time_tables=False)
    without = program.Program.create(config, params, 2, computed)
    saved = nbytes(timed) - nbytes(run.weights.tables)
    assert nbytes(run.arrays) == nbytes(without.arrays) - saved
    layer = config.expert.width * 3 * (config.expert.width + 1)
    besides = layer + 2 * config.expert.width * (config.expert.width + 1)
    assert nbytes(timed) == 4 * (2 * config.depth * layer + besides)


def test_images_that_are_not_the_models_are_an_error(tiny_config):
    config = tiny_config()
    observation = batches.noise(config, 1).observation
    layout, name = program.Layout(config), config.cameras[0]
    for bad in (observation.as_float().images[name], observation.images[name][:, :-1]):
        wrong = observation.replace(images={**observation.images, name: bad})
        with pytest.raises(ValueError, match=f"images of {name} must be uint8"):
            program.pack(layout, wrong, noise_of(config, 1))
