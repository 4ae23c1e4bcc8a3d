"""The command writes what training would compute, warns, and compares."""

import dataclasses
import json
import pathlib
import shutil

import exact_stats
import numpy as np
import polars as pl
import pytest

from shallow_pi.commands import compute_norm_stats
from shallow_pi.data import data_config, sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import normalize, robot
from shallow_pi.interop import openpi_flag
from shallow_pi.training import command_line

ROOT = pathlib.Path(__file__).parents[1]
FIXTURE = ROOT / "tests" / "fixtures" / "lerobot" / "pusht_v21_video"
ROBOT = """
from shallow_pi.data import robots, sources

ROBOT = robots.Robot(
    name="pusht",
    cameras={"base_0_rgb": "observation.images.top"},
    state_dim=2,
    action_dim=2,
    fps=10,
    delta=robots.mask(2),
)
"""


@pytest.fixture
def run(command, tmp_path, monkeypatch):
    """Runs the command in an empty folder with a robot file; gives its output and its warnings."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("pusht.py").write_text(ROBOT)

    def call(*arguments):
        path = () if "--data.path" in arguments else ("--data.path", FIXTURE)
        return command(compute_norm_stats, *path, "--data.robot", "pusht.py", *arguments)[1:]

    return call


def test_statistics_are_written_in_openpis_format(run):
    out, _ = run("--horizon", "4")
    file = pathlib.Path("norm_stats/pusht_v21_video/pusht/norm_stats.json")
    flags = f"--data.norm-stats {file.parent} --data.asset-id pusht"
    assert out == f"110 frames of 4 episodes\n{file}\ntrain with them: {flags}\n"
    assert sorted(json.loads(file.read_text())["norm_stats"]) == ["actions", "state"]
    dataset = reader.Dataset(FIXTURE)
    expected = sources.norm_stats([dataset], robot.find("pusht.py"), 4)
    for key, found in normalize.load(file.parent).items():
        np.testing.assert_array_equal(found.mean, expected[key].mean)
        np.testing.assert_array_equal(found.q99, expected[key].q99)
    run("--horizon", "4", "--output", "elsewhere", "--data.norm-stats", "dataset")
    assert normalize.load("elsewhere")["state"].mean.shape == (2,)


@pytest.mark.parametrize("flag", ["--data.asset-id", "--data.asset_id"])
def test_a_given_name_of_the_statistics_counts(run, flag):
    out, _ = run("--horizon", "4", flag, "mine")
    assert "norm_stats/pusht_v21_video/mine/norm_stats.json" in out


def test_a_config_brings_robot_horizon_and_kind(command):
    status, _, err = command(compute_norm_stats, "pi0_aloha_l6", "--data.path", FIXTURE)
    assert status == 1
    assert "lacks camera 'observation.images.cam_high'" in err


@pytest.fixture
def of_openpi(monkeypatch):
    """Stands in for `--openpi.config mine`, with samples from openpi's loader."""

    def call(name):
        data = data_config.DataConfig(
            source="mine:open_data", path="mine", robot=name, asset_id="me/arm"
        )
        own = command_line.load(ROOT / "train_configs", "pi0_aloha_l6")
        own = dataclasses.replace(own, name="mine_l6", data=data)
        monkeypatch.setattr(openpi_flag, "cli", lambda words: (own, words))

    return call


def test_a_config_of_openpis_brings_its_horizon_and_the_name_of_its_statistics(run, of_openpi):
    of_openpi("droid")
    out, _ = run()
    assert "norm_stats/mine_l6/me/arm/norm_stats.json" in out
    assert normalize.load("norm_stats/mine_l6/me/arm")["actions"].mean.shape == (2,)


def test_a_config_of_openpis_names_no_recordings_of_ours(command, of_openpi):
    of_openpi("droid")
    status, _, err = command(compute_norm_stats)
    assert status == 1
    assert err.startswith("error: name a dataset with --data.path")
    of_openpi("openpi:mine")
    _, _, err = command(compute_norm_stats, "--data.path", FIXTURE)
    assert "with openpi's own scripts/compute_norm_stats.py, or describe the" in err


