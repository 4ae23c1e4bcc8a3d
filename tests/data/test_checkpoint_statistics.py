"""Statistics are those the checkpoint was trained with, found in openpi's layout and LeRobot's."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

from shallow_pi.data.robots import assets, checkpoint_statistics, lerobot_policy, normalize
from shallow_pi.data.robots import robot as robots

OPTIONS = "--data.asset-id NAME"
VALUES = {
    "mean": np.array([0.5, -1.0, 2.0]),
    "std": np.array([1.0, 0.2, 3.0]),
    "min": np.array([-9.0, -1.5, 0.0]),
    "max": np.array([9.0, 1.0, 9.5]),
    "q01": np.array([-2.0, -1.3, 0.5]),
    "q99": np.array([4.0, 0.7, 9.0]),
    "q10": np.array([-1.0, -1.1, 1.0]),
    "q90": np.array([2.0, 0.5, 7.0]),
}


def _stats(shift=0.0):
    return normalize.NormStats(np.full(3, shift), np.ones(3), np.full(3, -1.0), np.ones(3))


def _openpis(step, *names):
    for shift, name in enumerate(names):
        both = {"state": _stats(shift), "actions": _stats(shift)}
        normalize.save(step / "assets" / name, both)
    return step


def _lerobots(step, mode, names=tuple(VALUES), relative=None, **settings):
    """A policy's preprocessor as LeRobot writes it, the same statistics for state and action."""
    step.mkdir(exist_ok=True)
    tensors = {
        f"{feature}.{name}": VALUES[name].astype(np.float32)
        for feature in ("observation.state", "action")
        for name in names
    }
    tensors["observation.images.top.mean"] = np.zeros((3, 1, 1), np.float32)
    safetensors.numpy.save_file(tensors, step / "pre_step_1_normalizer_processor.safetensors")
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    steps = [
        {"registry_name": "relative_actions_processor", "config": relative or {"enabled": False}},
        {
            "registry_name": "normalizer_processor",
            "config": {"eps": 1e-8, "features": {}, "norm_map": norm_map, **settings},
            "state_file": "pre_step_1_normalizer_processor.safetensors",
        },
    ]
    content = json.dumps({"name": "policy_preprocessor", "steps": steps})
    (step / "policy_preprocessor.json").write_text(content)
    return step


def _find(step, asset_id="mine", kind="z_score", **more):
    return checkpoint_statistics.find(step, asset_id, kind, options=OPTIONS, **more)


def test_openpis_are_found_by_their_name_or_its_last_part(tmp_path, capsys):
    step = _openpis(tmp_path, "org/first", "second")
    assert _find(step, "org/first").asset_id == _find(step, "first").asset_id == "org/first"
    found = _find(step, "second")
    assert found.path == tmp_path / "assets" / "second" / "norm_stats.json"
    np.testing.assert_array_equal(found.stats["state"].mean, 1)
    assert capsys.readouterr().err == ""


def test_those_in_assets_itself_are_of_any_name(tmp_path, capsys):
    step = _openpis(tmp_path, "", "org/second")
    found = _find(step, "mine", exact=True)
    assert (found.asset_id, found.path) == ("mine", tmp_path / "assets" / "norm_stats.json")
    assert _find(step, "second").asset_id == "org/second"
    assert capsys.readouterr().err == ""


