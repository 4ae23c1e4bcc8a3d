"""One step of the distillation: what is in the loss, who is trained, and that cutting the batch or
repeating a step changes nothing. (`training/test_meshes` splits steps over devices.)"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map, losses, step
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

KEY = jax.random.key(5)
TASK = losses.Losses(velocity=0.0, attention=0.0)
_draw = jax.jit(step.draw_inputs, static_argnums=0)
_velocity = jax.jit(pi0.velocity, static_argnums=0)
_step = jax.jit(step.distill_step, static_argnums=0)
_norms = jax.jit(step.loss_gradient_norms, static_argnums=0)
_init = jax.jit(step.init_state, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _losses(spec, teacher_params, state, key, batch):
    """The losses alone, so that no backward pass is compiled."""
    _, metrics = step.distill_step(spec, teacher_params, state, key, batch)
    return {name: value for name, value in metrics.items() if "norm" not in name}


@pytest.fixture(scope="module")
def result(setting):
    spec, teacher, state, batch = setting
    return _step(spec, teacher, state, KEY, batch)


@pytest.fixture(scope="module")
def norms(setting):
    """Of four microbatches; the tests compare them with steps of the whole batch."""
    spec, *given = setting
    return _norms(dataclasses.replace(spec, accumulation=4), *given[:2], KEY, given[2])


@pytest.fixture(scope="module")
def without_attention(setting):
    """A step of the other two losses that also averages, and is given its state to keep."""
    spec, teacher, state, batch = setting
    spec = dataclasses.replace(_with(spec, attention=0.0), ema_decay=0.75)
    start = _init(spec, state.params)
    run = jax.jit(functools.partial(step.distill_step, spec), donate_argnums=1)
    before = jax.tree.map(np.array, (state.params, teacher))
    return run(teacher, start, KEY, batch)[0], before


def _with(spec, **weights):
    return dataclasses.replace(spec, losses=dataclasses.replace(spec.losses, **weights))


def _update(new, old):
    """The gradient, from the update SGD made of it."""
    return jax.tree.map(
        lambda a, b: np.subtract(*map(np.asarray, (b, a))) / 0.1, new.params, old.params
    )


def _norm(tree):
    return np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree)))


def _assert_close(actual, expected, atol=1e-5):
    expected = weights.leaves(expected)
    for path, leaf in weights.leaves(actual).items():
        scale = max(1.0, float(np.abs(expected[path]).max()))
        np.testing.assert_allclose(leaf / scale, expected[path] / scale, atol=atol, err_msg=path)


def test_the_loss_is_the_weighted_sum_of_the_three(result):
    _, metrics = result
    parts = [float(metrics[f"{name}_loss"]) for name in ("task", "velocity", "attention")]
    assert min(parts) > 1e-3
    np.testing.assert_allclose(metrics["loss"], np.dot([1.0, 0.5, 2.0], parts), rtol=1e-5)


def test_the_attention_loss_is_in_the_loss_and_its_weight_counts(
    setting, result, without_attention, norms
):
    """Released code ignored it. Its share of the gradient is the rest when its weight is 0."""
    full, without = (_update(new, setting[2]) for new in (result[0], without_attention[0]))
    difference = jax.tree.map(np.subtract, full, without)
    assert _norm(difference) > 1e-3
    expected = norms["grad_norm_of/attention_loss"]
    np.testing.assert_allclose(_norm(difference), expected, rtol=1e-3)
    # Of the tower it moves what makes the compared layer's queries and keys, and nothing after.
    queries = difference["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum_1"]["w"]
    assert np.abs(queries[0]).max() > 1e-4
    np.testing.assert_allclose(queries[1], 0.0, atol=1e-5)


def test_no_gradient_reaches_the_teacher(setting):
    spec, teacher, state, batch = setting

    @jax.jit
    @jax.grad
    def gradient(teacher):
        return step.distill_step(spec, teacher, state, KEY, batch)[1]["loss"]

    for path, leaf in weights.leaves(gradient(teacher)).items():
        np.testing.assert_array_equal(leaf, 0.0, path)


def test_every_student_parameter_trains_that_can(setting, result):
    """Nothing reads the prefix's final norm, and softmax undoes a bias common to all keys."""
    update = weights.leaves(_update(result[0], setting[2]))
    idle = {path for path, leaf in update.items() if np.abs(leaf).max() < 1e-6}
    block = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0"
    assert idle == {"PaliGemma/llm/final_norm/scale", f"{block}/key/bias"}


