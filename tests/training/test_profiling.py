"""A trace contains exactly the requested steps, however the run ends."""

import dataclasses
import gzip
import json

import jax
import pytest

from shallow_pi.training import loop, metrics, profiling
from shallow_pi.training import run as runs

pytestmark = pytest.mark.timeout(300)
exact = pytest.mark.skipif(
    not hasattr(jax.profiler, "ProfileOptions"),
    reason="this JAX traces Python's calls too, which may crowd steps out of a trace",
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, tiny_experiment):
    return tiny_experiment(tmp_path_factory.mktemp("profiled"), num_train_steps=6)


def _train(experiment, **changes):
    experiment = dataclasses.replace(experiment, **changes)
    run = runs.open_run(experiment)
    with runs.claimed(experiment):
        loop.train(run)
    return experiment.folder


def _steps(folder):
    """The steps named in each trace for Perfetto, by the trace's folder."""
    found = {}
    for path in (folder / "profile").rglob("perfetto_trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        named = [event for event in events if event.get("name") == profiling.EVENT]
        assert all(event["dur"] > 0 for event in named)
        found[path.relative_to(folder).parts[1]] = [int(e["args"]["step_num"]) for e in named]
        assert list(path.parent.glob("*.xplane.pb")), "for XProf"
    return found


@pytest.mark.slow
@exact
def test_an_end_or_an_error_in_mid_range_keeps_the_trace(experiment, monkeypatch):
    assert _steps(_train(experiment, exp_name="end", profile="6:7")) == {"steps-6-6": [6]}

    def failing(self, number, values):
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "log", failing)
        with pytest.raises(KeyboardInterrupt):
            _train(experiment, exp_name="cut", profile="3:7", save_interval=100)
    folder = experiment.folder.with_name("cut")
    # The row of step 2 is written when step 4 was dispatched.
    assert _steps(folder) == {"steps-3-6": [3, 4]}
    assert jax.profiler.start_trace(folder / "another") is None, "the first one has ended"
    jax.profiler.stop_trace()


@pytest.mark.slow
@exact
def test_a_trace_holds_its_range_and_a_resumed_runs_what_is_ahead_of_it(experiment, capsys):
    changes = {"exp_name": "resumed", "num_train_steps": 3}
    folder = _train(experiment, **changes, profile="1:3")
    said = capsys.readouterr().err
    assert f"tensorboard --logdir {folder.absolute() / 'profile'}" in said
    assert "https://ui.perfetto.dev" in said
    # As a scheduler does, with the same command: nothing is left to trace, and nothing is wrong.
    _train(experiment, **changes | {"num_train_steps": 4}, profile="1:3", resume=True)
    with pytest.raises(
        ValueError, match=r"profile 3:6 begins before step 5, where this run resumes"
    ):
        _train(experiment, exp_name="resumed", profile="3:6", resume=True)
    _train(experiment, exp_name="resumed", profile="5:7", resume=True)
    assert _steps(folder) == {"steps-1-2": [1, 2], "steps-5-6": [5, 6]}


@pytest.mark.parametrize(
    "text", ["15:10", "10:10", "0:3", "x", "10", "10:", "-1:4", "1.5:3", "1:2:3"]
)
def test_what_is_no_range_is_refused(experiment, text):
    with pytest.raises(ValueError, match=r"FIRST:END with 1 <= FIRST < END, got .*10 to 14"):
        dataclasses.replace(experiment, profile=text)


def test_steps_the_run_does_not_have_are_refused(experiment):
    dataclasses.replace(experiment, profile="1:7")
    with pytest.raises(ValueError, match=r"traces step 7, and the last one is 6 .*END may be 7 at"):
        dataclasses.replace(experiment, profile="4:8")


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def full():
        stop()
        raise OSError("No space left on device")

    stop = jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    with profiling.traced(1, 3, "1:2", tmp_path, lambda: None) as numbers:
        assert list(numbers) == [1, 2, 3]
    assert "could not be written: OSError: No space left" in capsys.readouterr().err


def test_the_device_is_waited_for_at_both_ends(tmp_path):
    seen, waited = [], []
    with profiling.traced(1, 5, "2:4", tmp_path, lambda: waited.append(seen[-1])) as numbers:
        seen.extend(numbers)
    assert seen == [1, 2, 3, 4, 5]
    assert waited == [1, 3]
