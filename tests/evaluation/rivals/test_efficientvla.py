"""EfficientVLA: with everything kept it is the teacher; else it keeps what the formulas say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import layer_map, student
from shallow_pi.evaluation.rivals import efficientvla, rival, skipping, table
from shallow_pi.inference import sampler
from shallow_pi.models import gemma, layers, pi0

# Compiled for each rival, and of use to who works on rivals alone.
pytestmark = pytest.mark.slow

_sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps", "options"))
STEPS = 4
# 16 image tokens a camera, so that some can go.
SIDE = 48


@pytest.fixture
def sample(weights):
    def run(options, config, params, observation, noise):
        made = jax.jit(options.sample, static_argnums=0)
        return made(config, weights(config, params), observation, noise)

    return run


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_keeping_everything_is_the_teacher(pi05, setting, sample):
    config, params, observation, noise = setting(pi05, image_size=SIDE)
    expected = _sample(config, params, observation, noise, num_steps=STEPS)
    for tokens in (0, 99):
        found = sample(efficientvla.EfficientVLA(tokens=tokens), config, params, observation, noise)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_absent_tokens_go_first_and_cost_nothing(setting, sample):
    """Camera 1 of sample 0 is absent: 16 tokens are all it has."""
    config, params, observation, noise = setting(image_size=SIDE)
    masks = {name: jnp.array([mask[0], mask[0]]) for name, mask in observation.image_masks.items()}
    observation = observation.replace(image_masks=masks)
    expected = _sample(config, params, observation, noise, num_steps=STEPS)
    found = sample(efficientvla.EfficientVLA(tokens=20), config, params, observation, noise)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    fewer = sample(efficientvla.EfficientVLA(tokens=12), config, params, observation, noise)
    assert np.abs(fewer - expected).max() > 1e-3


def test_dropped_tokens_are_masked_ones_and_positions_stay(setting, sample, weights):
    """From the second layer on in the prefix, and for the suffix in all layers."""
    config, params, observation, noise = setting(image_size=SIDE, depth=2)
    found = sample(efficientvla.EfficientVLA(tokens=8), config, params, observation, noise)
    stack = [
        jax.tree.map(lambda leaf, i=i: leaf[i], params["PaliGemma"]["llm"]["layers"])
        for i in (0, 1)
    ]
    model, held = pi0.Pi0(config), weights(config, params).prepared

    @jax.jit
    def velocity(x_t, t):
        tokens, valid, *_ = model.apply({"params": params}, observation, method="embed_prefix")
        given = (observation.state, x_t[:, None], jnp.full((2, 1), t))
        suffix, _ = model.apply({"params": params}, *given, method="embed_suffix")
        geometry = gemma.Geometry.create(valid, 8, suffix.shape[2], 5)
        behind, first, _ = gemma.prefix_layer(stack[0], tokens, geometry)
        asked = efficientvla.relevance(
            config, held.prefix[0], tokens, first[0], valid, geometry.prefix_rope, 32
        )
        chosen = efficientvla.choose(asked, behind[:, :32], valid[:, :32], 8)
        kept = jnp.any(chosen[:, :, None] == jnp.arange(39), axis=1) | (jnp.arange(39) >= 32)
        geometry = geometry._replace(prefix_valid=valid & kept)
        _, second, _ = gemma.prefix_layer(stack[1], behind, geometry)
        for layer, cached in zip(stack, (first, second), strict=True):
            suffix, _ = gemma.suffix_layer(layer, suffix, cached, geometry)
        final = params["PaliGemma"]["llm"]["final_norm_1"]
        normed, _ = gemma.norm(final, suffix, None)
        return layers.dense(params["action_out_proj"], normed[:, 0, -5:])

    x_t = noise
    for t in sampler.integration_times(STEPS):
        x_t = x_t - velocity(x_t, t) / STEPS
    np.testing.assert_allclose(found, x_t, atol=1e-4)


@pytest.mark.parametrize("cache", [2, 3])
def test_cached_steps_add_what_the_last_computed_step_added(cache, setting, sample):
    config, params, observation, noise = setting(True, image_size=SIDE)
    found = sample(efficientvla.EfficientVLA(cache=cache), config, params, observation, noise)
    model = pi0.Pi0(config)

    @jax.jit
    def tokens_and_output(x_t, t):
        times = jnp.full((2, 1), t)
        suffix, condition = model.apply(
            {"params": params}, observation.state, x_t[:, None], times, method="embed_suffix"
        )
        hidden = pi0.hidden_states(config, params, observation, x_t, times[:, 0])
        return suffix, hidden.suffix[-1], condition

    x_t, added = noise, None
    for i, t in enumerate(sampler.integration_times(STEPS)):
        suffix, behind, condition = tokens_and_output(x_t, t)
        if i % cache == 0:
            added = behind - suffix
        final = params["PaliGemma"]["llm"]["final_norm_1"]
        normed, _ = gemma.norm(final, suffix + added, condition)
        v = layers.dense(params["action_out_proj"], normed[:, 0, -5:])
        x_t = x_t - v / STEPS
    np.testing.assert_allclose(found, x_t, atol=1e-4)


def test_tokens_are_chosen_by_relevance_and_then_by_distance_to_the_key():
    asked = np.array([[9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0, 0.5, 0.1]], np.float32)
    features = np.zeros((1, 12, 3), np.float32)
    features[0, :, 0] = 1.0  # All alike ...
    features[0, 9] = [0, 1, 0]  # ... but two, of which the first is the farther.
    features[0, 10] = [1, 1, 0]
    valid = np.ones((1, 12), bool)
    key = [0, 2, 4, 6]

    def chosen(kept, valid=valid):
        return efficientvla.choose(*map(jnp.asarray, (asked, features, valid)), kept)[0].tolist()

    assert chosen(4) == key
    assert chosen(6) == sorted([*key, 8, 9])  # One by relevance, one by diversity.
    assert chosen(8) == sorted([*key, 8, 7, 9, 10])
    assert chosen(12) == list(range(12))
    absent = valid.copy()
    absent[0, [0, 9]] = False
    assert chosen(6, absent) == sorted([2, 4, 6, 8, 7, 10])


def test_relevance_is_the_attention_that_prompt_tokens_give(setting, weights):
    config, params, observation, _ = setting(image_size=SIDE)
    layer = jax.tree.map(lambda leaf: leaf[0], params["PaliGemma"]["llm"]["layers"])
    tokens, valid, *_ = pi0.Pi0(config).apply(
        {"params": params}, observation, method="embed_prefix"
    )
    rope = layers.rope_table(jnp.cumsum(valid, axis=1) - 1, 8)
    normed, _ = gemma.norm(layer["pre_attention_norm"], tokens, None)
    q = jnp.einsum("bsd,ndh->bsnh", normed, layer["attn"]["q_einsum"]["w"])
    k = jnp.einsum("bsd,kdh->bskh", normed, layer["attn"]["kv_einsum"]["w"][0])
    q, k = layers.apply_rope(q, rope), layers.apply_rope(k, rope)
    k = jnp.repeat(k, 2, axis=2)  # Two query heads for each of two kv heads.
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    maps = jax.nn.softmax(jnp.where(valid[:, None, None], logits, -1e30), axis=-1).mean(axis=1)
    expected = (maps * valid[:, :, None])[:, 32:, :32].sum(axis=1)
    held = weights(config, params).prepared
    found = efficientvla.relevance(
        config, held.prefix[0], tokens, k[:, :, ::2], valid, rope, images=32
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_rival_runs_as_a_policy_and_drops_the_most_alike(own, params, tiny_batch, tmp_path):
    config = own.model
    batch = tiny_batch(config, 2)
    material = rival.Material(own, params, lambda: iter([batch]))
    made = table.find("efficientvla:layers=1").make(material, tmp_path)
    alike = rival.scores(material, "similarity")
    kept = layer_map.similarity(1, alike)
    shallow = student.cut(config, params, kept)
    expected = table.find("teacher").make(
        dataclasses.replace(
            material, assets=dataclasses.replace(own, model=pi0.at_depth(config, 1)), params=shallow
        ),
        tmp_path,
    )
    noise = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    np.testing.assert_allclose(
        made.sample(batch.observation, noise), expected.sample(batch.observation, noise), atol=1e-5
    )
    assert made.assets.model.depth == 1


def test_operations_count_what_is_left(tiny_config):
    config = tiny_config(image_size=48)
    whole = skipping.Teacher().operations(config, 10)

    def operations(**options):
        return efficientvla.EfficientVLA(**options).operations(config, 10)

    assert operations() == operations(layers=3, tokens=32) == whole
    assert operations(layers=2) == skipping.Skip(drop=1).operations(config, 10)
    layer = rival.layer(config).step
    assert whole - operations(cache=5) == 8 * 3 * layer
    fewer = rival.with_tokens(config, 8)
    saved = whole - operations(tokens=8)
    steps = 10 * 3 * (layer - rival.layer(fewer).step)
    # Of three layers the first sees all tokens, and the last computes only keys and values.
    middle = rival.layer(config).prefix - rival.layer(fewer).prefix
    keys_only = rival.count(config, 1, 1).prefix - rival.count(fewer, 1, 1).prefix
    assert saved == steps + middle + keys_only


def test_more_layers_than_there_are_are_refused(own, params, tiny_batch, tmp_path):
    material = rival.Material(own, params, lambda: iter([tiny_batch(own.model)]))
    with pytest.raises(ValueError, match="9 layers of 2 cannot stay"):
        table.find("efficientvla:layers=9").make(material, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficient", "rival 'efficient' is none of .*; did you mean 'efficientvla'"),
        ("efficientvla:layer=6", "options layers=0, tokens=0, cache=1, got 'layer=6'"),
        ("efficientvla:layers=six", "layers is of type int, got 'six'"),
        ("efficientvla:tokens=3", "tokens at least 4"),
        ("efficientvla:cache=0", "cache at least 1"),
        ("skip:order=best", "order one of oracle, similarity"),
        ("teacher:layers=6", r"options \(none\), got 'layers=6'"),
    ],
)
def test_a_wrong_name_says_what_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        table.find(name)
