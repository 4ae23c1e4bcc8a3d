"""The image encoder for inference computes what the one for training does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.inference import image_tower
from shallow_pi.models import siglip

CONFIG = siglip.SiglipConfig(width=24, depth=3, mlp_dim=40, num_heads=3, patch_size=4)


@pytest.fixture(scope="module")
def setting():
    module = siglip.Module(CONFIG, out_width=10, dtype=jnp.float32)
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.uniform(-1, 1, (2, 12, 8, 3)), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * generator.standard_normal(x.shape), jnp.float32), params
    )
    return params, images, jax.jit(module.apply)({"params": params}, images)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unrolled", [True, False])
def test_tokens_are_those_of_training(setting, strict, fused, unrolled):
    params, images, expected = setting
    tower = image_tower.prepare(CONFIG, params, jnp.float32, fused=fused, unrolled=unrolled)
    found = jax.jit(functools.partial(image_tower.encode, CONFIG))(tower, images)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_zeros_that_widen_the_mlp_change_nothing(setting):
    params, images, expected = setting
    tower = image_tower.prepare(
        CONFIG, params, jnp.float32, fused=True, unrolled=True, multiple=image_tower.WIDE
    )
    assert tower.layers[0].up[0].shape == (24, 128)
    assert tower.layers[0].down[0].shape == (128, 24)
    found = jax.jit(functools.partial(image_tower.encode, CONFIG))(tower, images)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_the_compute_dtype_is_that_of_the_tokens(setting):
    params, images, expected = setting
    tower = image_tower.prepare(CONFIG, params, jnp.bfloat16, fused=True, unrolled=True)
    found = image_tower.encode(CONFIG, tower, images)
    assert found.dtype == jnp.bfloat16
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found.astype(jnp.float32) / scale, expected / scale, atol=3e-2)
