"""π0 and π0.5: their parameters, their velocity against openpi's rules written out, what sees what.

`_oracle` is openpi's joint attention in numpy and float64, over one sequence of prefix and suffix
with the full mask; it shares nothing with the package but the image encoder (see test_siglip).
"""

import functools
import math

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


def _oracle(config, params, observation, x_t, t):
    """The velocity (b, ah, ad), and the logits of every layer (l, b, n, tokens, tokens)."""
    encode = siglip.Module(config.image, config.backbone.width, jnp.dtype("float32")).apply
    images = [
        encode({"params": params["PaliGemma"]["img"]}, observation.images[name])
        for name in config.cameras
    ]
    params, images = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, images))
    llm, b, horizon = params["PaliGemma"]["llm"], x_t.shape[0], config.action_horizon

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def swish(x):
        return x / (1 + np.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def norm(x, p, condition=None):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        if condition is None:
            return x * (1 + p["scale"]), 1.0
        modulation = condition @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
        scale, shift, gate = np.split(modulation[:, None], 3, axis=-1)
        return x * (1 + scale) + shift, gate

    def rope(x, positions):
        h = x.shape[-1] // 2
        angle = positions[..., None] / 10_000.0 ** (np.arange(h) / h)
        turned = (x[..., :h] + 1j * x[..., h:]) * np.exp(1j * angle)[:, :, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    prompt = llm["embedder"]["input_embedding"][np.asarray(observation.tokenized_prompt)]
    streams = [np.concatenate([*images, prompt * math.sqrt(config.backbone.width)], axis=1)]
    valid = [np.repeat(observation.image_masks[n][:, None], 4, 1) for n in config.cameras]
    valid = np.concatenate([*valid, observation.tokenized_prompt_mask], axis=1)
    s, width = valid.shape[1], config.expert.width

    period = 4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, width // 2)
    angle = np.float64(t)[:, None] * 2 * np.pi / period
    time = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    actions, condition = dense("action_in_proj", x_t), None
    if config.pi05:
        condition = swish(dense("time_mlp_out", swish(dense("time_mlp_in", time))))
        streams.append(actions)
        opens = [0] * s + [1] + [0] * (horizon - 1)
    else:
        repeated = np.repeat(time[:, None], horizon, axis=1)
        hidden = swish(dense("action_time_mlp_in", np.concatenate([actions, repeated], -1)))
        state = dense("state_proj", np.asarray(observation.state, np.float64))[:, None]
        streams.append(np.concatenate([state, dense("action_time_mlp_out", hidden)], axis=1))
        opens = [0] * s + [1, 1] + [0] * (horizon - 1)
    valid = np.concatenate([valid, np.ones((b, streams[1].shape[1]), bool)], axis=1)
    block = np.cumsum(opens)
    mask = (block[:, None] >= block[None, :]) & valid[:, None, :] & valid[:, :, None]
    positions = np.cumsum(valid, axis=1) - 1

    names, every_logits = ("", "_1"), []
    for i in range(config.depth):
        layer = jax.tree.map(lambda x, i=i: x[i], llm["layers"])
        attn, conditions = layer["attn"], (None, condition)
        normed = [
            norm(x, layer["pre_attention_norm" + n], c)
            for x, n, c in zip(streams, names, conditions, strict=True)
        ]
        q, k, v = (
            np.concatenate(parts, axis=1)
            for parts in zip(
                *(
                    (
                        np.einsum("btd,ndh->btnh", x, attn["q_einsum" + n]["w"]),
                        np.einsum("btd,kdh->btkh", x, attn["kv_einsum" + n]["w"][0]),
                        np.einsum("btd,kdh->btkh", x, attn["kv_einsum" + n]["w"][1]),
                    )
                    for (x, _), n in zip(normed, names, strict=True)
                ),
                strict=True,
            )
        )
        groups = q.shape[2] // k.shape[2]
        k, v = np.repeat(rope(k, positions), groups, 2), np.repeat(v, groups, 2)
        q = rope(q, positions) / math.sqrt(config.expert.head_dim)
        logits = np.einsum("btnh,bsnh->bnts", q, k)
        every_logits.append(logits)
        p = np.exp(np.where(mask[:, None], logits, -1e9))
        p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
        mixed = np.split(np.einsum("bnts,bsnh->btnh", p, v), [s], axis=1)
        for j, n in enumerate(names):
            streams[j] = streams[j] + normed[j][1] * np.einsum(
                "btnh,nhd->btd", mixed[j], attn["attn_vec_einsum" + n]["w"]
            )
            y, gate = norm(streams[j], layer["pre_ffw_norm" + n], conditions[j])
            gating, linear = layer["mlp" + n]["gating_einsum"], layer["mlp" + n]["linear"]
            streams[j] = streams[j] + gate * ((gelu(y @ gating[0]) * (y @ gating[1])) @ linear)
    out, _ = norm(streams[1], llm["final_norm_1"], condition)
    return dense("action_out_proj", out[:, -horizon:]), np.stack(every_logits)


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
    expected, _ = _oracle(config, params, observation, x_t, T)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(v, expected, atol=1e-5 * np.abs(expected).max())


@BOTH
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_that_of_action_queries_over_prefix_keys(pi05, layer, model):
    config, params, observation = model(pi05)
    x_t = _x_t(config, 2)
    v, attention = _velocity(config, params, observation, x_t, T, layer)
    _, logits = _oracle(config, params, observation, x_t, T)
    expected = logits[:, :, :, -config.action_horizon :, : config.prefix_tokens]
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


@BOTH
@pytest.mark.slow
def test_remat_changes_no_gradient(pi05, model):
    config, params, observation = model(pi05)
    x_t = _x_t(config, 2)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1)
    def gradient(remat, params):
        v, attention = pi0.velocity(
            config,
            params,
            observation,
            x_t,
            T,
            attention_layer=1,
            execution=layers.Execution(remat),
        )
        return jnp.mean(v**2) + jnp.mean(attention.logits**2)

    plain, recomputed = gradient("none", params), gradient("layers", params)
    for path, leaf in weights.leaves(plain).items():
        np.testing.assert_allclose(
            leaf, weights.leaves(recomputed)[path], rtol=1e-3, atol=1e-5, err_msg=path
        )


@BOTH
def test_flash_attention_changes_neither_velocity_nor_gradient(pi05, model, monkeypatch):
    """cuDNN's arguments, computed by XLA: the keys that exist come first."""
    config, params, observation = model(pi05)
    x_t, asked = _x_t(config, 2), []
    original = jax.nn.dot_product_attention

    def on_xla(*arguments, implementation, **keywords):
        asked.append((implementation, keywords["key_value_seq_lengths"] is not None))
        return original(*arguments, implementation="xla", **keywords)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    masks = {name: jnp.arange(2) > i for i, name in enumerate(config.cameras)}
    seen = observation.replace(image_masks=masks)

    def run(kernel):
        execution = layers.Execution("dots", tower_attention=kernel, prefix_attention=kernel)

        def loss(params):
            v, attention = pi0.velocity(
                config, params, seen, x_t, T, attention_layer=1, execution=execution
            )
            return jnp.mean(v**2) + jnp.mean(attention.logits**2), v

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    gradient, v = run("cudnn")
    assert set(asked) == {("cudnn", False), ("cudnn", True)}  # Tower and prefix.
    plain, expected = run("xla")
    np.testing.assert_allclose(v, expected, atol=1e-5)
    for path, leaf in weights.leaves(plain).items():
        found = weights.leaves(gradient)[path]
        np.testing.assert_allclose(leaf, found, rtol=1e-3, atol=1e-5, err_msg=path)


@BOTH
def test_unrolled_layers_change_neither_velocity_nor_gradient(pi05, model):
    """Nothing but the last layer's keys and values of the prefix is read, scanned or unrolled."""
    config, params, observation = model(pi05)
    x_t = _x_t(config, 2)

    def run(execution):
        def loss(params):
            v, attention = pi0.velocity(
                config, params, observation, x_t, T, attention_layer=1, execution=execution
            )
            return jnp.mean(v**2) + jnp.mean(attention.logits**2), v

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    gradient, v = run(layers.Execution("dots", unroll=True))
    plain, expected = run(layers.Execution("layers"))
    np.testing.assert_allclose(v, expected, atol=1e-5)
    for path, leaf in weights.leaves(plain).items():
        found = weights.leaves(gradient)[path]
        np.testing.assert_allclose(leaf, found, rtol=1e-3, atol=1e-5, err_msg=path)
    unread = gradient["PaliGemma"]["llm"]["layers"]["mlp"]["linear"][-1]
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
