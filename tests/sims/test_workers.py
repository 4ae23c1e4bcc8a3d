"""Simulators in other processes do the same as here, and say what went wrong there."""

import dataclasses
import re
import sys

import numpy as np
import pytest

from shallow_pi.sims import turntable, workers

SUITE = turntable.Suite(image_size=16)


@pytest.fixture(scope="module")
def pool():
    with workers.Workers(SUITE, 3, 2) as pool:
        yield pool


def test_they_play_the_same_episodes(pool):
    here = SUITE.make()
    for seed, there in enumerate(pool.simulators):
        for sim in (here, there):
            sim.reset(seed)
            while sim.time < 0.5:
                sim.step(workers.expert(sim) if sim is there else SUITE.expert()(sim))
        assert (there.task, there.prompt, there.success, there.done, there.time) == (
            here.task,
            here.prompt,
            here.success,
            here.done,
            here.time,
        )
        found, expected = there.observe(), here.observe()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)


def test_an_error_there_is_raised_here(pool):
    sim = pool.simulators[0]
    sim.reset(0)
    with pytest.raises(ValueError, match="expected three finite numbers"):
        sim.step(np.zeros(7))
    sim.step(np.zeros(3))  # It goes on.
    with pytest.raises(ValueError, match="the simulator failed with KeyError"):
        sim._call("fly")


def test_a_process_that_ended_is_reported():
    with workers.Workers(SUITE, 1, 1) as pool:
        pool._processes[0]._process.kill()
        with pytest.raises(ValueError, match=r"process ended with status -9 in reset\(\)"):
            pool.simulators[0].reset(0)


@dataclasses.dataclass(frozen=True)
class Large(turntable.Suite):
    """A suite with simulators of 2 GB."""

    memory = 2 * 10**9


@pytest.mark.parametrize(
    ("free", "expected"),
    [("MemAvailable:    4882813 kB", 2), ("MemAvailable: 97656 kB", 1), ("MemFree: 97656 kB", 50)],
)
def test_no_more_simulators_are_made_than_fit_in_memory(
    free, expected, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(workers, "_MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemTotal:  97656250 kB\n{free}\n")
    assert workers.fitting(Large(), 50) == expected
    said = f"50 simulators side by side need about 100 GB .*: {expected} at once"
    assert bool(re.search(said, capsys.readouterr().err)) == (expected < 50)
    assert workers.fitting(SUITE, 50) == 50
    (tmp_path / "meminfo").unlink()
    assert workers.fitting(Large(), 50) == 50


def test_this_machine_tells_its_free_memory():
    if sys.platform == "linux":
        assert workers._free_memory() > 2**20
