"""π0 and π0.5: their parameters, their velocity against openpi's rules in NumPy, what sees what."""

import functools
import math

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.models import gemma, layers, pi0, siglip

BOTH = pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
# Small, for float32 knows the sine of 2π·t/0.004 only so well: 1e-4 at t = 1.
T = np.array([0.01, 0.02], np.float32)


@functools.partial(jax.jit, static_argnames=("config", "attention_layer"))
def _velocity(config, params, observation, x_t, t, attention_layer=None):
    return pi0.velocity(config, params, observation, x_t, t, attention_layer=attention_layer)


def _x_t(config, *lead):
    shape = (*lead, config.action_horizon, config.action_dim)
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def model(tiny_config, tiny_params, tiny_observation):
    """Config, parameters, observation; sample 0 lacks camera 1, both prompts end in padding."""

    @functools.cache
    def make(pi05):
        config = tiny_config(pi05=pi05)
        return config, tiny_params(config), tiny_observation(config)

    return make


def _by_hand(config, params, observation, x_t):
    """Velocity and logits of the same model in NumPy."""
    seen = float64.observed(config, observation)
    return float64.run(config, float64.wide(params), seen, np.float64(x_t), np.float64(T))


@pytest.mark.parametrize(
    ("pi05", "depth", "total"),
    [
        (False, 18, 3_238_048_528),
        (False, 6, 1_709_150_992),
        (True, 18, 3_353_433_872),
        (True, 6, 1_748_989_712),
    ],
)
def test_parameters_number_as_many_as_openpi_s(pi05, depth, total):
    shapes = jax.tree.leaves(pi0.abstract_params(pi0.Pi0Config(pi05=pi05, depth=depth)))
    assert sum(math.prod(leaf.shape) for leaf in shapes) == total


def _bias(path, kernel, bias):
    return {f"{path}/kernel": kernel, f"{path}/bias": bias}


@BOTH
def test_parameter_paths_and_shapes_are_openpi_s(pi05):
    """openpi's tree, written out for depth 6; the expert's leaves end in _1."""
    n, d, e, i, heads = 6, 2048, 1024, 27, "MultiHeadDotProductAttention_0"
    layers = {
        "attn/q_einsum/w": (n, 8, d, 256),
        "attn/q_einsum_1/w": (n, 8, e, 256),
        "attn/kv_einsum/w": (n, 2, 1, d, 256),
        "attn/kv_einsum_1/w": (n, 2, 1, e, 256),
        "attn/attn_vec_einsum/w": (n, 8, 256, d),
        "attn/attn_vec_einsum_1/w": (n, 8, 256, e),
        "mlp/gating_einsum": (n, 2, d, 16_384),
        "mlp_1/gating_einsum": (n, 2, e, 4096),
        "mlp/linear": (n, 16_384, d),
        "mlp_1/linear": (n, 4096, e),
        "pre_attention_norm/scale": (n, d),
        "pre_ffw_norm/scale": (n, d),
    }
    block = {
        "LayerNorm_0/scale": (i, 1152),
        "LayerNorm_0/bias": (i, 1152),
        "LayerNorm_1/scale": (i, 1152),
        "LayerNorm_1/bias": (i, 1152),
        **_bias("MlpBlock_0/Dense_0", (i, 1152, 4304), (i, 4304)),
        **_bias("MlpBlock_0/Dense_1", (i, 4304, 1152), (i, 1152)),
        **_bias(f"{heads}/query", (i, 1152, 16, 72), (i, 16, 72)),
        **_bias(f"{heads}/key", (i, 1152, 16, 72), (i, 16, 72)),
        **_bias(f"{heads}/value", (i, 1152, 16, 72), (i, 16, 72)),
        **_bias(f"{heads}/out", (i, 16, 72, 1152), (i, 1152)),
    }
    rest = {
        "PaliGemma/llm/embedder/input_embedding": (257_152, d),
        "PaliGemma/llm/final_norm/scale": (d,),
        **_bias("PaliGemma/img/embedding", (14, 14, 3, 1152), (1152,)),
        "PaliGemma/img/pos_embedding": (1, 256, 1152),
        "PaliGemma/img/Transformer/encoder_norm/scale": (1152,),
        "PaliGemma/img/Transformer/encoder_norm/bias": (1152,),
        **_bias("PaliGemma/img/head", (1152, d), (d,)),
        **_bias("action_in_proj", (32, e), (e,)),
        **_bias("action_out_proj", (e, 32), (32,)),
    }
    if pi05:
        layers |= _bias("pre_attention_norm_1/Dense_0", (n, e, 3 * e), (n, 3 * e))
        layers |= _bias("pre_ffw_norm_1/Dense_0", (n, e, 3 * e), (n, 3 * e))
        rest |= _bias("PaliGemma/llm/final_norm_1/Dense_0", (e, 3 * e), (3 * e,))
        rest |= _bias("time_mlp_in", (e, e), (e,)) | _bias("time_mlp_out", (e, e), (e,))
    else:
        layers |= {"pre_attention_norm_1/scale": (n, e), "pre_ffw_norm_1/scale": (n, e)}
        rest |= {"PaliGemma/llm/final_norm_1/scale": (e,)} | _bias("state_proj", (32, e), (e,))
        rest |= _bias("action_time_mlp_in", (2 * e, e), (e,))
        rest |= _bias("action_time_mlp_out", (e, e), (e,))
    expected = (
        {f"PaliGemma/llm/layers/{name}": shape for name, shape in layers.items()}
        | {f"PaliGemma/img/Transformer/encoderblock/{name}": shape for name, shape in block.items()}
        | rest
    )
    leaves = weights.leaves(pi0.abstract_params(pi0.Pi0Config(pi05=pi05, depth=6)))
    assert {path: leaf.shape for path, leaf in leaves.items()} == expected
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


