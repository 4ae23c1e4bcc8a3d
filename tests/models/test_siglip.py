"""The image encoder against a transformer written out in numpy."""

import functools
import re

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
    return np.random.default_rng(0).uniform(-1, 1, (b, 8, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(1)
    shapes = jax.eval_shape(_module().init, jax.random.key(0), _images())["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.3 * generator.standard_normal(x.shape)), shapes)


def _encode(p, images):
    def layer_norm(x, p, i=()):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * p["scale"][i] + p["bias"][i]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    b, h, w, _ = images.shape
    patches = images.reshape(b, h // 4, 4, w // 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    x = patches.reshape(b, -1, 48) @ p["embedding"]["kernel"].reshape(48, 12)
    x = x + p["embedding"]["bias"] + p["pos_embedding"]
    block = p["Transformer"]["encoderblock"]
    heads, mlp = block["MultiHeadDotProductAttention_0"], block["MlpBlock_0"]
    for i in range(CONFIG.depth):
        y = layer_norm(x, block["LayerNorm_0"], i)
        q, k, v = (
            np.einsum("bsd,dnh->bnsh", y, heads[name]["kernel"][i])
            + heads[name]["bias"][i][:, None]
            for name in ("query", "key", "value")
        )
        weights = np.exp(q @ k.transpose(0, 1, 3, 2) / np.sqrt(4))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        x = x + np.einsum("bnsh,nhd->bsd", mixed, heads["out"]["kernel"][i])
        x = x + heads["out"]["bias"][i]
        y = layer_norm(x, block["LayerNorm_1"], i)
        y = gelu(y @ mlp["Dense_0"]["kernel"][i] + mlp["Dense_0"]["bias"][i])
        x = x + y @ mlp["Dense_1"]["kernel"][i] + mlp["Dense_1"]["bias"][i]
    x = layer_norm(x, p["Transformer"]["encoder_norm"])
    return x @ p["head"]["kernel"] + p["head"]["bias"]


def test_tokens_are_those_of_the_encoder_written_out(params):
    tokens = _run(_module(), params, _images())
    assert tokens.shape == (2, 6, 10)
    np.testing.assert_allclose(tokens, _encode(params, _images()), atol=1e-4)


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
