"""The timing takes turns, waits for the device and reports medians."""

import time

import pytest

from shallow_pi.speed import latency


class Pending:
    """A result that, like a JAX array, is still being computed when the call returns."""

    def __init__(self, seconds):
        self.seconds = seconds

    def block_until_ready(self):
        time.sleep(self.seconds)
        return self


def test_latency_takes_turns_and_leaves_the_warm_up_out():
    calls = []
    slow_once = iter([0.2] + [0.0] * 10)

    def first():
        calls.append("a")
        time.sleep(next(slow_once))  # compiling, say

    found = latency.median_latency(
        {"a": first, "b": lambda: calls.append("b")}, repeats=1, warmup=1
    )
    assert calls == ["a", "b", "a", "b"]
    assert found.median_ms["a"] < 100
    assert found.repeats == 1


def test_latency_waits_for_the_device():
    found = latency.median_latency(
        {"slow": lambda: {"actions": Pending(0.02)}, "fast": lambda: {"actions": Pending(0.004)}},
        repeats=5,
        warmup=0,
    )
    assert found.median_ms["slow"] >= 20
    assert 4 <= found.median_ms["fast"] < 20
    assert found.ratio("slow", "fast") == found.median_ms["slow"] / found.median_ms["fast"] > 1


def test_latency_reports_the_median_and_the_tail():
    pauses = iter([0.002, 0.002, 0.002, 0.002, 0.1])
    found = latency.median_latency({"a": lambda: time.sleep(next(pauses))}, repeats=5, warmup=0)
    assert found.median_ms["a"] < 40
    assert found.p95_ms["a"] > 60


@pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warmup": -1}])
def test_latency_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="repeats >= 1"):
        latency.median_latency({"a": lambda: None}, **arguments)


def test_latency_refuses_nothing_to_time():
    with pytest.raises(ValueError, match="at least one function"):
        latency.median_latency({})
