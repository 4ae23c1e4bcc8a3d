"""The tuner times what runs, tells of what does not, and takes the fastest."""

import pytest

from shallow_pi.inference import attention, tuning
from shallow_pi.speed import latency, tuner


def test_every_combination_is_a_candidate(monkeypatch):
    assert len(tuner.candidates("float32")) == 4
    monkeypatch.setattr(attention, "available", lambda dtype: ("xla", "cudnn"))
    found = tuner.candidates("bfloat16")
    assert len(set(found.values())) == len(found) == 8
    assert found["layers scanned, steps written out, cudnn attention"] == tuning.InferenceOptions(
        unrolled_layers=False, attention="cudnn"
    )


def test_the_fastest_that_runs_is_taken(tiny_config, monkeypatch):
    """cuDNN does not run on a CPU."""
    tried = {
        "lacking": tuning.InferenceOptions(attention="cudnn"),
        "slow": tuning.SCANNED,
        "fast": tuning.InferenceOptions(unrolled_steps=False),
    }

    def timed(calls, **_):
        for call in calls.values():
            assert call().shape == (1, 5, 6)
        known = {"slow": 3.0, "fast": 2.0}
        return latency.Latency({n: known[n] for n in calls}, known, 1, "a device")

    monkeypatch.setattr(latency, "median_latency", timed)
    found = tuner.tune(tiny_config(), num_steps=2, tried=tried)
    assert found.options == tried["fast"]
    assert list(found.median_ms.items()) == [("fast", 2.0), ("slow", 3.0)]
    assert set(found.failed) == {"lacking"}
    assert "needs an NVIDIA GPU" in found.failed["lacking"]


def test_nothing_that_runs_raises(tiny_config):
    tried = {"lacking": tuning.InferenceOptions(attention="cudnn")}
    with pytest.raises(RuntimeError, match=r"nothing compiles on cpu: lacking: .*'xla'"):
        tuner.tune(tiny_config(), num_steps=2, tried=tried)
