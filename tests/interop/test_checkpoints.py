"""Checkpoints both ways: what openpi's trainer writes we read, what we write openpi restores."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
import theirs
from flax import nnx
from openpi.models import model as openpi_model
from openpi.shared import normalize as openpi_normalize
from openpi.training import checkpoints as openpi_checkpoints
from openpi.training import utils as openpi_utils

from shallow_pi.checkpoints import sizes, weights
from shallow_pi.data.robots import normalize
from shallow_pi.distill import layer_map, student
from shallow_pi.inference import sampler
from shallow_pi.models import pi0

DEPTH = 18
STATS = {
    key: {
        name: (np.arange(3) + shift).tolist()
        for shift, name in enumerate(("mean", "std", "q01", "q99"))
    }
    for key in ("state", "actions")
}


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def teacher(request, tmp_path_factory):
    """A teacher of 18 layers, and the step folder openpi's own save_state made of it.

    π0.5 is saved with a moving average, which then is what the folder holds.
    """
    config = parity.model(request.param == "pi05", DEPTH, "float32")
    params = parity.own_params(config)
    graph, state = nnx.split(theirs.model(config, params))
    averaged = request.param == "pi05"
    saved = openpi_utils.TrainState(
        step=jnp.array(1),
        params=jax.tree.map(jnp.zeros_like, state) if averaged else state,
        model_def=graph,
        opt_state=(),
        tx=optax.identity(),
        ema_decay=0.5 if averaged else None,
        ema_params=state if averaged else None,
    )
    folder = tmp_path_factory.mktemp(request.param) / "run"
    manager, _ = openpi_checkpoints.initialize_checkpoint_dir(
        folder, keep_period=None, overwrite=False, resume=False
    )
    stats = {key: openpi_normalize.NormStats(**fields) for key, fields in STATS.items()}
    data = types.SimpleNamespace(norm_stats=stats, asset_id="robot")
    loader = types.SimpleNamespace(data_config=lambda: data)
    openpi_checkpoints.save_state(manager, saved, loader, 1)
    manager.wait_until_finished()
    manager.close()
    return config, params, folder / "1"


def _load(step, config, **keywords):
    return weights.load_params(step, pi0.abstract_params(config), **keywords)


def _assert_same(found, expected):
    found, expected = weights.leaves(found), weights.leaves(expected)
    assert set(found) == set(expected)
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype, path
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_what_openpi_writes_has_value_keys_and_is_read_bit_for_bit(teacher):
    config, params, step = teacher
    stored = weights.leaves(weights.stored_shapes(step / "params"))
    assert all(path.endswith("/value") for path in stored)
    _assert_same(_load(step, config), params)
    assert sizes.of(weights.stored_params(step))["depth"] == DEPTH


def test_statistics_of_openpi_are_read(teacher):
    for key, stats in normalize.load(teacher[2] / "assets" / "robot").items():
        for name, values in STATS[key].items():
            np.testing.assert_array_equal(getattr(stats, name), values)


def test_the_whole_chain_of_an_identity_cut_changes_no_bit(teacher, tmp_path):
    config, params, step = teacher
    all_layers = layer_map.explicit(range(DEPTH), DEPTH)
    cut = student.cut(config, _load(step, config), all_layers)
    weights.save_params(tmp_path / "params", cut)
    _assert_same(openpi_model.restore_params(tmp_path / "params"), params)


def test_in_bfloat16_the_chain_rounds_once(teacher, tmp_path):
    config, params, step = teacher
    weights.save_params(tmp_path / "params", _load(step, config, dtype=jnp.bfloat16))
    rounded = theirs.in_dtype(params, "bfloat16")
    _assert_same(openpi_model.restore_params(tmp_path / "params"), rounded)
    read = openpi_model.restore_params(step / "params", dtype=jnp.bfloat16)
    _assert_same(read, rounded)


def test_six_layers_padded_act_in_openpi_as_they_do_here(teacher, tmp_path):
    config, _, step = teacher
    layers = layer_map.uniform(6, DEPTH)
    shallow = pi0.at_depth(config, layers.depth)
    cut = student.cut(config, _load(step, config), layers)
    weights.save_params(tmp_path / "params", theirs.padded(cut, layers.layers))
    deep = theirs.model(config, openpi_model.restore_params(tmp_path / "params"))
    samples, noise = parity.batch(config), jnp.asarray(parity.noise(config))
    observation = parity.observe(samples)
    sample = jax.jit(sampler.sample_actions, static_argnums=0)
    ours = np.asarray(sample(shallow, cut, observation, noise))
    expected = np.asarray(theirs.sample(deep, samples))
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 6}, "the checkpoint has 18 layers, the config 6: give --model.depth 18"),
        ({"action_dim": 7}, "the checkpoint has 16 action dimensions, the config 7"),
        ({"vocab_size": 100}, r"input_embedding: expected \(100, 64\), found \(512, 64\)"),
    ],
)
def test_a_checkpoint_of_other_sizes_is_refused(teacher, change, said):
    config, _, step = teacher
    with pytest.raises(ValueError, match=said):
        _load(step, dataclasses.replace(config, **change))


def test_a_checkpoint_of_the_other_model_is_named_as_such(teacher):
    config, _, step = teacher
    other = dataclasses.replace(config, pi05=not config.pi05)
    said = f"this is a {config.kind} checkpoint and the config says {other.kind}"
    with pytest.raises(ValueError, match=said):
        _load(step, other)


def test_missing_statistics_are_named(teacher):
    with pytest.raises(FileNotFoundError, match=r"no normalization statistics at .*elsewhere"):
        normalize.load(teacher[2] / "assets" / "elsewhere")
