import itertools
import pickle

import mujoco
import numpy as np
import pytest

from shallow_pi.sims import demonstrations, gantry, raycast, turntable, turntable_scene


def _sim(**changes) -> turntable.Turntable:
    return turntable.Suite(**changes).make()


def _run(sim: turntable.Turntable, seed: int) -> np.ndarray:
    """Play the expert to the episode's end; the path of the tip."""
    path = []
    sim.reset(seed)
    while not sim.done:
        sim.step(gantry.reach(sim))
        path.append(sim.tip)
    return np.array(path)


def test_episode_is_a_function_of_the_seed():
    first, second = _sim(), _sim()
    _run(second, 99)  # what came before does not matter
    np.testing.assert_array_equal(_run(first, 3), _run(second, 3))
    a, b = first.observe(), second.observe()
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[k], b[k]) for k in a)
    prompts = set()
    for seed in range(8):
        first.reset(seed)
        prompts.add(first.prompt)
    assert len(prompts) > 4


def test_observation_has_lerobot_keys_and_proprioception_only():
    sim = _sim()
    sim.reset(0)
    seen = sim.observe()
    assert seen["observation.images.base"].shape == (48, 48, 3)
    assert seen["observation.images.wrist"].dtype == np.uint8
    assert seen["observation.state"].dtype == np.float32
    np.testing.assert_allclose(seen["observation.state"], sim.tip, atol=1e-6)
    assert seen["task"] in sim.config.prompts()


def test_pickled_simulator_continues_bit_for_bit():
    sim = _sim(disc_speed_deg=15.0)
    sim.reset(4)
    for _ in range(12):
        sim.step(gantry.reach(sim))
    twin = pickle.loads(pickle.dumps(sim))
    np.testing.assert_array_equal(sim.render("wrist"), twin.render("wrist"))
    while not sim.done:
        sim.step(gantry.reach(sim))
        twin.step(gantry.reach(twin))
        np.testing.assert_array_equal(sim.tip, twin.tip)
    assert twin.done
    assert twin.success
    assert pickle.loads(pickle.dumps(twin)).success  # it has been held long enough
    assert not pickle.loads(pickle.dumps(_sim())).data.time  # before the first reset, too


