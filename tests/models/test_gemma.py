"""The two-expert tower: its masks, its scan, its gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.models import captures, gemma, layers

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
CONFIGS = (
    gemma.GemmaConfig(width=24, mlp_dim=40, **SIZES),
    gemma.GemmaConfig(width=16, mlp_dim=28, **SIZES),
)
DEPTH, ROWS = 3, 3
VALID = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], bool)


def _module(remat="none"):
    return gemma.Module(CONFIGS, DEPTH, 8, jnp.dtype("float32"), layers.Execution(remat))


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("module", "asked", "hidden"))
def _run(module, params, prefix, suffix, geometry, **static):
    return module.apply({"params": params}, prefix, suffix, geometry, **static)


def _inputs(pi05):
    """Prefix of 5, suffix of 3 actions (π0.5) or a state token and 3 actions; two draws."""
    t = ROWS if pi05 else ROWS + 1
    prefix, suffix = jnp.asarray(_normal(2, 5, 24)), jnp.asarray(_normal(2, 2, t, 16, seed=1))
    condition = jnp.asarray(_normal(2, 2, 16, seed=2)) if pi05 else None
    return prefix, suffix, gemma.Geometry.create(jnp.asarray(VALID), 8, t, ROWS, condition)


def _params(pi05):
    generator = np.random.default_rng(3)
    shapes = jax.eval_shape(_module().init, jax.random.key(0), *_inputs(pi05))["params"]
    return jax.tree.map(lambda x: jnp.asarray(0.2 * generator.standard_normal(x.shape)), shapes)


def test_the_state_sees_itself_and_actions_see_the_whole_suffix():
    np.testing.assert_array_equal(
        gemma.suffix_mask(4, 3), [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(gemma.suffix_mask(3, 3), np.ones((3, 3)))


def test_positions_count_the_valid_tokens_and_go_on_in_the_suffix(strict):
    """The angle of frequency 0 is the position itself."""
    geometry = gemma.Geometry.create(jnp.asarray(VALID), 8, 4, 3)
    prefix, suffix = (
        np.array([[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]]),
        np.array([[3, 4, 5, 6], [5, 6, 7, 8]]),
    )
    np.testing.assert_allclose(geometry.prefix_rope[0][:, :, 0, 0], np.sin(prefix), atol=1e-6)
    np.testing.assert_allclose(geometry.suffix_rope[1][:, 0, :, 0, 0], np.cos(suffix), atol=1e-6)


@pytest.mark.parametrize("pi05", [False, True])
def test_scan_equals_a_loop_over_the_layers(pi05):
    params, (prefix, suffix, geometry) = _params(pi05), _inputs(pi05)
    expected, hidden, *_ = _run(_module(), params, prefix, suffix, geometry, hidden=True)
    block = jax.jit(gemma.Block(CONFIGS, None, False, False, layers.DEFAULT_EXECUTION).apply)
    carry = (prefix, suffix, None)
    for i in range(DEPTH):
        np.testing.assert_allclose(hidden.prefix[i], carry[0], atol=1e-5)
        np.testing.assert_allclose(hidden.suffix[i], carry[1], atol=1e-5)
        one = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        carry, _ = block({"params": one}, carry, jnp.int32(i), geometry)
    np.testing.assert_allclose(hidden.suffix[DEPTH], carry[1], atol=1e-5)
    np.testing.assert_allclose(hidden.prefix[DEPTH], carry[0], atol=1e-5)
    normed, _ = gemma.norm(params["final_norm_1"], carry[1], geometry.condition)
    np.testing.assert_allclose(expected, normed, atol=1e-5)


def test_only_valid_prefix_tokens_are_attended_to():
    """Changing what a masked token holds changes no other token, in either stream."""
    params, (prefix, suffix, geometry) = _params(False), _inputs(False)

    def run(prefix):
        out, hidden, *_ = _run(_module(), params, prefix, suffix, geometry, hidden=True)
        return out, np.asarray(hidden.prefix[-1])

    out, tokens = run(prefix)
    changed, other = run(prefix.at[0, 1].set(9.0))
    np.testing.assert_array_equal(out, changed)
    np.testing.assert_array_equal(tokens[VALID], other[VALID])
    moved, _ = run(prefix.at[0, 2].set(9.0))
    assert np.abs(moved - out)[0].max() > 1e-3


def test_adaptive_norms_start_as_identity_residuals():
    """Fresh π0.5 gates are zero, so the expert's stream passes through every layer unchanged."""
    prefix, suffix, geometry = _inputs(True)
    params = jax.jit(_module().init)(jax.random.key(0), prefix, suffix, geometry)["params"]
    _, hidden, *_ = _run(_module(), params, prefix, suffix, geometry, hidden=True)
    np.testing.assert_array_equal(hidden.suffix, np.broadcast_to(suffix, (4, *suffix.shape)))
    assert np.abs(hidden.prefix[-1] - prefix).max() > 0.1


