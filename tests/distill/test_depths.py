"""Students whose backbone, expert and image tower have depths of their own."""

import dataclasses
import functools

import float64
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import layer_table, layers, pi0, siglip
from shallow_pi.training import config

KEY = jax.random.key(5)
KV, WHOLE, ABSENT = "keys_values", "whole", "absent"
# Backbone: 0 whole, 2 keys and values; expert: 0 and 2; layer 1 in the backbone alone.
UNEVEN = {"backbone_layers": (WHOLE, WHOLE, KV), "expert_layers": (WHOLE, ABSENT, WHOLE)}


@pytest.fixture(scope="module")
def teacher(tiny_config, tiny_params):
    image = siglip.SiglipConfig(width=20, depth=3, mlp_dim=36, num_heads=2, patch_size=12)
    config = tiny_config(depth=4, image=image)
    return config, tiny_params(config)


@pytest.fixture(scope="module")
def spec(teacher):
    """All losses, of a student cut in the three directions."""
    small = dataclasses.replace(teacher[0].image, depth=2)
    return specs.Spec(
        student=dataclasses.replace(
            pi0.at_depth(teacher[0], 3), image=small, pooled_tokens=2, **UNEVEN
        ),
        optimizer=optax.adamw(0.1, weight_decay=1e-3),
        schedule=optax.constant_schedule(0.1),
        losses=losses.Losses(velocity=0.5, attention=2.0, reflow=1.5),
        teacher=teacher[0],
        layer_map=layer_map.explicit((0, 1, 3), 4),
        ema_decay=0.5,
        execution=layers.Execution(remat="dots"),
    )


@pytest.fixture(scope="module")
def cut(spec, teacher):
    made = functools.partial(student.cut, layer_map=spec.layer_map, student_config=spec.student)
    return jax.jit(made, static_argnums=0)(*teacher)


_step = jax.jit(step.distill_step, static_argnums=0)
_init = jax.jit(step.init_state, static_argnums=0)
_draw = jax.jit(step.draw_inputs, static_argnums=0)


@pytest.fixture(scope="module")
def result(spec, teacher, cut, tiny_batch):
    return _step(spec, teacher[1], _init(spec, cut), KEY, tiny_batch(teacher[0]))


def _lacks(config, path, layer):
    path = path.removeprefix("params/")
    inside = path.startswith("PaliGemma/llm/layers/")
    return inside and not layer_table.has(config.layers[layer], path)


def test_the_cut_takes_the_halves_of_the_table_and_zeros_the_others(teacher, cut):
    source, found = weights.leaves(teacher[1]), weights.leaves(cut)
    at = "PaliGemma/llm/layers/{}/w"
    kept = {
        "attn/kv_einsum": (0, 1, 3),
        "attn/q_einsum": (0, 1, None),
        "attn/attn_vec_einsum": (0, 1, None),
        "attn/q_einsum_1": (0, None, 3),
        "attn/kv_einsum_1": (0, None, 3),
    }
    for name, indices in kept.items():
        for i, index in enumerate(indices):
            leaf = source[at.format(name)]
            expected = np.zeros(leaf.shape[1:]) if index is None else leaf[index]
            np.testing.assert_array_equal(found[at.format(name)][i], expected, f"{name} {i}")
    block = "PaliGemma/img/Transformer/encoderblock/LayerNorm_0/scale"
    np.testing.assert_array_equal(found[block], source[block][np.array([0, 2])])


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_cut_halves_of_zeros_compute_the_same_in_whole_layers(
    pi05, tiny_config, tiny_params, tiny_observation
):
    """So openpi, whose layers are all whole, computes the student's function."""
    config = tiny_config(pi05=pi05, **UNEVEN)
    params = layer_table.zero_cut(config.layers, tiny_params(config))
    given = tiny_observation(config), jnp.ones((2, 5, 6)), jnp.array([0.2, 0.7])
    run = jax.jit(pi0.velocity, static_argnums=0, static_argnames="attention_layer")
    own, own_map = run(config, params, *given, attention_layer=2)
    expected, expected_map = run(pi0.at_depth(config, 3), params, *given, attention_layer=2)
    np.testing.assert_allclose(own, expected, atol=2e-6)
    np.testing.assert_allclose(own_map.logits, expected_map.logits, atol=2e-5)
    filled, _ = run(config, tiny_params(config), *given)
    np.testing.assert_array_equal(filled, run(config, params, *given)[0])
    assert np.abs(own - run(pi0.at_depth(config, 3), tiny_params(config), *given)[0]).max() > 1e-2


