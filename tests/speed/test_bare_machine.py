"""Timing an inference or a training step needs no package that reads data, simulates or serves."""

import importlib.util
import pathlib
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
ABSENT = {
    *("av", "filelock", "grain", "matplotlib", "mujoco", "openpi", "PIL", "polars"),
    *("prometheus_client", "sentencepiece", "tensorboardX", "websockets"),
}


class Absent:
    """A finder that has every module of `ABSENT` missing."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def bare(monkeypatch):
    """A Python without these packages, and without anything of ours that was imported before."""
    before = dict(sys.modules)
    for name in before:
        if name.partition(".")[0] in {*ABSENT, "shallow_pi"}:
            del sys.modules[name]
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    yield
    for name in set(sys.modules) - set(before):
        del sys.modules[name]
    sys.modules.update(before)


def test_the_benchmarks_import_jax_and_little_else(bare):
    for name in (
        *("benchmark", "benchmark_all", "benchmark_step"),
        *("compile_ahead", "estimate_memory"),
    ):
        spec = importlib.util.spec_from_file_location(f"bare_{name}", SCRIPTS / f"{name}.py")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "shallow_pi.speed.step" in sys.modules
    with pytest.raises(ModuleNotFoundError, match="polars"):
        importlib.import_module("shallow_pi.data.lerobot.reader")
