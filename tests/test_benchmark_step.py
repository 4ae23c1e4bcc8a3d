"""The command times both steps of a config, and refuses what cannot be timed."""

import json

import pytest

from shallow_pi.commands import benchmark_step


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_both_steps_are_printed_and_written(command, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    asked = "debug", "--batch-size", 8, "--repeats", 2, "--output", tmp_path / "new"
    _, printed, _ = command(benchmark_step, *asked)
    assert "debug, batch 8 on" in printed
    assert "MFU, of the measured rate" in printed
    found = json.loads((tmp_path / "new" / "step.json").read_text())
    assert found["arguments"] == ["debug", "--batch-size", "8"]
    assert set(found["median_ms"]) == {"distillation", "fine-tuning"}
    assert f"costs {found['ratio']:.2f} fine-tuning steps" in printed
    assert {"jax", "jaxlib"} <= set(found["versions"])
    assert "xla_flags" in found
    assert (tmp_path / "new" / "step.png").is_file()


def test_a_config_without_a_teacher_is_refused_in_one_line(command, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    status, _, said = command(benchmark_step, "pi0_turntable")
    assert status == 1
    assert "\nerror: pi0_turntable has no teacher: name a config with one\n" in f"\n{said}"


def test_no_repeats_are_refused_in_one_line(command):
    status, _, said = command(benchmark_step, "debug", "--repeats", 0)
    assert (status, said) == (1, "error: --repeats must be at least 1, got 0\n")
