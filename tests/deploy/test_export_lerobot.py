"""LeRobot computes with the folder's numbers what our transforms compute."""

import ast
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

from shallow_pi.checkpoints import safetensors_file
from shallow_pi.checkpoints import safetensors_layout as layout
from shallow_pi.data.robots import assets, normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy.export import card, lerobot, student

PLUGIN = pathlib.Path(__file__).parents[2] / "plugins/lerobot_policy_shallow_pi/src"
PLUGIN = PLUGIN / "lerobot_policy_shallow_pi"


@pytest.fixture(scope="module")
def make(tiny_config, tiny_dataset):
    """Assets of a π0 or π0.5 for the turntable, every statistic another."""
    ramp = np.linspace(0.5, 2, 4)

    def stats(shift):
        return normalize.NormStats(ramp + shift, ramp * 2, -ramp, ramp + 1 + shift)

    def assets_of(robot=robots.TURNTABLE, **changes):
        model = tiny_config(vocab_size=320, **changes)
        both = {"state": stats(0.0), "actions": stats(3.0)}
        return assets.Assets(model, robot, tiny_dataset[1], both, "turntable")

    return assets_of


def _steps(folder, name):
    content = json.loads((folder / f"{name}.json").read_text())
    return {step["registry_name"]: step for step in content["steps"]}


def test_the_config_names_the_plugins_type_and_its_depth(make):
    config = lerobot.config(make())
    assert (config["type"], config["depth"]) == ("shallow_pi0", 3)
    assert lerobot.config(make(pi05=True))["type"] == "shallow_pi05"
    assert list(config["input_features"]) == [
        "observation.images.base",
        "observation.images.wrist",
        "observation.state",
    ]
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [3]}}


def test_plugin_and_exporter_agree_on_names():
    """The plugin cannot be imported here (it needs torch); its literals can be read."""
    source = PLUGIN.joinpath("configuration_shallow_pi.py").read_text()
    assert re.findall(r'register_subclass\("(\w+)"\)', source) == ["shallow_pi0", "shallow_pi05"]
    tree = ast.parse(PLUGIN.joinpath("modeling_shallow_pi.py").read_text())
    literals = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    assert literals == {
        "FILE_NAME": safetensors_file.NAME,
        "EMBEDDING": f"model.{layout.EMBEDDING}",
        "TIED": f"model.{layout.TIED}",
        "UNUSED": f"model.{layout.UNUSED[1]}",
        "LAYERS": f"model.{layout.BACKBONE}layers.",
    }


def test_a_camera_the_robot_lacks_is_left_out_and_the_order_is_the_models(make):
    cameras = ("left_wrist_0_rgb", "right_wrist_0_rgb", "base_0_rgb")
    features = lerobot.config(make(cameras=cameras))["input_features"]
    images = [key for key in features if "images" in key]
    assert images == ["observation.images.wrist", "observation.images.base"]


@pytest.mark.parametrize("pi05", [False, True])
def test_lerobots_normalization_is_ours(make, tmp_path, pi05):
    """LeRobot: (x − mean) / (std + eps), and 2 (x − q01) / (q99 − q01) − 1."""
    own = make(pi05=pi05)
    lerobot.write_pipelines(tmp_path, own)
    for name, kind, key, ours in (
        ("policy_preprocessor", "normalizer_processor", "observation.state", "state"),
        ("policy_postprocessor", "unnormalizer_processor", "action", "actions"),
    ):
        step = _steps(tmp_path, name)[kind]
        stored = safetensors.numpy.load_file(tmp_path / step["state_file"])
        mean, std, q01, q99 = (stored[f"{key}.{x}"] for x in ("mean", "std", "q01", "q99"))
        assert mean.shape == (3,)
        x = np.array([0.1, -2.0, 5.0])
        if step["config"]["norm_map"]["STATE"] == "MEAN_STD":
            theirs = (x - mean) / (std + step["config"]["eps"])
        else:
            theirs = 2 * (x - q01) / (q99 - q01) - 1
        expected = normalize.normalize(x, own.stats[ours], own.kind)
        np.testing.assert_allclose(theirs, expected, rtol=1e-6)
        assert step["config"]["norm_map"]["STATE"] == ("QUANTILES" if pi05 else "MEAN_STD")


@pytest.mark.parametrize(
    ("delta", "enabled", "absolute"),
    [
        ((), False, ["action_000", "action_001", "action_002"]),
        ((True, True, True), True, []),
        ((True, False), True, ["action_001", "action_002"]),
    ],
)
def test_relative_actions_are_the_robots(make, tmp_path, delta, enabled, absolute):
    own = make(dataclasses.replace(robots.TURNTABLE, delta=delta))
    lerobot.write_pipelines(tmp_path, own)
    before = _steps(tmp_path, "policy_preprocessor")["relative_actions_processor"]["config"]
    after = _steps(tmp_path, "policy_postprocessor")["absolute_actions_processor"]["config"]
    assert before["enabled"] is after["enabled"] is enabled
    assert before["exclude_joints"] == absolute
    assert before["action_names"] == ["action_000", "action_001", "action_002"]
    # LeRobot adds the state of each control step, so that of a chunk only the first action is due.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["chunk_size"] == own.model.action_horizon > 1
    assert config["n_action_steps"] == (1 if enabled else own.model.action_horizon)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"state_indices": (7, 8, 9), "state_sizes": (44,)}, "state 7:10 of 'observation.state'"),
        ({"action_indices": (2, 1, 0), "action_sizes": (3,)}, "actions 2, 1, 0 of 'action'"),
    ],
)
def test_a_robot_that_selects_values_of_a_column_is_refused(make, changes, taken):
    """LeRobot has no such step, and a column in another order has the right size."""
    own = student.Student(make(dataclasses.replace(robots.TURNTABLE, **changes)), {})
    with pytest.raises(ValueError, match=rf"robot turntable selects values .* \({taken}\), and Le"):
        lerobot.check(own)
    text = card.text("", "x", own, student.Origin(), "checked", is_policy=True)
    assert f"20 Hz ({taken}) |" in text, "as the cards of other formats tell"


