"""The image encoder against a transformer in NumPy."""

import functools
import re
import types

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.models import layers, siglip

CONFIG = siglip.SiglipConfig(width=12, depth=2, mlp_dim=20, num_heads=3, patch_size=4)


def _module(**changes):
    settings = {"out_width": 10, "dtype": jnp.dtype("float32")} | changes
    return siglip.Module(CONFIG, **settings)


@functools.partial(jax.jit, static_argnames="module")
def _run(module, params, images):
    return module.apply({"params": params}, images)


def _images(b=2):
    return np.random.default_rng(0).uniform(-1, 1, (b, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(_module().init, jax.random.key(0), _images())["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.3 * generator.standard_normal(x.shape)), shapes)


def test_tokens_are_those_of_the_encoder_in_float64(params):
    tokens = _run(_module(), params, _images())
    assert tokens.shape == (2, 4, 10)
    wide = float64.wide({"PaliGemma": {"img": params}})
    model = types.SimpleNamespace(image=CONFIG, grid=2)
    expected = float64.tower(model, wide, _images()[:, None])
    np.testing.assert_allclose(tokens, expected[:, 0], atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other(params):
    images = _images()
    both = _run(_module(), params, images)
    alone = _run(_module(), params, images[1:])
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)


def test_remat_changes_neither_tokens_nor_gradient(params):
    def loss(params, remat):
        module = _module(execution=layers.Execution(remat))
        return jnp.sum(_run(module, params, _images()) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(params, "none")
    for remat in ("layers", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            plain,
            gradient(params, remat),
        )
        traced = str(jax.make_jaxpr(lambda p, r=remat: jax.grad(loss)(p, r))(params))
        assert re.search("remat|checkpoint", traced)


def test_bfloat16_is_close_to_float32(params):
    tokens = _run(_module(dtype=jnp.dtype("bfloat16")), params, _images())
    assert tokens.dtype == jnp.bfloat16
    expected = _run(_module(), params, _images())
    error = jnp.linalg.norm(tokens.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 2e-2
