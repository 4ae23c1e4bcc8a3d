"""The command times both steps of a config, and refuses what cannot be timed."""

import json
import pathlib
import sys

import pytest

from shallow_pi.commands import benchmark_step

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "benchmark_step.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_steps_are_printed_and_written(tmp_path, monkeypatch, capsys):
    command = [str(SCRIPT), "debug", "--batch-size", "8", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "new")])
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    benchmark_step.main()
    printed = capsys.readouterr().out
    assert "debug, batch 8 on" in printed
    assert "MFU, of the measured rate" in printed
    found = json.loads((tmp_path / "new" / "step.json").read_text())
    assert found["arguments"] == ["debug", "--batch-size", "8"]
    assert set(found["median_ms"]) == {"distillation", "fine-tuning"}
    assert f"costs {found['ratio']:.2f} fine-tuning steps" in printed
    assert {"jax", "jaxlib"} <= set(found["versions"])
    assert "xla_flags" in found
    assert (tmp_path / "new" / "step.png").is_file()


def test_a_config_without_a_teacher_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "pi0_turntable"])
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    with pytest.raises(SystemExit, match="1"):
        benchmark_step.main()
    said = "\nerror: pi0_turntable has no teacher: name a config with one\n"
    assert said in f"\n{capsys.readouterr().err}"


def test_no_repeats_are_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "debug", "--repeats", "0"])
    with pytest.raises(SystemExit, match="1"):
        benchmark_step.main()
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err
