"""Rows are means over exactly their steps, and none waits for the step dispatched last."""

import contextlib
import types

import jax.numpy as jnp
import pytest

from shallow_pi.training import metrics_buffer


class _Log:
    """Rows of steps with their number as the loss; a clock that is moved by the test."""

    def __init__(self, monkeypatch, interval):
        self.now, self.fetched, self.written = 100.0, [], {}
        monkeypatch.setattr(
            metrics_buffer, "time", types.SimpleNamespace(perf_counter=lambda: self.now)
        )
        self.buffer = metrics_buffer.MetricsBuffer(self._write, self._check, interval)

    def _check(self, number, values):
        assert values["loss"] == number
        self.fetched.append(number)

    def _write(self, number, row):
        assert number not in self.written
        self.written[number] = dict(row)

    def step(self, number, wait=0.0, seconds=0.0, **more):
        with self.buffer.waiting():
            self.now += wait
        self.now += seconds
        values = {"loss": float(number), **more}
        self.buffer.add(number, {name: jnp.float32(value) for name, value in values.items()})


@pytest.fixture
def log(monkeypatch):
    return lambda interval: _Log(monkeypatch, interval)


def test_a_step_is_fetched_when_two_more_are_dispatched_also_where_a_row_ends(log):
    log = log(2)
    for number in range(1, 8):
        log.step(number)
        assert log.fetched == list(range(1, number - 1))
        assert list(log.written) == [n for n in (2, 4, 6) if n <= number - 2]


def test_a_row_is_the_mean_over_its_steps(log):
    log = log(3)
    for number in range(1, 9):
        log.step(number, **({"now_and_then": number} if number == 2 else {}))
    assert [log.written[n]["loss"] for n in (3, 6)] == [2.0, 5.0]
    assert log.written[3]["now_and_then"] == 2.0
    assert "now_and_then" not in log.written[6]


def test_closing_waits_for_all_steps_and_writes_a_row_that_was_due_first(log):
    log = log(3)
    for number in range(1, 5):
        log.step(number)
    assert not log.written
    with log.buffer.closing() as row:
        assert log.fetched == [1, 2, 3, 4]
        assert list(log.written) == [3]
        row["error"] = 7.0
    assert {n: (row["loss"], row.get("error")) for n, row in log.written.items()} == {
        3: (2.0, None),
        4: (4.0, 7.0),
    }
    for number in range(5, 9):
        log.step(number)
    assert log.written[6]["loss"] == 5.5


def test_a_row_that_is_closed_at_its_interval_is_one_row(log):
    log = log(2)
    for number in (1, 2):
        log.step(number)
    with log.buffer.closing():
        assert not log.written
    assert list(log.written) == [2]


def test_a_row_is_written_though_its_checkpoint_fails(log):
    log = log(10)
    log.step(1)
    with contextlib.suppress(OSError), log.buffer.closing() as row, log.buffer.stalling(row):
        log.now += 3.0
        raise OSError
    assert log.written[1]["checkpoint_stall"] == 3.0


def test_what_must_not_be_is_raised_before_anything_is_saved(log):
    log = log(10)
    log.step(1)
    log.step(2)
    log.buffer._check = lambda number, values: 1 / (2 - number)
    with pytest.raises(ZeroDivisionError), log.buffer.closing():
        pytest.fail("step 2 is not fit to be saved")
    assert not log.written


def test_seconds_are_those_of_the_rows_own_steps(log):
    log = log(2)
    log.step(1, wait=1.0, seconds=9.0)
    log.step(2, wait=3.0, seconds=7.0)
    log.step(3, seconds=1.0)
    log.step(4, wait=5.0, seconds=1.0)
    # Seen when step 4 was dispatched: until then only steps 1 and 2 were done.
    assert log.written[2]["seconds_per_step"] == 27.0 / 2
    assert log.written[2]["data_wait"] == 2.0
    with log.buffer.closing() as row:
        log.now += 1000.0  # Validation is not the steps'.
        with log.buffer.stalling(row):
            log.now += 8.0
    assert log.written[4]["data_wait"] == 2.5
    assert log.written[4]["seconds_per_step"] == 0.0
    assert log.written[4]["checkpoint_stall"] == 8.0
    for number in range(5, 9):
        log.step(number, seconds=1.0)
    assert log.written[6]["seconds_per_step"] == (8.0 + 4.0) / 2
    assert "checkpoint_stall" not in log.written[6]