@BOTH
def test_velocity_is_that_of_one_joint_attention(pi05, model, strict):
    config, params, observation = model(pi05)
    x_t = _x_t(config, 2)
    v, _ = _velocity(config, params, observation, jnp.asarray(x_t), jnp.asarray(T))
    expected = _by_hand(config, params, observation, x_t).v
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(v, expected, atol=1e-5 * np.abs(expected).max())


@BOTH
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_that_of_action_queries_over_prefix_keys(pi05, layer, model):
    config, params, observation = model(pi05)
    x_t = _x_t(config, 2)
    v, attention = _velocity(config, params, observation, x_t, T, layer)
    expected = _by_hand(config, params, observation, x_t).logits
    assert attention.logits.shape == (2, 1, 4, 5, 15)
    valid = np.broadcast_to(np.asarray(attention.valid)[:, None, None], expected[layer].shape)
    np.testing.assert_allclose(
        np.asarray(attention.logits)[:, 0][valid], expected[layer][valid], atol=1e-4
    )
    assert np.abs(expected[layer] - expected[1 - layer])[valid].max() > 0.1
    np.testing.assert_array_equal(
        attention.valid,
        np.concatenate(
            [
                np.repeat(observation.image_masks["base_0_rgb"][:, None], 4, 1),
                np.repeat(observation.image_masks["left_wrist_0_rgb"][:, None], 4, 1),
                observation.tokenized_prompt_mask,
            ],
            axis=1,
        ),
    )
    alone, nothing = _velocity(config, params, observation, x_t, T)
    assert nothing is None
    np.testing.assert_allclose(v, alone, atol=1e-6)


def test_attention_nobody_uses_costs_nothing(model):
    """Once compiled, unused attention maps add no arithmetic to a velocity."""
    config, params, observation = model(False)
    x_t = _x_t(config, 2)

    def flops(layer, keep):
        def run(params, x_t):
            v, attention = pi0.velocity(config, params, observation, x_t, T, attention_layer=layer)
            return (v, attention.logits) if keep else v

        cost = jax.jit(run).lower(params, x_t).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    alone = flops(None, keep=False)
    assert flops(1, keep=False) <= alone * 1.001
    assert flops(1, keep=True) > alone


