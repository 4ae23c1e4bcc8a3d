"""A policy's assets go into a step folder and come back the same."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from shallow_pi.data.robots import assets, normalize, tokenizer
from shallow_pi.data.robots import robot as robots
from shallow_pi.training import command_line

CONFIGS = pathlib.Path(__file__).parents[2] / "train_configs"


def _stats():
    ramp = np.linspace(0.5, 2, 3)
    one = normalize.NormStats(mean=ramp, std=ramp + 1, q01=-ramp, q99=ramp)
    return {"state": one, "actions": dataclasses.replace(one, mean=ramp - 3)}


@pytest.fixture
def own(tiny_config, tiny_dataset):
    model = tiny_config(vocab_size=320)
    names = {"state": ("x", "y", "z")}
    return assets.Assets(model, robots.TURNTABLE, tiny_dataset[1], _stats(), "mine", names, 2)


@pytest.fixture
def observation():
    generator = np.random.default_rng(0)
    return {
        "observation.images.base": generator.integers(0, 256, (24, 24, 3), np.uint8),
        "observation.images.wrist": generator.integers(0, 256, (24, 24, 3), np.uint8),
        "observation.state": np.array([0.1, 0.2, 0.3], np.float32),
        "task": "touch the red block",
    }


def test_assets_come_back_as_they_were_saved(own, observation, tmp_path):
    own.save(tmp_path / "5" / "assets")
    read = assets.load(tmp_path / "5")
    assert (read.model, read.robot, read.asset_id) == (own.model, own.robot, "mine")
    assert read.names == {"state": ("x", "y", "z")}
    assert read.num_steps == 2
    for key, stats in own.stats.items():
        for name, value in dataclasses.asdict(stats).items():
            np.testing.assert_array_equal(getattr(read.stats[key], name), value)
    sample, expected = read.inputs()(dict(observation)), own.inputs()(dict(observation))
    assert sorted(sample) == sorted(expected)
    for key in ("state", "tokenized_prompt", "tokenized_prompt_mask"):
        np.testing.assert_array_equal(sample[key], expected[key])


def test_the_layout_is_openpis(own, tmp_path):
    own.save(tmp_path / "assets")
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "assets/mine/norm_stats.json",
        "assets/shallow_pi.json",
        "assets/tokenizer.model",
    }
    written = json.loads((tmp_path / "assets/mine/norm_stats.json").read_text())
    assert list(written) == ["norm_stats"]
    assert sorted(written["norm_stats"]) == ["actions", "state"]
    assert sorted(written["norm_stats"]["state"]) == ["mean", "q01", "q99", "std"]


def test_outputs_undo_inputs(own, observation):
    """Absolute targets → deltas, normalized, padded → absolute targets."""
    targets = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    sample = own.inputs()({**observation, "actions": targets})
    assert sample["actions"].shape == (5, own.model.action_dim)
    np.testing.assert_array_equal(sample["actions"][:, 3:], 0)
    found = own.outputs()({"actions": sample["actions"], "state": observation["observation.state"]})
    np.testing.assert_allclose(found["actions"], targets, atol=1e-5)


@pytest.mark.parametrize(("pi05", "kind"), [(False, "z_score"), (True, "quantile")])
def test_pi0_takes_z_scores_and_pi05_quantiles(own, observation, pi05, kind):
    model = dataclasses.replace(own.model, pi05=pi05)
    found = dataclasses.replace(own, model=model)
    assert found.kind == kind
    stats, state = own.stats["state"], observation["observation.state"]
    expected = {
        "z_score": (state - stats.mean) / stats.std,
        "quantile": (state - stats.q01) / (stats.q99 - stats.q01) * 2 - 1,
    }
    sample = found.inputs()(dict(observation))
    np.testing.assert_allclose(sample["state"][:3], expected[kind], atol=1e-5)


@pytest.mark.parametrize("name", sorted(command_line.names(CONFIGS)))
def test_a_model_survives_json(name):
    model = command_line.load(CONFIGS, name).model
    assert assets.model_from_dict(json.loads(json.dumps(dataclasses.asdict(model)))) == model


def test_a_tokenizer_of_another_vocabulary_is_an_error(own):
    pieces = tokenizer.Tokenizer(own.tokenizer, 8).vocab_size
    model = dataclasses.replace(own.model, vocab_size=pieces)
    dataclasses.replace(own, model=model).inputs()
    smaller = dataclasses.replace(own, model=dataclasses.replace(model, vocab_size=pieces - 1))
    with pytest.raises(ValueError, match=rf"has {pieces} pieces, the model embeds {pieces - 1}"):
        smaller.inputs()


def test_a_folder_without_assets_says_what_it_looks_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no shallow_pi\.json in .*<exp>/<step>"):
        assets.load(tmp_path)


@pytest.mark.parametrize("missing", ["tokenizer.model", "mine/norm_stats.json"])
def test_a_missing_file_is_named(own, tmp_path, missing):
    own.save(tmp_path / "assets")
    (tmp_path / "assets" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        assets.load(tmp_path).inputs()


def test_a_folder_that_does_not_say_its_integration_steps_has_ten(own, tmp_path):
    own.save(tmp_path / "assets")
    path = tmp_path / "assets" / "shallow_pi.json"
    content = json.loads(path.read_text())
    del content["num_steps"]
    path.write_text(json.dumps(content))
    assert assets.load(tmp_path).num_steps == 10


def test_statistics_outside_the_folder_are_refused(own, tmp_path):
    """A checkpoint may be anybody's, and an export writes them under the same name."""
    dataclasses.replace(own, asset_id="org/mine").save(tmp_path / "assets")
    assert assets.load(tmp_path).asset_id == "org/mine"
    path = tmp_path / "assets" / "shallow_pi.json"
    path.write_text(path.read_text().replace("org/mine", "../assets/org/mine"))
    with pytest.raises(ValueError, match=r"asset_id in .*shallow_pi\.json must name a folder insi"):
        assets.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: json.dumps({key: content[key] for key in ("robot", "asset_id")}),
        lambda content: json.dumps(content | {"model": content["model"] | {"legs": 2}}),
        lambda content: json.dumps(content | {"num_steps": "few"}),
        lambda content: json.dumps(content | {"num_steps": 0}),
        lambda content: json.dumps(content) + "\udcff",
    ],
    ids=[
        *("cut short", "without model", "with an unknown field", "steps in words", "no steps"),
        "no text",
    ],
)
def test_a_damaged_description_is_named(own, tmp_path, damage):
    own.save(tmp_path / "assets")
    path = tmp_path / "assets" / "shallow_pi.json"
    text = damage(json.loads(path.read_text()))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"shallow_pi\.json is damaged"):
        assets.load(tmp_path)


@pytest.mark.parametrize("robot", [*robots.ROBOTS.values()], ids=lambda robot: robot.name)
def test_every_robot_is_restored_as_saved(own, tmp_path, robot):
    changed = dataclasses.replace(robot, name="not_listed", prompt="go")
    dataclasses.replace(own, robot=changed).save(tmp_path / "assets")
    assert assets.load(tmp_path).robot == changed


def test_folders_that_only_name_their_robot_are_read(own, tmp_path):
    own.save(tmp_path / "assets")
    path = tmp_path / "assets" / "shallow_pi.json"
    content = json.loads(path.read_text())
    del content["robot_fields"]
    path.write_text(json.dumps(content))
    assert assets.load(tmp_path).robot == own.robot
    path.write_text(json.dumps(content | {"robot": "crane"}))
    with pytest.raises(ValueError, match="unknown robot 'crane'"):
        assets.load(tmp_path)