def test_the_only_ones_are_taken_with_a_word_and_of_several_none(tmp_path, capsys):
    step = _openpis(tmp_path, "trossen")
    assert _find(step).asset_id == "trossen"
    assert "no statistics of 'mine': taking its only ones, 'trossen'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no statistics of 'mine'; it has \['trossen'\]"):
        _find(step, exact=True)
    _openpis(tmp_path, "trossen", "droid", "a/same", "b/same")
    with pytest.raises(ValueError, match=r"it has \['a/same', .*, 'trossen'\]: .*--data\.asset-id"):
        _find(step)
    with pytest.raises(ValueError, match=r"several statistics of 'same', \['a/same', 'b/same'\]"):
        _find(step, "same")
    assert _find(tmp_path / "nothing") is None


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
@pytest.mark.parametrize(
    ("mode", "ends"),
    [("QUANTILES", ("q01", "q99")), ("MIN_MAX", ("min", "max")), ("QUANTILE10", ("q10", "q90"))],
)
def test_lerobots_two_ends_are_minus_one_and_one_for_either_model(tmp_path, kind, mode, ends):
    stats = _find(_lerobots(tmp_path, mode), kind=kind).stats
    for key in ("state", "actions"):
        for end, expected in zip(ends, (-1, 1), strict=True):
            found = normalize.normalize(VALUES[end], stats[key], kind)
            np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_lerobots_z_scores_are_z_scores_for_either_model(tmp_path, kind):
    stats = _find(_lerobots(tmp_path, "MEAN_STD", ("mean", "std"), eps=1e-3), kind=kind).stats
    values = np.array([[3.0, -4.0, 5.0]])
    expected = (values - VALUES["mean"]) / (VALUES["std"] + 1e-3)
    found = normalize.normalize(values, stats["state"], kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_lerobot_does_not_normalize_stays(tmp_path):
    values = np.array([[3.0, -4.0, 5.0]])
    for settings in ({"norm_map": {}}, {"normalize_observation_keys": ["observation.other"]}):
        stats = _find(_lerobots(tmp_path, "MEAN_STD", **settings)).stats
        found = normalize.normalize(values, stats["state"], "z_score")
        np.testing.assert_allclose(found, values, rtol=1e-6)


def test_another_normalization_than_the_models_is_reported(tmp_path, capsys):
    _find(_lerobots(tmp_path, "QUANTILES"), kind="quantile")
    assert capsys.readouterr().err == ""
    _find(_lerobots(tmp_path, "MEAN_STD"), kind="quantile")
    assert "action in" in (told := capsys.readouterr().err)
    assert "is normalized by MEAN_STD: written as statistics of the same map" in told


def test_statistics_of_lerobots_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"QUANTILES, which is impossible without \['q01', 'q99'\]"
    ):
        _find(_lerobots(tmp_path, "QUANTILES", ("mean", "std")))
    with pytest.raises(ValueError, match="by WARPED, which is not known here"):
        _find(_lerobots(tmp_path, "WARPED"))
    (tmp_path / "pre_step_1_normalizer_processor.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"step_1_normalizer.*cannot be read .*whole folder again"):
        _find(tmp_path)
    (tmp_path / "policy_preprocessor.json").write_text('{"steps": [3]}')
    with pytest.raises(ValueError, match=r"policy_preprocessor\.json is not a pipeline of LeRobot"):
        _find(tmp_path)
    (tmp_path / "policy_preprocessor.json").write_text('{"steps": []}')
    assert _find(tmp_path) is None


def test_a_robot_that_converts_does_not_fit_lerobots_policy(tmp_path):
    file = _lerobots(tmp_path, "MEAN_STD") / "policy_preprocessor.json"
    with pytest.raises(ValueError, match=r"robot aloha_sim converts .*\n.*state_conversion=None"):
        lerobot_policy.check_robot(tmp_path, robots.ALOHA_SIM)
    raw = dataclasses.replace(robots.ALOHA_SIM, state_conversion=None, action_conversion=None)
    lerobot_policy.check_robot(tmp_path, raw)
    # An export of ours converts as well, and a base policy has no statistics in any unit.
    content = json.loads(file.read_text())
    for changed in ([{"registry_name": "shallow_pi_to_model"}, *content["steps"]], []):
        file.write_text(json.dumps({"steps": changed}))
        lerobot_policy.check_robot(tmp_path, robots.ALOHA_SIM)


def test_relative_actions_of_lerobots_policy_have_to_be_the_robots(tmp_path):
    gripper = dataclasses.replace(robots.TURNTABLE, delta=(True, True))
    lerobot_policy.check_robot(tmp_path, gripper)
    names = {"action_names": ["x.pos", "y.pos", "Gripper.pos"], "exclude_joints": ["gripper"]}
    _lerobots(tmp_path, "MEAN_STD", relative={"enabled": True, **names})
    lerobot_policy.check_robot(tmp_path, gripper)
    with pytest.raises(ValueError, match=r"dimensions \[0, 1\] .* turntable \[0, 1, 2\]\ngive"):
        lerobot_policy.check_robot(tmp_path, robots.TURNTABLE)
    _lerobots(tmp_path, "MEAN_STD")
    with pytest.raises(
        ValueError, match=r"(?s)predicts dimensions \[\] .* delta=\(False, False, False\)"
    ):
        lerobot_policy.check_robot(tmp_path, robots.TURNTABLE)


def test_a_folder_named_by_hand_may_hold_them_one_level_down(tmp_path, capsys):
    _openpis(tmp_path, "mine")
    file = tmp_path / "assets" / "mine" / "norm_stats.json"
    for folder in (file, file.parent, tmp_path / "assets", tmp_path):
        found = checkpoint_statistics.at(folder, "mine")
        assert found.path == file
    assert capsys.readouterr().err == ""
    assert checkpoint_statistics.at(tmp_path, "third").path == file
    assert (
        "no statistics of 'third': taking its only ones, 'assets/mine'" in capsys.readouterr().err
    )
    _openpis(tmp_path, "mine", "other")
    with pytest.raises(
        FileNotFoundError, match=r"several below it: name one of \['mine', 'other'\]"
    ):
        checkpoint_statistics.at(tmp_path / "assets", "third")
    with pytest.raises(FileNotFoundError, match=r"no norm_stats\.json in .*compute_norm_stats\.py"):
        checkpoint_statistics.at(tmp_path / "absent", "mine")


def test_a_teacher_of_ours_for_another_robot_or_prompt_is_refused(own, tmp_path):
    own.save(tmp_path / "assets")
    found = assets.teacher_statistics(tmp_path, "turntable", robots.TURNTABLE, own.model)
    np.testing.assert_array_equal(found.stats["state"].mean, own.stats["state"].mean)
    absolute = dataclasses.replace(robots.TURNTABLE, name="absolute", delta=())
    with pytest.raises(
        ValueError, match=r"for robot turntable, not for absolute: delta is .*, giv"
    ):
        assets.teacher_statistics(tmp_path, "turntable", absolute, own.model)
    said = dataclasses.replace(own.model, pi05=True, discrete_state_input=True)
    with pytest.raises(ValueError, match=r"its state apart, .* --model\.no-discrete-state-input"):
        assets.teacher_statistics(tmp_path, "turntable", robots.TURNTABLE, said)
    shutil.rmtree(tmp_path / "assets")
    assert assets.teacher_statistics(tmp_path, "mine", robots.TURNTABLE, own.model) is None


def test_statistics_given_in_place_of_the_teachers_are_told(tmp_path, capsys):
    step, dims = _openpis(tmp_path, "trossen"), {"state": 3, "actions": 3}
    same = {"state": _stats(0.0), "actions": _stats(0.0)}
    checkpoint_statistics.warn_of_others(step, "mine", "z_score", same, dims)
    assert capsys.readouterr().err == ""
    other = {**same, "actions": _stats(0.5)}
    checkpoint_statistics.warn_of_others(step, "mine", "z_score", other, dims)
    told = capsys.readouterr().err
    assert "trained with other statistics of 'actions'" in told
    assert "'state'" not in told
    # By percentiles both are the same map.
    checkpoint_statistics.warn_of_others(step, "mine", "quantile", other, dims)
    checkpoint_statistics.warn_of_others(tmp_path / "none", "mine", "z_score", other, dims)
    _openpis(tmp_path, "trossen", "droid")
    checkpoint_statistics.warn_of_others(step, "mine", "z_score", other, dims)
    assert capsys.readouterr().err == ""


def test_statistics_behind_a_symbolic_link_are_found(tmp_path):
    _openpis(tmp_path / "else", "mine")
    (tmp_path / "step" / "assets").mkdir(parents=True)
    (tmp_path / "step" / "assets" / "mine").symlink_to(tmp_path / "else" / "assets" / "mine")
    assert _find(tmp_path / "step").asset_id == "mine"
    assert checkpoint_statistics.at(tmp_path / "step" / "assets", "other").stats.keys() == {
        "state",
        "actions",
    }


@pytest.mark.parametrize(
    ("mode", "names"), [("MEAN_STD", ("mean", "std")), ("MIN_MAX", ("min", "max"))]
)
def test_policies_from_before_lerobots_processors_hold_their_statistics_as_tensors(
    tmp_path, mode, names
):
    tensors = {
        f"{buffer}.{name}": VALUES[name].astype(np.float32)
        for buffer in (
            "normalize_inputs.buffer_observation_state",
            "unnormalize_outputs.buffer_action",
        )
        for name in names
    }
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(tensors, file)
    config = {"normalization_mapping": {"STATE": mode, "ACTION": mode}, "chunk_size": 50}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = _find(tmp_path)
    assert found.path == file
    values = np.stack([VALUES[name] for name in names])
    expected = {
        "MEAN_STD": [np.zeros(3), (values[1] - values[0]) / values[1]],
        "MIN_MAX": [-np.ones(3), np.ones(3)],
    }
    np.testing.assert_allclose(
        normalize.normalize(values, found.stats["actions"], "z_score"), expected[mode], atol=1e-5
    )
    # As LeRobot leaves them before it has seen a dataset.
    empty = {name: np.full_like(value, np.inf) for name, value in tensors.items()}
    safetensors.numpy.save_file(empty, file)
    assert _find(tmp_path) is None


def test_the_files_of_a_lerobot_teacher_contradict_a_wrong_config(tmp_path, own, capsys):
    step = _lerobots(tmp_path, "MEAN_STD")
    (step / "config.json").write_text(json.dumps({"chunk_size": 10, "num_inference_steps": 5}))
    assert assets.told(step) == {"action_horizon": 10, "discrete_state_input": False}
    assert lerobot_policy.num_steps(step) == 5
    said = dataclasses.replace(own.model, pi05=True, discrete_state_input=True)
    with pytest.raises(ValueError, match=r"give --model\.no-discrete-state-input"):
        assets.teacher_statistics(step, "mine", robots.TURNTABLE, said)


def test_cameras_in_another_order_than_a_lerobot_policys_are_told(tmp_path, capsys):
    step = _lerobots(tmp_path, "MEAN_STD")
    visual = {"type": "VISUAL", "shape": [3, 24, 24]}
    names = ["observation.images.wrist", "observation.images.base"]
    for order, told in ((names[::-1], False), (names, True)):
        features = {"observation.state": {"type": "STATE"}, **dict.fromkeys(order, visual)}
        (step / "config.json").write_text(json.dumps({"input_features": features}))
        still = dataclasses.replace(robots.TURNTABLE, delta=())
        lerobot_policy.check_robot(step, still)
        assert ("cameras in the order ['wrist', 'base']" in capsys.readouterr().err) == told
    # A policy from before LeRobot's processors has only its config.
    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(step / "config.json", older)
    lerobot_policy.check_robot(older, robots.TURNTABLE)
    assert "cameras in the order ['wrist', 'base']" in capsys.readouterr().err


def test_another_tokenizer_than_paligemmas_is_told(tmp_path, capsys):
    for name, told in (("google/paligemma-3b-pt-224", False), ("org/other", True)):
        step = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": name}}
        (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"steps": [step]}))
        lerobot_policy.warn_of_tokenizer(tmp_path)
        assert ("with the tokenizer org/other: taking Pali" in capsys.readouterr().err) == told