@BOTH
def test_draws_share_a_prefix_and_equal_one_at_a_time(pi05, model):
    config, params, observation = model(pi05)
    x_t, t = _x_t(config, 2, 3), np.linspace(0.1, 0.9, 6, dtype=np.float32).reshape(2, 3)
    v, attention = _velocity(config, params, observation, x_t, t, 1)
    for r in range(3):
        one, its = _velocity(config, params, observation, x_t[:, r], t[:, r], 1)
        np.testing.assert_allclose(v[:, r], one, atol=1e-5)
        np.testing.assert_allclose(attention.logits[:, r], its.logits[:, 0], atol=1e-4)


@BOTH
def test_absent_cameras_and_prompt_padding_change_nothing(pi05, model):
    config, params, observation = model(pi05)
    x_t = _x_t(config, 2)
    v, _ = _velocity(config, params, observation, x_t, T)
    images = dict(observation.images)
    images["left_wrist_0_rgb"] = images["left_wrist_0_rgb"].at[0].set(0.7)
    padding = ~observation.tokenized_prompt_mask
    other = observation.replace(
        images=images,
        tokenized_prompt=jnp.where(
            padding, 31 - observation.tokenized_prompt, observation.tokenized_prompt
        ),
    )
    np.testing.assert_array_equal(v, _velocity(config, params, other, x_t, T)[0])
    images["left_wrist_0_rgb"] = images["left_wrist_0_rgb"].at[1].set(0.7)
    seen, _ = _velocity(config, params, other.replace(images=images), x_t, T)
    np.testing.assert_array_equal(v[0], seen[0])
    assert np.abs(v[1] - seen[1]).max() > 1e-3


@BOTH
def test_the_prefix_sees_nothing_of_the_suffix(pi05, model):
    """No prefix stream has a gradient to x_t, t or the state; the suffix has."""
    config, params, observation = model(pi05)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def prefix(x_t, t, state):
        seen = observation.replace(state=state)
        hidden = pi0.hidden_states(config, params, seen, x_t, t)
        return jnp.sum(jnp.sin(hidden.prefix)), hidden.prefix.shape

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def suffix(x_t, t):
        return jnp.sum(pi0.hidden_states(config, params, observation, x_t, t).suffix[-1])

    x_t, t = jnp.asarray(_x_t(config, 2)), jnp.asarray(T)
    gradients, shape = prefix(x_t, t, observation.state)
    assert tuple(int(n) for n in shape) == (4, 2, 15, 24)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)
    assert all(float(jnp.abs(g).max()) > 0 for g in suffix(x_t, t))


def _gradient(config, params, observation, execution):
    """Gradient of a function of velocity and attention, and the velocity."""

    def loss(params):
        v, attention = pi0.velocity(
            config,
            params,
            observation,
            _x_t(config, 2),
            T,
            attention_layer=1,
            execution=execution,
        )
        return jnp.mean(v**2) + jnp.mean(attention.logits**2), v

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def _assert_same(found, expected):
    (gradient, v), (other, other_v) = found, expected
    np.testing.assert_allclose(v, other_v, atol=1e-5)
    leaves = weights.leaves(gradient)
    for path, leaf in weights.leaves(other).items():
        np.testing.assert_allclose(leaf, leaves[path], rtol=1e-3, atol=1e-5, err_msg=path)


@BOTH
def test_flash_attention_changes_neither_velocity_nor_gradient(pi05, model, monkeypatch):
    """cuDNN's arguments, computed by XLA: the keys that exist come first."""
    config, params, observation = model(pi05)
    asked, original = [], jax.nn.dot_product_attention

    def on_xla(*arguments, implementation, **keywords):
        asked.append((implementation, keywords["key_value_seq_lengths"] is not None))
        return original(*arguments, implementation="xla", **keywords)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    masks = {name: jnp.arange(2) > i for i, name in enumerate(config.cameras)}
    seen = observation.replace(image_masks=masks)
    found, expected = (
        _gradient(
            config,
            params,
            seen,
            layers.Execution("dots", tower_attention=kernel, prefix_attention=kernel),
        )
        for kernel in ("cudnn", "xla")
    )
    assert set(asked) == {("cudnn", False), ("cudnn", True)}  # Tower and prefix.
    _assert_same(found, expected)


