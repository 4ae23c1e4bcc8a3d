"""The benchmark times the real sampler, and what it says of its parts fits together."""

import dataclasses

import pytest

from shallow_pi.evaluation import benchmark, flops, plots
from shallow_pi.models import prepare


@pytest.fixture(scope="module")
def timing(tiny_config):
    config = tiny_config(dtype="bfloat16", pi05=True)
    savings = dataclasses.replace(prepare.LOOPS, fused=False)
    return config, benchmark.measure(config, num_steps=2, repeats=2, savings=savings)


def test_every_part_and_every_saving_that_is_on_is_timed(timing):
    _, found = timing
    assert set(found.median_ms) == {"image tower", "prefix", "one step", "whole", "end to end"}
    assert set(found.without_ms) == {"time_tables", "state_once"}
    assert min([*found.median_ms.values(), *found.without_ms.values()]) > 0
    assert all(found.p95_ms[name] >= found.median_ms[name] for name in found.median_ms)


def test_counts_are_those_of_what_was_timed(timing):
    config, found = timing
    savings = dataclasses.replace(prepare.LOOPS, fused=False)
    assert found.flops == flops.inference_flops(config, num_steps=2, savings=savings).total
    assert found.weight_bytes == flops.weight_bytes(config, num_steps=2).total
    assert found.depth == config.depth


def test_the_ceiling_is_operations_and_bytes_a_second():
    found = benchmark.ceiling("float32", size=256, repeats=2)
    assert 1e8 < found.flops_per_second < 1e16
    assert 1e7 < found.bytes_per_second < 1e14


def test_the_breakdown_is_a_picture(timing, tmp_path):
    _, found = timing
    plots.breakdown(tmp_path / "parts.png", [(found.depth, found.median_ms)], 2)
    assert (tmp_path / "parts.png").stat().st_size > 1000
