"""A model's sizes are in its parameters' shapes: what is read off is what they were made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import sizes, weights
from shallow_pi.models import gemma, pi0


def _rebuilt(stored, like):
    """A config with a checkpoint's sizes and the facts that no shape shows."""
    untold = ("action_horizon", "max_token_len", "cameras", "discrete_state_input")
    more = {name: getattr(like, name) for name in (*untold, "dtype")}
    return pi0.Pi0Config(**sizes.of(stored), **more)


@pytest.mark.parametrize("pi05", [False, True])
def test_sizes_are_those_the_parameters_were_made_with(tiny_config, pi05):
    """No two sizes of the tiny model are equal, so an exchanged pair would show."""
    config = tiny_config(pi05=pi05)
    assert _rebuilt(pi0.abstract_params(config), config) == config


@pytest.mark.parametrize(
    "model",
    [
        pi0.Pi0Config(),
        pi0.Pi0Config(pi05=True, action_horizon=15, max_token_len=200, discrete_state_input=True),
    ],
)
def test_openpis_own_sizes_are_recognised(model):
    assert _rebuilt(pi0.abstract_params(model), model) == model


def test_sizes_are_read_from_a_checkpoint_without_its_numbers(tiny_config, tiny_params, tmp_path):
    config = tiny_config()
    weights.save_params(tmp_path / "params", tiny_params(config))
    assert _rebuilt(weights.stored_params(tmp_path), config) == config


def test_a_config_takes_the_towers_and_keeps_its_decisions(tiny_config):
    """Widths are facts; kind, depth, action dimension and horizon are what the config wants."""
    stored = pi0.abstract_params(tiny_config(pi05=True, depth=2, action_dim=9))
    config = pi0.Pi0Config(dtype="float32", cameras=("base_0_rgb",))
    resolved = sizes.resolve(config, stored)
    towers = {name: getattr(tiny_config(), name) for name in sizes.TOWERS}
    assert resolved == dataclasses.replace(config, **towers)
    assert (resolved.pi05, resolved.depth, resolved.action_dim) == (False, 18, 32)
    with pytest.raises(ValueError, match=r"give --model\.depth 2"):
        weights.check_tree(pi0.abstract_params(resolved), stored, "teacher")


def test_parameters_without_sizes_leave_the_config_to_the_comparison(tiny_config):
    config = tiny_config()
    other = pi0.abstract_params(tiny_config(image_size=36))
    del other["PaliGemma"]["llm"]["embedder"]
    assert sizes.resolve(config, other) == config
    with pytest.raises(ValueError, match="missing PaliGemma/llm/embedder/input_embedding"):
        weights.check_tree(pi0.abstract_params(config), other, "teacher")


def _tree(config, path, shape):
    """The shapes of a model with one leaf replaced, or taken out."""

    def change(keys, leaf):
        if weights.path_name(keys) != path:
            return leaf
        return None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(change, pi0.abstract_params(config))


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("PaliGemma/llm/embedder/input_embedding", None, r"input_embedding .*it is missing"),
        ("action_in_proj/kernel", (6,), r"\(action_dim, expert_width\), it has the shape \(6,\)"),
        (
            "PaliGemma/llm/layers/mlp/linear",
            (4, 40, 24),
            r"layers is 3 in .*/attn/q_einsum/w and 4 in .*/mlp/linear",
        ),
        ("PaliGemma/img/pos_embedding", (1, 5, 20), "has 5 image tokens: expected a square"),
    ],
    ids=["missing", "axes", "contradiction", "oblong"],
)
def test_what_is_not_a_policy_is_named(tiny_config, path, shape, message):
    with pytest.raises(ValueError, match=message):
        sizes.of(_tree(tiny_config(), path, shape))


def test_differences_are_named_as_fields_are_set(tiny_config):
    config = tiny_config()
    wide = dataclasses.replace(config.expert, mlp_dim=72)
    other = dataclasses.replace(config, expert=wide, image_size=36)
    assert sizes.differences(config, other) == ["expert.mlp_dim 28 → 72", "image_size 24 → 36"]
    assert sizes.differences(config, config) == []


def test_sizes_are_read_off_arrays_too(tiny_config):
    arrays = jax.tree.map(lambda x: np.zeros(x.shape), pi0.abstract_params(tiny_config()))
    assert sizes.of(arrays)["backbone"] == gemma.GemmaConfig(24, 40, 4, 2, 8)
