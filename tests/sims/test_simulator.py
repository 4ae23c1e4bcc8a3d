"""Simulators are found by name with their options; what does not fit is named with what does."""

import dataclasses
import os
import subprocess
import sys

import pytest

from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import simulator, turntable
from shallow_pi.training import config


def test_a_suite_is_found_by_name_or_by_its_class():
    suite = simulator.find("turntable", {"num_cups": 3, "clearance_mm": "1.5", "tasks": "insert"})
    assert suite == turntable.Suite(tasks=("insert",), num_cups=3, clearance_mm=1.5)
    assert simulator.find("shallow_pi.sims.turntable:Suite", {}) == turntable.Suite()


def test_a_policy_that_takes_other_values_is_refused():
    """In another order they are as many as the simulator's."""
    suite = turntable.Suite()
    simulator.check_robot(suite, robots.TURNTABLE)
    for what in ("state", "action"):
        turned = dataclasses.replace(robots.TURNTABLE, **{f"{what}_indices": (2, 1, 0)})
        with pytest.raises(ValueError, match=rf"it has {what} indices \(2, 1, 0\) \(the sim"):
            simulator.check_robot(suite, turned)


@dataclasses.dataclass(frozen=True)
class Demanding(turntable.Suite):
    """A suite with an option that has no default."""

    mass: float = dataclasses.field(kw_only=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("turntabel", {}, r"unknown simulator 'turntabel'; there are .*did you mean 'turntable'"),
        ("TURNTABLE", {}, "did you mean 'turntable'"),
        ("nowhere:Suite", {}, "package 'nowhere' is not installed: uv pip install nowhere"),
        ("shallow_pi.sims.turntable:Sweet", {}, "expected MODULE:CLASS that can be imported"),
        ("shallow_pi.sims.gantry:Sim", {}, "gantry:Sim is no suite; expected a dataclass of opt"),
        (f"{__name__}:Demanding", {}, r"needs the options \['mass'\]: give each as NAME=VALUE"),
        ("turntable", {"num_cup": 3}, r"no option 'num_cup'; .*did you mean 'num_cups'"),
        ("turntable", {"num_cups": "three"}, "num_cups: expected int, got 'three'"),
        ("turntable", {"renderer": "vulkan"}, 'renderer: expected "ray" or "gl"'),
    ],
)
def test_what_is_unknown_is_named_with_what_there_is(name, options, message):
    with pytest.raises(ValueError, match=message):
        simulator.find(name, options)


def test_a_task_may_come_up_twice_as_often_in_demonstrations_but_not_in_an_evaluation():
    twice = {"tasks": "touch, insert, touch"}
    assert simulator.find("tabletop", twice).task_names() == ("touch", "insert", "touch")
    with pytest.raises(ValueError, match="evaluate name touch more than once, which repeats"):
        simulator.find_evaluated("tabletop", twice)
    once = {"tasks": "touch, insert"}
    assert simulator.find_evaluated("tabletop", once) == simulator.find("tabletop", once)


def test_a_simulators_package_is_imported_when_it_is_asked_for(monkeypatch):
    rooms = ("turntable", "gantry", "raycast")
    names = ("mujoco", *(f"shallow_pi.sims.{room}" for room in rooms))
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    for room in rooms:  # As attributes of their package they would be found without an import.
        monkeypatch.delattr(f"shallow_pi.sims.{room}")
    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.setitem(
        simulator.SUITES, "turntable", simulator.Entry("shallow_pi.sims.turntable:Suite", "table")
    )
    with pytest.raises(ValueError, match="'mujoco' is not installed: uv sync --extra table"):
        simulator.find("turntable", {})


def test_the_config_sets_what_differs_from_the_simulators_defaults():
    assert simulator.find("turntable", config.ClosedLoopConfig().set_options()) == turntable.Suite()
    own = {field.name: field.default for field in dataclasses.fields(turntable.Suite)}
    for name in ("tasks", "num_blocks", "num_cups", "clearance_mm", "disc_speed_deg"):
        assert getattr(config.ClosedLoopConfig(), name) == own[name], name
    given = config.ClosedLoopConfig(num_cups=3, options=("renderer=gl", "image_size=96"))
    assert given.set_options() == {"num_cups": 3, "renderer": "gl", "image_size": "96"}
    for options, message in (
        (("image_size",), "expected NAME=VALUE, got 'image_size'"),
        (("image_size=9", "image_size=8"), "image_size=9 and image_size=8 differ: give only one"),
        (
            ("num_cups=1",),
            "--closed-loop.num-cups and --closed-loop.options num_cups= set the same",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config.ClosedLoopConfig(num_cups=3, options=options)


def test_harder_variants_are_all_or_those_named():
    suite = turntable.Suite()
    assert list(simulator.harder(suite, None)) == ["tight", "crowded"]
    (found,) = simulator.harder(suite, ("crowded",)).values()
    assert found == turntable.Suite(num_blocks=3, num_cups=3)
    assert simulator.harder(suite, ()) == {}
    with pytest.raises(ValueError, match="did you mean 'crowded'"):
        simulator.harder(suite, ("crowd",))


def test_another_robot_is_refused_with_what_differs():
    suite = turntable.Suite()
    simulator.check_robot(suite, robots.TURNTABLE)
    simulator.check_robot(suite, dataclasses.replace(robots.TURNTABLE, name="mine", delta=()))
    with pytest.raises(ValueError, match=r"state dimensions 14 \(the simulator's: 3\).*cam_high"):
        simulator.check_robot(suite, robots.ALOHA)
    slow = dataclasses.replace(suite, control_hz=10.0)
    with pytest.raises(ValueError, match=r"control rate 20 \(the simulator's: 10.0\)"):
        simulator.check_robot(slow, robots.TURNTABLE)


def test_a_missing_opengl_library_is_told_before_anything_runs():
    code = "from shallow_pi.sims import simulator; simulator.find('turntable', {})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MUJOCO_GL": "eagle", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert "ValueError: MuJoCo cannot be imported with MUJOCO_GL=eagle (invalid" in done.stderr
    assert "egl or osmesa" in done.stderr
