"""Meta-World behind our interface: the package decides success, and its experts solve tasks."""

import pickle

import numpy as np
import pytest

from shallow_pi.sims import demonstrations, simulator

pytest.importorskip("metaworld", reason="needs the extra metaworld")

from metaworld import env_dict

from shallow_pi.sims import metaworld, metaworld_tasks


def _run(suite, sim, seed):
    sim.reset(seed)
    while not sim.done:
        sim.step(metaworld.expert(sim))


def test_every_task_of_the_package_has_an_instruction_of_its_own():
    names = {name.removesuffix("-v3") for name in env_dict.ALL_V3_ENVIRONMENTS}
    assert set(metaworld_tasks.PROMPTS) == names
    assert len(set(metaworld_tasks.PROMPTS.values())) == 50
    mt10, mt50 = (simulator.find(f"metaworld_{name}", {}) for name in ("mt10", "mt50"))
    assert [f"{name}-v3" for name in mt10.task_names()] == list(env_dict.MT10_V3)
    assert set(mt50.task_names()) == names


def test_seeds_take_the_tasks_in_turn_and_name_the_episode():
    sim = metaworld.Suite(tasks=("drawer-open", "reach")).make()
    sim.reset(4)
    first, goal = sim.true_state.copy(), sim.observe()["observation.images.base"]
    assert (sim.task, sim.prompt) == ("drawer-open", "open the drawer")
    _run(sim.config, sim, 5)
    assert sim.task == "reach"
    sim.reset(6)
    assert np.abs(sim.true_state - first).max() > 1e-3, "another place of the same drawer"
    sim.reset(4)
    np.testing.assert_array_equal(sim.true_state, first)
    np.testing.assert_array_equal(sim.observe()["observation.images.base"], goal)


def test_the_package_calls_the_experts_last_step_a_success():
    sim = metaworld.Suite(tasks=("drawer-close",)).make()
    _run(sim.config, sim, 0)
    assert sim.success
    assert sim.time == pytest.approx(sim._steps / 80)
    # The handle is where the goal is, by the package's own rule.
    assert np.linalg.norm(sim.true_state[4:7] - sim.true_state[-3:]) <= 0.05 + 0.015


def test_an_episode_without_success_ends_at_the_limit():
    sim = metaworld.Suite(tasks=("reach",), max_steps=5).make()
    sim.reset(0)
    for _ in range(5):
        assert not sim.done
        sim.step(np.array([-9.0, 0.0, 0.0, 0.0]))
    assert sim.done
    assert not sim.success


def test_an_action_is_a_centimetre_at_most_and_has_four_numbers():
    sim = metaworld.Suite(tasks=("reach",)).make()
    after = []
    for size in (1.0, 9.0):
        sim.reset(0)
        sim.step(np.array([size, 0.0, 0.0, 0.0]))
        after.append(sim.true_state[:4])
    np.testing.assert_array_equal(*after)
    with pytest.raises(ValueError, match="expected four finite numbers, got"):
        sim.step(np.zeros(7))


def test_the_goal_is_a_ball_in_the_image():
    suite = metaworld.Suite(tasks=("push",))
    sim = suite.make()
    sim.reset(4)
    red, green, blue = np.moveaxis(sim.observe()["observation.images.base"].astype(int), -1, 0)
    ball = (green > 100) & (red < 60) & (blue < 60)
    assert 3 <= ball.sum() <= 30
    goal, near = sim.true_state[-3:], sim._env.model.camera("corner2")
    seen = np.array(near.pos) - goal
    frame = sim._env.data.camera("corner2").xmat.reshape(3, 3)
    right, up, depth = (goal - near.pos) @ frame
    scale = 32 / np.tan(np.deg2rad(near.fovy[0]) / 2) / -depth
    rows, columns = np.nonzero(ball)
    assert np.linalg.norm(seen) < 1.2
    assert abs(columns.mean() + 0.5 - (32 + right * scale)) < 1
    assert abs(rows.mean() + 0.5 - (32 - up * scale)) < 1


def test_a_pickled_simulator_goes_on_where_it_was():
    sim = metaworld.Suite(tasks=("window-open",)).make()
    sim.reset(3)
    for _ in range(20):
        sim.step(metaworld.expert(sim))
    other = pickle.loads(pickle.dumps(sim))
    np.testing.assert_array_equal(other.true_state, sim.true_state)
    for _ in range(5):
        for one in (sim, other):
            one.step(metaworld.expert(one))
        # With the frame before, which the first step takes from the pickle.
        np.testing.assert_array_equal(other.true_state, sim.true_state)


def test_perturbed_demonstrations_begin_at_different_places():
    suite = metaworld.Suite(tasks=("drawer-close",), image_size=8)
    perturbed, exact = (
        [episode.vectors["observation.state"][0, :3] for episode in found]
        for found in (
            demonstrations.collect(suite, 4, seed=0, noise=0.5),
            demonstrations.collect(suite, 2, seed=0, noise=0.0),
        )
    )
    np.testing.assert_allclose(exact[0], exact[1], atol=1e-3)
    distances = np.linalg.norm(np.subtract(perturbed, exact[0]), axis=1)
    assert np.ptp(distances) > 0.05, "some begin near the package's start, some far from it"


def test_demonstrations_hold_the_experts_own_actions():
    suite = metaworld.Suite(tasks=("button-press-topdown",), image_size=16)
    (episode,) = demonstrations.collect(suite, 1, seed=0, noise=1.0)
    assert episode.task == "button-press-topdown"
    assert np.abs(episode.vectors["action"]).max() <= 1
    assert episode.vectors["action"].shape == episode.vectors["observation.state"].shape
    assert {image.shape[1:] for image in episode.images.values()} == {(16, 16, 3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "draw-open"}, r"Meta-World has no 'draw-open'.*did you mean 'drawer-open'"),
        ({"suite": "mt25"}, 'expected "mt10" or "mt50", got \'mt25\''),
        ({"view": "corner3"}, 'expected "near" or "corner2", got \'corner3\''),
        ({"max_steps": "0"}, "expected positive image_size and max_steps, got 64 and 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulator.find("metaworld_mt10", options)


@pytest.mark.slow
def test_the_experts_solve_mt10():
    suite = metaworld.Suite()
    sim = suite.make()
    solved = 0
    for seed in range(50):
        _run(suite, sim, seed)
        solved += sim.success
    assert solved >= 47
