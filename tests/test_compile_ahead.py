"""The commands that plan a step from shapes: their output, and their errors."""

import json
import pathlib

import jax
import pytest

from shallow_pi.commands import compile_ahead, estimate_memory
from shallow_pi.planning import compile, report

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_compiled_step_is_printed_and_written(command, tmp_path):
    arguments = ("--devices", 8, "--mesh.fsdp", 2, "--output", tmp_path)
    _, out, _ = command(compile_ahead, "debug", *arguments)
    assert "debug, cpu:8, batch 16 on 8 devices" in out
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert file.name == "debug-cpu-8-data4-fsdp2.json"
    assert (found["devices"], found["mesh"]["fsdp"]) == (8, 2)
    assert found["collectives"]["all-gather"]["times"] > 0
    assert found["total"] > found["given"]["student"] > 0
    assert found["useful_flops_per_device"] > 0


@pytest.mark.parametrize(("devices", "end"), [(1, "cpu-1"), (8, "cpu-8-data8")])
def test_the_file_of_a_plan_is_named_by_its_mesh_and_says_what_was_asked(
    command, tmp_path, monkeypatch, devices, end
):
    monkeypatch.setattr(compile, "devices", lambda count, _: jax.devices()[:count])
    monkeypatch.setattr(compile, "build", lambda *_: (None, None))
    monkeypatch.setattr(report, "planned", lambda *_: [])
    monkeypatch.setattr(report, "contents", lambda *_: {})
    asked = ("debug", "--student.depth", "3")
    command(compile_ahead, *asked, "--devices", devices, "--output", tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == f"debug-{end}.json"
    assert json.loads(file.read_text())["arguments"] == list(asked)


def test_memory_is_estimated_with_the_sizes_of_a_teacher_on_disk(command):
    """At once, as nothing is compiled."""
    changes = ("--model.vocab-size", 999, "--teacher.path", ROOT / "assets" / "pi0_turntable")
    asked = "pi0_turntable_l6", *changes, "--devices", 8, "--card", "h100"
    _, out, err = command(estimate_memory, *asked)
    assert "The sizes are those of the teacher's checkpoint:\n  vocab_size" in err
    for part in ("teacher", "student", "moments", "activations", "total", "largest batch"):
        assert part in out


@pytest.mark.parametrize("planner", [compile_ahead, estimate_memory])
def test_a_layout_that_cannot_be_is_refused_in_one_line(command, planner):
    status, _, err = command(planner, "debug", "--devices", "0")
    assert status == 1
    assert "--devices must be 1 or more, got 0" in err
