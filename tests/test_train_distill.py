"""The real command: it trains, resumes, and answers bad input with one error and no traceback."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from shallow_pi.checkpoints import fetch, weights
from shallow_pi.commands import train_distill
from shallow_pi.evaluation import study
from shallow_pi.models import pi0
from shallow_pi.parallel import processes
from shallow_pi.training import command_line, metrics

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "train_distill.py"


@pytest.fixture(autouse=True)
def the_cpu_has_been_split_in_eight(monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")


@pytest.fixture
def refused(command, tmp_path):
    """Calls it with --overwrite on an existing run; the run must stay where and as it is."""
    run = tmp_path / "runs" / "debug" / "first" / "100"
    run.mkdir(parents=True)
    (run / "precious").write_text("weeks of work")

    def call(*arguments):
        asked = "debug", "--checkpoint-dir", tmp_path / "runs", "--overwrite", *arguments
        status, _, said = command(train_distill, *asked)
        assert status in (1, 2)
        assert status == 2 or "\nerror: " in f"\n{said}"
        assert "Traceback" not in said
        assert [path.name for path in (tmp_path / "runs" / "debug").iterdir()] == ["first"]
        assert (run / "precious").read_text() == "weeks of work"
        assert [child.name for child in run.parent.iterdir()] == ["100"]
        return said

    return call


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_debug_runs_and_resumes_through_the_real_command(tmp_path, command):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    arguments = [sys.executable, str(SCRIPT), "debug", "--checkpoint-dir", str(tmp_path / "runs")]
    folder = tmp_path / "runs" / "debug" / "first"

    def call(*more):
        done = subprocess.run(
            [*arguments, *more], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        return done.returncode, done.stderr

    status, said = call("--num-train-steps", "20")
    assert status == 0, said
    assert "Distil: 20/20" in said
    status, _, said = command(train_distill, *arguments[2:])
    assert status == 1
    assert "\nerror: " in f"\n{said}"
    assert "--resume" in said
    status, said = call("--resume", "--gradient-interval", "40")
    assert status == 0, said
    rows = metrics.read(folder)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["loss"] < rows[0]["loss"]
    for name in ("task_loss", "velocity_loss", "attention_loss", "learning_rate", "grad_norm"):
        assert name in rows[0]
    assert ["grad_norm_of/attention_loss" in row for row in rows] == [False] * 3 + [True]
    student = command_line.load(ROOT / "train_configs", "debug").student_model
    weights.load_params(folder / "40" / "params", pi0.abstract_params(student))
    assert (folder / "tensorboard").is_dir()
    assert json.loads((folder / "config.json").read_text())["layer_map"] == [0, 3]


def test_an_unknown_config_exits_with_2_and_the_closest(command):
    status, _, said = command(train_distill, "debgu")
    assert status == 2
    assert "did you mean 'debug'?" in said


def test_a_teacher_without_config_cannot_be_trained(refused):
    assert "names no config that trains its teacher" in refused("--teacher.train")


def test_a_batch_that_does_not_divide_is_refused(refused):
    assert "batch size 12 is not divisible by the 8 devices" in refused("--batch-size", 12)


def test_losses_that_do_not_fit_the_student_are_refused(refused):
    said = refused("--losses.attention-layer", 2)
    assert "--losses.attention-layer must be -1 or one of 0, 1" in said


def test_resume_and_overwrite_exclude_each_other(refused):
    assert "give only one" in refused("--resume")


def test_data_that_cannot_be_used_are_refused(refused, tmp_path, tiny_dataset):
    assert "--data.path" in refused("--data.source", "lerobot")
    absent = ("--data.source", "lerobot", "--data.path", tmp_path / "absent")
    assert "no LeRobot dataset at" in refused(*absent)
    known = ("--data.source", "lerobot", "--data.path", tiny_dataset[0])
    assert "--data.tokenizer" in refused(*known)
    said = refused(*known, "--data.tokenizer", tiny_dataset[1])
    assert "pieces, the model embeds 64" in said
    assert "no SentencePiece model at nowhere" in refused(*known, "--data.tokenizer", "nowhere")
    known += ("--data.tokenizer", tiny_dataset[1], "--model.vocab-size", 320)
    assert "no norm_stats.json in nowhere" in refused(*known, "--data.norm-stats", "nowhere")
    robot = ("--data.robot", "aloha")
    assert "lacks camera 'observation.images.cam_high'" in refused(*known, *robot)


def test_a_teacher_that_cannot_be_used_is_refused(refused, tmp_path):
    teacher = tmp_path / "teacher"
    assert f"no checkpoint at {teacher}" in refused("--teacher.path", teacher)
    model = command_line.load(ROOT / "train_configs", "debug").model
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), pi0.abstract_params(model))
    del params["state_proj"]["bias"]
    weights.save_params(teacher / "params", params)
    assert "missing state_proj/bias (16,)" in refused("--teacher.path", teacher)
    (teacher / "params" / "_METADATA").unlink()
    assert "no _METADATA in it" in refused("--teacher.path", teacher)


def test_pi0_aloha_says_what_is_missing_and_where_to_put_it(command, tmp_path, monkeypatch):
    runs = ("--checkpoint-dir", tmp_path / "runs")
    status, _, said = command(train_distill, "pi0_aloha_l6", *runs)
    assert status == 1
    assert "name the folder of a LeRobot dataset (--data.path)" in said

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(fetch.fsspec, "filesystem", offline)
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    status, _, said = command(train_distill, "pi0_aloha_l6", *runs, "--data.source", "synthetic")
    assert status == 1
    target = tmp_path / "openpi" / "openpi-assets" / "checkpoints" / "pi0_base"
    for words in ("gs://openpi-assets/checkpoints/pi0_base", "uv sync --extra gcs", f"at {target}"):
        assert words in said
    assert "Traceback" not in said


def test_an_absent_teacher_that_can_be_trained_says_how(command, tmp_path):
    arguments = ("--checkpoint-dir", tmp_path / "runs", "--teacher.path", tmp_path / "absent")
    status, _, said = command(train_distill, "pi05_turntable_l6", *arguments)
    assert status == 1
    assert "there is no checkpoint at" in said
    assert "train it first, with pi05_turntable (--teacher.train)" in said
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_with_the_student_is_found_before_its_teacher_is_trained(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(study, "run", lambda own: pytest.fail("the teacher was trained"))
    arguments = ("pi0_turntable_l6", "--teacher.train", "--checkpoint-dir", tmp_path)
    status, _, said = command(train_distill, *arguments, "--batch-size", 12)
    assert (status, "not divisible" in said) == (1, True)
    folder = tmp_path / "pi0_turntable_l6" / "first"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    status, _, said = command(train_distill, *arguments)
    assert (status, "already holds a run" in said) == (1, True)


def test_the_cpu_is_split_for_the_batches_of_the_teacher_too(command, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(processes, "split_cpu", lambda *given: rows.extend(given))
    monkeypatch.setattr(study, "train_teacher", lambda experiment, own: experiment)
    monkeypatch.setattr(study, "run", lambda experiment: None)
    arguments = ("pi0_turntable_l6", "--teacher.train", "--checkpoint-dir", tmp_path)
    assert command(train_distill, *arguments, "--batch-size", 48)[0] == 0
    assert rows == [48, 64]
