"""Merged adapters do what openpi's two-step einsums do; what cannot be merged is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import lora

LAYERS = "PaliGemma/llm/layers/"


def _normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


# openpi's equations for an adapter, written out (models/lora.py makes them from the projection's).
@pytest.mark.parametrize(
    ("path", "shape", "plain", "first", "second"),
    [
        ("attn/q_einsum/w", (4, 6, 8), "btd,ndh->btnh", "btd,ndl->btnl", "btnl,nlh->btnh"),
        ("attn/kv_einsum_1/w", (2, 1, 6, 8), "bd,ckdh->cbkh", "bd,ckdl->cbkl", "cbkl,cklh->cbkh"),
        ("attn/attn_vec_einsum/w", (4, 8, 6), "btnh,nhd->btd", "btnh,nhl->btl", "btl,nld->btd"),
        ("mlp/gating_einsum", (2, 6, 10), "btd,cdf->cbtf", "btd,cdl->cbtl", "cbtl,clf->cbtf"),
        ("mlp_1/linear", (10, 6), "btf,fd->btd", "btf,fl->btl", "btl,ld->btd"),
    ],
)  # fmt: skip
def test_a_merged_matrix_acts_as_matrix_and_adapter(path, shape, plain, first, second):
    depth, rank = 3, 4
    w = _normal(depth, *shape)
    a, b = _normal(depth, *shape[:-1], rank), _normal(depth, *shape[:-2], rank, shape[-1])
    sizes = dict(zip(plain.partition(",")[2].partition("->")[0], shape, strict=True))
    x = _normal(*(sizes.get(letter, 2) for letter in plain.partition(",")[0]))
    merged = lora.merge(LAYERS + path, jnp.asarray(w), jnp.asarray(a), jnp.asarray(b))
    assert merged.shape == w.shape
    for layer in range(depth):
        adapted = np.einsum(second, np.einsum(first, x, a[layer]), b[layer])
        expected = np.einsum(plain, x, w[layer]) + adapted
        actual = np.einsum(plain, x, np.asarray(merged[layer]))
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def _leaves(rank, suffix="", *names):
    w = f"{LAYERS}attn/q_einsum{suffix}/w"
    leaves = {w: np.zeros((3, 4, 6, 8)), f"{LAYERS}mlp{suffix}/linear": np.zeros((3, 10, 6))}
    factors = {
        "attn/q_einsum{}/lora_a": (3, 4, 6, rank),
        "attn/q_einsum{}/lora_b": (3, 4, rank, 8),
        "mlp{}/linear_lora_a": (3, 10, rank),
        "mlp{}/linear_lora_b": (3, rank, 6),
    }
    return leaves | {LAYERS + k.format(suffix): np.zeros(v) for k, v in factors.items()}


@pytest.mark.parametrize(("suffix", "rank"), [("", 16), ("_1", 32)])
def test_each_matrix_finds_its_factors(suffix, rank):
    q, mlp = f"{LAYERS}attn/q_einsum{suffix}", f"{LAYERS}mlp{suffix}/linear"
    assert lora.adapters(_leaves(rank, suffix)) == {
        f"{q}/w": (f"{q}/lora_a", f"{q}/lora_b"),
        mlp: (f"{mlp}_lora_a", f"{mlp}_lora_b"),
    }
    assert lora.adapters({"action_in_proj/kernel": np.zeros((2, 2))}) == {}


def test_only_factors_are_adapters():
    assert lora.is_adapter(f"{LAYERS}attn/q_einsum/lora_a")
    assert lora.is_adapter(f"{LAYERS}mlp_1/gating_einsum_lora_b")
    assert not lora.is_adapter(f"{LAYERS}attn/q_einsum/w")


@pytest.mark.parametrize(("suffix", "rank"), [("", 32), ("_1", 16), ("", 8)])
def test_a_rank_of_no_variant_is_refused_because_its_scale_is_unknown(suffix, rank):
    with pytest.raises(
        ValueError, match=rf"rank {rank}, not openpi's .*alpha is not in the checkpoint"
    ):
        lora.adapters(_leaves(rank, suffix))


@pytest.mark.parametrize("lost", ["attn/q_einsum/w", "attn/q_einsum/lora_b", "mlp/linear"])
def test_a_lost_matrix_or_factor_is_named(lost):
    leaves = _leaves(16)
    del leaves[LAYERS + lost]
    with pytest.raises(ValueError, match=r"lacks \[.*(q_einsum|linear).*two factors"):
        lora.adapters(leaves)
