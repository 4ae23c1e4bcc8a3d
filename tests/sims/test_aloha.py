"""Simulated ALOHA moves as gym-aloha does, and the expert solves both tasks."""

import dataclasses
import pickle

import numpy as np
import pytest

from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import simulator

pytest.importorskip("gym_aloha", reason="needs the extra aloha-sim")

from gym_aloha import utils

from shallow_pi.sims import aloha

SMALL = aloha.Suite(renderer="ray", height=48)


def test_objects_begin_where_the_package_puts_them():
    transfer, insertion = SMALL.make(), dataclasses.replace(SMALL, task="insertion").make()
    for seed in (0, 7):
        transfer.reset(seed)
        np.testing.assert_array_equal(transfer.data.qpos[16:], utils.sample_box_pose(seed))
        insertion.reset(seed)
        peg_and_socket = np.concatenate(utils.sample_insertion_pose(seed))
        np.testing.assert_array_equal(insertion.data.qpos[16:], peg_and_socket)


def test_joints_move_as_in_the_packages_environment():
    """The numbers are those of gym-aloha 0.1.5 with dm_control, which is not installed here."""
    sim = dataclasses.replace(SMALL, task="insertion").make()
    sim.reset(3)
    start, size = sim.state().astype(float), np.array(([1.0] * 6 + [2.0]) * 2)
    for step in range(60):
        sim.step(start + 0.2 * np.sin(step / 10) * size)
    arm = [-0.1244, -1.0624, 1.0687, -0.0824, -0.3935, -0.0732, 0.1010]
    np.testing.assert_allclose(sim.state(), arm * 2, atol=1e-4)
    places = [0.1551, 0.5416, 0.01, -0.1489, 0.5786, 0.022]
    np.testing.assert_allclose(sim.data.qpos[[16, 17, 18, 23, 24, 25]], places, atol=1e-4)


@pytest.mark.parametrize("task", ["transfer_cube", "insertion"])
def test_the_expert_solves_the_task_with_both_arms(task):
    suite = dataclasses.replace(SMALL, task=task)
    sim = suite.make()
    for seed in (2, 8):
        sim.reset(seed)
        rewards = []
        while not sim.done:
            sim.step(suite.expert()(sim))
            rewards.append(sim.reward())
        assert sim.success
        assert 80 < rewards.index(2) < rewards.index(4), "lifted first"
        assert sim.time == pytest.approx(len(rewards) / 50)


def test_the_expert_stays_on_its_way_when_it_is_pushed():
    suite = dataclasses.replace(SMALL, height=3, task="insertion")
    sim = suite.make()
    sim.reset(0)
    frames = list(suite.demonstrate(sim, np.random.default_rng(0), 0.5))
    assert sim.success
    sim.reset(0)
    for _ in range(60):
        sim.step(aloha.expert(sim))
    apart = np.abs(frames[60][0]["observation.state"] - sim.state())
    assert 0.001 < apart.max() < 0.1, "radians"


def test_time_is_up_after_the_packages_limit():
    sim = dataclasses.replace(SMALL, max_steps=3).make()
    sim.reset(0)
    for _ in range(3):
        assert not sim.done
        sim.step(sim.state())
    assert sim.done
    assert not sim.success
    with pytest.raises(ValueError, match="expected 14 finite numbers"):
        sim.step(np.zeros(7))


def test_observations_are_those_of_the_robot():
    for task, prompt in aloha.PROMPTS.items():
        suite = dataclasses.replace(SMALL, task=task)
        simulator.check_robot(suite, robots.ALOHA_SIM)
        sim = suite.make()
        sim.reset(0)
        observation = sim.observe()
        assert observation["task"] == suite.robot.prompt == prompt
        assert observation["observation.state"].shape == (14,)
        image = observation["observation.images.top"].astype(int)
        assert image.shape == (48, 64, 3)
        red = (image[..., 0] > 100) & (image[..., 1:].max(-1) < 50)
        assert red.sum() >= 2, "the cube, or the peg"


def test_a_pickled_simulator_goes_on_where_it_was():
    sim = SMALL.make()
    sim.reset(1)
    for _ in range(10):
        sim.step(aloha.expert(sim))
    other = pickle.loads(pickle.dumps(sim))
    for one in (sim, other):
        one.step(aloha.expert(one))
    np.testing.assert_array_equal(other.state(), sim.state())
    assert other.steps == 11


def test_other_tasks_do_not_exist():
    with pytest.raises(ValueError, match=r"task: expected one of .*, got 'transfer'"):
        simulator.find("aloha_transfer_cube", {"task": "transfer"})
