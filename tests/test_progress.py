"""A warning is shown once, and is an error if requested; progress bars estimate correctly."""

import contextlib
import os
import pty
import sys
import types

import pytest

from shallow_pi import progress


def test_a_warning_is_printed_once_in_one_line(capsys):
    text = "camera [front] is not used " + "x" * 120
    progress.warn(text)
    progress.warn(text)
    progress.warn("another")
    assert capsys.readouterr().err == f"warning: {text}\nwarning: another\n"


def test_a_server_that_warns_of_its_clients_ends_doing_so(capsys):
    """Each of them may send other keys in every observation, of any length."""
    for number in range(progress.MOST + 10):
        progress.warn(f"{number} {'x' * 10_000}")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == progress.MOST + 1
    assert max(map(len, said)) < 3000
    assert said[-1].endswith("no more are shown")


def test_strict_makes_a_warning_an_error():
    progress.be_strict()
    with pytest.raises(ValueError, match=r"a key is not used \(--strict makes this"):
        progress.warn("a key is not used")


def test_the_time_left_does_not_count_the_first_unit(monkeypatch, capsys):
    """A step is compiled in it."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with progress.bar("Train", total=100, done=10) as advance:
        for seconds in (600.0, 6.0, 6.0):
            now[0] += seconds
            advance(1)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        *("Train: 10/100", "Train: 11/100", "Train: 13/100, ETA 522 s", "Train: 13/100 in 612.0 s")
    ]


@pytest.mark.parametrize("opened", [os.pipe, pty.openpty], ids=["tee", "terminal"])
def test_what_writes_to_a_log_goes_on_when_nobody_reads_it_any_more(opened, monkeypatch):
    """Ctrl-C ends `tee` too, before a run has saved; and a terminal may be closed."""
    reads, writes = opened()
    gone = os.fdopen(writes, "w", buffering=1)
    os.close(reads)
    monkeypatch.setattr(sys, "stderr", gone)
    with progress.bar("Train", total=2) as advance:
        advance(2)
    progress.say("saved")
    with contextlib.suppress(OSError):
        gone.close()
