"""Tuning times every candidate that runs, reports the others, and takes the fastest."""

import dataclasses

import pytest

from shallow_pi.commands import benchmark
from shallow_pi.inference import attention
from shallow_pi.inference import tuning as options
from shallow_pi.speed import latency, tuning


def test_every_combination_is_a_candidate(monkeypatch):
    assert len(tuning.candidates("float32")) == 6
    monkeypatch.setattr(attention, "available", lambda dtype: ("xla", "cudnn"))
    found = tuning.candidates("bfloat16")
    assert len(set(found.values())) == len(found) == 13
    assert options.default() == found["layers scanned, steps scanned"]
    unrolled = found["layers unrolled, steps unrolled"]
    assert found["layers scanned, steps unrolled"] == dataclasses.replace(
        unrolled, unrolled_layers=False
    )
    in_tower = found["all unrolled, attention cudnn (tower), xla (prefix), xla (steps)"]
    assert in_tower == dataclasses.replace(unrolled, tower_attention="cudnn")
    more = list(tuning.candidates("bfloat16", ("int8", "w8")).values())
    assert [one.quantize for one in more] == ["none"] * 13 + ["int8", "w8"]


def test_the_fastest_that_runs_is_taken(tiny_config, monkeypatch):
    """cuDNN does not run on a CPU."""
    tried = {
        "lacking": options.InferenceOptions(tower_attention="cudnn"),
        "slow": options.SCANNED,
        "fast": options.InferenceOptions(unrolled_steps=False),
        "rounded": options.InferenceOptions(quantize="int8"),
    }

    def timed(calls, **_):
        for call in calls.values():
            assert call().shape == (1, 5, 6)
        known = {"slow": 3.0, "fast": 2.0, "rounded": 1.0}
        return latency.Latency({n: known[n] for n in calls}, known, 1, "a device")

    monkeypatch.setattr(latency, "median_latency", timed)
    found = tuning.tune(tiny_config(), num_steps=2, tried=tried)
    assert found.options == tried["fast"]
    assert found.quantize == "int8"  # Changes the result, so it is kept apart.
    assert list(found.median_ms.items()) == [("rounded", 1.0), ("fast", 2.0), ("slow", 3.0)]
    assert set(found.failed) == {"lacking"}
    assert "needs an NVIDIA GPU" in found.failed["lacking"]
    alone = tuning.tune(tiny_config(), num_steps=2, tried={"slow": options.SCANNED})
    assert alone.quantize is None


def test_nothing_that_runs_raises(tiny_config):
    tried = {"lacking": options.InferenceOptions(step_attention="cudnn")}
    with pytest.raises(RuntimeError, match=r"nothing compiles on cpu: lacking: .*'xla'"):
        tuning.tune(tiny_config(), num_steps=2, tried=tried)


def test_models_that_share_a_tuning_are_tuned_once():
    given = benchmark.Arguments(model="turntable", depths=(2, 1), cameras=(2, 1))
    chosen = benchmark.to_tune(list(given.models()))
    assert [(model.depth, len(model.cameras)) for model, _ in chosen] == [(2, 2), (1, 2)]
