"""Distillation of the scorer of image tokens from the teacher's attention."""

import dataclasses
import functools

import float64
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import layers, pi0
from shallow_pi.training import config

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def teacher(tiny_config, tiny_params):
    made = tiny_config()
    return made, tiny_params(made)


@pytest.fixture(scope="module")
def spec(teacher):
    """A student of two layers and two of four patches, padded actions left out; plain SGD."""
    return specs.Spec(
        student=dataclasses.replace(pi0.at_depth(teacher[0], 2), scored_tokens=2),
        optimizer=optax.sgd(0.1),
        schedule=optax.constant_schedule(0.1),
        losses=losses.Losses(velocity=0.5, attention=2.0, scorer=3.0, mask_padded_actions=True),
        teacher=teacher[0],
        layer_map=layer_map.explicit((1, 2), 3),
        draws=2,
        execution=layers.Execution(remat="none"),
    )


@pytest.fixture(scope="module")
def cut(spec, teacher):
    """With scores that differ from one patch to the next."""
    made = jax.jit(lambda p: student.cut(teacher[0], p, spec.layer_map, spec.student))(teacher[1])
    own = made["image_scorer"]
    kernel = 0.3 * jax.random.normal(jax.random.key(1), own["score"]["kernel"].shape)
    return {**made, "image_scorer": {**own, "score": {"kernel": kernel}}}


@pytest.fixture(scope="module")
def batch(teacher, tiny_batch):
    """Of four observations; the last actions of the first are padding."""
    made = tiny_batch(teacher[0], b=4)
    made.action_mask[0, 3:] = False
    return made


_step = jax.jit(step.distill_step, static_argnums=0)
_init = jax.jit(step.init_state, static_argnums=0)


def _run(spec, teacher, params, batch):
    return _step(spec, teacher[1], _init(spec, params), KEY, batch)


@pytest.fixture(scope="module")
def result(spec, teacher, cut, batch):
    return _run(spec, teacher, cut, batch)


def test_scores_that_are_the_teachers_attention_have_no_loss():
    """Up to a constant a camera; a camera that is absent does not count."""
    mass = np.random.default_rng(0).uniform(0.01, 1, (3, 2, 5)).astype(np.float32)
    scores = np.log(mass) + np.array([2.0, -3.0], np.float32)[:, None]
    valid = np.array([[True, True], [True, False], [False, False]])
    scores[1, 1] = scores[2] = 9.0
    found = losses.scorer_loss(*map(jnp.asarray, (scores, mass, valid)))
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_the_scorer_loss_is_the_divergence_of_each_camera():
    generator = np.random.default_rng(0)
    mass, scores = generator.uniform(0, 1, (2, 2, 5)), generator.standard_normal((2, 2, 5))
    mass[0, 0, 2] = mass[0, 1] = 0
    valid = jnp.array([[True, True], [True, False]])
    p = mass / np.maximum(mass.sum(axis=-1, keepdims=True), 1e-30)
    q = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    kl = np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / q), 0).sum(axis=-1)
    given = jnp.asarray(scores, jnp.float32), jnp.asarray(mass, jnp.float32)
    found = losses.scorer_loss(*given, valid)
    np.testing.assert_allclose(found, [kl[0].sum() / 2, kl[1, 0]], rtol=1e-5)
    jax.test_util.check_grads(
        lambda s: losses.scorer_loss(s, given[1], valid), given[:1], order=1, modes=["rev"]
    )
    fixed = jax.grad(lambda m: jnp.sum(losses.scorer_loss(given[0], m, valid)))(given[1])
    assert not fixed.any()
    with pytest.raises(ValueError, match="attention"):
        losses.scorer_loss(given[0], given[1][:, :1], valid)


def test_a_step_is_that_of_float64(spec, teacher, cut, result, batch):
    """Over the kept patches, and the attention of the actions that count."""
    draw = jax.jit(step.draw_inputs, static_argnums=0)
    inputs = draw(spec, jax.random.fold_in(KEY, 0), batch)
    before, after = jax.device_get((cut, result[0].params))
    gradient = jax.tree.map(lambda a, b: 10 * (a - b), before, after)
    float64.check(spec, teacher[1], cut, inputs, result[1], gradient)
    assert min(result[1]["scorer_loss"], result[1]["attention_kept"]) > 0.05


