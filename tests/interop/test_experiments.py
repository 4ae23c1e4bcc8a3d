"""openpi's training configs as experiments of ours: taken over whole, or refused with reason."""

import dataclasses

import pytest
import stand_ins

stand_ins.install()

# ruff: noqa: E402 (openpi comes after the stand-ins)
from openpi import transforms as openpi_transforms
from openpi.models import pi0_config
from openpi.training import config as openpi_config

from shallow_pi.data.robots import robot as robots
from shallow_pi.interop import openpi_configs, openpi_data, openpi_flag
from shallow_pi.models import pi0


@pytest.mark.parametrize(
    ("name", "model", "robot", "asset_id"),
    [
        (
            "pi05_libero",
            pi0.Pi0Config(pi05=True, action_horizon=10, max_token_len=200),
            robots.LIBERO,
            "physical-intelligence/libero",
        ),
        ("pi0_libero", pi0.Pi0Config(), robots.LIBERO_DELTA, "physical-intelligence/libero"),
        ("pi0_aloha", pi0.Pi0Config(), robots.ALOHA, "trossen"),
        (
            "pi0_aloha_sim",
            pi0.Pi0Config(),
            robots.ALOHA_SIM,
            "lerobot/aloha_sim_transfer_cube_human",
        ),
        (
            "pi05_droid",
            pi0.Pi0Config(
                pi05=True, action_horizon=15, max_token_len=200, discrete_state_input=True
            ),
            robots.DROID,
            "droid",
        ),
        (
            "pi05_full_droid_finetune",
            pi0.Pi0Config(
                pi05=True, action_horizon=16, max_token_len=200, discrete_state_input=True
            ),
            robots.DROID_POSITION,
            "droid",
        ),
    ],
)
def test_a_config_is_taken_over(name, model, robot, asset_id):
    found = openpi_configs.experiment(name)
    assert found.name == f"{name}_l6"
    assert found.model == model
    assert found.student_model.depth == 6
    assert (found.data.robot, found.data.asset_id) == (robot.name, asset_id)


def test_statistics_are_those_of_the_config():
    found = openpi_configs.experiment("pi05_full_droid_finetune").data.norm_stats
    assert found == "gs://openpi-assets/checkpoints/pi05_base/assets/droid"
    assert openpi_configs.experiment("pi05_libero").data.norm_stats == ""


