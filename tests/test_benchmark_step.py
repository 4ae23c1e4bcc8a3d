"""The command times both steps of a config, and refuses what cannot be timed."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "benchmark_step.py"


def _run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_steps_are_told_and_kept(tmp_path):
    made = _run("debug", "--batch-size", 8, "--repeats", 2, "--output", tmp_path / "new")
    assert made.returncode == 0, made.stderr
    assert "debug, batch 8 on" in made.stdout
    assert "MFU, of the measured rate" in made.stdout
    found = json.loads((tmp_path / "new" / "step.json").read_text())
    assert found["arguments"] == ["debug", "--batch-size", "8"]
    assert set(found["median_ms"]) == {"distillation", "fine-tuning"}
    assert f"costs {found['ratio']:.2f} fine-tuning steps" in made.stdout
    assert {"jax", "jaxlib"} <= set(found["versions"])
    assert "xla_flags" in found
    assert (tmp_path / "new" / "step.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("debug", "--mesh.fsdp", "3"), "does not fit"),
        (("debug", "--repeats", "0"), "--repeats must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_timed_is_refused(arguments, message):
    made = _run(*arguments)
    assert made.returncode == 1
    assert message in made.stderr
    assert "Traceback" not in made.stderr