@pytest.mark.parametrize("layer", [0, 2])
def test_captured_attention_is_that_of_the_chosen_layer(layer):
    """The keys are the layer's own projection of the prefix that enters it."""
    params, (prefix, suffix, geometry) = _params(False), _inputs(False)
    _, hidden, capture, _ = _run(
        _module(),
        *(params, prefix, suffix, geometry),
        asked=captures.Asked(layer, ROWS, 2),
        hidden=True,
    )
    one = jax.tree.map(lambda x: x[layer], params["layers"])
    normed, _ = gemma.norm(one["pre_attention_norm"], hidden.prefix[layer], None)
    keys = jnp.einsum("bsd,kdh->bskh", normed, one["attn"]["kv_einsum"]["w"][0])
    keys = layers.apply_rope(keys, geometry.prefix_rope)
    np.testing.assert_allclose(capture.keys, keys, atol=1e-5)
    by_hand = np.einsum("brakgh,bskh->brkgas", capture.suffix_queries, capture.keys)
    by_hand = by_hand.reshape(2, 2, 4, ROWS, 5)
    found = capture.attention(jnp.asarray(VALID))
    np.testing.assert_allclose(found.logits, by_hand, atol=1e-5)
    # The last rows of the prefix: what the layer itself attends with.
    queries = jnp.einsum("btd,ndh->btnh", normed, one["attn"]["q_einsum"]["w"])
    queries, _ = layers.split_heads(queries, keys, geometry.prefix_rope)
    by_hand = np.einsum("bpkgh,bskh->bkgps", queries[:, -2:], capture.keys).reshape(2, 4, 2, 5)
    np.testing.assert_allclose(found.prefix_logits, by_hand, atol=1e-5)


def test_adaptive_norm_takes_scale_shift_and_gate_from_the_condition(strict):
    x, condition = _normal(2, 3, 8), _normal(2, 5, seed=1)
    dense = {"kernel": _normal(5, 24, seed=2), "bias": _normal(24, seed=3)}
    y, gate = gemma.norm({"Dense_0": dense}, jnp.asarray(x), jnp.asarray(condition))
    modulation = condition @ dense["kernel"] + dense["bias"]
    scale, shift = modulation[:, None, :8], modulation[:, None, 8:16]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(gate, modulation[:, None, 16:], atol=1e-5)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    params, inputs = _params(True), _inputs(True)

    def loss(params, remat):
        return jnp.sum(_run(_module(remat=remat), params, *inputs)[0] ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for remat in ("layers", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            gradient(params, "none"),
            gradient(params, remat),
        )


def test_remat_keeps_a_layers_input_its_products_or_everything():
    """Residuals from the forward to the backward pass, by the number of stacked arrays."""
    params, inputs = _params(True), _inputs(True)

    def kept(remat):
        module = _module(remat=remat)
        _, pullback = jax.vjp(lambda p: _run(module, p, *inputs)[0], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert kept("layers") < kept("dots") < kept("none")