@BOTH
def test_unrolled_layers_change_neither_velocity_nor_gradient(pi05, model):
    """Nothing but the last layer's keys and values of the prefix is read, scanned or unrolled."""
    unrolled = _gradient(*model(pi05), layers.Execution("dots", unroll=True))
    _assert_same(unrolled, _gradient(*model(pi05), layers.Execution("layers")))
    unread = unrolled[0]["PaliGemma"]["llm"]["layers"]["mlp"]["linear"][-1]
    np.testing.assert_array_equal(unread, 0.0)


@BOTH
def test_bfloat16_is_close_to_float32(pi05, model, tiny_config):
    config, params, observation = model(pi05)
    x_t = _x_t(config, 2)
    full, _ = _velocity(config, params, observation, x_t, T)
    low_config = tiny_config(pi05=pi05, dtype="bfloat16")
    served = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), params)
    for low in (params, served):
        v, _ = _velocity(low_config, low, observation, x_t, T)
        assert v.dtype == jnp.float32
        assert np.linalg.norm(v - full) < 2e-2 * np.linalg.norm(full)


def test_a_fresh_model_has_finite_velocities_and_openpi_s_zeros(tiny_config, tiny_observation):
    config = tiny_config(pi05=True)
    params = jax.jit(pi0.init, static_argnums=0)(config, jax.random.key(0))
    v, _ = _velocity(config, params, tiny_observation(config), _x_t(config, 2), T)
    assert np.isfinite(v).all()
    adaptive = {p: x for p, x in weights.leaves(params).items() if "norm_1/Dense_0" in p}
    assert len(adaptive) == 6
    assert all(not np.any(leaf) for leaf in adaptive.values())


ODD = gemma.GemmaConfig(width=24, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"action_horizon": 0}, "action_horizon must be at least 1, got 0"),
        ({"image": siglip.SiglipConfig(num_heads=0)}, "image.num_heads must be at least 1, got 0"),
        (
            {"image": siglip.SiglipConfig(num_heads=7)},
            "num_heads must divide image.width 1152, got 7",
        ),
        (dict.fromkeys(("backbone", "expert"), ODD), "head_dim must be even, got 15"),
        ({"cameras": ("wrist", "wrist")}, r"each once; got \['wrist', 'wrist'\]"),
        ({"image_size": 25}, "image_size 25 must be a multiple of image.patch_size 12"),
        ({"cameras": ()}, "at least one camera"),
        ({"discrete_state_input": True}, "π0.5 option"),
        ({"dtype": "float64"}, "'bfloat16', 'float16' or 'float32', got 'float64'"),
        ({"expert": pi0.GEMMA_300M}, "must be equal; got"),
    ],
)
def test_a_bad_config_raises(changes, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_key_value_heads_must_be_fewer_than_query_heads(tiny_config):
    same = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
    one = type(pi0.GEMMA_2B)(width=24, mlp_dim=40, **same)
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads and be smaller"):
        tiny_config(backbone=one, expert=one)


def test_inputs_that_do_not_fit_raise(model):
    config, params, observation = model(False)
    x_t = _x_t(config, 2)
    with pytest.raises(ValueError, match=r"must lie in 0..2 for a model of 3 layers, got 3"):
        pi0.velocity(config, params, observation, x_t, T, attention_layer=3)
    with pytest.raises(ValueError, match=r"shape \(…, 5, 6\), got \(…, 4, 6\)"):
        pi0.velocity(config, params, observation, x_t[:, 1:], T)
    images = {"base_0_rgb": observation.images["base_0_rgb"]}
    with pytest.raises(ValueError, match="lacks"):
        pi0.velocity(config, params, observation.replace(images=images), x_t, T)


def test_a_config_knows_its_sizes(tiny_config):
    config = tiny_config()
    assert (config.image_tokens, config.prefix_tokens, config.kind) == (4, 15, "π0")
    assert pi0.Pi0Config(pi05=True, max_token_len=200).prefix_tokens == 968
    assert pi0.at_depth(config, 2) == tiny_config(depth=2)
