"""The table: a matrix does to a vector in PyTorch what its leaf does in JAX, and comes back."""

import numpy as np
import pytest

from shallow_pi.checkpoints import safetensors_layout as layout
from shallow_pi.checkpoints import weights
from shallow_pi.models import pi0

RULES = {rule.parameter.path: rule for rule in layout.RULES}
TOWER = "PaliGemma/llm/layers/"
BLOCK = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/"


def _normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape)


@pytest.mark.parametrize("pi05", [False, True])
def test_every_leaf_has_one_rule_and_every_tensor_one_leaf(tiny_config, pi05):
    expected = weights.leaves(pi0.abstract_params(tiny_config(pi05=pi05)))
    assert not set(expected) - set(RULES)
    names = [name for path in expected for name in RULES[path].names]
    assert len(names) == len(set(names))
    assert len(RULES) == len(layout.RULES)


# torch.nn.Linear computes x @ weight.T; each row is the leaf's own einsum in the model, over one
# token, and PyTorch flattens or splits heads around its matrix.
@pytest.mark.parametrize(
    ("path", "shape", "einsum"),
    [
        (TOWER + "attn/q_einsum/w", (4, 6, 8), "d,ndh->nh"),
        (TOWER + "attn/kv_einsum_1/w", (2, 6, 8), "d,kdh->kh"),
        (TOWER + "attn/attn_vec_einsum/w", (4, 8, 6), "nh,nhd->d"),
        (TOWER + "mlp/gating_einsum", (6, 10), "d,df->f"),
        (TOWER + "mlp_1/linear", (10, 6), "f,fd->d"),
        (TOWER + "pre_ffw_norm_1/Dense_0/kernel", (6, 18), "i,io->o"),
        (BLOCK + "query/kernel", (6, 2, 5), "w,wme->me"),
        (BLOCK + "out/kernel", (2, 5, 6), "me,mew->w"),
        ("action_in_proj/kernel", (3, 6), "i,io->o"),
    ],
)
def test_a_matrix_acts_as_its_leaf(path, shape, einsum):
    leaf = _normal(*shape)
    inputs, _, rest = einsum.partition(",")
    sizes = dict(zip(rest.partition("->")[0], shape, strict=True))
    x = _normal(*(sizes[letter] for letter in inputs))
    tensor = RULES[path].tensor(leaf)
    assert tensor.flags.c_contiguous
    np.testing.assert_allclose(x.ravel() @ tensor.T, np.einsum(einsum, x, leaf).ravel())


def test_the_patch_embedding_convolves_the_same_patch():
    """torch.nn.Conv2d: weight (out, in, rows, columns) over an image (in, rows, columns)."""
    kernel, patch = _normal(4, 4, 3, 6), _normal(4, 4, 3)
    weight = RULES["PaliGemma/img/embedding/kernel"].tensor(kernel)
    assert weight.shape == (6, 3, 4, 4)
    convolved = np.einsum("oiyx,iyx->o", weight, patch.transpose(2, 0, 1))
    np.testing.assert_allclose(convolved, np.einsum("yxi,yxio->o", patch, kernel))


@pytest.mark.parametrize("path", sorted(RULES))
def test_a_tensor_goes_back_to_its_leaf(path):
    rule = RULES[path]
    known = {"one": 1, "kv_heads": 2, "image_heads": 3, "head_dim": 4}
    leaf = _normal(*(known.get(axis, 5 + i) for i, axis in enumerate(rule.axes)))
    np.testing.assert_array_equal(rule.part(rule.tensor(leaf), known), leaf)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (
            "paligemma_with_expert.paligemma.model.language_model.layers.{}.self_attn.v_proj.weight",
            TOWER + "attn/kv_einsum/w",
        ),
        (
            layout.IMAGES + "encoder.layers.{}.mlp.fc2.bias",
            "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_1/bias",
        ),
        (
            "paligemma_with_expert.gemma_expert.model.layers.{}.input_layernorm.dense.weight",
            TOWER + "pre_attention_norm_1/Dense_0/kernel",
        ),
        (layout.EXPERT + "norm.weight", "PaliGemma/llm/final_norm_1/scale"),
        (layout.PALIGEMMA + "multi_modal_projector.linear.bias", "PaliGemma/img/head/bias"),
        ("action_time_mlp_in.weight", "action_time_mlp_in/kernel"),
    ],
)  # fmt: skip
def test_names_are_those_of_openpis_classes(name, path):
    assert name in RULES[path].names


@pytest.mark.parametrize("shape", [(10, 6), (32,), (4, 8, 6)])
def test_a_tensor_that_does_not_split_into_heads_is_an_error(shape):
    rule = RULES[TOWER + "attn/q_einsum/w"]
    with pytest.raises(
        ValueError, match=r"q_proj\.weight has shape .*(split into heads × head_dim|dimensions)"
    ):
        rule.sizes(shape, {"one": 1, "kv_heads": 1, "head_dim": 8})
