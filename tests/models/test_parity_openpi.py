"""Our models against numbers recorded from openpi itself (see tests/parity.py and its recorder)."""

import pathlib

import numpy as np
import parity
import pytest

RECORDED = pathlib.Path(__file__).with_name("openpi_parity.npz")


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED) as file:
        return dict(file)


@pytest.mark.parametrize("name", parity.MODELS)
def test_embeddings_tower_loss_and_actions_are_openpis(name, recorded):
    config = parity.MODELS[name]
    found = parity.ours(config)
    expected = {path.partition("/")[2]: x for path, x in recorded.items() if path.startswith(name)}
    assert set(found) == set(expected)
    parity.compare(config, found, expected)


def test_the_file_is_small_and_has_no_model_too_many(recorded):
    assert RECORDED.stat().st_size < 1_000_000
    assert {path.partition("/")[0] for path in recorded} == set(parity.MODELS)


def test_a_difference_beyond_the_tolerance_is_seen(recorded):
    name, config = next(iter(parity.MODELS.items()))
    expected = {"loss": recorded[f"{name}/loss"]}
    parity.compare(config, expected, expected)
    with pytest.raises(AssertionError, match="loss"):
        parity.compare(config, {"loss": expected["loss"] * (1 + 2e-4)}, expected)
