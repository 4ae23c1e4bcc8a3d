"""Which step of a run is read, and policies from folders that say less than ours."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from shallow_pi.checkpoints import safetensors_file, weights
from shallow_pi.data.robots import assets, normalize, robot
from shallow_pi.deploy import policy, step_folder
from shallow_pi.deploy.export import lerobot


@pytest.fixture
def run(tmp_path):
    for step in ("2", "10", "9"):
        (tmp_path / "first" / step / "assets").mkdir(parents=True)
    return tmp_path / "first"


@pytest.fixture(scope="module")
def openpis(own, params, tmp_path_factory):
    """A step folder as openpi writes it: parameters and statistics. Tests must not change it."""
    folder = tmp_path_factory.mktemp("openpi") / "29999"
    weights.save_params(folder / "params", params)
    normalize.save(folder / "assets" / "org" / "turntable", own.stats)
    return folder


def fields(own):
    return {"action_horizon": 5, "max_token_len": 7, "dtype": "float32"} | {
        "cameras": own.model.cameras
    }


def test_a_run_stands_for_its_last_step_or_the_one_asked_for(run):
    assert step_folder.find(run) == run / "10"
    assert step_folder.find(run, 9) == run / "9"
    assert step_folder.find(run, "2") == run / "2"
    (run / "best.json").write_text(json.dumps({"step": 9, "loss": 0.1}))
    assert step_folder.find(run, "best") == run / "9"
    # A step folder is itself, and so is its params folder.
    assert step_folder.find(run / "2") == step_folder.find(run / "2", 2) == run / "2"
    assert step_folder.find(run / "2" / "params") == run / "2"
    # LeRobot's checkpoints, and their files.
    (run.parent / "checkpoints" / "000500" / "pretrained_model").mkdir(parents=True)
    inside = run.parent / "checkpoints" / "000500" / "pretrained_model"
    (inside / "model.safetensors").touch()
    for name in (
        "",
        "000500",
        "000500/pretrained_model",
        "000500/pretrained_model/model.safetensors",
    ):
        assert step_folder.find(run.parent / "checkpoints" / name) == inside


def test_a_missing_step_lists_the_existing_ones(run):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*first has the steps 2, 9, 10$"):
        step_folder.find(run / "3")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*did you mean 'first'\?$"):
        step_folder.find(run.parent / "frist")
    with pytest.raises(FileNotFoundError, match=r"no step 3; there are 2, 9, 10 in"):
        step_folder.find(run, 3)
    with pytest.raises(FileNotFoundError, match=r"no best\.json in .*use the last one"):
        step_folder.find(run, "best")
    with pytest.raises(ValueError, match=r"it holds the runs first: name one, such as .*/first$"):
        step_folder.find(run.parent)
    with pytest.raises(ValueError, match="'last', 'best' or a number, got 'first'"):
        step_folder.find(run, "first")
    with pytest.raises(ValueError, match=r"step best was requested, but .* is not the folder of"):
        step_folder.find(run / "2", "best")
    (run / "best.json").write_text(json.dumps({"step": 4}))
    with pytest.raises(FileNotFoundError, match=r"no step 4 \(the best\); there are 2, 9, 10 in"):
        step_folder.find(run, "best")
    (run / "best.json").write_text("{}")
    with pytest.raises(ValueError, match=r"best\.json is damaged"):
        step_folder.find(run, "best")


def test_a_folder_of_openpis_is_the_same_policy_once_its_robot_is_known(own, params, openpis):
    observation = {
        key: np.full((24, 24, 3), 100, np.uint8) for key in robot.TURNTABLE.cameras.values()
    } | {"observation.state": np.ones(3, np.float32), "task": "touch the red block"}
    found = policy.Policy.from_checkpoint(
        openpis,
        robot="turntable",
        tokenizer=own.tokenizer,
        num_steps=2,
        warm_up=False,
        **fields(own),
    )
    assert found.assets.model == own.model
    assert found.assets.asset_id == "org/turntable"
    expected = policy.Policy(own, params, num_steps=2).infer(observation)["actions"]
    np.testing.assert_allclose(found.infer(observation)["actions"], expected, atol=1e-6)


def test_facts_that_no_shape_shows_default_to_openpis_and_are_named(
    own, openpis, tiny_config, tiny_params, tmp_path, capsys
):
    asked = {"robot": robot.TURNTABLE, "tokenizer": own.tokenizer}
    model = step_folder.assets(openpis, **asked).model
    assert (model.pi05, model.depth, model.action_dim) == (False, 2, 6)
    assert (model.action_horizon, model.max_token_len, model.dtype) == (50, 48, "bfloat16")
    weights.save_params(tmp_path / "params", tiny_params(tiny_config(pi05=True, vocab_size=320)))
    shutil.copytree(openpis / "assets", tmp_path / "assets")
    capsys.readouterr()
    model = step_folder.assets(tmp_path, **asked, action_horizon=10).model
    assert (model.pi05, model.discrete_state_input) == (True, True)
    assert (model.action_horizon, model.max_token_len) == (10, 200)
    told = capsys.readouterr().err
    assert "assuming openpi's max_token_len 200, discrete_state_input True" in told
    assert "--policy.max-token-len --policy.discrete-state-input" in told
    step_folder.assets(tmp_path, **asked, **fields(own), discrete_state_input=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "pi05", "horizon"), [("pi05_libero", True, 10), ("pi0_aloha_towel", False, 50)]
)
def test_a_policy_that_openpi_publishes_is_known_by_its_place(
    own, openpis, tiny_config, tiny_params, tmp_path, capsys, name, pi05, horizon
):
    folder = tmp_path / "openpi-assets" / "checkpoints" / name
    weights.save_params(folder / "params", tiny_params(tiny_config(pi05=pi05, vocab_size=320)))
    shutil.copytree(openpis / "assets", folder / "assets")
    model = step_folder.assets(folder, robot=robot.TURNTABLE, tokenizer=own.tokenizer).model
    assert (model.action_horizon, model.discrete_state_input) == (horizon, False)
    assert "assuming" not in capsys.readouterr().err


def test_openpis_folder_without_a_robot_or_tokenizer_or_statistics_is_an_error(own, openpis):
    with pytest.raises(
        ValueError, match=r"(?s)no assets/shallow_pi\.json.*--policy\.robot .*turntable"
    ):
        policy.Policy.from_checkpoint(openpis)
    with pytest.raises(FileNotFoundError, match=r"of 320 is not PaliGemma's: give --policy\.tok"):
        step_folder.assets(openpis, robot="turntable")
    with pytest.raises(ValueError, match=r"no statistics of 'other'; it has \['org/turntable'\]"):
        step_folder.assets(openpis, robot="turntable", asset_id="other")
    for asset_id in ("..", "org/../other", ""):
        with pytest.raises(ValueError, match=r"--policy\.asset-id .* must name a folder inside"):
            step_folder.assets(openpis, robot="turntable", asset_id=asset_id)
    with pytest.raises(ValueError, match=r"a model has no \['horizon'\]; it has \['action_dim'"):
        step_folder.assets(openpis, robot="turntable", horizon=3)
    with pytest.raises(ValueError, match=r"unknown robot 'turntabel'; .*did you mean 'turntable'"):
        step_folder.assets(openpis, robot="turntabel")


def test_one_of_several_statistics_is_the_robots_or_the_one_named(own, openpis, tmp_path):
    shutil.copytree(openpis, tmp_path / "1")
    shutil.move(tmp_path / "1/assets/org", tmp_path / "1/assets/first")
    shutil.copytree(tmp_path / "1/assets/first/turntable", tmp_path / "1/assets/second")
    asked = {"robot": robot.TURNTABLE, "tokenizer": own.tokenizer}
    assert step_folder.assets(tmp_path / "1", **asked).asset_id == "first/turntable"
    assert step_folder.assets(tmp_path / "1", **asked, asset_id="second").asset_id == "second"
    renamed = {**asked, "robot": dataclasses.replace(robot.TURNTABLE, name="mine")}
    with pytest.raises(ValueError, match=r"'mine'; it has \['first/turntable', 'second'\]: choose"):
        step_folder.assets(tmp_path / "1", **renamed)
    assert step_folder.assets(openpis, **renamed).asset_id == "org/turntable"


def test_a_trained_robot_may_be_given_other_names_but_no_other_units(own, params, tmp_path, capsys):
    weights.save_params(tmp_path / "params", params)
    own.save(tmp_path / "assets")
    renamed = dataclasses.replace(robot.TURNTABLE, name="mine", state_key="q", prompt_key="say")
    assert step_folder.assets(tmp_path, robot=renamed).robot == renamed
    assert capsys.readouterr().err == ""
    one_eye = dataclasses.replace(renamed, cameras={"base_0_rgb": "top"}, fps=5)
    step_folder.assets(tmp_path, robot=one_eye)
    told = capsys.readouterr().err
    assert "trained with ['left_wrist_0_rgb'], for which robot mine has no camera" in told
    assert "trained at 20 actions a second, robot mine runs at 5" in told
    absolute = dataclasses.replace(robot.TURNTABLE, name="absolute", delta=())
    with pytest.raises(ValueError, match=r"absolute has other units: delta is .*, given \(\)"):
        step_folder.assets(tmp_path, robot=absolute)


def test_a_robot_with_openpis_transforms_may_be_described_in_a_file(own, params, tmp_path, capsys):
    weights.save_params(tmp_path / "params", params)
    names = {camera: camera for camera in robot.TURNTABLE.cameras}
    theirs = robot.Robot("openpi:pi0_mine", names, 3, 3, fps=1, elsewhere="pi0_mine")
    dataclasses.replace(own, robot=theirs).save(tmp_path / "assets")
    step_folder.assets(tmp_path, robot=dataclasses.replace(theirs, elsewhere=""))
    assert capsys.readouterr().err == ""
    assert step_folder.assets(tmp_path, robot=robot.TURNTABLE).robot == robot.TURNTABLE
    told = " ".join(capsys.readouterr().err.split())
    assert "differences of robot turntable must be those of openpi's config pi0_mine" in told
    with pytest.raises(ValueError, match="tabletop has other units: state_dim is 3, given 4"):
        step_folder.assets(tmp_path, robot=robot.TABLETOP)


def test_a_folder_of_ours_takes_other_statistics_and_another_tokenizer(own, params, tmp_path):
    weights.save_params(tmp_path / "params", params)
    own.save(tmp_path / "assets")
    other = {
        key: dataclasses.replace(stats, mean=stats.mean + 1) for key, stats in own.stats.items()
    }
    normalize.save(tmp_path / "assets" / "other", other)
    shutil.copyfile(own.tokenizer, tmp_path / "mine.model")
    found = step_folder.assets(tmp_path, asset_id="other", tokenizer=tmp_path / "mine.model")
    assert (found.asset_id, found.tokenizer) == ("other", tmp_path / "mine.model")
    np.testing.assert_array_equal(found.stats["state"].mean, own.stats["state"].mean + 1)
    with pytest.raises(
        ValueError, match=r"no statistics of 'third'; it has \['other', 'turntable'\]"
    ):
        step_folder.assets(tmp_path, asset_id="third")
    shutil.move(tmp_path / "assets" / "other", tmp_path / "elsewhere")
    found = step_folder.assets(tmp_path, norm_stats=tmp_path / "elsewhere")
    np.testing.assert_array_equal(found.stats["state"].mean, own.stats["state"].mean + 1)


def test_a_checkpoint_of_parameters_alone_is_given_its_statistics(own, openpis, tmp_path):
    shutil.copytree(openpis / "params", tmp_path / "1" / "params")
    asked = {"robot": robot.TURNTABLE, "tokenizer": own.tokenizer}
    with pytest.raises(FileNotFoundError, match=r"no statistics in .*--policy\.norm-stats FOLDER"):
        step_folder.assets(tmp_path / "1", **asked)
    found = step_folder.assets(tmp_path / "1", **asked, norm_stats=openpis / "assets")
    np.testing.assert_array_equal(found.stats["actions"].std, own.stats["actions"].std)


def test_a_step_of_a_trial_on_synthetic_samples_is_no_policy(openpis, tmp_path):
    shutil.copytree(openpis / "params", tmp_path / "first" / "4" / "params")
    (tmp_path / "first" / "config.json").write_text('{"data": {"source": "synthetic"}}')
    for read in (step_folder.assets, assets.load):
        with pytest.raises(ValueError, match=r"first/4 is not a policy: its run is a trial on "):
            read(tmp_path / "first" / "4")


def test_a_folder_without_parameters_is_told_before_its_robot_is_asked_for(openpis, tmp_path):
    shutil.copytree(openpis / "assets", tmp_path / "1" / "assets")
    (tmp_path / "1" / "train_state").mkdir()
    with pytest.raises(
        ValueError, match=r"holds no parameters .* it holds assets, train_state\. A"
    ):
        step_folder.assets(tmp_path / "1")
    (tmp_path / "1" / "full_weights.pt").touch()
    with pytest.raises(ValueError, match=r"files \(full_weights\.pt\) are not read, .*: save the"):
        step_folder.assets(tmp_path / "1")
    (tmp_path / "1" / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match=r"an adapter of PEFT's without the model: merge it"):
        step_folder.assets(tmp_path / "1")
    (tmp_path / "all" / "first").mkdir(parents=True)
    (tmp_path / "all" / "first" / "config.json").touch()
    with pytest.raises(ValueError, match=r"holds the runs first: name one, such as .*all/first$"):
        step_folder.assets(tmp_path / "all")


def test_a_path_that_may_be_an_address_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, meant in (
        ("lerobot/pi05_base", "hf://lerobot/pi05_base"),
        ("gs:/bucket/pi0_base/params", "gs://bucket/pi0_base"),
        ("hf:/lerobot/pi0", "hf://lerobot/pi0"),
        ("https://huggingface.co/lerobot/pi0/tree/main", "hf://lerobot/pi0@main"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=meant):
            step_folder.find(given)


def test_a_policy_of_lerobots_says_more_of_itself(own, params, tmp_path, capsys):
    """Only its standard files, without assets of ours."""
    written = weights.leaves(params)
    heads = {"num_kv_heads": own.model.backbone.num_kv_heads, "num_image_heads": 2}
    safetensors_file.write(tmp_path / "model.safetensors", written, **heads, prefix="model.")
    lerobot.write_pipelines(tmp_path, own)
    found = step_folder.assets(
        tmp_path, robot="turntable", tokenizer=own.tokenizer, cameras=own.model.cameras
    )
    assert dataclasses.replace(found.model, dtype="float32") == own.model
    for key, stats in own.stats.items():
        np.testing.assert_allclose(found.stats[key].mean, stats.mean)
        np.testing.assert_allclose(found.stats[key].std, stats.std)
    assert capsys.readouterr().err == ""
    (tmp_path / "config.json").write_text('{"chunk_size": "many"}')
    with pytest.raises(ValueError, match=r"config\.json is not a policy's config .*copy it again"):
        step_folder.assets(tmp_path, robot="turntable", tokenizer=own.tokenizer)
