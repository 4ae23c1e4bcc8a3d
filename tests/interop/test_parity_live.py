"""openpi and our code on the same parameters and inputs, both computed here and now."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import parity
import pytest
import record_parity
import theirs

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map
from shallow_pi.interop import openpi as interop
from shallow_pi.models import pi0
from shallow_pi.speed import inference


@pytest.fixture(scope="module", params=parity.MODELS)
def case(request):
    config = parity.MODELS[request.param]
    return request.param, config, theirs.results(config)


def test_embeddings_tower_loss_and_actions_are_openpis(case):
    _, config, expected = case
    found = parity.ours(config)
    assert set(found) == set(expected)
    parity.compare(config, found, expected)


def test_the_recorded_numbers_are_openpis(case):
    name, _, found = case
    with np.load(record_parity.RECORDED) as file:
        recorded = {path: file[path] for path in file if path.startswith(name)}
    assert {f"{name}/{what}" for what in found} == set(recorded)
    # The machine's own rounding apart.
    tolerance = 2e-2 if name.endswith("bfloat16") else 1e-5
    for what, value in found.items():
        expected = recorded[f"{name}/{what}"]
        apart = np.abs(value - expected).max() / np.abs(expected).max()
        assert apart <= tolerance, f"{what}: run record_parity.py again if the inputs changed"


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_the_parameter_trees_are_the_same_at_any_depth(pi05):
    for depth in (1, 6, 18):
        config = parity.model(pi05, depth, "bfloat16")
        ours = weights.leaves(pi0.abstract_params(config))
        assert theirs.shapes(config) == {path: leaf.shape for path, leaf in ours.items()}


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_a_student_padded_with_zero_layers_is_the_student(pi05):
    """Bit for bit where rounding is coarse; `test_checkpoints` compares in float32 with ours."""
    layers = layer_map.uniform(6, 18).layers
    config = parity.model(pi05, 6, "bfloat16")
    params = theirs.in_dtype(parity.own_params(config), "bfloat16")
    deep = theirs.model(pi0.at_depth(config, 18), theirs.padded(params, layers))
    samples = parity.batch(config)
    shallow = theirs.sample(theirs.model(config, params), samples)
    np.testing.assert_array_equal(theirs.sample(deep, samples), shallow)


def test_the_benchmark_times_openpis_sampler_on_the_same_model():
    """Two cameras: openpi encodes the third one too, which is black and masked."""
    config = parity.model(True, 2, "float32")
    config = dataclasses.replace(config, cameras=config.cameras[:2])
    found = inference.measure(
        config, num_steps=2, repeats=1, ablate=False, others={"openpi": interop.sampler}
    )
    assert found.others_ms["openpi"] > 0
    assert found.others_difference < 1e-4
    assert jnp.isfinite(found.others_difference)
