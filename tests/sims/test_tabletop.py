"""The suite's tasks can be solved, need what they are for, and are functions of the seed."""

import pickle

import numpy as np
import pytest

from shallow_pi.sims import demonstrations, gantry, simulator, tabletop, turntable_scene


@pytest.fixture(scope="module")
def sims():
    """One simulator a task; scenes are compiled once."""
    return {task: tabletop.Suite(tasks=(task,)).make() for task in tabletop.LAYOUTS}


def _play(sim, seed, expert=tabletop.expert):
    sim.reset(seed)
    path = [sim.tip]
    while not sim.done:
        sim.step(expert(sim))
        path.append(sim.tip)
    return np.array(path)


@pytest.mark.parametrize("task", tabletop.LAYOUTS)
@pytest.mark.parametrize("start", ["usual", "elsewhere"])
def test_the_expert_solves_every_task_from_every_start(task, start):
    sim = tabletop.Suite(tasks=(task,), start=start).make()
    solved = []
    for seed in range(12):
        _play(sim, seed)
        solved.append(sim.success)
        assert sim.time < 3.5
    assert all(solved)


def test_an_episode_is_a_function_of_its_seed_alone():
    first, second = tabletop.Suite().make(), tabletop.Suite().make()
    tasks = set()
    for seed in range(12):
        second.reset(seed + 100)  # What came before, another scene perhaps, does not matter.
        np.testing.assert_array_equal(_play(first, seed), _play(second, seed))
        a, b = first.observe(), second.observe()
        assert all(np.array_equal(a[key], b[key]) for key in a)
        tasks.add(first.task)
    assert len(tasks) > 4


def test_both_ways_around_the_pillar_are_taken_and_their_mean_is_fatal(sims):
    """The coin is not in the observation: the best single plan is the mean, which collides."""
    sim = sims["around"]
    sides, collisions = set(), []
    for seed in range(12):
        paths = []
        for side in (-1, 1):

            def one_way(sim, side=side):
                sim.side = side
                return tabletop.expert(sim)

            path = _play(sim, seed, one_way)
            assert sim.success
            assert np.hypot(*(path[:, :2] - sim.pillar).T).min() > tabletop.PILLAR_RADIUS + 0.012
            paths.append(path[1 : tabletop.EXECUTE_STEPS + 1])
        sim.reset(seed)
        sides.add(sim.side)
        for target in np.mean(paths, axis=0):
            sim.step(target)
        collisions.append(sim.collided)
        assert sim.failure == sim.collided
    assert sides == {-1, 1}
    assert np.mean(collisions) == 1


def test_the_pillar_may_be_brushed_but_its_core_not(sims):
    """Straight on at some distance from the centre; the peg has a radius too."""
    sim = sims["around"]
    inside = turntable_scene.PEG_RADIUS + tabletop.CORE_RADIUS
    assert inside + 0.002 < turntable_scene.PEG_RADIUS + tabletop.PILLAR_RADIUS
    for distance, touched in ((inside - 0.002, True), (inside + 0.002, False)):
        sim.reset(3)
        goal = sim.positions[sim.target, :2]
        line = (goal - sim.pillar) / np.linalg.norm(goal - sim.pillar)
        beside = sim.pillar + distance * np.array([-line[1], line[0]])
        along = (sim.tip[:2] - sim.pillar) @ line
        while along < 0.04 and not sim.done:
            sim.step(np.array([*(beside + along * line), sim.tip[2]]))
            along += 0.004
        assert sim.collided == touched == sim.failure
        twin = pickle.loads(pickle.dumps(sim))
        assert (twin.failure, twin.done) == (sim.failure, sim.done)


def test_one_object_in_the_clutter_has_the_named_colour(sims):
    sim = sims["clutter"]
    for seed in range(40):
        sim.reset(seed)
        shade = sim.model.geom_rgba[sim.bench.geoms, :3]
        shade = shade / shade.max(axis=1, keepdims=True)
        alike = np.abs(shade - shade[sim.target]).max(axis=1) < 0.1
        assert alike.sum() == 1