def test_the_teacher_is_what_openpi_publishes_or_ones_own_run():
    published = openpi_configs.experiment("pi05_libero").teacher.path
    assert published == "gs://openpi-assets/checkpoints/pi05_libero"
    assert openpi_configs.experiment("pi0_libero").teacher.path == "./checkpoints/pi0_libero"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pi0_fast_libero", "is a pi0_fast model"),
        ("pi0_aloha_pen_uncap", r"ALOHA, prompt='uncap the pen'\)\n.*: no lerobot"),
        ("pi05_libro", r"no config 'pi05_libro' in openpi's .*config\.py; did you mean 'pi05_lib"),
        ("", "no config '' in openpi's .*; there are pi0_aloha, .*debug_pi05"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_with_the_reason(monkeypatch, name, reason):
    """Without LeRobot, openpi's loader cannot run what no robot of ours says."""
    monkeypatch.setattr(openpi_data, "obstacle", lambda _: "no lerobot")
    with pytest.raises(ValueError, match=reason):
        openpi_configs.experiment(name)


def test_other_transforms_than_a_known_robots_are_refused(monkeypatch):
    source = openpi_config.get_config("pi05_droid")
    group = openpi_transforms.Group(inputs=[openpi_transforms.SubsampleActions(2)])
    data = dataclasses.replace(source.data, data_transforms=lambda _: group)
    changed = dataclasses.replace(source, data=data)
    monkeypatch.setitem(openpi_config._CONFIGS_DICT, "mine", changed)
    monkeypatch.setattr(openpi_data, "obstacle", lambda _: "no lerobot")
    with pytest.raises(ValueError, match=r"mine cannot be taken over: .* of SimpleDataConfig"):
        openpi_configs.experiment("mine")


@pytest.fixture
def mine(monkeypatch):
    """Lets openpi have a config `mine`: its pi05_libero with other fields."""

    def register(**changes):
        source = openpi_config.get_config("pi05_libero")
        changed = dataclasses.replace(source, name="mine", **changes)
        monkeypatch.setitem(openpi_config._CONFIGS_DICT, "mine", changed)

    return register


@dataclasses.dataclass(frozen=True)
class _FromLibero(openpi_config.LeRobotLiberoDataConfig):
    """LIBERO's fields, and transforms that only its own `create` tells."""


def test_a_data_config_derived_from_openpis_is_not_taken_for_its_robot(monkeypatch, mine):
    mine(data=_FromLibero(repo_id="me/arm"))
    assert openpi_configs.experiment("mine").data.robot == "openpi:mine"
    monkeypatch.setattr(openpi_data, "obstacle", lambda _: "no lerobot")
    with pytest.raises(ValueError, match=r"(?s)transforms of _FromLibero.*here: no lerobot"):
        openpi_configs.experiment("mine")


ALOHA_KEYS = {"images": {"cam_high": "observation.images.top"}, "actions": "action"}


@pytest.mark.parametrize(
    ("repack", "robot"),
    [
        ([ALOHA_KEYS | {"state": "observation.state"}], "aloha_sim"),
        ([ALOHA_KEYS | {"state": "observation.qpos"}], "openpi:mine"),
        ([{"state": "observation.state", "actions": "action"}], "openpi:mine"),
    ],
    ids=["listed", "other keys", "no images"],
)
def test_an_aloha_with_keys_of_its_own_is_not_taken_for_a_listed_one(mine, repack, robot):
    inputs = [openpi_transforms.RepackTransform(keys) for keys in repack]
    data = openpi_config.LeRobotAlohaDataConfig(
        repo_id="me/aloha",
        default_prompt="Transfer cube",
        use_delta_joint_actions=False,
        repack_transforms=openpi_transforms.Group(inputs=inputs),
    )
    mine(data=data)
    assert openpi_configs.experiment("mine").data.robot == robot


def test_the_folder_of_statistics_may_be_a_path(mine, tmp_path):
    assets = openpi_config.AssetsConfig(assets_dir=tmp_path, asset_id="arm")
    mine(data=openpi_config.LeRobotLiberoDataConfig(repo_id="me/arm", assets=assets))
    assert openpi_configs.experiment("mine").data.norm_stats == f"{tmp_path}/arm"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"data": openpi_config.LeRobotLiberoDataConfig(repo_id=["me/a", "me/b"])},
            r"mine does not name its statistics: .* got \['me/a', 'me/b'\]",
        ),
        (
            {"data": openpi_config.LeRobotLiberoDataConfig()},
            "mine does not name its statistics: .* got tyro.MISSING",
        ),
        (
            {"model": pi0_config.Pi0Config(action_expert_variant="gemma_300M")},
            "openpi's config mine: Unknown variant: gemma_300M",
        ),
    ],
    ids=["several datasets", "none", "variant"],
)
def test_what_is_wrong_in_a_config_is_said_with_its_name(mine, fields, said):
    mine(**fields)
    with pytest.raises(ValueError, match=said):
        openpi_configs.experiment("mine")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("pi05_droid", "has no repo_id"), ("pi05_full_droid_finetune", "are in RLDS")],
)
def test_a_config_that_our_reader_takes_over_says_why(name, reason, capsys):
    openpi_configs.experiment(name)
    said = " ".join(capsys.readouterr().err.split())
    assert f"cannot read those of {name} here" in said
    assert reason in said


@pytest.mark.parametrize(
    "given", [["--openpi.config", "pi05_libero"], ["--openpi.config=pi05_libero"]]
)
def test_a_command_line_names_openpis_config_anywhere(given):
    found, fields = openpi_flag.cli(["--batch-size", "8", *given, "--resume"])
    assert found == openpi_configs.experiment("pi05_libero")
    assert fields == ["--batch-size", "8", "--resume"]
    assert openpi_flag.cli(["debug", "--resume"]) == (None, ["debug", "--resume"])


@pytest.mark.parametrize("lerobot", [False, True])
def test_every_config_of_openpi_is_taken_over_or_refused(monkeypatch, lerobot):
    """With openpi's loader, all but π0-FAST and what only RLDS reads or nobody can."""
    if not lerobot:
        monkeypatch.setattr(openpi_data, "obstacle", lambda _: "no lerobot")
    refused = {}
    for name in openpi_config._CONFIGS_DICT:
        try:
            openpi_configs.experiment(name)
        except ValueError as error:
            refused[name] = str(error)
    taken = set(openpi_config._CONFIGS_DICT) - set(refused)
    assert {"pi0_libero", "pi05_libero", "pi0_droid", "debug", "debug_pi05"} <= taken
    assert all(name in reason for name, reason in refused.items())
    if lerobot:
        assert "pi0_aloha_pen_uncap" in taken
        teacher = openpi_configs.experiment("pi0_aloha_pen_uncap").teacher.path
        assert teacher == "gs://openpi-assets/checkpoints/pi0_aloha_pen_uncap"
