"""Costs of rivals are counted and timed with any parameters."""

import json

import pytest

from shallow_pi.evaluation.rivals import costs, table

NAMES = (
    "teacher",
    "skip:drop=1",
    "efficientvla:cache=2",
    "mole:layers=2",
    "cogvla",
    "earlyexit:every=1",
)


@pytest.mark.slow
def test_every_rival_has_costs_before_it_is_trained(setting):
    config, params, *_ = setting(image_size=48)
    found = {c.name: c for c in costs.measure(config, params, NAMES, num_steps=2, repeats=1)}
    assert tuple(found) == NAMES
    assert {name.partition(":")[0] for name in NAMES} == set(table.RIVALS)
    whole = found.pop("teacher")
    assert whole.median_ms > 0
    # An early exit computes its first step twice: with two steps it saves nothing.
    assert {n for n, c in found.items() if c.operations >= whole.operations} == {NAMES[-1]}
    assert found["skip:drop=1"].parameters < whole.parameters
    assert found["efficientvla:cache=2"].parameters == whole.parameters
    for routed in ("mole:layers=2", "earlyexit:every=1", "cogvla"):
        assert found[routed].parameters > whole.parameters
    assert json.loads(whole.to_json())["device"] == whole.device
