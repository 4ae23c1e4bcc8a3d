"""A step folder alone is a policy: robot observations in, that robot's actions out."""

import concurrent.futures
import dataclasses
import functools
import re

import jax
import msgpack
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.data.robots import normalize, pipelines
from shallow_pi.deploy import observation_keys, policy, warm_up
from shallow_pi.inference import sampler, tuning
from shallow_pi.models import batch as batches

PROMPTS = ("touch the red block", "touch the blue block")


@pytest.fixture(scope="module")
def step(own, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "7"
    weights.save_params(folder / "params", params)
    own.save(folder / "assets")
    return folder


@pytest.fixture(scope="module")
def deployed(step):
    return policy.Policy.from_checkpoint(step, num_steps=3, warm_up=False)


@pytest.fixture(scope="module")
def scene():
    """Two observations and their noise."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 2, 24, 24, 3), np.uint8)
    found = [
        {
            "observation.images.base": images[i, 0],
            "observation.images.wrist": images[i, 1],
            "observation.state": generator.standard_normal(3).astype(np.float32),
            "task": PROMPTS[i],
        }
        for i in range(2)
    ]
    return found, generator.standard_normal((2, 5, 6)).astype(np.float32)


def test_a_step_folder_gives_the_actions_of_the_parameters_in_memory(own, params, deployed, scene):
    actions = deployed.infer_batch(*scene)
    assert actions.shape == (2, 5, 3)
    in_memory = policy.Policy(own, params, num_steps=3)
    np.testing.assert_allclose(actions, in_memory.infer_batch(*scene), atol=1e-6)


def test_a_policy_runs_as_was_measured_here(own, params, deployed, scene, monkeypatch, tmp_path):
    """Layers are unrolled then, which is not the default on a CPU."""
    monkeypatch.setenv("SHALLOW_PI_CACHE", str(tmp_path))
    tuning.store(own.model, dataclasses.replace(tuning.SCANNED, unrolled_layers=True), {})
    tuned = policy.Policy(own, params, num_steps=3)
    assert isinstance(tuned.program.weights.prefix, list)
    assert not isinstance(deployed.program.weights.prefix, list)
    np.testing.assert_allclose(tuned.infer_batch(*scene), deployed.infer_batch(*scene), atol=1e-5)


def test_actions_are_the_samplers_in_the_robots_units(own, params, deployed, scene):
    """Unnormalized by hand, plus the state the deltas were predicted from."""
    found, noise = scene
    samples = [own.inputs()(dict(o)) for o in found]
    batch = batches.stack([pipelines.to_observation(one) for one in samples]).as_float()
    sample = functools.partial(sampler.sample_actions, own.model, num_steps=3)
    normalized = jax.jit(sample)(params, batch, noise)
    stats = own.stats["actions"]
    state = np.stack([o["observation.state"] for o in found])
    expected = np.asarray(normalized)[..., :3] * (stats.std + 1e-6) + stats.mean + state[:, None]
    np.testing.assert_allclose(deployed.infer_batch(*scene), expected, atol=1e-4)


def test_the_same_noise_gives_the_same_actions_and_another_does_not(deployed, scene):
    found, noise = scene
    np.testing.assert_array_equal(
        deployed.infer_batch(found, noise), deployed.infer_batch(found, noise)
    )
    assert (
        np.abs(deployed.infer_batch(found, noise) - deployed.infer_batch(found, -noise)).max()
        > 1e-3
    )


def test_the_observations_of_a_batch_do_not_touch_each_other(deployed, scene):
    found, noise = scene
    both = deployed.infer_batch(found, noise)
    swapped = deployed.infer_batch(found[::-1], noise[::-1])
    np.testing.assert_allclose(both, swapped[::-1], atol=1e-5)


@pytest.mark.parametrize("key", ["observation.images.wrist", "observation.state", "task"])
def test_everything_observed_matters(deployed, scene, key):
    (first, second), noise = scene
    changed = deployed.infer_batch([{**first, key: second[key]}, second], noise)
    assert np.abs(changed[0] - deployed.infer_batch([first, second], noise)[0]).max() > 1e-5


def test_parameters_are_read_in_the_models_compute_dtype(own, params, scene, tmp_path):
    model = dataclasses.replace(own.model, dtype="bfloat16")
    weights.save_params(tmp_path / "params", params)
    dataclasses.replace(own, model=model).save(tmp_path / "assets")
    read = policy.Policy.from_checkpoint(tmp_path, warm_up=False)
    read.infer_batch(*scene)
    assert {leaf.dtype for leaf in jax.tree.leaves(read.program.weights.params)} == {
        jax.numpy.dtype("bfloat16")
    }


def test_noise_of_another_shape_is_an_error(deployed, scene):
    found, noise = scene
    for bad in (noise[:1], noise[:, :4], noise[..., :3]):
        with pytest.raises(ValueError, match=r"noise must have shape \(2, 5, 6\) for 2 observ"):
            deployed.infer_batch(found, bad)


def test_an_observation_without_a_camera_names_it(deployed, scene):
    found, noise = scene
    del (first := dict(found[0]))["observation.images.wrist"]
    with pytest.raises(ValueError, match=r"lacks camera 'observation\.images\.wrist'"):
        deployed.infer_batch([first], noise[:1])


def test_no_integration_steps_are_an_error(step):
    with pytest.raises(ValueError, match="num_steps"):
        policy.Policy.from_checkpoint(step, num_steps=0)


def test_parameters_of_another_model_name_their_paths(own, params, tmp_path):
    weights.save_params(tmp_path / "params", params)
    dataclasses.replace(own, model=dataclasses.replace(own.model, depth=3)).save(
        tmp_path / "assets"
    )
    with pytest.raises(ValueError, match=r"policy .*\n(.*\n)*.*mlp/linear: expected \(3, 40, 24\)"):
        policy.Policy.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "options", "match"),
    [
        ({"elsewhere": "pi0_mine"}, {}, "pi0_mine"),
        ({}, {"num_steps": 3, "quantize": "int8"}, r"needs bounds in assets/calibration\.json"),
        ({}, {"tokenizer": __file__}, "is not a SentencePiece model"),
    ],
)
def test_parameters_are_read_when_all_else_is_checked(own, tmp_path, changes, options, match):
    """A policy's take minutes to fetch; here there are none."""
    trained = dataclasses.replace(own.robot, **changes)
    dataclasses.replace(own, robot=trained).save(tmp_path / "7" / "assets")
    with pytest.raises(ValueError, match=match):
        policy.Policy.from_checkpoint(tmp_path / "7", **options)


def test_a_folder_that_is_no_step_says_what_is_expected(step):
    with pytest.raises(
        FileNotFoundError, match=r"there is no checkpoint at .*absent: give a step folder"
    ):
        policy.Policy.from_checkpoint(step / "absent")


def test_one_observation_gives_one_chunk_and_its_times(deployed, scene):
    found, noise = scene
    result = deployed.infer(found[0], noise[0])
    assert result["actions"].dtype == np.float32
    np.testing.assert_allclose(
        result["actions"], deployed.infer_batch(found, noise)[0], rtol=1e-5, atol=1e-5
    )
    times = result["timing"]
    assert all(isinstance(ms, float) and ms > 0 for ms in times.values())
    parts = times["transform_ms"] + times["device_ms"] + times["output_ms"]
    assert times["infer_ms"] == pytest.approx(parts)


def test_the_nth_call_since_a_reset_draws_its_noise_from_the_seed_and_n(own, params, scene):
    asked = policy.Policy(own, params, num_steps=3, seed=4)
    observation = scene[0][0]
    asked.reset()
    found = [asked.infer(observation)["actions"] for _ in range(3)]
    for n, actions in enumerate(found):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(4), n), (5, 6))
        expected = asked.infer(observation, np.asarray(noise))["actions"]
        np.testing.assert_array_equal(actions, expected)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    # Noise that is given does not count.
    asked.reset()
    np.testing.assert_array_equal(asked.infer(observation)["actions"], found[0])
    with pytest.raises(ValueError, match="lacks"):
        asked.infer({})
    np.testing.assert_array_equal(asked.infer(observation)["actions"], found[1])