def test_hidden_states_of_cut_layers_pass_unchanged(tiny_config, tiny_params, tiny_observation):
    config = tiny_config(**UNEVEN)
    given = tiny_observation(config), jnp.ones((2, 5, 6)), jnp.array([0.2, 0.7])
    hidden = jax.jit(pi0.hidden_states, static_argnums=0)(config, tiny_params(config), *given)
    moved = [[bool((s[i] != s[i + 1]).any()) for i in range(3)] for s in hidden]
    assert moved == [[True, True, False], [True, False, True]]


def test_a_step_leaves_cut_halves_zero_and_moves_everything_else(spec, cut, result):
    state, _ = result
    for tree in (state.params, state.ema_params):
        for path, leaf in weights.leaves(tree).items():
            before = weights.leaves(cut)[path]
            if not path.startswith("PaliGemma/llm/layers/"):
                continue
            for i in range(3):
                if _lacks(spec.student, path, i):
                    assert not np.any(leaf[i]), path
                elif "Dense" not in path and not (
                    path.startswith("PaliGemma/llm/layers/mlp/") and i == 1
                ):
                    assert np.any(leaf[i] != before[i]), (path, i)
    block = "PaliGemma/img/Transformer/encoderblock/LayerNorm_0/scale"
    assert np.any(weights.leaves(state.params)[block] != weights.leaves(cut)[block])


def test_a_step_is_that_of_float64(spec, teacher, cut, result, tiny_batch):
    """Every loss and the gradient, which Adam's first moment is a tenth of."""
    assert spec.losses.vision == 1.0
    inputs = _draw(spec, jax.random.fold_in(KEY, 0), tiny_batch(teacher[0]))
    gradient = jax.tree.map(lambda leaf: 10 * leaf, result[0].opt_state[0].mu)
    float64.check(spec, teacher[1], cut, inputs, result[1], gradient)


def test_microbatches_give_the_same_vision_loss(spec, teacher, cut, result, tiny_batch):
    alone = losses.Losses(task=1.0, velocity=0.0, attention=0.0)
    halved = dataclasses.replace(spec, losses=alone, accumulation=2)
    state = _init(spec, cut)
    _, metrics = _step(halved, teacher[1], state, KEY, tiny_batch(teacher[0]))
    np.testing.assert_allclose(metrics["vision_loss"], result[1]["vision_loss"], rtol=1e-5)


def test_the_vision_loss_is_off_where_the_tower_is_whole(spec, teacher):
    whole = dataclasses.replace(spec.student, image=teacher[0].image)
    plain = dataclasses.replace(spec, student=whole, losses=losses.Losses(0.0, 0.0, 1.0))
    assert plain.losses.vision == 0.0
    with pytest.raises(ValueError, match=r"--student.freeze vision keeps the"):
        dataclasses.replace(spec, freeze=("vision",))


@pytest.mark.parametrize(
    ("expert", "pair"),
    [((0, 1, 2, 3, 4, 5), (2, 7)), ((0, 5), (0, 0)), ((1, 3, 5), (3, 10)), ((5,), (5, 17))],
)
def test_attention_is_compared_at_the_middle_layer_of_the_expert(expert, pair, spec, tiny_config):
    """Student layer and its source among 0 3 7 10 14 17."""
    columns = layer_map.halves(6, range(6), expert)
    model = tiny_config(depth=6, backbone_layers=columns[0], expert_layers=columns[1])
    found = dataclasses.replace(
        spec, student=model, teacher=pi0.at_depth(model, 18), layer_map=layer_map.uniform(6, 18)
    )
    assert found.attention_layers == pair


