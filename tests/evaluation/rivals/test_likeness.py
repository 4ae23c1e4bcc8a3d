"""Similarity and sensitivity along the teacher's own denoising path, and their pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import flow, layer_scores
from shallow_pi.evaluation.rivals import likeness, rival
from shallow_pi.inference import sampler


@pytest.fixture(scope="module")
def found(own, params, tiny_batch):
    batch = tiny_batch(own.model, 2)
    return batch, likeness.measure(rival.Material(own, params, lambda: iter([batch])), num_steps=3)


def test_layers_are_measured_where_the_sampler_passes(found, own, params):
    batch, measured = found
    observation = jax.tree.map(jnp.asarray, batch.observation).as_float()
    noise = flow.sample_noise(jax.random.key(0), batch.actions.shape)
    np.testing.assert_allclose(measured.times, sampler.integration_times(3))
    t = jnp.ones(2)
    start = layer_scores.cosines(own.model, params, observation, noise, t)
    np.testing.assert_allclose(measured.expert[0], start.expert, atol=1e-5)
    np.testing.assert_allclose(measured.backbone, start.backbone, atol=1e-5)
    missed = layer_scores.sensitivity(own.model, params, observation, noise, t)
    np.testing.assert_allclose(measured.sensitivity[0], missed, rtol=1e-3, atol=1e-6)
    assert np.abs(measured.expert[2] - measured.expert[0]).max() > 1e-4
    again = likeness.from_json(measured.to_json())
    np.testing.assert_allclose(again.expert, measured.expert, atol=1e-6)


def test_the_rank_correlation_is_minus_one_where_alike_layers_are_not_missed():
    expert, missed = np.array([[0.9, 0.5, 0.7]]), np.array([[1.0, 9.0, 2.0]])
    made = likeness.Likeness(np.ones(1), np.ones(3), expert, missed)
    assert made.rank_correlation == pytest.approx(-1)


def test_pictures_are_drawn(found, tmp_path):
    _, measured = found
    likeness.heat_map(tmp_path / "heat.png", measured)
    likeness.scatter(tmp_path / "scatter.png", measured)
    likeness.dropped(tmp_path / "dropped.png", {"oracle": {0: (0.9, 0.8, 1.0), 1: (0.5, 0.4, 0.6)}})
    assert {path.name for path in tmp_path.iterdir()} == {"heat.png", "scatter.png", "dropped.png"}
