"""The cut: which leaves are gathered, which are copied, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map, student
from shallow_pi.models import pi0, siglip

LAYERS = "PaliGemma/llm/layers/"
_cut = jax.jit(student.cut, static_argnums=(0, 2))


@pytest.fixture(scope="module")
def teacher(tiny_config, tiny_params):
    """Its image encoder has as many layers as its tower: shapes cannot tell them apart."""
    image = siglip.SiglipConfig(width=20, depth=5, mlp_dim=36, num_heads=2, patch_size=12)
    config = tiny_config(depth=5, image=image)
    return config, tiny_params(config)


@pytest.fixture(scope="module")
def cut(teacher):
    config, params = teacher
    return _cut(config, params, layer_map.explicit((0, 3, 4), 5))


def test_backbone_and_expert_take_the_same_layers_bit_for_bit(teacher, cut):
    """Released code gave the expert layers 0 3 7 …, the backbone 0 1 2 …."""
    source, result = weights.leaves(teacher[1]), weights.leaves(cut)
    gathered = [path for path in source if path.startswith(LAYERS)]
    assert len(gathered) == 14
    assert sum("_1" in path for path in gathered) == 7
    for path in gathered:
        np.testing.assert_array_equal(result[path], np.asarray(source[path])[[0, 3, 4]], path)


def test_leaves_are_told_apart_by_path_not_by_digits_or_shape(teacher, cut):
    """The encoder's own layer axis, Dense_0, LayerNorm_1 and final_norm_1 are copied whole."""
    source, result = weights.leaves(teacher[1]), weights.leaves(cut)
    copied = [path for path in source if not path.startswith(LAYERS)]
    assert any("encoderblock/MlpBlock_0/Dense_0" in path for path in copied)
    assert {p for p in copied if source[p].shape[0] == 5 and "encoderblock" in p}
    for path in copied:
        np.testing.assert_array_equal(result[path], source[path], path)
    assert source.keys() == result.keys()


def test_all_layers_give_exactly_the_teacher(teacher):
    config, params = teacher
    whole = _cut(config, params, layer_map.uniform(5, 5))
    jax.tree.map(np.testing.assert_array_equal, whole, params)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_a_student_is_a_teacher_whose_other_layers_are_zero(
    pi05, tiny_config, tiny_params, tiny_observation
):
    """Zero output projections leave both streams as they are, so the two velocities are equal."""
    config = tiny_config(pi05=pi05)
    params, observation = tiny_params(config), tiny_observation(config)
    shallow = _cut(config, params, layer_map.explicit((0, 2), 3))
    padded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.at[1].set(0.0) if weights.path_name(path).startswith(LAYERS) else leaf
        ),
        params,
    )
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    x_t, t = jnp.ones((2, 5, 6)), jnp.array([0.2, 0.7])
    v, _ = velocity(pi0.at_depth(config, 2), shallow, observation, x_t, t)
    expected, _ = velocity(config, padded, observation, x_t, t)
    np.testing.assert_allclose(v, expected, atol=1e-6)
    full, _ = velocity(config, params, observation, x_t, t)
    assert np.abs(v - full).max() > 1e-2


def test_a_cut_keeps_the_teacher_s_dtype(teacher):
    config, params = teacher
    low = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    result = jax.eval_shape(lambda low: student.cut(config, low, layer_map.first(2, 5)), low)
    assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(jnp.bfloat16)}


def test_a_map_for_another_teacher_raises(teacher):
    with pytest.raises(ValueError, match=r"for a teacher of 18 layers, this one has 5"):
        student.cut(*teacher, layer_map.uniform(6, 18))


def test_a_missing_extra_or_misshapen_leaf_raises_by_name(teacher):
    config, params = teacher
    kept = layer_map.first(2, 5)
    without = {name: tree for name, tree in params.items() if name != "state_proj"}
    with pytest.raises(ValueError, match=r"missing state_proj/kernel"):
        student.cut(config, without, kept)
    with pytest.raises(ValueError, match=r"extra adapter/kernel"):
        student.cut(config, params | {"adapter": {"kernel": jnp.ones(3)}}, kept)
    wrong = params | {"action_in_proj": params["action_in_proj"] | {"bias": jnp.ones(17)}}
    with pytest.raises(ValueError, match=r"action_in_proj/bias.*\(16,\).*\(17,\)"):
        student.cut(config, wrong, kept)


def test_a_teacher_s_file_given_as_the_student_raises(teacher, tmp_path):
    """Released code read such a file's first layers without a word, and nothing at a wrong path."""
    config, params = teacher
    weights.save_params(tmp_path / "teacher" / "params", params)
    expected = pi0.abstract_params(pi0.at_depth(config, 2))
    load = functools.partial(weights.load_params, expected=expected)
    with pytest.raises(ValueError, match="5") as error:
        load(tmp_path / "teacher")
    assert "layers" in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        load(tmp_path / "student")