def test_a_step_repeats_for_its_number_and_differs_for_the_next(setting, result):
    spec, teacher, state, batch = setting
    again, metrics = _step(spec, teacher, state, KEY, batch)
    jax.tree.map(np.testing.assert_array_equal, (again, metrics), result)
    assert int(again.step) == 1
    later = dataclasses.replace(state, step=jnp.int32(1))
    assert _step(spec, teacher, later, KEY, batch)[1]["task_loss"] != metrics["task_loss"]
    other = _step(spec, teacher, state, jax.random.key(6), batch)[1]
    assert other["task_loss"] != metrics["task_loss"]


def test_inputs_are_openpi_s_for_one_draw(setting):
    """preprocess, noise and time keys in this order; shapes (b, ah, ad) and (b,)."""
    spec, _, _, batch = setting
    inputs = _draw(spec, KEY, batch)
    _, noise_key, time_key = jax.random.split(KEY, 3)
    noise = jax.random.normal(noise_key, (8, 5, 6))
    t = jax.random.beta(time_key, 1.5, 1, (8,)) * 0.999 + 0.001
    np.testing.assert_allclose(inputs.t[:, 0], t, rtol=1e-6)
    x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * batch.actions
    np.testing.assert_allclose(inputs.x_t[:, 0], x_t, atol=1e-5)
    np.testing.assert_allclose(inputs.u[:, 0], noise - batch.actions, atol=1e-5)


def test_draws_differ_and_share_their_observation(setting):
    spec, _, _, batch = setting
    several = dataclasses.replace(spec, draws=4)
    inputs = _draw(several, KEY, batch)
    assert inputs.x_t.shape == (8, 4, 5, 6)
    assert inputs.action_mask.shape == (8, 4, 5)
    assert len(np.unique(inputs.t)) == 32
    noise = inputs.u + batch.actions[:, None]
    assert len(np.unique(np.round(np.asarray(noise), 4))) > 0.9 * noise.size
    # Every draw is a path to the same data: x_t − t·u = a.
    data = inputs.x_t - inputs.t[..., None, None] * inputs.u
    np.testing.assert_allclose(data, np.repeat(batch.actions[:, None], 4, 1), atol=1e-5)


def test_augmentation_is_drawn_once_and_seen_by_both(setting):
    """A student that is the teacher has no velocity or attention loss, whatever was drawn."""
    spec, teacher, _, batch = setting
    spec = dataclasses.replace(
        spec,
        student=spec.teacher,
        layer_map=layer_map.uniform(3, 3),
        augmentation=observations.Augmentation(),
        draws=2,
    )
    metrics = _losses(spec, teacher, _init(spec, teacher), KEY, batch)
    np.testing.assert_allclose(metrics["velocity_loss"], 0.0, atol=1e-8)
    np.testing.assert_allclose(metrics["attention_loss"], 0.0, atol=1e-6)
    np.testing.assert_allclose(metrics["velocity_cosine"], 1.0, atol=1e-5)
    np.testing.assert_allclose(metrics["task_loss"], metrics["teacher_task_loss"], rtol=1e-5)
    plain = dataclasses.replace(spec, augmentation=observations.NO_AUGMENTATION)
    varied, still = _draw(spec, KEY, batch), _draw(plain, KEY, batch)
    np.testing.assert_array_equal(varied.x_t, still.x_t)
    images = (x.observation.images["base_0_rgb"] for x in (varied, still))
    assert np.abs(np.subtract(*images)).max() > 0.1