def test_images_that_lerobots_first_pi0_pads_at_one_side_are_told(tmp_path, capsys):
    wide, square = ({"cam": {"type": "VISUAL", "shape": [3, 24, w]}} for w in (32, 24))
    first = {"resize_imgs_with_padding": [224, 224]}
    for config, told in (
        ({"input_features": wide, "image_resolution": [224, 224]}, False),
        ({"input_features": square, **first}, False),
        ({"input_features": wide, **first}, True),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        lerobot_policy.warn_of_padding(tmp_path)
        assert ("is of LeRobot's first π0" in capsys.readouterr().err) == told


def test_what_lerobot_0_4_padded_differently_is_told(tmp_path, capsys):
    wide, square = ({"cam": {"type": "VISUAL", "shape": [3, 24, w]}} for w in (32, 24))
    step = _lerobots(tmp_path, "QUANTILES")
    pipeline = json.loads((step / "policy_preprocessor.json").read_text())
    state = {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}
    for config, prompt, told in (
        ({"input_features": square}, [state], r"0\.4 filled up the state in its prompts; 0\.5"),
        ({"input_features": wide}, [], r"0\.4 padded images that are not square with less"),
        ({"input_features": wide}, [state], r"in its prompts and padded images"),
        ({"input_features": square}, [], ""),
        ({"input_features": wide, "use_relative_actions": False}, [state], ""),
        ({}, [state], ""),
    ):
        (step / "config.json").write_text(json.dumps(config))
        content = {"steps": [*pipeline["steps"], *prompt]}
        (step / "policy_preprocessor.json").write_text(json.dumps(content))
        lerobot_policy.warn_of_padding(step)
        err = capsys.readouterr().err
        assert re.search(told, err) if told else not err


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_a_state_that_lerobot_leaves_as_it_is_is_read_with_its_count_of_frames(tmp_path, kind):
    step = _lerobots(tmp_path, "IDENTITY")
    file = step / "pre_step_1_normalizer_processor.safetensors"
    counts = {f"{name}.count": np.ones(1, np.float32) for name in ("observation.state", "action")}
    safetensors.numpy.save_file({**safetensors.numpy.load_file(file), **counts}, file)
    values = np.array([[3.0, -4.0, 5.0]])
    found = normalize.normalize(values, _find(step, kind=kind).stats["state"], kind)
    np.testing.assert_allclose(found, values, atol=1e-5)
