"""Configs that say "as in openpi" have the values of the openpi that is installed."""

import dataclasses
import pathlib

import pytest
import stand_ins

stand_ins.install()

# ruff: noqa: E402 (openpi comes after the stand-ins)
import numpy as np
from openpi.training import config as openpi_config

from shallow_pi.interop import openpi_configs
from shallow_pi.training import command_line

CONFIGS = pathlib.Path(__file__).parents[2] / "train_configs"
# Our config → openpi's config of its teacher. openpi's pi0_aloha is for inference: its robot and
# assets are those of pi0_aloha_l6.
TEACHERS = {
    "pi0_aloha_l6": "pi0_aloha",
    "pi0_aloha_sim_l6": "pi0_aloha_sim",
    "pi0_libero_l6": "pi0_libero",
    "pi05_libero_l6": "pi05_libero",
    "pi05_libero_l9": "pi05_libero",
    "pi05_droid_l6": "pi05_droid",
}


@pytest.mark.parametrize(("name", "teacher"), TEACHERS.items())
def test_model_robot_and_statistics_are_openpis(name, teacher):
    ours, theirs = command_line.load(CONFIGS, name), openpi_configs.experiment(teacher)
    assert ours.model == theirs.model
    assert (ours.data.robot, ours.data.asset_id) == (theirs.data.robot, theirs.data.asset_id)


@pytest.mark.parametrize("name", ["pi0_libero_l6", "pi05_libero_l6", "pi05_libero_l9"])
def test_the_learning_rate_is_openpis_at_every_step(name):
    ours, theirs = command_line.load(CONFIGS, name), openpi_config.get_config(TEACHERS[name])
    assert ours.num_train_steps == theirs.num_train_steps
    mine, other = ours.schedule.create(), theirs.lr_schedule.create()
    for step in (0, 1, 500, 1000, 9999, 10_000, 20_000, ours.num_train_steps):
        np.testing.assert_allclose(mine(step), other(step), rtol=1e-6)


def test_pi05_libero_has_openpis_batch_average_and_optimizer():
    ours, theirs = (
        command_line.load(CONFIGS, "pi05_libero_l6"),
        openpi_config.get_config("pi05_libero"),
    )
    assert (ours.batch_size, ours.ema_decay) == (theirs.batch_size, theirs.ema_decay)
    assert ours.data.path == theirs.data.repo_id
    mine = dataclasses.asdict(ours.optimizer)
    for field in ("b1", "b2", "eps", "weight_decay"):
        assert mine[field] == getattr(theirs.optimizer, field)
    assert ours.optimizer.clip_norm == theirs.optimizer.clip_gradient_norm


def test_the_simulated_aloha_has_openpis_data_and_steps():
    ours, theirs = (
        command_line.load(CONFIGS, "pi0_aloha_sim_l6"),
        openpi_config.get_config("pi0_aloha_sim"),
    )
    assert ours.num_train_steps == theirs.num_train_steps
    assert ours.data.path == theirs.data.repo_id == ours.data.asset_id
