"""A step folder alone is a policy: robot observations in, that robot's actions out."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from shallow_pi.deploy import policy
from shallow_pi.models import observation as observations
from shallow_pi.models import sampler, weights

PROMPTS = ("touch the red block", "touch the blue block")


@pytest.fixture(scope="module")
def step(own, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "7"
    weights.save_params(folder / "params", params)
    own.save(folder / "assets")
    return folder


@pytest.fixture(scope="module")
def deployed(step):
    return policy.Policy.from_checkpoint(step, num_steps=3)


@pytest.fixture(scope="module")
def scene():
    """Two observations and their noise."""
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (2, 2, 24, 24, 3), np.uint8)
    found = [
        {
            "observation.images.base": pictures[i, 0],
            "observation.images.wrist": pictures[i, 1],
            "observation.state": generator.standard_normal(3).astype(np.float32),
            "task": PROMPTS[i],
        }
        for i in range(2)
    ]
    return found, generator.standard_normal((2, 5, 6)).astype(np.float32)


def test_a_step_folder_gives_the_actions_of_the_parameters_in_memory(own, params, deployed, scene):
    actions = deployed.infer(*scene)
    assert actions.shape == (2, 5, 3)
    in_memory = policy.Policy(own, params, num_steps=3)
    np.testing.assert_allclose(actions, in_memory.infer(*scene), atol=1e-6)


def test_actions_are_the_samplers_in_the_robots_units(own, params, deployed, scene):
    """Unnormalized by hand, plus the state the deltas were predicted from."""
    found, noise = scene
    samples = [own.inputs()(dict(o)) for o in found]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *samples)
    batch = observations.Observation.from_batch(batch)
    sample = functools.partial(sampler.sample_actions, own.model, num_steps=3)
    normalized = jax.jit(sample)(params, batch, noise)
    stats = own.stats["actions"]
    state = np.stack([o["observation.state"] for o in found])
    expected = np.asarray(normalized)[..., :3] * (stats.std + 1e-6) + stats.mean + state[:, None]
    np.testing.assert_allclose(deployed.infer(*scene), expected, atol=1e-4)


def test_the_same_noise_gives_the_same_actions_and_another_does_not(deployed, scene):
    found, noise = scene
    np.testing.assert_array_equal(deployed.infer(found, noise), deployed.infer(found, noise))
    assert np.abs(deployed.infer(found, noise) - deployed.infer(found, -noise)).max() > 1e-3


def test_the_observations_of_a_batch_do_not_touch_each_other(deployed, scene):
    found, noise = scene
    both = deployed.infer(found, noise)
    swapped = deployed.infer(found[::-1], noise[::-1])
    np.testing.assert_allclose(both, swapped[::-1], atol=1e-5)


@pytest.mark.parametrize("key", ["observation.images.wrist", "observation.state", "task"])
def test_everything_observed_matters(deployed, scene, key):
    (first, second), noise = scene
    changed = deployed.infer([{**first, key: second[key]}, second], noise)
    assert np.abs(changed[0] - deployed.infer([first, second], noise)[0]).max() > 1e-5


def test_parameters_are_read_in_the_models_compute_dtype(own, params, scene, tmp_path):
    model = dataclasses.replace(own.model, dtype="bfloat16")
    weights.save_params(tmp_path / "params", params)
    dataclasses.replace(own, model=model).save(tmp_path / "assets")
    read = policy.Policy.from_checkpoint(tmp_path)
    read.infer(*scene)
    assert {leaf.dtype for leaf in jax.tree.leaves(read.weights.params)} == {
        jax.numpy.dtype("bfloat16")
    }


def test_noise_of_another_shape_is_an_error(deployed, scene):
    found, noise = scene
    for bad in (noise[:1], noise[:, :4], noise[..., :3]):
        with pytest.raises(ValueError, match=r"noise must have shape \(2, 5, 6\) for 2 observ"):
            deployed.infer(found, bad)


def test_an_observation_without_a_camera_names_it(deployed, scene):
    found, noise = scene
    del (first := dict(found[0]))["observation.images.wrist"]
    with pytest.raises(ValueError, match=r"lacks camera 'observation\.images\.wrist'"):
        deployed.infer([first], noise[:1])


def test_no_integration_steps_are_an_error(step):
    with pytest.raises(ValueError, match="num_steps"):
        policy.Policy.from_checkpoint(step, num_steps=0)


def test_parameters_of_another_model_name_their_paths(own, params, tmp_path):
    weights.save_params(tmp_path / "params", params)
    dataclasses.replace(own, model=dataclasses.replace(own.model, depth=3)).save(
        tmp_path / "assets"
    )
    with pytest.raises(ValueError, match=r"policy .*\n(.*\n)*.*mlp/linear: expected \(3, 40, 24\)"):
        policy.Policy.from_checkpoint(tmp_path)


def test_a_folder_that_is_no_step_says_what_is_expected(step):
    with pytest.raises(FileNotFoundError, match=r"no shallow_pi\.json .*<exp>/<step>"):
        policy.Policy.from_checkpoint(step.parent)
    with pytest.raises(FileNotFoundError, match=r"no shallow_pi\.json"):
        policy.Policy.from_checkpoint(step / "absent")
