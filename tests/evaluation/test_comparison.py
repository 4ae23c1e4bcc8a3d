"""A folder of results belongs to its settings, and holds policies in the order they joined."""

import json

import pytest

from shallow_pi.evaluation import comparison, rollout
from shallow_pi.sims import turntable


def _prepare(folder, **origin):
    """Settings of one policy of which there are results."""
    course = comparison.Course("turntable", {}, turntable.Suite(), 2, 0, 1, 1)
    entrant = comparison.Entrant("one", origin, 5, rollout.AT_ONCE, lambda: None)
    found = comparison.prepare(folder, course, [entrant])
    (folder / comparison.EPISODES).mkdir(exist_ok=True)
    (folder / comparison.EPISODES / "one.jsonl").write_text("{}\n")
    return found["one"]


def test_results_of_another_training_in_the_same_folder_are_not_mixed(tmp_path):
    _prepare(tmp_path, source="run/3", parameters="a")
    with pytest.raises(ValueError, match=r"other settings: one's parameters a \(asked for: b\)"):
        _prepare(tmp_path, source="run/3", parameters="b")


def test_settings_of_which_a_killed_evaluation_has_no_results_are_forgotten(tmp_path):
    entrant = comparison.Entrant("one", {"source": "run/3"}, 5, rollout.AT_ONCE, lambda: None)
    for seed in (7, 8):
        course = comparison.Course("turntable", {}, turntable.Suite(), 2, seed, 1, 1)
        comparison.prepare(tmp_path, course, [entrant])
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 8


def test_policies_stand_in_the_order_in_which_they_joined():
    found = comparison.in_order(
        {"second": 2, "first": 1}, {"first": {}, "absent": {}, "second": {}}
    )
    assert list(found) == ["first", "second"]
