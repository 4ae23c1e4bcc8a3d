"""One description of a batch: zeros, noise and stacked samples fit it, on the host and pickled."""

import pickle

import jax
import numpy as np
import pytest

from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations


def test_spec_is_that_of_the_loaders_batches(tiny_config):
    """Written out once, for two observations."""

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((2, *shape), dtype)

    cameras = ("base_0_rgb", "left_wrist_0_rgb")
    assert batches.spec(tiny_config(), 2) == batches.Batch(
        observation=observations.Observation(
            images={name: array(np.uint8, 24, 24, 3) for name in cameras},
            image_masks={name: array(np.bool_) for name in cameras},
            state=array(np.float32, 6),
            tokenized_prompt=array(np.int32, 7),
            tokenized_prompt_mask=array(np.bool_, 7),
        ),
        actions=array(np.float32, 5, 6),
        action_mask=array(np.bool_, 5),
    )


@pytest.mark.parametrize("make", [batches.zeros, batches.noise])
def test_synthetic_batches_fit_the_spec_and_mask_nothing(make, tiny_config):
    config = tiny_config()
    batch = make(config, 3)
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    assert found == batches.spec(config, 3)
    observation = batch.observation
    for mask in (*observation.image_masks.values(), observation.tokenized_prompt_mask):
        assert mask.all()
    assert batch.action_mask.all()
    assert observation.tokenized_prompt.max() < config.vocab_size


def test_samples_stack_to_the_batch_they_come_from(tiny_config):
    batch = batches.noise(tiny_config(), 3)
    samples = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(3)]
    jax.tree.map(np.testing.assert_array_equal, batches.stack(samples), batch)
    jax.tree.map(np.testing.assert_array_equal, pickle.loads(pickle.dumps(batch)), batch)
