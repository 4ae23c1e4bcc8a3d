"""The commands that plan a step from shapes: their output, and their errors."""

import importlib
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def _run(script, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_compiled_step_is_printed_and_written(tmp_path):
    made = _run("compile_ahead.py", "debug", "--devices", 2, "--mesh.fsdp", 2, "--output", tmp_path)
    assert made.returncode == 0, made.stderr
    assert "debug, cpu:2, batch 16 on 2 devices" in made.stdout
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert file.name == "debug-cpu-2-fsdp2.json"
    assert found["devices"] == found["mesh"]["fsdp"] == 2
    assert found["collectives"]["all-gather"]["times"] > 0
    assert found["total"] > found["given"]["student"] > 0
    assert found["useful_flops_per_device"] > 0


def test_memory_is_estimated_with_the_sizes_of_a_teacher_on_disk():
    """At once, as nothing is compiled."""
    changes = ("--model.vocab-size", "999", "--teacher.path", ROOT / "assets" / "pi0_turntable")
    made = _run("estimate_memory.py", "pi0_turntable_l6", *changes, "--card", "h100")
    assert made.returncode == 0, made.stderr
    assert "The sizes are those of the teacher's checkpoint: vocab_size" in made.stderr
    for part in ("teacher", "student", "moments", "activations", "total", "largest batch"):
        assert part in made.stdout


@pytest.mark.parametrize("name", ["compile_ahead", "estimate_memory"])
def test_a_layout_that_cannot_be_is_refused_in_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "debug", "--devices", "0"])
    with pytest.raises(SystemExit, match="1"):
        importlib.import_module(f"shallow_pi.commands.{name}").main()
    assert "--devices must be 1 or more, got 0" in capsys.readouterr().err