def test_without_a_teacher_the_step_is_the_task_loss_alone(setting, without_attention, norms):
    """Beside it the velocity loss has the rest of the gradient of both."""
    spec, _, state, batch = setting
    task = losses.Losses(task=1.0, velocity=0.0, attention=0.0)
    alone = dataclasses.replace(spec, losses=task, teacher=None, layer_map=None)
    new_state, metrics = _step(alone, None, state, KEY, batch)
    np.testing.assert_allclose(metrics["grad_norm"], norms["grad_norm_of/task_loss"], rtol=1e-4)
    both, own = (_update(new, state) for new in (without_attention[0], new_state))
    rest = _norm(jax.tree.map(np.subtract, both, own))
    np.testing.assert_allclose(rest, norms["grad_norm_of/velocity_loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], metrics["task_loss"])
    assert not {"velocity_loss", "attention_loss", "teacher_task_loss"} & metrics.keys()


def test_the_average_follows_and_donation_leaves_the_teacher_alone(setting, without_attention):
    _, teacher, state, _ = setting
    new_state, (kept, teacher_before) = without_attention
    expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * np.asarray(p), kept, new_state.params)
    _assert_close(new_state.ema_params, expected, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, (state.params, teacher), (kept, teacher_before))
    assert state.ema_params is None


def test_a_state_shares_no_array_with_what_it_was_made_of(setting):
    given = {"bias": jnp.ones(3)}
    state = step.init_state(dataclasses.replace(setting[0], ema_decay=0.75), given)
    trees = (given, state.params, state.ema_params)
    assert len({tree["bias"].unsafe_buffer_pointer() for tree in trees}) == 3


def test_a_state_is_float32_whatever_it_was_cut_from(setting):
    spec, _, state, _ = setting
    low = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), state.params)
    state = jax.eval_shape(functools.partial(step.init_state, spec), low)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_gradient_norms_of_the_parts_make_the_whole(setting, result):
    _, metrics = result
    parts = ("vision", "embedder", "backbone", "expert", "projections")
    norms = [float(metrics[f"grad_norm/{part}"]) for part in parts]
    assert min(norms) > 0
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(norms), rtol=1e-5)
    gradient = _update(result[0], setting[2])
    np.testing.assert_allclose(metrics["grad_norm"], _norm(gradient), rtol=1e-3)
    expert = [x for path, x in weights.leaves(gradient).items() if "_1/" in path and "llm" in path]
    np.testing.assert_allclose(metrics["grad_norm/expert"], _norm(expert), rtol=1e-3)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1)


def test_gradient_norms_of_the_losses_are_named_and_obey_the_triangle(norms, result):
    names = {f"grad_norm_of/{name}_loss" for name in ("task", "velocity", "attention")}
    assert set(norms) == names
    assert result[1]["grad_norm"] <= sum(norms.values())


def test_a_given_attention_layer_is_compared_with_its_source(setting):
    spec = setting[0]
    assert spec.attention_layers == (0, 0)
    assert _with(spec, attention_layer=1).attention_layers == (1, 2)


def test_a_batch_that_does_not_divide_raises(setting):
    spec, teacher, state, batch = setting
    with pytest.raises(ValueError, match=r"batch of 8 does not divide into accumulation = 3"):
        _step(dataclasses.replace(spec, accumulation=3), teacher, state, KEY, batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 0, "num_steps": 0}, "at least 1, got draws 0, num_steps 0"),
        ({"accumulation": 0}, "at least 1, got accumulation 0"),
        ({"teacher": None}, "a layer map names layers of a teacher, and there is none"),
        ({"teacher": None, "layer_map": None}, "velocity 0.5, --losses.attention 2.0; give one"),
        (
            {"teacher": None, "layer_map": None, "losses": TASK, "freeze": ("vision",)},
            "freeze vision keeps parts of a teacher, and there is none",
        ),
        ({"losses": losses.Losses(attention_layer=2)}, r"must be -1 or one of 0, 1, .* got 2"),
    ],
)
def test_a_bad_spec_raises(changes, message, setting):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(setting[0], **changes)


def test_teacher_and_student_of_two_models_raise(setting, tiny_config):
    other = tiny_config(cameras=("base_0_rgb",), depth=2, action_horizon=4, vocab_size=33)
    with pytest.raises(ValueError, match=r"vocab_size \(32 and 33\), action_horizon \(5 and 4\)"):
        dataclasses.replace(setting[0], student=other)
    low = tiny_config(cameras=("base_0_rgb",), depth=2, dtype="bfloat16")
    assert dataclasses.replace(setting[0], student=low).student.dtype == "bfloat16"