@pytest.mark.parametrize("task", ["touch", "insert"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_blocks": 4, "num_cups": 4, "clearance_mm": 1.5}, {"disc_speed_deg": 15.0}]
)
def test_expert_succeeds(task, changes):
    sim = _sim(tasks=(task,), **changes)
    results = []
    for seed in range(20):
        path = _run(sim, seed)
        results.append(sim.success)
        steps = np.diff(path, axis=0)
        assert np.linalg.norm(steps, axis=1).max() * sim.config.control_hz < 0.4  # m/s
    assert sum(results) == 20


def test_expert_action_is_smooth_in_the_tips_position():
    sim = _sim(tasks=("insert",))
    sim.reset(1)
    sim.data.qpos[1:] = sim.positions[sim.target] + [0.05, 0.0, 0.005]
    actions = []
    for _ in range(500):  # towards the target, 0.1 mm at a time
        sim.data.qpos[1] -= 1e-4
        mujoco.mj_forward(sim.model, sim.data)
        actions.append(gantry.reach(sim))
    assert np.linalg.norm(np.diff(actions, axis=0), axis=1).max() < 2e-3


@pytest.mark.parametrize("task", ["touch", "insert"])
def test_success_needs_the_target_to_be_held(task):
    sim = _sim(tasks=(task,))
    sim.reset(2)
    while sim.bench.holding() is None:
        assert not sim.done
        sim.step(gantry.reach(sim))
    for _ in range(gantry.HOLD_STEPS - 1):
        assert not sim.success
        assert not sim.done
        sim.step(gantry.reach(sim))
    assert sim.success
    assert sim.done
    assert not sim.failure


def test_touch_that_is_broken_off_starts_to_count_anew():
    sim = _sim(tasks=("touch",))
    sim.reset(2)
    while sim._held_steps < 2:
        sim.step(gantry.reach(sim))
    while sim.bench.holding() is not None:
        sim.step(sim.tip + np.array([0.0, 0.0, 0.02]))
    assert sim._held_steps == 0
    while sim.bench.holding() is None:
        sim.step(gantry.reach(sim))
    assert not sim.success


@pytest.mark.parametrize(("task", "wrong"), [("touch", 0), ("touch", 2), ("insert", 0)])
def test_wrong_object_ends_the_episode_as_a_failure(task, wrong):
    sim = _sim(tasks=(task,))
    seed = next(s for s in itertools.count() if sim.reset(s) or sim.target != wrong)
    sim.reset(seed)
    meant = sim.target
    while not sim.done:
        sim.target = wrong  # mislead the expert, not the judge
        action = gantry.reach(sim)
        sim.target = meant
        sim.step(action)
    assert sim.failure
    assert not sim.success
    assert sim.time < sim.config.max_seconds


def test_episode_without_a_touch_times_out():
    sim = _sim(max_seconds=0.5)
    sim.reset(0)
    start = sim.tip
    for _ in range(10):
        assert not sim.done
        sim.step(start)
    assert sim.done
    assert not sim.success
    assert not sim.failure
    np.testing.assert_allclose(sim.tip, start, atol=1e-3)  # gravity is compensated


def test_gantry_follows_its_target_with_finite_stiffness():
    sim = _sim()
    sim.reset(0)
    goal = np.array([0.05, -0.05, 0.09])
    for _ in range(30):
        sim.step(goal)
    np.testing.assert_allclose(sim.tip, goal, atol=5e-4)
    for _ in range(40):
        sim.step(np.array([0.0, 0.0, -1.0]))  # clipped to the reach, stopped by the disc
    assert -0.002 < sim.tip[2] < 0.032


@pytest.mark.parametrize("speed", [0.0, 15.0])
def test_disc_turns_its_objects_at_the_stated_speed(speed):
    sim = _sim(disc_speed_deg=speed, max_seconds=9.0)
    sim.reset(0)
    before, home = sim.positions, sim.tip
    for _ in range(40):
        sim.step(home)
    angles = [np.arctan2(p[:, 1], p[:, 0]) for p in (before, sim.positions)]
    turned = np.rad2deg(np.unwrap(angles, axis=0)[1] - angles[0])
    np.testing.assert_allclose(turned, 2.0 * speed, atol=0.05)


def test_objects_keep_apart_and_colours_are_distinct_within_a_noun():
    sim = _sim(num_blocks=4, num_cups=4)
    shared = 0
    for seed in range(30):
        sim.reset(seed)
        blocks, cups = set(sim.colours[:4]), set(sim.colours[4:])
        assert len(blocks) == len(cups) == 4
        shared += len(blocks & cups)
        radius = np.linalg.norm(sim.positions[:, :2], axis=1)
        assert radius.min() >= gantry.MIN_RADIUS
        assert radius.max() <= gantry.MAX_RADIUS
        for a, b in itertools.combinations(sim.positions, 2):
            assert np.hypot(*(a - b)[:2]) >= gantry.SEPARATION
        assert sim.colours[sim.target] in sim.prompt
    assert shared  # so that the noun must be read


def test_colours_are_told_apart_in_images():
    sim = _sim()
    seen: dict[tuple[str, str], np.ndarray] = {}
    camera = raycast.RayCamera(sim.model, "base")
    for seed in range(60):
        sim.reset(seed)
        sim.data.qpos[1:] = [-0.16, 0.16, 0.15]  # out of the way
        mujoco.mj_forward(sim.model, sim.data)
        image = camera.render(sim.data).astype(float) / 255
        for i, colour in enumerate(sim.colours):
            # The right part of a cup's rim: its middle is the dark hole.
            point = sim.positions[i] + [0.0135 * (i >= 2), 0.0, 0.0]
            ray = (point - sim.data.cam_xpos[0]) @ sim.data.cam_xmat[0].reshape(3, 3)
            scale = 24 / np.tan(np.deg2rad(sim.model.cam_fovy[0]) / 2) / -ray[2]
            row, column = int(24 - ray[1] * scale), int(24 + ray[0] * scale)
            seen.setdefault(("block" if i < 2 else "cup", colour), image[row, column])
    assert len(seen) == 12
    for noun in ("block", "cup"):
        for a, b in itertools.combinations(turntable_scene.COLOURS, 2):
            assert np.abs(seen[noun, a] - seen[noun, b]).max() > 0.15, (noun, a, b)


def test_batched_rays_agree_with_single_rays():
    sim = _sim(num_blocks=4, num_cups=4)
    hit = np.zeros(1, np.int32)
    for seed, name in itertools.product(range(3), gantry.CAMERAS):
        _run(sim, seed)
        camera = raycast.RayCamera(sim.model, name, 24, 24)
        rays = camera._corners.reshape(-1, 3)
        geom, _, _ = camera.cast(sim.data, rays)
        for ray, expected in zip(rays, geom, strict=True):
            world = sim.data.cam_xmat[camera._id].reshape(3, 3) @ ray
            origin = sim.data.cam_xpos[camera._id]
            groups = raycast.VISIBLE_GROUPS
            mujoco.mj_ray(sim.model, sim.data, origin, world, groups, 1, -1, hit, None)
            assert hit[0] == expected


def test_prompts_name_every_colour_and_noun():
    found = turntable.Suite().prompts()
    assert len(found) == 24 == len(set(found))
    assert "put the peg into the orange cup" in found
    assert sum("block" in prompt for prompt in found) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("push",)}, r"tasks: expected some of \['touch', 'insert'\]"),
        ({"tasks": ()}, "tasks: expected some"),
        ({"num_cups": 0}, "num_cups: expected 1 to 4"),
        ({"num_blocks": 5}, "num_blocks: expected 1 to 4"),
        ({"clearance_mm": 0.0}, "clearance_mm: expected 0.5 to 8"),
        ({"control_hz": 0.0}, "control_hz: expected a positive"),
        ({"max_seconds": float("nan")}, "max_seconds: expected a positive number, got nan"),
        ({"renderer": "vulkan"}, "renderer: expected"),
    ],
)
def test_bad_config_says_what_is_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        turntable.Suite(**changes)


