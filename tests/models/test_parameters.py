"""The table of parameters against the modules' tree; test_pi0 writes out paths and shapes."""

import functools

import jax
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.models import parameters, pi0


@pytest.mark.parametrize(("pi05", "scored"), [(False, 0), (True, 0), (True, 2)])
def test_a_fresh_model_has_the_leaves_of_the_table(tiny_config, pi05, scored):
    config = tiny_config(pi05=pi05, scored_tokens=scored)
    fresh = jax.eval_shape(functools.partial(pi0.init, config), jax.random.key(0))
    assert weights.leaves(fresh) == weights.leaves(pi0.abstract_params(config))


@pytest.mark.parametrize(
    ("path", "stack"),
    [
        ("PaliGemma/llm/layers/mlp_1/linear", "layers"),
        ("PaliGemma/llm/layers/pre_ffw_norm_1/Dense_0/kernel", "layers"),
        ("opt_state/0/mu/PaliGemma/llm/layers/mlp/linear", "layers"),
        ("PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel", "image_layers"),
        ("PaliGemma/llm/final_norm_1/Dense_0/kernel", None),
        ("PaliGemma/llm/embedder/input_embedding", None),
        ("action_in_proj/kernel", None),
        ("layers/PaliGemma/llm", None),
    ],
)
def test_a_leaf_is_stacked_by_its_path(path, stack):
    assert parameters.stack(path) == stack


def test_a_path_is_found_from_a_whole_name():
    assert parameters.find("ema/action_in_proj/kernel").inputs == ("action_dim",)
    assert parameters.find("my_action_in_proj/kernel") is None


def test_matrices_are_counted_without_vectors(tiny_config):
    """By hand: two 16 × 16 matrices in π0.5's time MLP."""
    sizes = pi0.axis_sizes(tiny_config())
    assert parameters.count(sizes, "time_mlp_in", "time_mlp_out") == 2 * 16 * 16


@pytest.mark.parametrize(
    ("path", "deviation"),
    [
        # lecun: fan-in⁻¹ᐟ²; xavier, uniform: (2 / (fan-in + fan-out))¹ᐟ².
        ("PaliGemma/llm/layers/attn/attn_vec_einsum/w", 1024**-0.5),
        ("PaliGemma/llm/layers/attn/q_einsum/w", 512**-0.5),
        ("PaliGemma/img/embedding/kernel", (4 * 4 * 3) ** -0.5),
        (f"{parameters.ENCODER}/MultiHeadDotProductAttention_0/out/kernel", (2 / 512) ** 0.5),
        ("PaliGemma/llm/embedder/input_embedding", 512**-0.5),
        ("time_mlp_in/bias", 0.0),
    ],
)
def test_a_fresh_leaf_has_the_deviation_of_its_initialiser(path, deviation):
    sizes = {"heads": 8, "head_dim": 128, "width": 512, "vocab": 64, "time_hidden": 9}
    sizes |= {"patch_height": 4, "patch_width": 4, "colours": 3, "image_width": 256}
    sizes |= {"image_heads": 4, "image_head_dim": 64}
    leaf = parameters.find(path)
    drawn = leaf.initializer()(jax.random.key(0), leaf.layer_shape(sizes))
    np.testing.assert_allclose(np.std(drawn), deviation, rtol=0.02)