def test_the_scorer_moves_by_its_own_loss_alone(spec, teacher, cut, result, batch):
    """And without it the rest of the student moves as it does with it."""
    none = dataclasses.replace(spec, losses=dataclasses.replace(spec.losses, scorer=0.0))
    state, metrics = _run(none, teacher, cut, batch)
    assert "scorer_loss" not in metrics
    before, with_it, without = (
        weights.leaves(tree) for tree in (cut, result[0].params, state.params)
    )
    for path, leaf in before.items():
        if path.startswith("image_scorer/"):
            np.testing.assert_array_equal(without[path], leaf)
            assert np.any(with_it[path] != leaf), path
        else:
            np.testing.assert_allclose(without[path], with_it[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"freeze": ("vision", "embedder")}])
def test_microbatches_and_a_frozen_tower_give_the_same_scores(
    changes, spec, teacher, cut, result, batch
):
    spec = dataclasses.replace(spec, **changes)
    names = ("scorer_loss", "attention_kept", "attention_loss", "task_loss")

    @jax.jit
    def losses_of(*given):
        """Without the backward pass."""
        metrics = step.distill_step(spec, *given)[1]
        return {name: metrics[name] for name in names}

    metrics = losses_of(teacher[1], _init(spec, cut), KEY, batch)
    for name in names:
        np.testing.assert_allclose(metrics[name], result[1][name], rtol=1e-4, err_msg=name)


def test_the_norm_of_its_gradient_is_measured(spec, teacher, cut, batch):
    alone = losses.Losses(task=0.0, velocity=0.0, attention=0.0, scorer=1.0)
    run = jax.jit(
        functools.partial(step.loss_gradient_norms, dataclasses.replace(spec, losses=alone))
    )
    found = run(teacher[1], _init(spec, cut), KEY, batch)
    assert list(found) == ["grad_norm_of/scorer_loss"]
    assert found["grad_norm_of/scorer_loss"] > 0


def test_training_brings_the_scores_to_the_teachers_attention(spec, teacher, cut, batch):
    quick = dataclasses.replace(
        spec,
        losses=losses.Losses(task=0.0, velocity=0.0, attention=0.0, scorer=1.0),
        optimizer=optax.adam(3e-3),
        draws=1,
    )
    state, found = _init(quick, cut), []
    for _ in range(60):
        state, metrics = _step(quick, teacher[1], state, KEY, batch)
        found.append(float(metrics["scorer_loss"]))
    assert np.mean(found[-5:]) < 0.3 * found[0]


def test_products_in_8_bits_leave_the_scorer_as_it_is(spec, cut):
    rounded = jax.jit(step.rounded, static_argnums=0)
    found = rounded(dataclasses.replace(spec, quantize="int8"), cut)
    for path, leaf in weights.leaves(cut).items():
        if path.startswith("image_scorer/"):
            np.testing.assert_array_equal(weights.leaves(found)[path], leaf)
    linear = "PaliGemma/llm/layers/mlp/linear"
    assert np.any(weights.leaves(found)[linear] != weights.leaves(cut)[linear])


def test_losses_and_scorer_come_together(spec, tiny_experiment, tmp_path):
    scored = config.StudentConfig(depth=2, image_tokens=2, image_token_choice="scored")
    made = tiny_experiment(tmp_path, student=scored)
    assert made.student_model.scored_tokens == 2
    assert dataclasses.replace(spec, losses=losses.Losses()).losses.scorer == 1.0
    for changes, message in (
        ({"losses": losses.Losses(scorer=0.0)}, "trained only by --losses.scorer, which is 0"),
        ({"teacher": None}, "--student.image-tokens: these cut a student out of a teacher"),
        (
            {"model": dataclasses.replace(made.model, scored_tokens=2)},
            "--model.scored-tokens 2: the teacher must see all image tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(made, **changes)
    whole = dataclasses.replace(spec.student, scored_tokens=0)
    with pytest.raises(ValueError, match=r"--losses.scorer 3 trains a scorer that is not there"):
        dataclasses.replace(spec, student=whole)
    with pytest.raises(
        ValueError, match=r"the teacher sees 2 of 4 image tokens.*--model.scored-tokens"
    ):
        dataclasses.replace(spec, teacher=dataclasses.replace(spec.teacher, scored_tokens=2))
