"""The command: it exports, explains itself, and answers bad input with one error."""

import json
import pathlib
import shutil

import pytest

from shallow_pi.checkpoints import sizes, weights
from shallow_pi.commands import export_student

ROOT = pathlib.Path(__file__).parents[1]
TEACHER = ROOT / "assets" / "pi0_turntable"


def test_the_packaged_policy_is_exported_and_the_folder_printed(command, tmp_path):
    target = tmp_path / "export"
    arguments = ("--format", "openpi-pytorch", "--output", target, "--any-size")
    status, out, _ = command(export_student, TEACHER, *arguments)
    assert status == 0
    assert out == f"{target}\n"
    assert sizes.of(weights.stored_params(target))["depth"] == 18
    assert json.loads((target / "config.json").read_text())["depth"] == 18
    status, _, err = command(export_student, TEACHER, *arguments)
    assert status == 1
    assert "exists and is never overwritten" in err


def test_help_teaches(command):
    status, out, _ = command(export_student, "--help")
    assert status == 0
    for word in ("openpi-padded", "lerobot", "--opset", "never overwritten"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--format", "openpi"), "there is no checkpoint at"),
        ((TEACHER, "--format", "openpi"), "--any-size"),
        (("s3://bucket/7", "--format", "openpi"), "expected a local path"),
    ],
)
def test_bad_input_is_one_error_without_a_traceback(command, arguments, message):
    status, out, err = command(export_student, *arguments)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_an_unknown_format_lists_the_formats(command):
    status, _, err = command(export_student, TEACHER, "--format", "tflite")
    assert status == 1
    assert "unknown --format 'tflite': there are openpi, openpi-padded, openpi-pytorch" in err


def test_a_truncated_safetensors_file_is_named(command, tmp_path):
    broken = tmp_path / "7"
    shutil.copytree(TEACHER / "assets", broken / "assets")
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    status, _, err = command(export_student, broken, "--format", "openpi", "--any-size")
    assert status == 1
    assert "model.safetensors could not be read" in err
