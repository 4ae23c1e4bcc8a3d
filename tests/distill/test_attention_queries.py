"""Whose attention the loss compares: actions, all tokens, or the prompt over the image tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import attention, layer_map, losses, step
from shallow_pi.models import captures, layer_table, pi0

B, R, N, T, AH, P = 2, 2, 3, 4, 3, 5
KEY = jax.random.key(5)
_step = jax.jit(step.distill_step, static_argnums=0)


def _logits(seed, images):
    generator = np.random.default_rng(seed)
    s = images + P
    suffix = generator.standard_normal((B, R, N, T, s)).astype(np.float32)
    return suffix, generator.standard_normal((B, N, s, s)).astype(np.float32)


def _kl(student_row, teacher_row):
    """Of rows with an axis of heads, in float64."""
    p, q = (np.exp(np.float64(row)) for row in (teacher_row, student_row))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1).mean()


@pytest.mark.parametrize("queries", ["all", "text"])
def test_the_divergence_is_the_mean_over_the_tokens_that_exist(queries, tiny_config, strict):
    """Neither padding of the prompt, nor a masked camera, nor a padded action is among them."""
    config = tiny_config(max_token_len=P)
    images = len(config.cameras) * config.image_tokens
    valid = np.ones((B, images + P), bool)
    valid[0, : config.image_tokens] = False
    valid[:, -2:] = False
    actions = np.ones((B, R, AH), bool)
    actions[1, 0, -1] = False
    own, teachers = _logits(0, images), _logits(1, images)
    first = 0 if queries == "all" else images

    def given(logits):
        suffix = logits[0] if queries == "all" else None
        return captures.PrefixAttention(suffix, logits[1][:, :, first:], jnp.asarray(valid))

    switches = losses.Losses(attention_queries=queries)
    found = attention.divergence(
        config, switches, given(own), given(teachers), jnp.asarray(actions)
    )
    for b, r in np.ndindex(B, R):
        keys = valid[b] & ((np.arange(images + P) < images) | (queries == "all"))
        rows = [
            _kl(own[1][b, :, row][:, keys], teachers[1][b, :, row][:, keys])
            for row in range(first, images + P)
            if valid[b, row]
        ]
        if queries == "all":
            rows += [
                _kl(own[0][b, r, :, row][:, keys], teachers[0][b, r, :, row][:, keys])
                for row in range(T)
                if row == 0 or actions[b, r, row - 1]  # The state, then the actions.
            ]
        np.testing.assert_allclose(found[b, r], np.mean(rows), rtol=1e-4)


def test_an_observation_without_a_prompt_gives_nothing(tiny_config):
    config = tiny_config(max_token_len=P)
    images = len(config.cameras) * config.image_tokens
    valid = jnp.arange(images + P)[None] < images
    maps = [
        captures.PrefixAttention(None, _logits(seed, images)[1][:1, :, images:], valid)
        for seed in (0, 1)
    ]
    text = losses.Losses(attention_queries="text")
    found = attention.divergence(config, text, *maps, jnp.ones((1, R, AH), bool))
    np.testing.assert_array_equal(found, 0.0)


@pytest.fixture(scope="module")
def attending(setting):
    """The attention loss alone."""
    spec, *others = setting
    alone = losses.Losses(task=0.0, velocity=0.0, attention=1.0)
    return dataclasses.replace(spec, losses=alone), *others


def _with(spec, **switches):
    return dataclasses.replace(spec, losses=dataclasses.replace(spec.losses, **switches))


@pytest.mark.parametrize(("queries", "layer", "pair"), [("all", 1, (1, 2)), ("text", -1, (0, 0))])
def test_a_step_moves_the_queries_that_are_compared(attending, queries, layer, pair):
    spec, teacher, state, batch = attending
    spec = _with(spec, attention_queries=queries, attention_layer=layer)
    assert spec.attention_layers == pair
    new, metrics = _step(spec, teacher, state, KEY, batch)

    @jax.jit
    def by_hand(batch):
        inputs = step.draw_inputs(spec, jax.random.fold_in(KEY, 0), batch)
        given = (inputs.observation, inputs.x_t, inputs.t)
        maps = [
            pi0.velocity(config, params, *given, attention_layer=layer, attention_queries=queries)[
                1
            ]
            for config, params, layer in (
                (spec.student, state.params, pair[0]),
                (spec.teacher, teacher, pair[1]),
            )
        ]
        return attention.divergence(spec.student, spec.losses, *maps, inputs.action_mask)

    expected = np.mean(by_hand(batch))
    assert expected > 1e-4
    np.testing.assert_allclose(metrics["attention_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    new, old = jax.device_get((new.params, state.params))
    moved = jax.tree.map(lambda a, b: np.abs(a - b), new, old)
    attn = moved["PaliGemma"]["llm"]["layers"]["attn"]
    assert attn["q_einsum"]["w"][pair[0]].max() > 1e-6
    if queries == "all":
        # Unrolled layers leave out what nothing reads: here the last one's queries are read.
        unrolled = dataclasses.replace(spec.execution, unroll=True)
        again = dataclasses.replace(spec, accumulation=2, execution=unrolled)
        parts = _step(again, teacher, state, KEY, batch)[1]
        np.testing.assert_allclose(parts["attention_loss"], expected, rtol=1e-5)
        assert attn["q_einsum_1"]["w"][pair[0]].max() > 1e-6
    else:
        assert attn["q_einsum_1"]["w"].max() == 0


def test_pooled_tokens_have_a_loss_of_the_prompt_and_none_of_all_tokens(attending, tiny_params):
    spec, teacher, _, batch = attending
    pooled = dataclasses.replace(spec.student, pooled_tokens=1)
    text = dataclasses.replace(_with(spec, attention_queries="text"), student=pooled)
    metrics = _step(text, teacher, step.init_state(text, tiny_params(pooled)), KEY, batch)[1]
    # One token a camera and no other key: whoever attends to images attends to it.
    np.testing.assert_allclose(metrics["attention_loss"], 0.0, atol=1e-6)
    with pytest.raises(ValueError, match=r"queries all compares token by token.*image-tokens 1"):
        dataclasses.replace(_with(spec, attention_queries="all"), student=pooled)


def test_a_teacher_of_pooled_tokens_has_students_of_the_same_means(attending, tiny_params):
    spec, _, _, batch = attending
    few = dataclasses.replace(spec.teacher, pooled_tokens=2)
    whole = layer_map.uniform(few.depth, few.depth)
    own = dataclasses.replace(
        _with(spec, attention_queries="all", velocity=1.0),
        **{"teacher": few, "student": few, "layer_map": whole},
    )
    params = tiny_params(few)
    metrics = _step(own, params, step.init_state(own, params), KEY, batch)[1]
    np.testing.assert_allclose(metrics["attention_loss"], 0.0, atol=1e-6)
    np.testing.assert_allclose(metrics["velocity_loss"], 0.0, atol=1e-10)
    for other in (1, 0):
        with pytest.raises(
            ValueError, match=r"sees 2 of 4 image tokens, .*--student.image-tokens 0"
        ):
            dataclasses.replace(own, student=dataclasses.replace(few, pooled_tokens=other))


def test_layers_without_the_queries_are_refused(attending, tiny_config):
    spec = attending[0]
    halves = layer_table.reads_last(1, 1)
    parted = dataclasses.replace(spec.student, backbone_layers=halves[0], expert_layers=halves[1])
    apart = dataclasses.replace(spec, student=parted, teacher=None, layer_map=None,
                                losses=losses.Losses(velocity=0, attention=0))  # fmt: skip
    assert apart._attending == [1]
    assert _with(apart, attention_queries="text")._attending == [0]
    with pytest.raises(ValueError, match=r"must be -1 or one of 0, .*with a whole backbone; got 1"):
        _with(apart, attention_queries="text", attention_layer=1)
    whole = tiny_config(depth=2, cameras=("base_0_rgb",))
    both = dataclasses.replace(whole, backbone_layers=halves[0], expert_layers=halves[1])
    with pytest.raises(ValueError, match="compares a layer with both halves, and the student has"):
        dataclasses.replace(spec, student=both, teacher=both, layer_map=layer_map.uniform(2, 2),
                            losses=losses.Losses(attention_queries="all"))  # fmt: skip
    with pytest.raises(ValueError, match="layer 1 has no backbone half, whose attention is asked"):
        captures.check(parted.layers, 1, "text")