def test_the_card_warns_of_what_lerobot_does_to_relative_actions(make):
    found = []
    for robot in (robots.METAWORLD, robots.TURNTABLE, robots.ALOHA):
        own = student.Student(make(robot, action_dim=14), {})
        found.append(lerobot.usage("x", own))
    assert ["`n_action_steps` is 1" in card for card in found] == [False, True, True]
    assert ["`--inference.type=rtc`" in card for card in found] == [False, False, True]


def test_the_state_is_normalized_before_it_goes_into_the_prompt(make, tmp_path):
    lerobot.write_pipelines(tmp_path, make(pi05=True, discrete_state_input=True))
    names = list(_steps(tmp_path, "policy_preprocessor"))
    state_in_prompt = names.index("pi05_prepare_state_tokenizer_processor_step")
    assert names.index("normalizer_processor") < state_in_prompt
    assert state_in_prompt < names.index("tokenizer_processor")
    assert "pi0_new_line_processor" not in names


def test_a_prompt_without_state_ends_in_a_newline(make, tmp_path):
    lerobot.write_pipelines(tmp_path, make(pi05=True))
    names = list(_steps(tmp_path, "policy_preprocessor"))
    assert names.index("pi0_new_line_processor") < names.index("tokenizer_processor")


def test_a_robots_own_units_come_before_the_difference_and_after_it(make, tmp_path):
    """Order of openpi: units, difference, normalization; and back."""
    aloha = make(robots.ALOHA, action_dim=14)
    lerobot.write_pipelines(tmp_path, aloha)
    before = list(_steps(tmp_path, "policy_preprocessor"))
    after = list(_steps(tmp_path, "policy_postprocessor"))
    wanted = ("shallow_pi_to_model", "relative_actions_processor", "normalizer_processor")
    assert [name for name in before if name in wanted] == list(wanted)
    wanted = ("unnormalizer_processor", "absolute_actions_processor", "shallow_pi_to_robot")
    assert [name for name in after if name in wanted] == list(wanted)


def test_the_units_in_the_folder_are_the_robots(make, tmp_path):
    """Computed from the folder's numbers alone, as the plugin does in torch."""
    lerobot.write_pipelines(tmp_path, make(robots.ALOHA, action_dim=14))
    config = _steps(tmp_path, "policy_preprocessor")["shallow_pi_to_model"]["config"]
    back = _steps(tmp_path, "policy_postprocessor")["shallow_pi_to_robot"]["config"]
    assert back["action"] == config["action"]
    values = np.random.default_rng(0).uniform(0.1, 0.9, 14)
    for ours, units in (
        (robots.ALOHA.state_conversion, config["state"]),
        (robots.ALOHA.action_conversion, config["action"]),
    ):
        found = values.copy()
        for dim in units["crank"]:
            fingers = found[dim] * (units["open"] - units["closed"]) + units["closed"]
            sine = units["horn"] ** 2 + fingers**2 - units["arm"] ** 2
            found[dim] = np.arcsin(sine / (2 * units["horn"] * fingers))
        found = found * np.array(units["factor"]) + np.array(units["offset"])
        np.testing.assert_allclose(found, ours.forward(values), rtol=1e-6)


def test_other_names_become_lerobots_and_a_fixed_prompt_is_a_step(make, tmp_path):
    droid = dataclasses.replace(robots.DROID, prompt="pick up the cup")
    own = make(droid, action_dim=8)
    lerobot.write_pipelines(tmp_path, own)
    features = lerobot.config(own)["input_features"]
    assert list(features) == [
        "observation.images.exterior_image_1_left",
        "observation.images.wrist_image_left",
        "observation.state",
    ]
    assert features["observation.state"]["shape"] == [8]
    step = _steps(tmp_path, "policy_preprocessor")["shallow_pi_to_model"]["config"]
    assert step == {"state": None, "action": None, "prompt": "pick up the cup"}
    assert "shallow_pi_to_robot" not in _steps(tmp_path, "policy_postprocessor")


def test_a_robot_in_lerobots_own_terms_needs_no_step_of_the_plugin(make, tmp_path):
    lerobot.write_pipelines(tmp_path, make())
    steps = {**_steps(tmp_path, "policy_preprocessor"), **_steps(tmp_path, "policy_postprocessor")}
    assert not [name for name in steps if name.startswith("shallow_pi")]


def test_the_plugin_registers_the_steps_and_takes_their_fields(make, tmp_path):
    """The plugin cannot be imported here (it needs torch); its source can be read."""
    lerobot.write_pipelines(tmp_path, make(robots.ALOHA_SIM, action_dim=14))
    tree = ast.parse(PLUGIN.joinpath("units_shallow_pi.py").read_text())
    fields = {
        node.decorator_list[0].args[0].value: {
            item.target.id for item in node.body if isinstance(item, ast.AnnAssign)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    for pipeline in ("policy_preprocessor", "policy_postprocessor"):
        for name, step in _steps(tmp_path, pipeline).items():
            if name.startswith("shallow_pi"):
                assert set(step["config"]) == fields.pop(name)
    assert not fields
