"""The command measures a policy on a dataset, and the policy then runs in 8 bits."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.commands import calibrate, policy_arguments
from shallow_pi.data.lerobot import reader
from shallow_pi.deploy import policy
from shallow_pi.inference import calibration, rounding_error, tuning
from shallow_pi.models import batch as batches
from shallow_pi.models import quantized


@pytest.fixture(scope="module")
def step(own, params, tmp_path_factory):
    """A step folder in a run, without a calibration."""
    folder = tmp_path_factory.mktemp("run") / "2"
    weights.save_params(folder / "params", params)
    dataclasses.replace(own, num_steps=2).save(folder / "assets")
    return folder


@pytest.fixture(scope="module")
def calibrated(step, tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "2"
    shutil.copytree(step, folder)
    given = ["--data.path", str(tiny_dataset[0]), "--samples", "7", "--batch-size", "4"]
    given.append("--no-compare")
    calibrate.main([str(folder), *given])
    return folder


@pytest.fixture(scope="module")
def scene():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 24, 24, 3), np.uint8)
    observation = {
        "observation.images.base": images[0],
        "observation.images.wrist": images[1],
        "observation.state": generator.standard_normal(3).astype(np.float32),
        "task": "touch the red block",
    }
    return observation, generator.standard_normal((5, 6)).astype(np.float32)


def _policy(folder, **options):
    return policy.Policy.from_checkpoint(folder, warm_up=False, **options)


def test_a_calibrated_policy_runs_in_8_bits(calibrated, own, scene):
    found = calibration.load(calibrated / "assets", own.model)
    # Seven frames in batches of four: each counts once.
    assert (found.observations, found.num_steps) == (7, 2)
    exact = _policy(calibrated, quantize="none").infer(*scene)["actions"]
    for scheme, dtype in (("int8", "int8"), ("fp8", "float8_e4m3fn")):
        chosen = _policy(calibrated, quantize=scheme)
        error = np.linalg.norm(chosen.infer(*scene)["actions"] - exact) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.2
        assert chosen.metadata["quantize"] == scheme
        assert f"products in 8 bits ({scheme})" in chosen.description
        held = [leaf.dtype for leaf in chosen.program.arrays.others]
        assert held.count(quantized.DTYPES[scheme]) == 4 * 3
        assert held.count(dtype) == 4 * 3
    part = _policy(calibrated, quantize="int8", quantized=("expert",))
    assert [leaf.dtype for leaf in part.program.arrays.others].count("int8") == 4


def test_a_guided_chunk_in_8_bits_continues_the_previous_one(calibrated, scene):
    """The gradient of the guidance passes the rounding: without it guidance would do little."""
    observation, noise = scene
    chosen = _policy(calibrated, quantize="int8")
    left = chosen.infer(observation, -noise)["actions"]
    apart = np.abs(chosen.infer(observation, noise)["actions"] - left)[:2].mean()
    guided = chosen.infer(observation, noise, previous=left, delay=2)["actions"]
    exact = _policy(calibrated, quantize="none")
    reference = exact.infer(observation, noise, previous=left, delay=2)["actions"]
    assert np.abs(guided - left)[:2].mean() < 0.5 * apart
    assert np.abs(guided - reference).mean() < 0.2 * np.abs(reference - left).max() + 0.1 * apart


def test_the_error_of_rounding_is_that_of_the_robots_actions(calibrated, own, params):
    found = calibration.load(calibrated / "assets", own.model)
    given = batches.noise(own.model, 3).observation
    noise = np.random.default_rng(0).standard_normal((3, *_policy(calibrated).noise_shape))
    noise = noise.astype(np.float32)
    errors = rounding_error.measure(
        own.model, params, [(given, noise)], found, action_dim=2, schemes=("w8",)
    )
    exact, rounded = (
        np.asarray(_policy(calibrated, quantize=scheme).sample(given, noise))[..., :2]
        for scheme in ("none", "w8")
    )
    each = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(rounded, exact, strict=True)]
    together = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    expected = together, np.median(each), np.quantile(each, 0.95)
    np.testing.assert_allclose(errors["w8"], expected, rtol=1e-3)


def test_rounded_activations_need_a_calibration_of_the_same_steps(step, calibrated, capsys):
    with pytest.raises(
        ValueError, match=r"bounds in assets/calibration\.json.*weights alone \(w8\)"
    ):
        _policy(step, quantize="int8")
    asked = policy_arguments.Loading(quantize="w8", quantized=("expert",))
    assert asked.load(str(step)).quantize == "w8"
    assert "has no effect" not in capsys.readouterr().err
    dataclasses.replace(asked, quantize="").load(str(step))
    assert "--policy.quantized expert has no effect: the policy rounds" in capsys.readouterr().err
    _policy(calibrated, quantize="fp8", num_steps=1)
    assert "calibrated at 2 integration steps and it samples in 1" in capsys.readouterr().err


def test_a_policy_runs_in_the_bits_it_was_trained_for(step, calibrated, own, tmp_path):
    for source, expected in ((step, "wf8"), (calibrated, "fp8")):
        folder = tmp_path / expected
        shutil.copytree(source, folder)
        path = folder / "assets" / "shallow_pi.json"
        content = json.loads(path.read_text())
        assert content["quantize"] == "none"
        path.write_text(json.dumps(content | {"quantize": "fp8"}))
        assert _policy(folder).quantize == expected
        assert _policy(folder, quantize="none").quantize == "none"
    path.write_text(json.dumps(content | {"quantize": "int4"}))
    with pytest.raises(ValueError, match=r"damaged.*quantize 'int4'"):
        _policy(folder)


def test_tuned_takes_the_fastest_scheme_measured_here(calibrated, own, monkeypatch, tmp_path):
    monkeypatch.setenv("SHALLOW_PI_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"its --model, --depths 2 --horizons 5 --tune --quantize"):
        _policy(calibrated, quantize="tuned")
    tuning.store(own.model, tuning.SCANNED, {}, "fp8")
    assert _policy(calibrated, quantize="tuned").quantize == "fp8"
    assert _policy(calibrated).quantize == "none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no dataset to calibrate on: .* give --data.path"),
        (["--data.robot", "aloha"], "--data.robot aloha has no effect: it is the policy's own"),
        (["--data.robot", "absent.py"], "^error: no robot file absent.py"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--data.path", "nowhere"], "nowhere"),
        (["--data.path", "DATASET", "--percentile", "101"], r"--percentile must lie in \(0, 100\]"),
    ],
)
def test_bad_arguments_end_in_one_line(command, step, tiny_dataset, arguments, message):
    given = [tiny_dataset[0] if word == "DATASET" else word for word in arguments]
    _, _, err = command(calibrate, step, *given)
    assert re.search(message, err.replace("\n", " "))
    assert not (step / "assets" / "calibration.json").exists()


def test_the_datasets_and_episodes_of_the_run_are_taken(step, tiny_dataset, tmp_path, capsys):
    shutil.copytree(step, tmp_path / "2")
    path = str(tiny_dataset[0])
    data = {"path": path, "more": [path], "episodes": ["0/0", "1/1"]}
    (tmp_path / "config.json").write_text(json.dumps({"data": data}))
    # More samples than there are frames: all of them are taken.
    given = ["--samples", "999", "--batch-size", "1", "--num-steps", "1"]
    calibrate.main([str(tmp_path / "2"), *given])
    said = capsys.readouterr()
    assert f"Dataset of the policy's run: {path}, {path}; episodes 0/0 1/1" in said.err
    frames = sum(len(reader.Dataset(path, episodes=[episode])) for episode in (0, 1))
    found = json.loads((tmp_path / "2" / "assets" / "calibration.json").read_text())
    assert found["observations"] == frames
    assert said.out.strip() == str(tmp_path / "2" / "assets" / "calibration.json")
    assert "Too few frames to compare" in said.err


@pytest.mark.slow
def test_schemes_are_compared_on_frames_between(step, tiny_dataset, tmp_path, capsys):
    shutil.copytree(step, tmp_path / "2")
    given = ["--data.path", str(tiny_dataset[0]), "--samples", "2", "--num-steps", "1"]
    calibrate.main([str(tmp_path / "2"), *given])
    out = capsys.readouterr().out
    assert "actions of 2 other frames" in out
    found = re.findall(r"^ +(w8|int8|wf8|fp8) +([\d.]+) ", out, re.MULTILINE)
    assert {name for name, _ in found} == {"w8", "int8", "wf8", "fp8"}
    errors = [float(value) for _, value in found]
    assert 0 < errors[0] <= errors[1] <= errors[2] <= errors[3] < 20
