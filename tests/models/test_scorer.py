"""Image tokens chosen by a scorer: which they are, at which positions, and what they see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.models import gemma, layers, parameters, pi0, prefixes, scorer

velocity = jax.jit(pi0.velocity, static_argnums=0, static_argnames="attention_layer")


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def setting(request, tiny_config, tiny_params, tiny_observation):
    """A model that keeps two of four patches, noisy actions and times; a camera is absent."""
    config = tiny_config(pi05=request.param, scored_tokens=2)
    x_t = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)
    given = tiny_observation(config), x_t, jnp.array([0.2, 0.7])
    return config, tiny_params(config), given


def _whole(config):
    return dataclasses.replace(config, scored_tokens=0)


def test_the_kept_patches_are_the_best_in_their_order():
    scores = np.random.default_rng(0).standard_normal((3, 2, 9)).astype(np.float32)
    scores[0, 0] = [1, 3, 3, 0, 3, 3, 1, 1, 2]  # Of equal ones the first.
    kept = np.array(scorer.top(jnp.asarray(scores), 4))
    best = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :4], axis=-1)
    np.testing.assert_array_equal(best[0, 0], [1, 2, 4, 5])
    np.testing.assert_array_equal(kept, best[..., None] == np.arange(9))


def test_taking_is_exact_in_every_dtype():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 4, 3)) * 1e3, jnp.bfloat16)
    scores = jnp.array([[[0.0, 2, 1, 3]], [[3.0, 2, 1, 0]]])
    found = scorer.take(x, scorer.top(scores, 2))
    np.testing.assert_array_equal(found[:, 0], jnp.stack([x[0, 0, [1, 3]], x[1, 0, [0, 1]]]))


def test_attention_over_kept_patches_is_renormalised():
    """Two cameras of four patches and three words; the second camera is absent."""
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((2, 1, 2, 5, 11)).astype(np.float32)
    kept = scorer.top(jnp.asarray(generator.standard_normal((2, 2, 4))), 2)
    found = jax.nn.softmax(scorer.take_logits(jnp.asarray(logits), kept)[..., [0, 1, 4, 5, 6]])
    for b in range(2):
        chosen = [*np.flatnonzero(kept[b, 0].any(axis=0)), 8, 9, 10]
        p = np.exp(logits[b][..., chosen])
        np.testing.assert_allclose(found[b], p / p.sum(axis=-1, keepdims=True), rtol=1e-5)


def test_all_tokens_are_the_whole_model(setting):
    config, params, given = setting
    every = dataclasses.replace(config, scored_tokens=4)
    found, attention = velocity(every, params, *given, attention_layer=1)
    expected, theirs = velocity(_whole(config), params, *given, attention_layer=1)
    np.testing.assert_array_equal(found, expected)
    seen = np.broadcast_to(theirs.valid[:, None, None, None], theirs.logits.shape)
    np.testing.assert_array_equal(attention.valid, theirs.valid)
    np.testing.assert_array_equal(attention.logits[seen], theirs.logits[seen])


def test_a_student_is_the_whole_model_without_the_patches_left_out(setting):
    """At the same positions, with the other patches masked; an absent camera stays absent."""
    config, params, given = setting
    observation, x_t, t = given
    found, _ = velocity(config, params, *given)
    model = pi0.Pi0(_whole(config))
    tokens, valid, positions, _ = model.apply(
        {"params": params}, observation, method="embed_prefix"
    )
    prompt = tokens[:, 8:]
    kept = scorer.choose(
        params["image_scorer"], tokens[:, :8].reshape(2, 2, 4, -1), prompt, valid[:, 8:], 2
    ).kept
    seen = np.array(kept.any(axis=2)).reshape(2, 8)
    assert len({tuple(row) for row in seen.reshape(4, 4).tolist()}) > 1
    seen = jnp.concatenate([seen, jnp.ones((2, 7), bool)], axis=1) & valid
    suffix, condition = model.apply(
        {"params": params}, *(observation.state, x_t[:, None], t[:, None]), method="embed_suffix"
    )
    ends = positions, prefixes.positions_taken(_whole(config), valid)
    geometry = gemma.Geometry.create(seen, 8, suffix.shape[2], 5, condition, positions=ends)
    streams = (config.backbone, config.expert)
    tower = gemma.Module(streams, 3, config.vocab_size, jnp.dtype("float32"))
    own = {"params": params["PaliGemma"]["llm"]}
    x = tower.apply(own, tokens, suffix, geometry).suffix
    expected = layers.dense(params["action_out_proj"], x[:, 0, -5:])
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found - velocity(_whole(config), params, *given)[0]).max() > 1e-3


def test_an_absent_camera_changes_nothing(setting):
    """Its tokens are not valid, and what its image shows moves no other choice."""
    config, params, (observation, *rest) = setting
    name = config.cameras[1]
    other = observation.images[name].at[0].set(-observation.images[name][0])
    moved = dataclasses.replace(observation, images={**observation.images, name: other})
    expected, attention = velocity(config, params, observation, *rest, attention_layer=0)
    np.testing.assert_array_equal(velocity(config, params, moved, *rest)[0], expected)
    np.testing.assert_array_equal(attention.valid[0, :4], [True, True, False, False])


def test_the_scorer_reads_the_prompt_but_no_padding(setting):
    config, params, (observation, *_) = setting
    embed = jax.jit(pi0.Pi0(config).apply, static_argnames="method")

    def scores(prompt):
        seen = dataclasses.replace(observation, tokenized_prompt=prompt)
        return embed({"params": params}, seen, method="embed_prefix").choice.scores

    prompt, there = observation.tokenized_prompt, observation.tokenized_prompt_mask
    padded = jnp.where(there, prompt, (prompt + 5) % config.vocab_size)
    np.testing.assert_array_equal(scores(padded), scores(prompt))
    assert np.abs(scores((prompt + 1) % config.vocab_size) - scores(prompt)).max() > 1e-3


def test_the_choice_passes_no_gradient_to_the_scorer_nor_its_scores_to_the_rest(setting):
    config, params, given = setting

    def through_velocity(params):
        return jnp.sum(pi0.velocity(config, params, *given)[0])

    def through_scores(params):
        x_t, t = given[1][:, None], given[2][:, None]
        found = pi0.outputs(config, params, given[0], x_t, t)
        return jnp.sum(jnp.sin(found.choice.scores))

    moved = []
    for function in (through_velocity, through_scores):
        norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), jax.jit(jax.grad(function))(params))
        own = jax.tree.leaves(norms.pop("image_scorer"))
        others = [n for path, n in jax.tree_util.tree_leaves_with_path(norms) if n > 0]
        moved.append((min(own), max(own), len(others)))
    assert moved[0][1] == 0
    assert moved[0][2] > 20
    assert moved[1][0] > 0
    assert moved[1][2] == 0


def test_a_fresh_scorer_keeps_evenly_spaced_patches():
    """Whatever the number: of 16 × 16 patches every quarter has its share."""
    config = pi0.Pi0Config(scored_tokens=64)
    own = pi0.abstract_params(config)["image_scorer"]
    assert {k: v.shape for k, v in own["hidden"].items()} == {"kernel": (2048, 128), "bias": (128,)}
    leaves = parameters.Leaves("image_scorer", pi0.axis_sizes(config))
    made = leaves.init(jax.random.key(0))["params"]
    tokens = jax.random.normal(jax.random.key(1), (1, 1, 256, 2048))
    scores = scorer.score(made, tokens, tokens[0, :, :3], jnp.ones((1, 3), bool))
    for count in (32, 64, 100):
        kept = np.array(scorer.top(scores, count).any(axis=2)).reshape(2, 8, 2, 8)
        shares = kept.sum(axis=(1, 3))
        assert shares.min() >= count // 4 - 3, shares


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scored_tokens": 5}, r"a scorer chooses 1 to 4 of the 2 × 2 patches of a camera, not 5"),
        ({"scored_tokens": -1}, "of a camera, not -1"),
        ({"scored_tokens": 1, "pooled_tokens": 2}, "not both; got 2 and 1"),
    ],
)
def test_tokens_that_are_not_there_raise(tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