def test_statistics_of_a_config_of_ones_own_are_named_as_its_runs_are(
    command, tmp_path, monkeypatch
):
    shutil.copy(ROOT / "train_configs" / "debug.py", tmp_path / "mine.py")
    (tmp_path / "pusht.py").write_text(ROBOT)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    own = "--data.path", FIXTURE, "--data.robot", "../pusht.py", "--horizon", 4
    _, out, _ = command(compute_norm_stats, "../mine.py", *own)
    assert "\nnorm_stats/mine/turntable/norm_stats.json\n" in out


def test_given_statistics_are_compared_and_nothing_is_written(run):
    run("--output", "own")
    out, err = run("--data.norm-stats", "own")
    assert "the statistics in own fit the dataset" in out
    assert "warning" not in err
    wrong = {k: exact_stats.of(np.ones((9, 2)) * 5 + np.eye(9, 2)) for k in ("state", "actions")}
    normalize.save("other", wrong)
    out, err = run("--data.norm-stats", "other")
    assert "the statistics in other do not fit the dataset" in out
    assert "warning: state[0] is" in err
    assert not pathlib.Path("norm_stats").exists()


def test_constant_dimensions_are_told_and_bad_episodes_counted(run, tmp_path):
    copy = shutil.copytree(FIXTURE, tmp_path / "copy")
    for file in (copy / "data").rglob("*.parquet"):
        moves, still = pl.col("observation.state").arr.get(0), pl.lit(3.0, pl.Float32)
        column = pl.concat_arr(moves, still).alias("observation.state")
        pl.read_parquet(file).with_columns(column).write_parquet(file)
    (copy / "data" / "chunk-000" / "episode_000001.parquet").write_bytes(b"junk")
    out, err = run("--data.path", str(copy), "--data.skip-bad-episodes")
    assert out.startswith("85 frames of 3 episodes, 1 left out\n")
    assert f"warning: episode 1 of dataset {copy} is left out: cannot read" in err
    assert "warning: state[1] is constant (3)" in err


def test_a_set_without_its_videos_and_their_columns_has_statistics(run, tmp_path):
    copy = shutil.copytree(FIXTURE.with_name("pusht_v30_video"), tmp_path / "copy")
    shutil.rmtree(copy / "videos")
    for file in (copy / "meta" / "episodes").rglob("*.parquet"):
        pl.read_parquet(file).select(pl.exclude("^videos/.*$")).write_parquet(file)
    out, _ = run("--data.path", str(copy))
    assert " frames of " in out
    assert pathlib.Path("norm_stats/copy/pusht/norm_stats.json").is_file()


def test_episodes_are_chosen_and_warnings_are_errors_when_asked(run):
    out, err = run("--data.episodes", "1:", "--data.exclude-episodes", "2")
    assert out.startswith("60 frames of 2 episodes\n")
    assert "does not use these of dataset" in err
    assert "--strict makes this warning an error" in run("--strict")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", ""], "name a dataset with --data.path"),
        (["--data.path", "absent"], "absent: there is no such folder"),
        (["--horizon", "0"], "horizon must be at least 1"),
    ],
)
def test_bad_input_is_reported_in_one_line(run, arguments, message):
    out, err = run(*arguments)
    assert not out
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ("--data.weights", "1"),
            "--data.weights 1.0 has no effect: the statistics do not depend on it",
        ),
        (
            ("--data.norm-stats", "own", "--output", "x"),
            "--output x has no effect: --data.norm-stats own is comp",
        ),
        (("--kind", "quantile"), "--kind quantile has no effect: only a comparison depends on it"),
    ],
)
def test_a_flag_without_effect_is_told(run, arguments, why):
    assert why in run(*arguments, "--data.path", "absent")[1]