@pytest.mark.parametrize("action", [np.zeros(2), np.array([0.0, np.nan, 0.0])])
def test_bad_action_is_refused(action):
    sim = _sim()
    sim.reset(0)
    with pytest.raises(ValueError, match="three finite numbers"):
        sim.step(action)


def test_demonstrations_record_clean_actions_of_perturbed_states():
    config = turntable.Suite()
    clean, noisy = (list(demonstrations.collect(config, 4, 7, noise)) for noise in (0.0, 1.0))
    for episode in (*clean, *noisy):
        state, action = (episode.vectors[key] for key in ("observation.state", "action"))
        assert state.shape == action.shape == (len(state), 3)
        assert episode.images["observation.images.base"].shape == (len(state), 48, 48, 3)
        assert (state.dtype, action.dtype) == (np.float32, np.float32)
        assert ("block" in episode.prompt) == (episode.task == "touch")
        assert episode.prompt in config.prompts()
        reach = np.linalg.norm(action - state, axis=1)
        assert reach.max() <= np.sqrt(2) * gantry.STRIDE + 1e-6  # no noise in labels
    # Without noise a record is the expert's own path, as played from the episode's seed.
    sim = _sim()
    path = _run(sim, clean[0].seed)
    states = [[e.vectors["observation.state"] for e in part] for part in (clean, noisy)]
    np.testing.assert_allclose(states[0][0][1:], path[:-1], atol=1e-6)
    assert any(len(a) != len(b) for a, b in zip(*states, strict=True))


def test_noise_beyond_measure_is_reported():
    config = turntable.Suite(max_seconds=0.2)
    with pytest.raises(ValueError, match="no success in 100 attempts"):
        next(demonstrations.collect(config, 1, 0))


@pytest.mark.slow
def test_two_workers_give_the_episodes_of_one():
    config = turntable.Suite()
    one = demonstrations.collect(config, 6, 3, workers=1)
    two = demonstrations.collect(config, 6, 3, workers=2)
    for a, b in zip(one, two, strict=True):
        assert (a.prompt, a.seed) == (b.prompt, b.seed)
        for mine, other in ((a.vectors, b.vectors), (a.images, b.images)):
            assert list(mine) == list(other)
            for key in mine:
                np.testing.assert_array_equal(mine[key], other[key])


def test_slipping_from_one_object_to_the_next_starts_to_count_anew(monkeypatch):
    sim = _sim()
    sim.reset(0)
    other = (sim.target + 1) % 4
    sequence = iter([other] * 3 + [sim.target] * 4)
    monkeypatch.setattr(sim.bench, "holding", lambda: next(sequence))
    for _ in range(6):
        sim.step(sim.tip)
        assert not sim.done
    sim.step(sim.tip)
    assert sim.success


def test_missing_graphics_library_says_what_to_do(monkeypatch):
    def no_backend(*_):
        raise RuntimeError("no display")

    monkeypatch.setattr(mujoco, "Renderer", no_backend)
    sim = _sim(renderer="gl")
    sim.reset(0)
    with pytest.raises(ValueError, match=r'none works here \(no display\).*renderer="ray"'):
        sim.observe()