def test_observations_answered_together_are_refused_and_warned_of_one_by_one(deployed, scene):
    (first, second), _ = scene
    far = {**second, "observation.state": np.float32([60, 0, 0])}
    absurd = {**second, "observation.state": np.float32([1e6, 0, 0])}
    lacking, refused, good, warned = deployed.infer_each([{}, absurd, first, far], [0, 1, 2, 3])
    assert isinstance(lacking, ValueError)
    assert "lacks camera" in str(lacking)
    assert isinstance(refused, ValueError)
    assert "the policy was not asked" in str(refused)
    assert "warnings" not in good
    assert "dimension 0 is 60" in warned["warnings"][0]
    assert good["timing"].keys() == {"infer_ms", "transform_ms", "device_ms", "output_ms"}
    # A call number of each, wherever it is in the batch.
    deployed.reset()
    alone = [deployed.infer(first)["actions"] for _ in range(3)][2]
    np.testing.assert_allclose(good["actions"], alone, rtol=1e-5, atol=1e-5)
    (only,) = deployed.infer_each([{}], [0])
    assert isinstance(only, ValueError)


def test_as_many_are_answered_together_as_give_the_most_answers_a_second(own, params, monkeypatch):
    tiny = policy.Policy(own, params, num_steps=1)
    assert [tiny.together(waiting) for waiting in (1, 2, 9)] == [1, 1, 1]
    # As on an accelerator: filling up is nearly free, but for 5 that a batch of 4 answers faster.
    monkeypatch.setattr(tiny, "batch_ms", {1: 10.0, 2: 11.0, 4: 13.0, 8: 18.0})
    assert [tiny.together(n) for n in range(1, 10)] == [1, 2, 3, 4, 4, 6, 7, 8, 8]
    # As on a CPU: a row computed in vain costs as much as another, and 8 are no faster than 4.
    monkeypatch.setattr(tiny, "batch_ms", {1: 4.0, 2: 4.8, 4: 8.0, 8: 20.0})
    assert [tiny.together(n) for n in range(1, 10)] == [1, 2, 2, 4, 4, 4, 4, 4, 4]
    # No gain, no batch.
    monkeypatch.setattr(tiny, "batch_ms", {1: 1.0, 2: 2.0, 4: 4.5})
    assert [tiny.together(n) for n in (1, 2, 4)] == [1, 1, 1]


