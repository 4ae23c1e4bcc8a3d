"""The commands that compile a step from shapes: what they print, and what they refuse."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


def _run(script, *arguments):
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_compiled_step_is_told_and_kept(tmp_path):
    made = _run("compile_ahead.py", "debug", "--devices", 2, "--mesh.fsdp", 2, "--output", tmp_path)
    assert made.returncode == 0, made.stderr
    assert "debug, cpu:2: batch 16 on 2 devices" in made.stdout
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert file.name == "debug-cpu-2-fsdp2.json"
    assert found["devices"] == found["mesh"]["fsdp"] == 2
    assert found["collectives"]["all-gather"]["times"] > 0
    assert found["total"] > found["given"]["student"] > 0
    assert found["useful_flops_per_device"] > 0


@pytest.mark.slow
def test_memory_is_told_by_part_and_card():
    made = _run("estimate_memory.py", "debug", "--card", "h100")
    assert made.returncode == 0, made.stderr
    for part in ("teacher", "student", "moments", "activations and gradients", "largest batch"):
        assert part in made.stdout
    assert "fits" in made.stdout


@pytest.mark.parametrize("script", ["compile_ahead.py", "estimate_memory.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("debug", "--devices", "0"), "--devices must be 1 or more, got 0"),
        (("debug", "--devices", "3", "--mesh.fsdp", "2"), "does not fit 3 devices"),
    ],
)
def test_what_cannot_be_compiled_is_told(script, arguments, message):
    made = _run(script, *arguments)
    assert made.returncode == 1
    assert message in made.stderr
    assert "Traceback" not in made.stderr