@pytest.mark.parametrize(
    ("fields", "backbone", "expert"),
    [
        ({}, (), ()),
        ({"backbone_depth": 2}, (WHOLE, KV, KV, KV, WHOLE, KV), ()),
        ({"expert_depth": 4}, (), (WHOLE, ABSENT, WHOLE, WHOLE, ABSENT, WHOLE)),
        ({"backbone_depth": 1, "expert_depth": 4}, (WHOLE, KV, KV, KV), ()),
        (
            {"layers": (0, 3, 7), "backbone_layers": (0, 3), "expert_layers": (0, 7)},
            (WHOLE, WHOLE, KV),
            (WHOLE, ABSENT, WHOLE),
        ),
    ],
)
def test_flags_make_the_layer_table(fields, backbone, expert):
    found = config.StudentConfig(**fields).cut(pi0.Pi0Config())
    assert (found.backbone_layers, found.expert_layers) == (backbone, expert)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layers": (0, 7), "expert_layers": (0, 3)},
            r"3 not among --student.layers 0 7: an expert layer needs its backbone layer, at least "
            "as keys and values; add it there",
        ),
        (
            {"layers": (0, 7), "strategy": "last"},
            "--student.layers 0 7 and --student.strategy last both choose the layers: give only",
        ),
        ({"layers": (0, 7), "backbone_layers": (3,)}, r"3 not among --student.layers 0 7; add it"),
        ({"layers": (0, 7), "expert_layers": (7, 7)}, "each layer once, in increasing order"),
        ({"expert_layers": (3,)}, r"3 not among --student.layers \(none\)"),
        (
            {"layers": (0, 7), "backbone_layers": (0,), "backbone_depth": 1},
            "--student.backbone-layers 0 and --student.backbone-depth say the same",
        ),
        ({"layers": (0, 7), "expert_depth": 3}, r"--student.expert-depth must lie in 1..2"),
        (
            {"layers": (0, 3, 7), "backbone_layers": (0,), "expert_layers": (0, 7)},
            "neither stream has all of --student.layers",
        ),
        (
            {"image_tokens": 100},
            r"--student.image-tokens 100: .* cannot be pooled .*: give one of 256, 128, 64, 32",
        ),
        (
            {"image_tokens": 257, "image_token_choice": "scored"},
            r"--student.image-tokens 257: a scorer chooses 1 to 256 of the 16 × 16 patches",
        ),
        ({"image_token_choice": "scored"}, "scored chooses --student.image-tokens of each camera"),
        ({"vision_depth": 28}, r"--student.vision-depth must lie in 1..27 .*, got 28"),
        ({"backbone_depth": -1}, "--student.backbone-depth must be at least 0, got -1"),
    ],
)
def test_bad_depths_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        config.StudentConfig(**fields).cut(pi0.Pi0Config())


def test_depths_without_a_teacher_raise(tiny_experiment, tmp_path):
    given = config.StudentConfig(depth=2, vision_depth=1, strategy="gate")
    with pytest.raises(ValueError, match=r"depth, --student.strategy, --student.vision-depth: the"):
        tiny_experiment(tmp_path, teacher=None, student=given)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ((WHOLE, ABSENT), ()),
            "layer 1 of the expert reads the keys and values of backbone layer 1",
        ),
        (((WHOLE, KV), (WHOLE, ABSENT)), "layer 1 has keys and values alone and no expert layer"),
        (((), (WHOLE, KV)), "layer 1 of the expert must be 'whole' or 'absent'"),
        (((WHOLE,), ()), "one entry for each of the 2 layers, got 1: whole"),
        (((WHOLE, "half"), ()), "must be made of whole, keys_values, absent, got half"),
        (((), (ABSENT, ABSENT)), "the expert must have at least one layer"),
    ],
)
def test_a_bad_layer_table_raises(columns, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        tiny_config(depth=2, backbone_layers=columns[0], expert_layers=columns[1])