def test_the_side_is_in_no_observation(sims):
    sim = sims["around"]
    sim.reset(0)
    before = sim.observe()
    sim.side = -sim.side
    after = sim.observe()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_relation_needs_its_word_and_the_object_it_names(sims):
    """The target stands as the prompt says, and for no other object of those words."""
    sim, kinds = sims["relation"], set()
    for seed in range(60):
        sim.reset(seed)
        words = sim.prompt.split()
        kind = next(k for k in ("left", "right", "nearest") if k in words)
        kinds.add(kind)
        colours = list(turntable_scene.COLOURS)
        (colour,) = [word for word in words if word in colours]
        rgb = np.array(turntable_scene.COLOURS[colour], np.float32)
        cups = sim.bench.is_cup == (words[-1] == "cup")
        same = [
            i
            for i, geom in enumerate(sim.bench.geoms)
            if cups[i] and np.allclose(sim.model.geom_rgba[geom, :3], rgb)
        ]
        (named,) = same
        place, blocks = sim.positions[:, :2], np.flatnonzero(~sim.bench.is_cup)
        if kind == "nearest":
            distances = np.hypot(*(place[blocks] - place[named]).T)
            assert blocks[np.argmin(distances)] == sim.target
            assert np.sort(distances)[1] - distances.min() > 0.02
        else:
            way = place[sim.target] - place[named]
            assert (way[0] < 0) == (kind == "left")
            assert abs(way[1]) < abs(way[0])
    assert kinds == {"left", "right", "nearest"}


def test_the_discs_speed_is_in_the_state_and_turns_the_target(sims):
    sim, speeds = sims["moving"], set()
    for seed in range(16):
        sim.reset(seed)
        speeds.add(round(float(np.rad2deg(sim.observe()["observation.state"][3]))))
        before = sim.positions[sim.target]
        sim.step(sim.tip)
        after = sim.positions[sim.target]
        turned = np.arctan2(before[0] * after[1] - before[1] * after[0], before[:2] @ after[:2])
        assert turned == pytest.approx(sim.speed / sim.config.control_hz, rel=0.05)
    assert speeds == {-30, -15, 15, 30}


def test_clutter_changes_light_and_ground_but_keeps_hues(sims):
    sim = sims["clutter"]
    grounds = set()
    for seed in range(4):
        sim.reset(seed)
        assert len(sim.positions) == 8
        grounds.add(tuple(sim.render("base")[2, 2]))
    assert len(grounds) == 4


def test_precise_has_a_third_of_the_play(sims):
    for task in ("precise", "insert"):
        sims[task].reset(0)
    assert sims["precise"].bench.hole_radius == pytest.approx(turntable_scene.PEG_RADIUS + 0.001)
    assert sims["insert"].bench.hole_radius == pytest.approx(turntable_scene.PEG_RADIUS + 0.003)


def test_demonstrations_fit_the_robot():
    suite = tabletop.Suite(image_size=24)
    (episode,) = demonstrations.collect(suite, 1, seed=0)
    assert episode.vectors["observation.state"].shape[1] == suite.robot.state_dim
    assert episode.vectors["action"].shape[1] == suite.robot.action_dim
    assert episode.prompt in suite.prompts()
    simulator.check_robot(suite, suite.robot)


def test_starts_elsewhere_are_where_no_demonstration_starts():
    usual, elsewhere = tabletop.Suite(("touch",)), tabletop.Suite(("touch",), start="elsewhere")
    ys = {suite.start: [] for suite in (usual, elsewhere)}
    for suite in (usual, elsewhere):
        sim = suite.make()
        for seed in range(30):
            sim.reset(seed)
            ys[suite.start].append(sim.tip[1])
    assert max(ys["usual"]) < min(ys["elsewhere"])
    assert usual.harder() == {"elsewhere": elsewhere}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("stack",)}, "tasks: expected some of"),
        ({"tasks": ()}, "tasks: expected some of"),
        ({"start": "there"}, 'start: expected "usual" or "elsewhere"'),
        ({"image_size": 0}, "image_size: expected a positive number"),
        ({"renderer": "vulkan"}, 'renderer: expected "ray" or "gl"'),
    ],
)
def test_options_that_cannot_be_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tabletop.Suite(**options)


def test_the_expert_keeps_its_hover_until_it_is_in_line(sims):
    sim = sims["precise"]
    sim.reset(0)
    while np.hypot(*(sim.tip - sim.positions[sim.target])[:2]) > 0.02:
        assert sim.tip[2] > turntable_scene.CUP_HEIGHT + 0.003
        sim.step(tabletop.expert(sim))
    assert gantry.HOVER > 0.003