def test_robots_that_start_a_chunk_of_their_own_are_batched_by_the_times_of_such(
    own, params, scene, monkeypatch
):
    """Where batches gain only without guidance, as on a CPU; robots ask as they did last."""
    tiny = policy.Policy(own, params, num_steps=1)
    asked = []

    def sample(batch, start, guidance=None):
        asked.append(guidance is not None)
        return np.zeros((len(batch.state), 5, 6), np.float32)

    def times(calls):
        calls[1]()
        gain = 2 if asked[-1] else 1.2
        return {size: gain ** np.log2(size) for size in calls}

    monkeypatch.setattr(tiny, "sample", sample)
    monkeypatch.setattr(warm_up, "times", times)
    tiny.warm_up(batch=8, guided=True)
    assert [tiny.together(waiting) for waiting in (1, 3, 8)] == [1, 3, 8]
    free = scene[0][0]
    goes_on = observation_keys.with_previous(free, np.zeros((2, 3)), 1)
    tiny.infer_each(4 * [goes_on], range(4))
    assert tiny.together(8) == 1
    tiny.infer_each([goes_on, free, free, free], range(4))
    assert tiny.together(8) == 8


def test_threads_get_the_actions_of_their_own_observation(deployed, scene):
    (first, _), _ = scene
    generator = np.random.default_rng(1)
    noise = generator.standard_normal((12, 5, 6)).astype(np.float32)
    seen = [
        {**first, "observation.state": x} for x in generator.standard_normal((12, 3)).astype("f4")
    ]
    serial = [deployed.infer(*pair)["actions"] for pair in zip(seen, noise, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            found = pool.map(deployed.infer, seen, noise)
            for ours, expected in zip(found, serial, strict=True):
                np.testing.assert_array_equal(ours["actions"], expected)


def test_threads_that_give_no_noise_never_share_it(deployed, scene):
    observation = scene[0][0]
    deployed.reset()
    serial = [deployed.infer(observation)["actions"].tobytes() for _ in range(8)]
    deployed.reset()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: deployed.infer(observation)["actions"].tobytes(), range(8))
        assert sorted(found) == sorted(serial)


def test_a_policy_that_takes_some_values_answers_as_if_there_were_no_others(
    own, params, deployed, scene
):
    """States and previous chunks in the robot's order, in a column that has other values too."""
    found, noise = scene
    robot = dataclasses.replace(
        own.robot, state_indices=(5, 0, 2), state_sizes=(6,), action_indices=(8, 7, 1)
    )
    taking = policy.Policy(dataclasses.replace(own, robot=robot), params, num_steps=3)
    wide = []
    for one in found:
        column = np.full(6, np.nan, np.float32)
        column[[5, 0, 2]] = one["observation.state"]
        wide.append({**one, "observation.state": column})
    np.testing.assert_array_equal(
        taking.infer_batch(wide, noise), deployed.infer_batch(found, noise)
    )
    previous = list(np.random.default_rng(1).standard_normal((2, 3, 3)).astype(np.float32))
    went_on = taking.infer_batch(wide, noise, previous=previous, delay=1)
    np.testing.assert_array_equal(
        went_on, deployed.infer_batch(found, noise, previous=previous, delay=1)
    )
    assert np.abs(went_on - taking.infer_batch(wide, noise)).max() > 1e-3
    (answer,) = taking.infer_each(wide[:1], [0])
    assert answer["actions"].shape == (5, 3)
    told = taking.metadata
    assert (told["state_dim"], told["state_sizes"], told["action_dim"]) == (3, [6], 3)
    assert (told["state_indices"], told["action_indices"]) == ([5, 0, 2], [8, 7, 1])
    assert ", state 5, 0, 2 of 'observation.state', actions 8, 7, 1 of 'action'," in (
        taking.description
    )
    message = (
        r"got 'observation.state' \(3\), .* expects 'observation.state' \(6\) and takes 5, 0, 2"
    )
    with pytest.raises(ValueError, match=message):
        taking.infer(found[0])
    wide[0]["observation.state"][0] = np.nan
    with pytest.raises(ValueError, match=r"is not finite: nan in dimension \[0\]"):
        taking.infer(wide[0])


def test_metadata_has_a_robots_own_and_never_in_place_of_the_policys(own, params):
    robot = dataclasses.replace(own.robot, metadata={"reset_pose": [0, -1.5], "depth": 99})
    found = policy.Policy(dataclasses.replace(own, robot=robot), params, num_steps=1).metadata
    assert found["reset_pose"] == [0, -1.5]
    assert found["depth"] == 2


def test_metadata_is_plain_and_says_what_a_client_sends(deployed, step):
    found = deployed.metadata
    assert msgpack.unpackb(msgpack.packb(found)) == found
    assert found == {
        "parameters": weights.digest(step),
        "model": "pi0",
        "depth": 2,
        "robot": "turntable",
        "image_size": deployed.assets.model.image_size,
        "action_horizon": 5,
        "action_dim": 3,
        "state_dim": 3,
        "cameras": {
            "base_0_rgb": "observation.images.base",
            "left_wrist_0_rgb": "observation.images.wrist",
        },
        "state_keys": ["observation.state"],
        "state_sizes": [],
        "state_indices": [],
        "action_indices": [],
        "action_key": "action",
        "action_keys": ["action"],
        "prompt_key": "task",
        "fps": 20,
        "num_steps": 3,
        "quantize": "none",
        "real_time_chunking": False,
        "state_names": [],
        "action_names": [],
        "state_low": [-0.5, -1.25, -2.0],
        "state_high": [0.5, 1.25, 2.0],
    }


def test_a_policy_samples_in_the_steps_it_was_trained_for_and_warns_of_others(
    own, params, scene, capsys
):
    few = dataclasses.replace(own, num_steps=3)
    trained, asked = policy.Policy(few, params), policy.Policy(own, params, num_steps=3)
    np.testing.assert_array_equal(trained.infer_batch(*scene), asked.infer_batch(*scene))
    assert trained.metadata["num_steps"] == 3
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "samples in 3 integration steps and was trained for 10" in said


def test_a_default_prompt_stands_in_for_one_that_is_not_sent(own, params, scene, capsys):
    (first, _), noise = scene
    own = dataclasses.replace(own, num_steps=1)
    asked = policy.Policy(own, params, prompt=PROMPTS[1])
    unsaid = {key: value for key, value in first.items() if key != "task"}
    expected = asked.infer({**first, "task": PROMPTS[1]}, noise[0])["actions"]
    np.testing.assert_array_equal(asked.infer(unsaid, noise[0])["actions"], expected)
    assert capsys.readouterr().err == ""
    own_prompt = asked.infer(first, noise[0])["actions"]
    assert np.abs(own_prompt - expected).max() > 1e-5
    fixed = dataclasses.replace(own, robot=dataclasses.replace(own.robot, prompt=PROMPTS[0]))
    policy.Policy(fixed, params, prompt=PROMPTS[1])
    assert f"always has the prompt '{PROMPTS[0]}'" in capsys.readouterr().err


@pytest.fixture
def traced(monkeypatch):
    """An entry for every time that the sampler is traced."""
    traced = []
    original = sampler.sample_prepared

    def counted(*arguments, **options):
        traced.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(sampler, "sample_prepared", counted)
    return traced


def test_a_warm_policy_traces_nothing_more(step, scene, traced):
    # A number of steps that no other test takes, whose program would be here already.
    warm = policy.Policy.from_checkpoint(step, num_steps=7, prompt=PROMPTS[0])
    assert len(traced) == 1
    warm.warm_up(guided=True)
    assert len(traced) == 2
    asked = {key: value for key, value in scene[0][0].items() if key != "task"}
    chunk = warm.infer(asked)["actions"]
    warm.infer(asked, previous=chunk[2:], delay=1)
    warm.infer(asked, previous=chunk[1:], delay=3, max_guidance_weight=2.0)
    assert len(traced) == 2
    warm.warm_up(batch=3)
    assert list(warm.batch_ms) == [1, 2, 3]
    assert len(traced) == 4
    for count in (3, 2):
        warm.infer_each(count * [asked], range(count))
    assert len(traced) == 4
    warm.warm_up(batch=3, guided=True)
    assert len(traced) == 6
    for count in (3, 2, 1):
        left = {"previous": chunk[1:], "delay": 1}
        warm.infer_each(count * [{**asked, "real_time_chunking": left}], range(count))
        warm.infer_each(count * [asked], range(count))
    assert len(traced) == 6


def test_a_warm_policy_traces_nothing_more_for_any_prompt(own, params, scene, traced):
    longer = dataclasses.replace(own, model=dataclasses.replace(own.model, max_token_len=64))
    # A number of steps that no other test takes.
    warm, cold = (policy.Policy(longer, params, num_steps=6, prompt=6 * "a b ") for _ in range(2))
    warm.warm_up()
    assert len(traced) == 2
    prompts = [count * "a b " for count in (1, 6, 10, 100)]
    seen, noise = [{**scene[0][0], "task": prompt} for prompt in prompts], scene[1][0]
    found = [warm.infer(one, noise)["actions"] for one in seen]
    assert len(traced) == 2
    for one, actions in zip(seen, found, strict=True):
        np.testing.assert_allclose(actions, cold.infer(one, noise)["actions"], atol=1e-5)
    assert len(traced) > 2


def test_a_chunk_continues_the_previous_one(deployed, scene):
    """In the robot's absolute units, although the state, and with it every difference, moved."""
    (first, second), noise = scene
    previous = deployed.infer(first, noise[0])["actions"][2:]
    moved = {**second, "observation.state": first["observation.state"] + 0.5}
    plain = deployed.infer(moved, noise[1])["actions"]
    found = deployed.infer(moved, noise[1], previous=previous, delay=2)["actions"]
    before, after = (np.abs(chunk[:2] - previous[:2]).mean() for chunk in (plain, found))
    assert after < 0.5 * before
    ignored = deployed.infer(moved, noise[1], previous=previous, delay=2, max_guidance_weight=0)
    np.testing.assert_allclose(ignored["actions"], plain, atol=1e-5)
    nothing = deployed.infer(moved, noise[1], previous=previous[:0])
    np.testing.assert_array_equal(nothing["actions"], plain)


def test_the_previous_chunk_reaches_the_model_as_it_would_predict_it(deployed, scene):
    """The way there is the inverse of the way back: from this state, normalized, padded."""
    (first, _), noise = scene
    result = deployed.infer(first, noise[0])["actions"]
    batch = deployed.prepare([first])
    normalized = np.asarray(deployed.sample(batch, noise[:1]))
    asked = deployed._transforms.to_model(first, result)
    _, guidance = deployed._transforms.stack([asked])
    np.testing.assert_allclose(guidance.previous[..., :3], normalized[..., :3], atol=1e-5)
    assert not guidance.previous[..., 3:].any()


def test_a_sensors_noise_where_nothing_moved_in_training_does_not_move_a_chunk(own, params, scene):
    (first, _), noise = scene
    stats, moves = own.stats["actions"], np.array([1, 0, 1])
    stats = normalize.NormStats(stats.mean, stats.std * moves)
    still = dataclasses.replace(own, stats={**own.stats, "actions": stats})
    asked = policy.Policy(still, params, num_steps=3)
    previous = asked.infer(first, noise[0])["actions"][2:]
    noisy = {**first, "observation.state": first["observation.state"] + np.float32([0, 1e-3, 0])}
    expected, found = (
        asked.infer(one, noise[1], previous=previous, delay=2)["actions"] for one in (first, noisy)
    )
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_each_chunk_of_a_batch_continues_its_predecessor_or_none(deployed, scene):
    found, noise = scene
    previous = deployed.infer(found[0], noise[1])["actions"][2:]
    nothing = previous[:0]
    both = deployed.infer_batch(found, noise, previous=[previous, nothing], delay=2)
    alone = deployed.infer(found[0], noise[0], previous=previous, delay=2)["actions"]
    np.testing.assert_allclose(both[0], alone, atol=1e-4)
    np.testing.assert_allclose(both[1], deployed.infer_batch(found, noise)[1], atol=1e-4)
    none = deployed.infer_batch(found, noise, previous=[previous, None], delay=2)
    np.testing.assert_array_equal(none, both)


@pytest.mark.parametrize(
    ("previous", "delay", "said"),
    [
        (np.zeros((2, 4)), 0, r"must be numbers \(n <= 5, 3\), .* got float64 .* \(2, 4\)"),
        (np.zeros((6, 3)), 0, r"must be numbers \(n <= 5, 3\), .* got float64 .* \(6, 3\)"),
        ([["1", "2", "3"]], 0, r"must be numbers \(n <= 5, 3\), .* got <U1 .* \(1, 3\)"),
        ([[1, 2, 3], [1]], 0, r"must be numbers \(n <= 5, 3\), .* got object .* \(\)"),
        ({"actions": 1}, 0, r"must be numbers \(n <= 5, 3\), .* got object .* \(\)"),
        (np.zeros((2, 3)), -1, r"a whole number of actions, 0 or more, got -1"),
        (np.zeros((2, 3)), 1.0, r"a whole number of actions, 0 or more, got 1\.0"),
        (np.zeros((2, 3)), True, r"a whole number of actions, 0 or more, got True"),
        (np.zeros((2, 3)), 1000 * "1", r"a whole number of actions, 0 or more, got '1+\.\.\.1+'$"),
        (np.full((2, 3), np.nan), 0, r"not finite, or beyond 1e\+09; begin without one"),
        (np.full((2, 3), 1e300), 0, r"not finite, or beyond 1e\+09; begin without one"),
        (np.full((2, 3), 1e9), 0, r"not finite, or beyond 1e\+09; begin without one"),
    ],
)
def test_a_previous_chunk_that_cannot_be_meant_is_an_error(
    deployed, scene, previous, delay, said, monkeypatch
):
    with pytest.raises(ValueError, match=said):
        deployed.infer(scene[0][0], previous=previous, delay=delay)
    monkeypatch.setattr(deployed, "is_guided", True)
    sent = {**scene[0][0], "real_time_chunking": {"previous": previous, "delay": delay}}
    refused, answered = deployed.infer_each([sent, scene[0][1]], [0, 0])
    assert isinstance(refused, ValueError)
    assert re.search(said, str(refused))
    assert answered["actions"].shape == (5, 3)


def test_observations_of_a_server_say_themselves_what_they_go_on_from(deployed, scene, monkeypatch):
    """Each of a batch from its own chunk and delay, or from none, as `infer` does alone."""
    (first, second), noise = scene
    previous = deployed.infer(first, noise[0])["actions"]
    said = [
        {"previous": previous[2:], "delay": 2},
        None,
        {"previous": previous[3:].tolist(), "delay": 1},
        {"previous": [], "delay": 1},
    ]
    plain = [first, second, first, second]
    sent = [{**one, "real_time_chunking": left} for one, left in zip(plain, said, strict=True)]
    assert deployed.metadata["real_time_chunking"] is False
    refused, answered, _, _ = deployed.infer_each(sent, range(4))
    assert "start the server with --real-time-chunking" in str(refused)
    assert answered["actions"].shape == (5, 3)
    monkeypatch.setattr(deployed, "is_guided", True)
    assert deployed.metadata["real_time_chunking"] is True
    monkeypatch.setattr(deployed, "batch_ms", {1: 1.0, 2: 1.0, 4: 1.0})
    batches_of, sample = [], deployed.sample

    def counted(batch, start, guidance):
        batches_of.append((len(batch.state), guidance is not None))
        return sample(batch, start, guidance)

    with monkeypatch.context() as patch:
        patch.setattr(deployed, "sample", counted)
        together = deployed.infer_each(sent, range(4))
    assert batches_of == [(2, False), (2, True)], "free ones do not pay for the others"
    deployed.reset()
    conditions = [
        {"previous": previous[2:], "delay": 2},
        {},
        {"previous": previous[3:], "delay": 1},
        {},
    ]
    for one, condition, answer in zip(plain, conditions, together, strict=True):
        alone = deployed.infer(one, **condition)["actions"]
        np.testing.assert_allclose(answer["actions"], alone, atol=1e-4)
    deployed.reset()
    free = deployed.infer(first)["actions"]
    assert np.abs(together[0]["actions"] - free).max() > 1e-2


@pytest.mark.parametrize(
    ("said", "got"),
    [
        (np.zeros((2, 3)), "got ndarray"),
        ({"previous": np.zeros((2, 3))}, r"got \['previous'\]"),
        ({"previous": np.zeros((2, 3)), "delay": 1, "dealy": 1}, r"\['dealy', 'delay', 'prev"),
    ],
)
def test_a_server_is_told_both_the_previous_chunk_and_the_delay(deployed, scene, said, got):
    """Without a delay nothing would be frozen, and the robot would jump."""
    (refused,) = deployed.infer_each([{**scene[0][0], "real_time_chunking": said}], [0])
    assert re.search(f"must be a map of 'previous' .* and 'delay' .*{got}", str(refused))


def test_a_robot_may_have_keys_called_previous_and_delay(own, params, scene):
    """A server that goes on from chunks leaves them alone."""
    robot = dataclasses.replace(
        own.robot,
        state_key="observation.previous",
        state_more=("delay",),
        state_sizes=(2, 1),
    )
    named = policy.Policy(dataclasses.replace(own, robot=robot), params, num_steps=3)
    named.is_guided = True
    state = scene[0][0]["observation.state"]
    asked = {key: value for key, value in scene[0][0].items() if key != "observation.state"}
    asked |= {"previous": state[:2], "delay": state[2:]}
    chunk = named.infer(asked)["actions"]
    left = {"previous": chunk[1:], "delay": 1}
    free, goes_on = named.infer_each([asked, {**asked, "real_time_chunking": left}], [0, 0])
    np.testing.assert_allclose(free["actions"], chunk, atol=1e-4)
    named.reset()
    alone = named.infer(asked, previous=chunk[1:], delay=1)["actions"]
    np.testing.assert_allclose(goes_on["actions"], alone, atol=1e-4)


@pytest.mark.parametrize("weight", [-1, np.inf, np.nan])
def test_a_guidance_weight_that_is_none_is_an_error(deployed, scene, weight):
    with pytest.raises(ValueError, match=f"finite and 0 or more, got {weight}"):
        deployed.infer(scene[0][0], previous=np.zeros((2, 3)), max_guidance_weight=weight)


def test_images_resized_on_the_device_give_the_same_actions(own, params, scene):
    """Cameras of another size than the model's, and of two sizes in one batch."""
    found, noise = scene
    generator = np.random.default_rng(2)
    wide = {
        **found[0],
        "observation.images.base": generator.integers(0, 256, (48, 64, 3), np.uint8),
        "observation.images.wrist": generator.integers(0, 256, (30, 40, 3), np.uint8),
    }
    by_pillow, on_device = (
        policy.Policy(own, params, num_steps=2, resize_on_device=chosen) for chosen in (False, True)
    )
    expected = by_pillow.infer(wide, noise[0])["actions"]
    np.testing.assert_allclose(on_device.infer(wide, noise[0])["actions"], expected, atol=5e-3)
    assert on_device.prepare([wide]).images["base_0_rgb"].shape == (1, 48, 64, 3)
    both = on_device.infer_batch([wide, found[1]], noise)
    np.testing.assert_allclose(both, by_pillow.infer_batch([wide, found[1]], noise), atol=1e-5)
